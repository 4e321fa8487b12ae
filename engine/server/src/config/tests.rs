use std::fs;

use super::*;

const AVAILABLE: u64 = 64 << 30;

fn with(
    text: &str,
    environment: &[(&str, &str)],
    arguments: &[(&'static str, &'static str, String)],
) -> Result<Settings, ConfigErrors> {
    let environment = environment
        .iter()
        .map(|&(name, value)| (name.into(), value.into()))
        .collect();
    Settings::read(&Sources {
        file: Some((Path::new("kvtide.toml"), text)),
        environment: &environment,
        arguments,
        available_bytes: Some(AVAILABLE),
    })
}

fn read(text: &str) -> Result<Config, ConfigErrors> {
    with(text, &[], &[]).map(|settings| settings.config)
}

fn errors(text: &str, environment: &[(&str, &str)]) -> Vec<String> {
    let ConfigErrors(errors) = with(text, environment, &[]).unwrap_err();
    errors.iter().map(ToString::to_string).collect()
}

#[test]
fn without_anything_set_the_defaults_hold() {
    let config = read("").unwrap();
    assert_eq!(config.memory.capacity_bytes, AVAILABLE / 4);
    assert!(!config.memory.capacity_is_chosen);
    assert_eq!(config.socket.path, Path::new(crate::DEFAULT_SOCKET));
    assert_eq!(config.http_listen, Some(([127, 0, 0, 1], 9462).into()));
}

#[test]
fn the_default_capacity_is_whole_extents_of_which_there_is_at_least_one() {
    let of = |available_bytes| {
        let available_bytes = Some(available_bytes);
        let sources = Sources {
            file: None,
            environment: &BTreeMap::new(),
            arguments: &[],
            available_bytes,
        };
        Settings::read(&sources).map(|settings| settings.config.memory.capacity_bytes)
    };
    assert_eq!(of((9 << 30) + 12345), Ok(9 << 28));
    assert_eq!(of(300 << 20), Ok(256 << 20));
    assert!(of(200 << 20).is_err(), "there is no room for an extent");
}

#[test]
fn where_the_available_memory_is_unknown_the_capacity_has_to_be_set() {
    let of = |text| {
        let sources = Sources {
            file: Some((Path::new("kvtide.toml"), text)),
            environment: &BTreeMap::new(),
            arguments: &[],
            available_bytes: None,
        };
        Settings::read(&sources).map(|settings| settings.config.memory.capacity_bytes)
    };
    assert_eq!(
        of("").unwrap_err().to_string(),
        "default: memory.capacity: how much memory is available cannot be read here; set it, such as \
         to \"64GiB\""
    );
    assert_eq!(of("[memory]\ncapacity = \"1TiB\"\n"), Ok(1 << 40));
}

