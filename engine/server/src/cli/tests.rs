use clap::CommandFactory as _;
use clap::error::ErrorKind;

use super::*;

fn parse(line: &str) -> Result<Command, ErrorKind> {
    let words = line.split_whitespace();
    let parsed = Cli::try_parse_from(std::iter::once("kvtide").chain(words));
    parsed.map(|cli| cli.command).map_err(|error| error.kind())
}

#[test]
fn the_command_line_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_says_how_it_ends_and_operators_commands_take_a_socket_and_json() {
    for command in Cli::command().get_subcommands() {
        let name = command.get_name();
        let mut command = command.clone();
        let help = command.render_long_help().to_string();
        assert!(help.contains("Exit status: 0"), "{name}");
        assert!(help.contains("--socket"), "{name}");
        assert_eq!(help.contains("--json"), name != "serve", "{name}");
    }
}

#[test]
fn watching_has_an_interval_of_its_own_or_two_seconds() {
    let watch = |line: &str| match parse(line) {
        Ok(Command::Status(args)) => Ok(args.watch),
        other => Err(other.map(|_| ()).unwrap_err()),
    };
    assert_eq!(watch("status"), Ok(None));
    assert_eq!(watch("status --watch"), Ok(Some(Duration::from_secs(2))));
    assert_eq!(
        watch("status --watch=500ms"),
        Ok(Some(Duration::from_millis(500)))
    );
    assert_eq!(watch("status --watch=1ms"), Err(ErrorKind::ValueValidation));
    assert_eq!(watch("status --watch 5s"), Err(ErrorKind::UnknownArgument));
}

#[test]
fn a_purge_says_what_and_only_one_thing() {
    assert!(parse("purge --namespace x").is_ok());
    assert!(parse("purge --namespace x --yes").is_ok());
    assert!(parse("purge --all").is_ok());
    assert!(parse("purge --tenant acme").is_ok());
    assert!(matches!(
        parse("purge --tenant acme --namespace x"),
        Err(ErrorKind::ArgumentConflict)
    ));
    assert!(matches!(
        parse("purge"),
        Err(ErrorKind::MissingRequiredArgument)
    ));
    assert!(matches!(
        parse("purge --yes"),
        Err(ErrorKind::MissingRequiredArgument)
    ));
    assert!(matches!(
        parse("purge --all --namespace x"),
        Err(ErrorKind::ArgumentConflict)
    ));
}

#[test]
fn a_pin_has_a_time_to_live() {
    let ttl = |line: &str| match parse(line) {
        Ok(Command::Pin(args)) => Ok(args.ttl),
        other => Err(other.map(|_| ()).unwrap_err()),
    };
    assert_eq!(
        ttl("pin --namespace x --ttl 1h"),
        Ok(Duration::from_secs(3600))
    );
    assert_eq!(
        ttl("pin --namespace x"),
        Err(ErrorKind::MissingRequiredArgument)
    );
    assert_eq!(
        ttl("pin --namespace x --ttl 31d"),
        Err(ErrorKind::ValueValidation)
    );
    assert_eq!(
        ttl("pin --namespace x --ttl 0s"),
        Err(ErrorKind::ValueValidation)
    );
}

#[test]
fn the_socket_is_that_of_the_option_or_the_variable_or_the_default() {
    let path = |option: Option<&str>, variable: Option<&str>| {
        socket_path(option.map(PathBuf::from), variable.map(OsString::from))
    };
    assert_eq!(path(Some("/a"), Some("/b")), PathBuf::from("/a"));
    assert_eq!(path(None, Some("/b")), PathBuf::from("/b"));
    assert_eq!(path(None, Some("")), PathBuf::from(DEFAULT_SOCKET));
    assert_eq!(path(None, None), PathBuf::from(DEFAULT_SOCKET));
}
