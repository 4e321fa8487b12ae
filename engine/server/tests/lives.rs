//! The real program over its lives, with engines on its pool: stopped, killed, started anew, and asked.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use std::fs;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::engine::{Engine, LIMIT, SMALL, keys, namespace};
use common::place::{KVTIDE, Place, held};
use kvtide_server::node::{Inspection, Pinned, Purged, Unpinned};
use kvtide_server::status::SessionState;

fn start(place: &Place, engine_id: &str) -> Engine {
    Engine::start(&place.socket(), engine_id, SMALL)
}

#[test]
fn a_daemon_that_was_stopped_leaves_its_blocks_to_the_next_and_no_socket() {
    let place = Place::new();
    let daemon = place.start();
    let engine = start(&place, "a");
    engine.save(&keys(0..4));
    let first = place.until(|status| held(status) == 4);
    drop(engine);
    let (status, log) = daemon.stop();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(log.contains("stopped"), "{log}");
    assert!(!place.socket().exists());

    let daemon = place.start();
    let second = place.status();
    assert_ne!(first.boot, second.boot);
    assert_eq!((held(&second), second.sessions.len()), (4, 0));
    assert!(start(&place, "b").loads(&keys(0..4)));
    drop(daemon);
}

#[test]
fn a_daemon_that_was_killed_does_so_too_and_its_engines_go_on() {
    let place = Place::new();
    let daemon = place.start();
    let mut engine = start(&place, "a");
    engine.save(&keys(0..4));
    place.until(|status| held(status) == 4);
    daemon.kill();
    let daemon = place.start();
    assert_eq!(held(&place.status()), 4);
    let begun = Instant::now();
    while engine.session.lookup(&keys(0..4)).lease.len() < 4 {
        assert!(begun.elapsed() < LIMIT, "it is not attached again");
        let _ = engine.session.poll();
        sleep(Duration::from_millis(10));
    }
    assert!(engine.loads(&keys(0..4)));
    drop(engine);
    place.until(|status| status.sessions.is_empty());
    let (status, log) = daemon.stop();
    assert!(status.success(), "{log}");
}

#[test]
fn a_save_that_does_not_end_is_cut_off_and_told() {
    let place = Place::new();
    let daemon = place.start();
    let engine = start(&place, "a");
    let unfinished = engine.begin(&keys(0..3), &[0, 1, 2]);
    let (status, log) = daemon.stop();
    assert!(status.success(), "{log}");
    assert!(log.contains("stopped with saves in flight"), "{log}");
    assert!(log.contains("blocks=3"), "{log}");
    drop((unfinished, engine));
    let _daemon = place.start();
    assert_eq!(held(&place.status()), 0);
}

#[test]
fn another_capacity_begins_anew_and_one_that_nobody_chose_does_not() {
    let place = Place::new();
    let daemon = place.start();
    let engine = start(&place, "a");
    engine.save(&keys(0..4));
    place.until(|status| held(status) == 4);
    drop(engine);
    daemon.stop();
    let text = fs::read_to_string(place.path("kvtide.toml")).unwrap();
    let unset = text.replace("capacity = \"16MiB\"\n", "");
    fs::write(place.path("kvtide.toml"), unset).unwrap();
    let daemon = place.start();
    let status = place.status();
    assert_eq!(
        (held(&status), status.tiers[0].capacity_bytes),
        (4, 16 << 20)
    );
    daemon.stop();
    let _daemon = place.start_with(&[("KVTIDE_SERVE_MEMORY_CAPACITY", "8MiB")]);
    let status = place.status();
    assert_eq!(
        (held(&status), status.tiers[0].capacity_bytes),
        (0, 8 << 20)
    );
}

#[test]
fn operators_see_and_change_what_the_pool_has() {
    let place = Place::new();
    let daemon = place.start();
    let engine = start(&place, "engine-a");
    engine.save(&keys(0..4));
    let status = place.until(|status| held(status) == 4);
    let [session] = &status.sessions[..] else {
        panic!("{status:#?}");
    };
    assert_eq!(session.state, SessionState::Attached);
    assert_eq!(
        (session.engine_id.as_str(), session.tenant.as_str()),
        ("engine-a", "team-a")
    );
    assert_eq!(session.processes[0].pid, std::process::id());
    let id = status.namespaces[0].namespace.clone();
    assert_eq!(id, namespace("m").to_string());
    assert_eq!(status.tiers[0].used_bytes, 2 << 20);

    let blocks: Inspection = place.ask(&["inspect", "--namespace", &id[..6], "--limit", "3"]);
    assert_eq!((blocks.blocks.len(), blocks.more), (3, 1));
    let [first, ..] = &blocks.blocks[..] else {
        panic!("three");
    };
    let one: Inspection = place.ask(&["inspect", "--key", &first.key]);
    assert_eq!((one.blocks.len(), &one.blocks[0].key), (1, &first.key));
    assert_eq!((first.state.as_str(), first.pins), ("held", 0));

    let pinned: Pinned = place.ask(&["pin", "--namespace", "m", "--ttl", "1h"]);
    assert_eq!((pinned.namespace.as_str(), pinned.blocks), (id.as_str(), 4));
    assert!(place.status().namespaces[0].pinned_until_unix_s.is_some());
    let unpinned: Unpinned = place.ask(&["unpin", "--namespace", "m"]);
    assert!(unpinned.was_pinned);

    let read = engine.session.lookup(&keys(0..1));
    let purged: Purged = place.ask(&["purge", "--namespace", "m", "--yes"]);
    assert_eq!((purged.blocks, purged.later_blocks), (4, 1));
    assert!(engine.session.lookup(&keys(0..4)).lease.is_empty());
    drop(read);
    assert_eq!(held(&place.status()), 0);
    let output = place.command(&["purge", "--namespace", "nobody", "--yes"]);
    assert_eq!(output.status.code(), Some(1));
    drop((engine, daemon));
}

#[test]
fn two_daemons_with_one_memory_are_one_too_many() {
    let place = Place::new();
    let _daemon = place.start();
    let output = Command::new(KVTIDE)
        .args(["serve", "--socket"])
        .arg(place.path("other.sock"))
        .arg("--config")
        .arg(place.path("kvtide.toml"))
        .output()
        .unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("memory.name: another daemon uses "), "{told}");
    assert!(told.contains("; stop it, or set memory.name"), "{told}");
}
