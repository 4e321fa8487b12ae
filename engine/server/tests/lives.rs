//! The real program over its lives, with engines on its pool: stopped, killed, started anew, and asked.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::engine::{Engine, LIMIT, SMALL, keys, namespace};
use common::place::{KVTIDE, Place, held};
use kvtide_engine::SaveJob;
use kvtide_server::node::{Inspection, Pinned, Purged, Unpinned};
use kvtide_server::status::SessionState;
use rustix::process::Signal;

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
fn a_check_says_whether_the_memory_that_is_there_is_kept() {
    let place = Place::new();
    let check = |settings: &[(&str, &str)]| {
        let output = Command::new(KVTIDE)
            .args(["serve", "--check", "--config"])
            .arg(place.path("kvtide.toml"))
            .envs(settings.iter().copied())
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let would = "would begin anew, empty: ";
    assert!(!check(&[]).contains(would), "there is none yet");
    place.start().kill();
    assert!(!check(&[]).contains(would));
    let text = check(&[("KVTIDE_SERVE_MEMORY_CAPACITY", "8MiB")]);
    let why = "memory.capacity is 8 MiB in whole extents, and was 16 MiB; engines";
    assert!(text.contains(&format!("{would}{why}")), "{text}");
    let text = check(&[("KVTIDE_SERVE_MEMORY_EXTENT", "4MiB")]);
    let why = "memory.extent is 4 MiB, and was 2 MiB";
    assert!(text.contains(&format!("{would}{why}")), "{text}");
    let own = place.memory("");
    let length = || fs::metadata(own.join("memory")).unwrap().len();
    assert_eq!(length(), 16 << 20, "nothing is changed");
    fs::write(own.join("ledger"), "torn").unwrap();
    assert!(check(&[]).contains(&format!("{would}its ledger is damaged")));
    fs::remove_file(own.join("ledger")).unwrap();
    assert!(check(&[]).contains(&format!("{would}its ledger is missing")));
    let daemon = place.start();
    let (_, log) = daemon.stop();
    assert!(
        log.contains("the memory that is there is given up"),
        "{log}"
    );
    assert!(log.contains("its ledger is missing"), "{log}");
}

#[test]
fn a_daemon_that_ends_while_it_makes_its_memory_leaves_no_part_of_it() {
    for signal in [Signal::KILL, Signal::TERM] {
        let place = Place::new();
        let mut command = place.command_of(Path::new(KVTIDE));
        command.env("KVTIDE_SERVE_MEMORY_CAPACITY", "1GiB");
        let daemon = place.spawn_at_once(command);
        let own = place.memory("");
        let begun = Instant::now();
        while !own.join("lock").exists() {
            assert!(begun.elapsed() < LIMIT, "it does not begin");
            sleep(Duration::from_micros(100));
        }
        daemon.signal(signal);
        daemon.ended();
        // It was too late, or there is nothing.
        if let Ok(memory) = fs::metadata(own.join("memory")) {
            assert_eq!(memory.blocks() * 512, 1 << 30, "after {signal:?}");
        }
    }
}

#[test]
fn memory_is_placed_and_taken_in_huge_pages_as_it_is_set_or_the_start_says_why_not() {
    let place = Place::new();
    let numa = ("KVTIDE_SERVE_MEMORY_NUMA", "interleave");
    let start = |settings: &[(&str, &str)]| {
        Command::new(KVTIDE)
            .args(["serve", "--config"])
            .arg(place.path("kvtide.toml"))
            .envs(settings.iter().copied())
            .output()
            .unwrap()
    };
    let mount = kvtide_segment::mount_huge_pages(place.directory()).unwrap();
    if mount == kvtide_segment::MountHugePages::Never {
        let output = start(&[("KVTIDE_SERVE_MEMORY_HUGE_PAGES", "require")]);
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.contains("memory.huge_pages: "), "{told}");
        assert!(told.contains("mount -o remount,huge=within_size"), "{told}");
        let left = fs::read_dir(place.memory("")).unwrap();
        let names: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["lock"]);
    }
    let daemon = place.start_with(&[numa]);
    let pid = daemon.pid();
    let maps = fs::read_to_string(format!("/proc/{pid}/numa_maps")).unwrap_or_default();
    let memory = maps
        .lines()
        .find(|line| line.contains("kvtide-pool-pool/memory"));
    match memory {
        Some(line) => assert!(line.contains(" interleave:"), "{line}"),
        None => eprintln!("SKIPPED: this kernel does not show where memory lies"),
    }
    drop(daemon);
}

#[test]
fn a_tenant_has_its_quota_and_is_purged_by_its_name() {
    let place = Place::new();
    let quotas = ("KVTIDE_SERVE_LIMITS_QUOTAS", "team-a=3MiB,team-b=16MiB");
    let daemon = place.start_with(&[quotas]);
    let engine = start(&place, "engine-a");
    // More than an extent has.
    for at in 0..300 {
        let plan = engine.begin(&keys(at..at + 1), &[0]);
        let (job, moves) = (plan.job, plan.moves);
        engine.worker.save_now(vec![SaveJob { job, moves }]);
        assert!(engine.session.drain(LIMIT));
    }
    let status = place.until(|status| status.tenants[0].denied_by_quota > 0);
    let [team_a, team_b] = &status.tenants[..] else {
        panic!("{status:#?}");
    };
    assert_eq!(team_a.tenant, "team-a");
    assert_eq!((team_a.quota_bytes, team_a.bytes), (Some(3 << 20), 2 << 20));
    assert!(team_a.held_blocks > 0 && team_a.held_blocks < 256);
    assert_eq!((team_b.quota_bytes, team_b.bytes), (Some(16 << 20), 0));
    let purged: Purged = place.ask(&["purge", "--tenant", "team-a", "--yes"]);
    assert_eq!(purged.blocks, team_a.held_blocks);
    let output = place.command(&["purge", "--tenant", "nobody", "--yes"]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        told,
        "error: tenant \"nobody\" has nothing; name one that kvtide status shows\n"
    );
    drop(engine);
    place.until(|status| status.namespaces.is_empty());
    let (_, log) = daemon.stop();
    for line in [
        "a model gets no more memory: its tenant has its quota",
        "a process of an engine is connected",
        "a process of an engine is no longer connected",
        "an engine has gone",
        "a pool that holds nothing and has no engine is closed",
    ] {
        assert!(log.contains(line), "{line}\n{log}");
    }
    assert_eq!(log.matches("gets no more memory").count(), 1, "{log}");
}

#[test]
fn an_operators_pin_is_there_after_a_kill() {
    let place = Place::new();
    let daemon = place.start();
    let engine = start(&place, "a");
    engine.save(&keys(0..4));
    place.until(|status| held(status) == 4);
    drop(engine);
    let pinned: Pinned = place.ask(&["pin", "--namespace", "m", "--ttl", "1h"]);
    daemon.kill();
    let _daemon = place.start();
    let until = place.status().namespaces[0].pinned_until_unix_s;
    assert_eq!(until, Some(pinned.until_unix_s));
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
    assert_eq!(id, namespace("m").of_tenant("team-a").to_string());
    assert_eq!(status.namespaces[0].tenant, "team-a");
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
