//! The real program: exit statuses, messages, `serve --check`, a socket of the service manager.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use kvtide_server::socket::Listening;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const KVTIDE: &str = env!("CARGO_BIN_EXE_kvtide");

fn kvtide(arguments: &[&str]) -> Output {
    let mut command = Command::new(KVTIDE);
    command.args(arguments).env_clear().stdin(Stdio::null());
    command.output().unwrap()
}

fn told(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn shown(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// A directory on shared memory, with a configuration that this machine can do.
struct Place {
    directory: TempDir,
}

impl Place {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir_in("/dev/shm").unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn configuration(&self, more: &str) -> String {
        let directory = self.directory.path().display();
        let text = format!(
            "[memory]\ncapacity = \"16MiB\"\nextent = \"2MiB\"\ndirectory = \"{directory}\"\n\
             [socket]\npath = \"{directory}/kvtide.sock\"\n[http]\nlisten = \"none\"\n{more}"
        );
        let path = self.path("kvtide.toml");
        fs::write(&path, text).unwrap();
        path.display().to_string()
    }
}

#[test]
fn the_version_is_printed() {
    let output = kvtide(&["--version"]);
    assert!(output.status.success());
    assert_eq!(
        shown(&output),
        concat!("kvtide ", env!("CARGO_PKG_VERSION"), "\n")
    );
}

#[test]
fn exit_status_2_is_for_what_trying_again_cannot_mend() {
    let place = Place::new();
    let wrong = place.configuration("[eviction]\npolicy = \"clock\"\n");
    for arguments in [
        &["frobnicate"][..],
        &["purge"],
        &["pin", "--namespace", "x"],
        &["serve", "--config", &wrong],
        &["serve", "--config", "/no/such/file.toml"],
        &["purge", "--all"],
    ] {
        let output = kvtide(arguments);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{arguments:?}: {}",
            told(&output)
        );
        assert!(!told(&output).is_empty());
    }
}

#[test]
fn exit_status_1_is_for_a_daemon_that_is_not_there() {
    let place = Place::new();
    let socket = place.path("kvtide.sock").display().to_string();
    for command in [
        &["status"][..],
        &["inspect"],
        &["purge", "--all", "--yes"],
        &["pin", "--namespace", "x", "--ttl", "1h"],
        &["unpin", "--namespace", "x"],
    ] {
        let output = kvtide(&[command, &["--socket", &socket]].concat());
        assert_eq!(output.status.code(), Some(1));
        let told = told(&output);
        assert!(
            told.starts_with(&format!("error: {socket}: no kvtide serve listens there")),
            "{told}"
        );
    }
}

#[test]
fn a_wrong_configuration_is_told_line_by_line() {
    let place = Place::new();
    let path = place.configuration("[eviction]\npolicy = \"clock\"\n[log]\nlevels = \"info\"\n");
    let output = kvtide(&["serve", "--check", "--config", &path]);
    assert_eq!(output.status.code(), Some(2));
    let told = told(&output);
    let lines: Vec<&str> = told.lines().collect();
    assert_eq!(lines.len(), 2, "{told}");
    let found = |begin: &str| lines.iter().any(|line| line.starts_with(begin));
    assert!(
        found(&format!(
            "error: {path}:10: eviction.policy: \"clock\" is not "
        )),
        "{told}"
    );
    assert!(
        found(&format!(
            "error: {path}:12: log.levels: there is no such setting"
        )),
        "{told}"
    );
}

#[test]
fn a_check_shows_the_configuration_and_changes_nothing() {
    let place = Place::new();
    let path = place.configuration("");
    let output = kvtide(&["serve", "--check", "--config", &path, "--grace", "5s"]);
    let text = shown(&output);
    assert!(output.status.success(), "{text}{}", told(&output));
    assert!(
        text.contains("grace = \"5s\"") && text.contains("# --grace"),
        "{text}"
    );
    for line in [
        "# ok    memory directory",
        "# ok    room",
        "# ok    socket directory",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
    let names: Vec<_> = fs::read_dir(place.directory.path()).unwrap().collect();
    assert_eq!(names.len(), 1, "only the configuration: {names:?}");
    // What it prints is a configuration.
    let again = place.path("again.toml");
    fs::write(&again, &text).unwrap();
    let again = again.display().to_string();
    assert!(
        kvtide(&["serve", "--check", "--config", &again])
            .status
            .success()
    );
}

#[test]
fn a_check_finds_what_this_machine_cannot_do() {
    let place = Place::new();
    let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = place.path("disk.toml");
    let directory = disk.path().display();
    let text = format!(
        "[memory]\ncapacity = \"16MiB\"\nextent = \"2MiB\"\ndirectory = \"{directory}\"\n\
         [socket]\npath = \"{directory}/no/such/kvtide.sock\"\nowner = \"no-such-user\"\n"
    );
    fs::write(&path, text).unwrap();
    let output = kvtide(&["serve", "--check", "--config", &path.display().to_string()]);
    assert_eq!(output.status.code(), Some(1));
    let text = shown(&output);
    assert!(text.contains("# FAIL  memory directory"), "{text}");
    assert!(
        text.contains("is not memory; set memory.directory to"),
        "{text}"
    );
    assert!(text.contains("# FAIL  socket directory"), "{text}");
    assert!(text.contains("# FAIL  socket owner"), "{text}");
    assert_eq!(told(&output), "error: 3 checks have failed\n");
}

#[test]
fn a_second_daemon_on_one_socket_names_the_process_of_the_first() {
    let place = Place::new();
    let path = place.configuration("");
    let socket = common::config(&place.path("kvtide.sock"), "").socket;
    let _first = Listening::open(&socket).unwrap();
    let output = kvtide(&["serve", "--config", &path]);
    assert_eq!(output.status.code(), Some(1));
    let expected = format!("process {} serves this socket already", std::process::id());
    assert!(told(&output).contains(&expected), "{}", told(&output));
    // A check says so, and is no failure: it is for the moment before a restart.
    let output = kvtide(&["serve", "--check", "--config", &path]);
    assert!(output.status.success());
    assert!(shown(&output).contains(&format!("process {} serves it now", std::process::id())));
}

#[test]
fn why_a_start_has_failed_is_a_log_line_and_the_status_of_the_unit() {
    let place = Place::new();
    let config = place.configuration("[log]\nformat = \"json\"\n");
    let manager = UnixDatagram::bind(place.path("notify")).unwrap();
    let _first = Listening::open(&common::config(&place.path("kvtide.sock"), "").socket).unwrap();
    let output = Command::new(KVTIDE)
        .args(["serve", "--config", &config])
        .env("NOTIFY_SOCKET", place.path("notify"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told = told(&output);
    let line: serde_json::Value = serde_json::from_str(told.lines().last().unwrap()).unwrap();
    assert_eq!(line["level"], "ERROR");
    let message = line["fields"]["message"].as_str().unwrap();
    assert!(message.contains("serves this socket already"), "{message}");
    let mut heard = [0; 1024];
    let bytes = manager.recv(&mut heard).unwrap();
    let heard = String::from_utf8(heard[..bytes].to_vec()).unwrap();
    assert_eq!(heard.trim_end(), format!("STATUS={message}"));
}

/// Runs the daemon as systemd would, with `listener` as descriptor 3, until it is stopped.
fn with_passed_socket(listener: UnixListener, config: &Path, socket: &Path) -> Output {
    let script =
        "exec 3<&0 0</dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" serve --config \"$1\"";
    let daemon = Command::new("/bin/sh")
        .args(["-c", script, KVTIDE])
        .arg(config)
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    common::until_ready(socket);
    let daemon_pid = Pid::from_child(&daemon);
    kill_process(daemon_pid, Signal::TERM).unwrap();
    daemon.wait_with_output().unwrap()
}

#[test]
fn a_socket_that_systemd_has_opened_is_taken_and_left_in_its_place() {
    let place = Place::new();
    let config = place.configuration("");
    let listener = UnixListener::bind(place.path("kvtide.sock")).unwrap();
    let socket = place.path("kvtide.sock");
    let output = with_passed_socket(listener.try_clone().unwrap(), Path::new(&config), &socket);
    let told = told(&output);
    assert!(output.status.success(), "{told}");
    assert!(told.contains("systemd has opened the socket"), "{told}");
    assert!(
        place.path("kvtide.sock").exists(),
        "it is systemd's to remove"
    );
}