#[test]
fn every_section_and_kind_of_value_is_read() {
    let config = read(
        r#"
        [memory]
        capacity = "32GiB"
        directory = "/mnt/pool"
        name = "pool-a"
        extent = "128 MiB"
        huge_pages = "require"
        numa = "interleave"
        [socket]
        path = "/run/kv/a.sock"
        mode = "0600"
        owner = "kvtide"
        group = 65532
        allow_uids = [1000, 1001]
        allow_gids = []
        [http]
        listen = ""
        [limits]
        sessions = 8
        minimum = "1GiB"
        minimums = { "org/model" = "2GiB", "8f3a11c0" = "0B" }
        quota = "4GiB"
        [limits.quotas]
        acme = "8GiB"
        "" = "512 MiB"
        [scrub]
        rate = "0B"
        [eviction]
        policy = "S3-FIFO"
        [shutdown]
        grace = "1.5m"
        [log]
        level = "info,kvtide_server=debug"
        format = "json"
        "#,
    )
    .unwrap();
    let Memory {
        capacity_bytes,
        extent_bytes,
        ..
    } = config.memory;
    assert_eq!((capacity_bytes, extent_bytes), (32 << 30, 128 << 20));
    assert_eq!(config.memory.huge_pages, HugePages::Require);
    assert_eq!(config.memory.numa, Numa::Interleave);
    assert_eq!(config.socket.mode, 0o600);
    assert_eq!(config.socket.group.as_deref(), Some("65532"));
    assert_eq!(config.socket.allow_uids, [1000, 1001]);
    assert_eq!(config.http_listen, None);
    assert_eq!(config.limits.sessions, 8);
    assert_eq!(config.limits.minimum_bytes, 1 << 30);
    let sizes = |sizes: &[(&str, u64)]| -> BTreeMap<String, u64> {
        sizes
            .iter()
            .map(|&(name, bytes)| (name.to_owned(), bytes))
            .collect()
    };
    let minimums = sizes(&[("org/model", 2 << 30), ("8f3a11c0", 0)]);
    assert_eq!(config.limits.minimums, minimums);
    assert_eq!(config.limits.quota_bytes, Some(4 << 30));
    let quotas = sizes(&[("acme", 8 << 30), ("", 512 << 20)]);
    assert_eq!(config.limits.quotas, quotas);
    assert_eq!(config.eviction, Eviction::S3Fifo);
    assert_eq!(config.grace, Duration::from_secs(90));
    assert_eq!(config.log.format, LogFormat::Json);
}

#[test]
fn the_command_line_wins_over_variables_and_those_over_the_file() {
    let text = "[socket]\npath = \"/a\"\nmode = \"0600\"\n[shutdown]\ngrace = \"1s\"\n";
    let variables = [
        ("KVTIDE_SERVE_SOCKET_PATH", "/b"),
        ("KVTIDE_SERVE_SHUTDOWN_GRACE", "2s"),
        ("HOME", "/root"),
    ];
    let arguments = [("--socket", "socket.path", "/c".to_owned())];
    let settings = with(text, &variables, &arguments).unwrap();
    assert_eq!(settings.config.socket.path, Path::new("/c"));
    assert_eq!(settings.config.grace, Duration::from_secs(2));
    assert_eq!(settings.config.socket.mode, 0o600);
    let origin = |key| settings.origin(key).to_string();
    assert_eq!(origin("socket.path"), "--socket");
    assert_eq!(origin("shutdown.grace"), "KVTIDE_SERVE_SHUTDOWN_GRACE");
    assert_eq!(origin("socket.mode"), "kvtide.toml:3");
    assert_eq!(origin("memory.capacity"), "default");
}

#[test]
fn a_variable_can_set_what_the_file_can() {
    let variables = [
        ("KVTIDE_SERVE_LIMITS_MINIMUM", "1GiB"),
        ("KVTIDE_SERVE_SOCKET_ALLOW_UIDS", "1000, 1001"),
        ("KVTIDE_SERVE_LIMITS_SESSIONS", "4"),
        ("KVTIDE_SERVE_LIMITS_QUOTA", "none"),
        ("KVTIDE_SERVE_LIMITS_QUOTAS", "acme=2GiB, a=b = 1GiB"),
        ("KVTIDE_SERVE_LIMITS_MINIMUMS", "org/model=1GiB"),
        ("KVTIDE_SERVE_HTTP_LISTEN", "none"),
        ("KVTIDE_SERVE_LOG_LEVEL", ""),
    ];
    let config = with("", &variables, &[]).unwrap().config;
    assert_eq!(config.limits.minimum_bytes, 1 << 30);
    assert_eq!(config.socket.allow_uids, [1000, 1001]);
    assert_eq!(config.limits.sessions, 4);
    assert_eq!(config.limits.quota_bytes, None);
    let quotas: Vec<_> = config.limits.quotas.into_iter().collect();
    assert_eq!(
        quotas,
        [("a=b".to_owned(), 1 << 30), ("acme".to_owned(), 2 << 30)]
    );
    assert_eq!(config.limits.minimums["org/model"], 1 << 30);
    assert_eq!(config.http_listen, None);
    assert_eq!(config.log.level, "info", "an empty variable is as none");
}

