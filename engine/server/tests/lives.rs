//! The real program over its lives, with engines on its pool: stopped, killed, started anew, and asked.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use kvtide_engine::{AttachOptions, Attachment, SaveJob, SavePlan, Session, Worker};
use kvtide_kernels::copy::{HostCache, HostDevice};
use kvtide_model::wire::Geometry;
use kvtide_model::{BlockKey, BlockMove, Namespace, NamespaceId};
use kvtide_segment::Holder;
use kvtide_server::node::{Inspection, Pinned, Purged, Unpinned};
use kvtide_server::status::{SessionState, Status};
use rustix::process::{Pid, Signal, kill_process};
use serde::de::DeserializeOwned;
use tempfile::TempDir;

const KVTIDE: &str = env!("CARGO_BIN_EXE_kvtide");
const LIMIT: Duration = Duration::from_secs(20);
const LAYERS: u32 = 2;
const LAYER_BYTES: usize = 4096;
const BLOCKS: u32 = 8;

/// A directory on shared memory, and the daemons that have its memory one after the other.
struct Place {
    directory: TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self {
            directory: tempfile::tempdir_in("/dev/shm").unwrap(),
        };
        let directory = place.directory.path().display();
        let text = format!(
            "[memory]\ncapacity = \"16MiB\"\nextent = \"2MiB\"\ndirectory = \"{directory}\"\n\
             [socket]\npath = \"{directory}/kvtide.sock\"\n[http]\nlisten = \"none\"\n\
             [shutdown]\ngrace = \"500ms\"\n"
        );
        fs::write(place.path("kvtide.toml"), text).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn start(&self) -> Daemon {
        self.start_with(&[])
    }

    fn start_with(&self, settings: &[(&str, &str)]) -> Daemon {
        let child = Command::new(KVTIDE)
            .args(["serve", "--config"])
            .arg(self.path("kvtide.toml"))
            .envs(settings.iter().copied())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let daemon = Daemon {
            child: Some(child.unwrap()),
        };
        common::until_ready(&self.path("kvtide.sock"));
        daemon
    }

    fn command(&self, arguments: &[&str]) -> Output {
        Command::new(KVTIDE)
            .args(arguments)
            .arg("--socket")
            .arg(self.path("kvtide.sock"))
            .output()
            .unwrap()
    }

    /// What a command prints for programs.
    fn ask<T: DeserializeOwned>(&self, arguments: &[&str]) -> T {
        let output = self.command(&[arguments, &["--json"]].concat());
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{told}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn status(&self) -> Status {
        self.ask(&["status"])
    }

    /// The status, as soon as it is as it should be.
    fn until(&self, is_so: impl Fn(&Status) -> bool) -> Status {
        let begun = Instant::now();
        loop {
            let status = self.status();
            if is_so(&status) {
                return status;
            }
            assert!(begun.elapsed() < LIMIT, "{status:#?}");
            sleep(Duration::from_millis(10));
        }
    }
}

/// The program. A test that fails leaves none behind.
struct Daemon {
    child: Option<Child>,
}

impl Daemon {
    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().unwrap();
        kill_process(Pid::from_child(child), signal).unwrap();
    }

    /// How it ended, and what it had logged.
    fn ended(mut self) -> (ExitStatus, String) {
        let output = self.child.take().unwrap().wait_with_output().unwrap();
        (output.status, String::from_utf8(output.stderr).unwrap())
    }

    fn stop(self) -> (ExitStatus, String) {
        self.signal(Signal::TERM);
        self.ended()
    }

