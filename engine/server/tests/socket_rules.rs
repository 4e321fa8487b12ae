//! Who may listen, and how the socket file looks.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use kvtide_server::socket::{Listening, SocketError, holder};
use tempfile::TempDir;

struct Place {
    directory: TempDir,
}

impl Place {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("kvtide.sock")
    }

    fn listen(&self, settings: &str) -> Result<Listening, SocketError> {
        Listening::open(&common::config(&self.socket(), settings).socket)
    }
}

#[test]
fn the_file_has_the_mode_that_was_set() {
    for (text, mode) in [("", 0o660), ("[socket]\nmode = \"0600\"\n", 0o600)] {
        let place = Place::new();
        let _listening = place.listen(text).unwrap();
        let file = fs::metadata(place.socket()).unwrap();
        assert!(file.file_type().is_socket());
        assert_eq!(file.mode() & 0o777, mode);
        UnixStream::connect(place.socket()).unwrap();
    }
}

#[test]
fn the_file_has_the_group_that_was_set() {
    let place = Place::new();
    let group = rustix::process::getegid().as_raw();
    let _listening = place
        .listen(&format!("[socket]\ngroup = {group}\n"))
        .unwrap();
    assert_eq!(fs::metadata(place.socket()).unwrap().gid(), group);
}

#[test]
fn an_owner_whom_nobody_knows_leaves_no_socket_behind() {
    let place = Place::new();
    let error = place
        .listen("[socket]\nowner = \"no-such-user\"\n")
        .unwrap_err();
    assert!(error.to_string().starts_with("socket.owner: "), "{error}");
    assert!(!place.socket().exists());
    place.listen("").unwrap();
}

#[test]
fn a_second_daemon_is_refused_with_the_process_of_the_first() {
    let place = Place::new();
    let first = place.listen("").unwrap();
    let own = std::process::id();
    assert_eq!(
        place.listen("").unwrap_err().to_string(),
        format!(
            "{}: process {own} serves this socket already; stop it, or set socket.path to another path",
            place.socket().display()
        )
    );
    assert_eq!(holder(&place.socket()), Some(own));
    UnixStream::connect(place.socket()).expect("the first is not disturbed");
    drop(first);
    assert_eq!(holder(&place.socket()), None);
    place.listen("").expect("the first has gone");
}

#[test]
fn what_a_daemon_that_was_killed_left_is_taken_over() {
    let place = Place::new();
    drop(UnixListener::bind(place.socket()).unwrap());
    fs::write(place.directory.path().join("kvtide.sock.lock"), "4711\n").unwrap();
    assert!(
        place.socket().exists(),
        "nobody listens, and nobody has removed it"
    );
    let listening = place.listen("").unwrap();
    UnixStream::connect(place.socket()).unwrap();
    let own = std::process::id();
    assert_eq!(holder(&place.socket()), Some(own));
    drop(listening);
}

#[test]
fn somebody_who_listens_without_the_lock_is_left_alone() {
    let place = Place::new();
    let foreign = UnixListener::bind(place.socket()).unwrap();
    let error = place.listen("").unwrap_err();
    assert!(matches!(error, SocketError::Foreign { .. }), "{error}");
    assert!(error.to_string().contains("systemctl start kvtide"));
    UnixStream::connect(place.socket()).unwrap();
    drop(foreign);
}

#[test]
fn somebody_who_listens_and_takes_no_connections_is_left_alone_too() {
    let place = Place::new();
    let foreign = UnixListener::bind(place.socket()).unwrap();
    foreign.set_nonblocking(true).unwrap();
    let mut waiting = Vec::new();
    // Until the backlog is full. A connection more would wait.
    let limit = fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
    let limit: usize = limit.trim().parse::<usize>().unwrap().min(4096);
    for _ in 0..=limit {
        waiting.push(UnixStream::connect(place.socket()).unwrap());
        if waiting.len() > 128 {
            break; // std asks for no more.
        }
    }
    let error = place.listen("").unwrap_err();
    assert!(matches!(error, SocketError::Foreign { .. }), "{error}");
}

#[test]
fn a_file_that_is_no_socket_is_not_removed() {
    let place = Place::new();
    fs::write(place.socket(), "precious").unwrap();
    let error = place.listen("").unwrap_err();
    assert!(matches!(error, SocketError::NotASocket { .. }), "{error}");
    assert_eq!(fs::read_to_string(place.socket()).unwrap(), "precious");
}

#[test]
fn a_link_in_place_of_the_lock_is_not_followed() {
    let place = Place::new();
    let precious = place.directory.path().join("precious");
    fs::write(&precious, "precious").unwrap();
    let lock = place.directory.path().join("kvtide.sock.lock");
    std::os::unix::fs::symlink(&precious, lock).unwrap();
    let error = place.listen("").unwrap_err();
    let SocketError::Io { source, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(
        source.raw_os_error(),
        Some(rustix::io::Errno::LOOP.raw_os_error())
    );
    assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
}

#[test]
fn a_directory_that_is_missing_is_named() {
    let place = Place::new();
    let socket = place.directory.path().join("no/such/kvtide.sock");
    let error = Listening::open(&common::config(&socket, "").socket).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("no/such: there is no such directory; create it")
    );
}

#[test]
fn the_end_removes_the_socket_and_keeps_the_lock_file() {
    let place = Place::new();
    drop(place.listen("").unwrap());
    assert!(!place.socket().exists());
    assert!(place.directory.path().join("kvtide.sock.lock").exists());
}