#[test]
fn an_unknown_key_is_refused_with_its_line_and_the_nearest_one() {
    assert_eq!(
        errors("[memory]\n\ncapacity_gb = \"1GiB\"\n", &[]),
        [
            "kvtide.toml:3: memory.capacity_gb: there is no such setting; did you mean memory.capacity? \
             The settings of [memory] are capacity, directory, name, extent, huge_pages, numa"
        ]
    );
    let [in_another_section] = &errors("[http]\nmode = \"0600\"\n", &[])[..] else {
        panic!("one error");
    };
    assert!(
        in_another_section.contains("did you mean socket.mode?"),
        "{in_another_section}"
    );
}

#[test]
fn an_unknown_section_is_refused_with_the_nearest_one() {
    let [error] = &errors("[mem]\ncapacity = \"1GiB\"\n", &[])[..] else {
        panic!("one error");
    };
    assert!(
        error.starts_with("kvtide.toml:1: mem: there is no such section; did you mean [memory]?")
    );
    let [outside] = &errors("capacity = \"1GiB\"\n", &[])[..] else {
        panic!("one error");
    };
    assert!(
        outside.contains("did you mean capacity in [memory]?"),
        "{outside}"
    );
    let [no_section] = &errors("memory = \"1GiB\"\n", &[])[..] else {
        panic!("one error");
    };
    assert!(
        no_section.contains("write [memory] on a line of its own"),
        "{no_section}"
    );
}

#[test]
fn an_unknown_variable_is_refused_unless_kubernetes_has_set_it() {
    let of = |name| errors("", &[(name, "1GiB")]);
    assert_eq!(
        of("KVTIDE_SERVE_MEMORY_CAPACITY_GB"),
        [
            "KVTIDE_SERVE_MEMORY_CAPACITY_GB: memory_capacity_gb: there is no such setting; did you mean \
             KVTIDE_SERVE_MEMORY_CAPACITY?"
        ]
    );
    for name in [
        "KVTIDE_SERVE_SERVICE_HOST",
        "KVTIDE_SERVE_PORT",
        "KVTIDE_SERVE_PORT_9462_TCP_ADDR",
        "KVTIDE_SERVE_METRICS_SERVICE_PORT_HTTP",
        "KVTIDE_HOST_CAPACITY_GB",
    ] {
        assert!(
            with("", &[(name, "tcp://10.0.0.1:80")], &[]).is_ok(),
            "{name}"
        );
    }
}

#[test]
fn what_is_no_toml_is_told_with_its_line() {
    let [error] = &errors("[memory]\ncapacity = 64GiB\n", &[])[..] else {
        panic!("one error");
    };
    assert!(error.starts_with("kvtide.toml:2: TOML: "), "{error}");
    let [twice] = &errors("[log]\nlevel = \"info\"\nlevel = \"warn\"\n", &[])[..] else {
        panic!("one error");
    };
    assert!(twice.starts_with("kvtide.toml:3: TOML: "), "{twice}");
}

#[test]
fn all_that_is_wrong_is_told_at_once() {
    let told = errors(
        "[memory]\ncapacity = 64\nextents = \"1GiB\"\n[eviction]\npolicy = \"clock\"\n",
        &[("KVTIDE_SERVE_SHUTDOWN_GRACE", "soon")],
    );
    assert_eq!(told.len(), 4, "{told:#?}");
    assert!(told.iter().any(|error| error
        == "kvtide.toml:2: memory.capacity: 64 is not a size above 0, such as \"64GiB\"; set it to a \
            size above 0, such as \"64GiB\""));
    assert!(
        told.iter()
            .any(|error| error.starts_with("KVTIDE_SERVE_SHUTDOWN_GRACE: shutdown.grace: "))
    );
}