    fn kill(self) {
        self.signal(Signal::KILL);
        self.ended();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// An engine of one rank, without vLLM.
struct Engine {
    session: Session,
    cache: Arc<HostCache>,
    worker: Worker,
}

impl Engine {
    fn start(place: &Place, engine_id: &str, model: &str) -> Self {
        let options = AttachOptions {
            socket: place.path("kvtide.sock"),
            engine_id: engine_id.into(),
            client: "kvtide test".into(),
            namespace: namespace(model),
            model: model.into(),
            tenant: "team-a".into(),
            geometry: Geometry {
                ranks: 1,
                layers: LAYERS,
                layer_bytes: LAYER_BYTES as u64,
                block_tokens: 16,
            },
            events: false,
            timeout: LIMIT,
        };
        let worker = Attachment::new(options.clone(), Holder::Worker(0)).unwrap();
        let scheduler = Attachment::new(options, Holder::Scheduler).unwrap();
        let cache = HostCache::new(LAYERS as usize, BLOCKS, LAYER_BYTES).unwrap();
        let registration = cache.register(Arc::clone(worker.segment()), 0).unwrap();
        let device = Arc::new(HostDevice::new(Arc::new(registration)));
        Self {
            session: Session::attached(scheduler, Duration::from_secs(60)),
            worker: Worker::start(device, engine_id).unwrap(),
            cache,
        }
    }

    fn compute(&self, block: u32, content: u8) {
        for layer in 0..LAYERS as usize {
            self.cache.write(layer, block, |_| content);
        }
    }

    fn has(&self, block: u32, content: u8) -> bool {
        let holds = |layer| self.cache.read(layer, block).iter().all(|&b| b == content);
        (0..LAYERS as usize).all(holds)
    }

    fn begin(&self, keys: &[BlockKey], blocks: &[u32]) -> SavePlan {
        let begun = Instant::now();
        loop {
            let plan = self.session.begin_save(keys, 0, blocks);
            if plan.covered == keys.len() {
                return plan;
            }
            assert!(begun.elapsed() < LIMIT, "there is no place to save");
            sleep(Duration::from_millis(2));
        }
    }

    /// Saves the blocks 0 to 3 of the engine, with contents of their own.
    fn save_four(&self) {
        for block in 0..4 {
            self.compute(block, content(block));
        }
        let plan = self.begin(&keys(0..4), &[0, 1, 2, 3]);
        let (job, moves) = (plan.job, plan.moves);
        self.worker.save_now(vec![SaveJob { job, moves }]);
        assert!(self.session.drain(LIMIT));
    }

    /// Loads them into the blocks 4 to 7; whether they are what was saved.
    fn loads_four(&mut self) -> bool {
        let found = self.session.lookup(&keys(0..4));
        let slots = found.lease.slots().iter();
        let moves: Vec<_> = slots
            .zip(4..)
            .map(|(&slot, block)| BlockMove { slot, block })
            .collect();
        assert_eq!(moves.len(), 4);
        self.worker.load_async(1, 0, moves, true);
        let begun = Instant::now();
        let outcome = loop {
            if let Some((_, outcome)) = self.worker.take_loads().pop() {
                break outcome;
            }
            assert!(begun.elapsed() < LIMIT, "the load does not end");
            sleep(Duration::from_millis(1));
        };
        outcome.failed.is_empty() && (0..4).all(|block| self.has(4 + block, content(block)))
    }
}

fn content(block: u32) -> u8 {
    40 + u8::try_from(block).unwrap()
}

fn namespace(model: &str) -> NamespaceId {
    let model = model.to_owned();
    Namespace {
        model,
        ..Namespace::default()
    }
    .id()
}

fn keys(range: std::ops::Range<u32>) -> Vec<BlockKey> {
    let key = |n: u32| {
        let mut bytes = [7; 16];
        bytes[..4].copy_from_slice(&n.wrapping_mul(0x9E37_79B9).to_le_bytes());
        BlockKey::from_bytes(bytes)
    };
    range.map(key).collect()
}

fn held(status: &Status) -> u64 {
    let whole = |each: &kvtide_server::status::Namespace| each.held_blocks - each.saving_blocks;
    status.namespaces.iter().map(whole).sum()
}

#[test]
fn a_daemon_that_was_stopped_leaves_its_blocks_to_the_next_and_no_socket() {
    let place = Place::new();
    let daemon = place.start();
    let engine = Engine::start(&place, "a", "m");
    engine.save_four();
    let first = place.until(|status| held(status) == 4);
    drop(engine);
    let (status, log) = daemon.stop();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(log.contains("stopped"), "{log}");
    assert!(!place.path("kvtide.sock").exists());

    let daemon = place.start();
    let second = place.status();
    assert_ne!(first.boot, second.boot);
    assert_eq!((held(&second), second.sessions.len()), (4, 0));
    assert!(Engine::start(&place, "b", "m").loads_four());
    drop(daemon);
}

#[test]
fn a_daemon_that_was_killed_does_so_too_and_its_engines_go_on() {
    let place = Place::new();
    let daemon = place.start();
    let mut engine = Engine::start(&place, "a", "m");
    engine.save_four();
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
    assert!(engine.loads_four());
    drop(engine);
    place.until(|status| status.sessions.is_empty());
    let (status, log) = daemon.stop();
    assert!(status.success(), "{log}");
}

#[test]
fn a_save_that_does_not_end_is_cut_off_and_told() {
    let place = Place::new();
    let daemon = place.start();
    let engine = Engine::start(&place, "a", "m");
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
    let engine = Engine::start(&place, "a", "m");
    engine.save_four();
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
    let own = place.path("kvtide-pool-pool");
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
        let child = Command::new(KVTIDE)
            .args(["serve", "--config"])
            .arg(place.path("kvtide.toml"))
            .env("KVTIDE_SERVE_MEMORY_CAPACITY", "1GiB")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let daemon = Daemon {
            child: Some(child.unwrap()),
        };
        let own = place.path("kvtide-pool-pool");
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
    let mount = kvtide_segment::mount_huge_pages(place.directory.path()).unwrap();
    if mount == kvtide_segment::MountHugePages::Never {
        let output = start(&[("KVTIDE_SERVE_MEMORY_HUGE_PAGES", "require")]);
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.contains("memory.huge_pages: "), "{told}");
        assert!(told.contains("mount -o remount,huge=within_size"), "{told}");
        let left = fs::read_dir(place.path("kvtide-pool-pool")).unwrap();
        let names: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["lock"]);
    }
    let daemon = place.start_with(&[numa]);
    let pid = daemon.child.as_ref().unwrap().id();
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
fn operators_see_and_change_what_the_pool_has() {
    let place = Place::new();
    let daemon = place.start();
    let engine = Engine::start(&place, "engine-a", "m");
    engine.save_four();
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
fn a_tenant_has_its_quota_and_is_purged_by_its_name() {
    let place = Place::new();
    let quotas = ("KVTIDE_SERVE_LIMITS_QUOTAS", "team-a=3MiB,team-b=16MiB");
    let daemon = place.start_with(&[quotas]);
    let engine = Engine::start(&place, "engine-a", "m");
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
    let engine = Engine::start(&place, "a", "m");
    engine.save_four();
    place.until(|status| held(status) == 4);
    drop(engine);
    let pinned: Pinned = place.ask(&["pin", "--namespace", "m", "--ttl", "1h"]);
    daemon.kill();
    let _daemon = place.start();
    let until = place.status().namespaces[0].pinned_until_unix_s;
    assert_eq!(until, Some(pinned.until_unix_s));
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