#[test]
fn a_wrong_value_is_refused_even_where_another_wins() {
    let told = errors(
        "[shutdown]\ngrace = \"soon\"\n",
        &[("KVTIDE_SERVE_SHUTDOWN_GRACE", "1s")],
    );
    assert!(
        told[0].starts_with("kvtide.toml:2: shutdown.grace: "),
        "{told:?}"
    );
}

#[test]
fn wrong_values_name_the_key_and_what_is_expected() {
    let wrong = [
        ("memory.capacity", "\"64GB\""),
        ("memory.capacity", "\"0B\""),
        ("memory.directory", "\"shm\""),
        ("memory.name", "\"../pool\""),
        ("memory.name", "\".pool\""),
        ("memory.extent", "\"1MiB\""),
        ("memory.extent", "\"3MiB\""),
        ("memory.huge_pages", "true"),
        ("memory.numa", "\"all\""),
        ("socket.path", "\"kvtide.sock\""),
        ("socket.mode", "660"),
        ("socket.mode", "\"0999\""),
        ("socket.mode", "\"0066\""),
        ("socket.owner", "\"\""),
        ("socket.group", "-1"),
        ("socket.allow_uids", "[\"me\"]"),
        ("socket.allow_gids", "1000.5"),
        ("http.listen", "\"9462\""),
        ("limits.sessions", "63"),
        ("limits.sessions", "0"),
        ("limits.minimum", "1"),
        ("limits.minimums", "{ \"\" = \"1GiB\" }"),
        ("limits.quota", "\"all\""),
        ("limits.quotas", "{ acme = 1 }"),
        ("limits.quotas", "\"acme=1GiB,acme=2GiB\""),
        ("scrub.rate", "\"fast\""),
        ("eviction.policy", "\"clock\""),
        ("shutdown.grace", "\"2h\""),
        ("log.level", "\"verbose\""),
        ("log.format", "1979-05-27"),
    ];
    for setting in SETTINGS {
        assert!(
            wrong.iter().any(|(key, _)| setting.is(key)),
            "{}",
            setting.name()
        );
    }
    for (name, value) in wrong {
        let (section, key) = name.split_once('.').unwrap();
        let told = errors(&format!("[{section}]\n{key} = {value}\n"), &[]);
        assert_eq!(told.len(), 1, "{told:?}");
        let begin = format!("kvtide.toml:2: {name}: ");
        assert!(
            told[0].starts_with(&begin) && told[0].contains("; set it to "),
            "{told:?}"
        );
    }
}

#[test]
fn values_that_contradict_each_other_are_refused() {
    let told = |text: &str| errors(text, &[]).join("\n");
    let too_much = told("[memory]\ncapacity = \"65GiB\"\n");
    assert!(
        too_much.starts_with("kvtide.toml:2: memory.capacity: 65GiB is more than the 64GiB"),
        "{too_much}"
    );
    let extent = told("[memory]\ncapacity = \"1GiB\"\nextent = \"2GiB\"\n");
    assert!(
        extent.starts_with("kvtide.toml:3: memory.extent: "),
        "{extent}"
    );
    let minimum = told("[memory]\ncapacity = \"4GiB\"\n[limits]\nminimum = \"5GiB\"\n");
    assert!(minimum.contains("limits.minimum: 5GiB is more than the capacity of 4GiB"));
    let minimums = told(
        "[memory]\ncapacity = \"4GiB\"\n[limits]\nminimums = { a = \"2GiB\", b = \"2049MiB\" }\n",
    );
    assert_eq!(
        minimums,
        "kvtide.toml:4: limits.minimums: together, in whole extents, they are 4352MiB, which is more \
         than the capacity of 4GiB; lower one, or raise memory.capacity"
    );
    let quotas = told("[limits]\nquota = \"1MiB\"\nquotas = { a = \"2GiB\", b = \"255MiB\" }\n");
    assert_eq!(
        quotas,
        "kvtide.toml:3: limits.quotas: the 255MiB of \"b\" are less than an extent; set it to 256MiB \
         at least, or lower memory.extent\nkvtide.toml:2: limits.quota: 1MiB is less than an extent; \
         set it to 256MiB at least, or lower memory.extent"
    );
}

#[test]
fn what_may_not_be_meant_is_noticed() {
    let notices = |text| with(text, &[], &[]).unwrap().notices;
    assert!(notices("[socket]\nmode = \"0666\"\n")[0].starts_with("every user of this machine"));
    assert!(notices("[socket]\nmode = \"0666\"\nallow_uids = [1000]\n").is_empty());
    let few = notices("[memory]\ncapacity = \"1GiB\"\nextent = \"512MiB\"\n");
    assert!(few[0].contains("room for 2 extents"), "{few:?}");
    let all = notices("[memory]\ncapacity = \"4GiB\"\n[limits]\nminimums = { a = \"4GiB\" }\n");
    assert!(
        all[0].starts_with("limits.minimums leaves 0B to models"),
        "{all:?}"
    );
}

#[test]
fn what_is_shown_is_a_file_that_gives_the_same_configuration() {
    let text = r#"
        [memory]
        capacity = "32GiB"
        [socket]
        owner = "me"
        allow_uids = [1, 2]
        [limits]
        minimum = "1536MiB"
        quota = "8GiB"
        quotas = { acme = "1GiB", "a \"b\" c" = "2GiB" }
        [shutdown]
        grace = "1500ms"
    "#;
    for text in [text, ""] {
        let settings = with(text, &[], &[]).unwrap();
        let shown = settings.as_toml();
        assert_eq!(read(&shown).unwrap(), settings.config, "{shown}");
    }
}

#[test]
fn where_a_value_came_from_is_shown_beside_it() {
    let variables = [("KVTIDE_SERVE_LOG_FORMAT", "json")];
    let shown = with("[log]\nlevel = \"warn\"\n", &variables, &[])
        .unwrap()
        .as_toml();
    let lines: Vec<String> = shown
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    for expected in [
        "level = \"warn\" # kvtide.toml:2",
        "format = \"json\" # KVTIDE_SERVE_LOG_FORMAT",
        "mode = \"0660\" # default",
        "# capacity = \"16GiB\" # default",
        "# owner # default",
    ] {
        assert!(
            lines.iter().any(|line| line == expected),
            "{expected}\n{shown}"
        );
    }
}

/// Cells of the rows of the table of settings in `docs/serve.md`.
fn documented() -> Vec<Vec<String>> {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/serve.md");
    let page = fs::read_to_string(page).unwrap();
    let lines = page
        .lines()
        .skip_while(|line| !line.starts_with("| Setting |"));
    let rows = lines.skip(2).take_while(|line| line.starts_with('|'));
    let cells = |row: &str| {
        let cells = row.trim_matches('|').split(" | ");
        cells.map(|cell| cell.trim().to_owned()).collect()
    };
    rows.map(cells).collect()
}

#[test]
fn the_page_has_every_setting_with_its_variable_and_its_default() {
    let config = with("", &[], &[]).unwrap().config;
    let expected: Vec<_> = SETTINGS
        .iter()
        .map(|setting| {
            let default = match (setting.show)(&config) {
                _ if setting.is("memory.capacity") => {
                    "a quarter of the available memory".to_owned()
                }
                Some(value) => format!("`{value}`"),
                None => "none".to_owned(),
            };
            let name = format!("`{}`", setting.name());
            [name, default, format!("`{}`", setting.variable())]
        })
        .collect();
    let documented = documented();
    let said: Vec<_> = documented.iter().map(|row| row[..3].to_vec()).collect();
    assert_eq!(said, expected);
}

#[test]
fn the_page_names_every_choice_of_a_setting() {
    for (setting, row) in SETTINGS.iter().zip(documented()) {
        let choices = setting.expects.split('"').skip(1).step_by(2);
        let is_a_choice = !setting.expects.contains("such as");
        for choice in choices.filter(|_| is_a_choice) {
            assert!(
                row[1..].join(" ").contains(choice),
                "{}: {choice}",
                setting.name()
            );
        }
    }
}
