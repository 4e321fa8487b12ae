//! A hundred engines hammer one daemon, more than it serves at once, while they and it are killed,
//! stopped and started anew at random instants. Engines are processes; what they do is in `member`.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]
#![allow(clippy::print_stdout, reason = "members tell the test what they do")]

#[path = "../common/mod.rs"]
mod common;
mod member;
mod tally;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::engine::LIMIT;
use common::place::{Daemon, Place};
use common::random::Random;
use kvtide_server::status::Status;
use rustix::process::{Pid, Signal, kill_process};
use tally::Tally;

const MEMBERS: usize = 100;
/// Of them at once, so that the others still get on.
const STOPPED_MAX: usize = 4;
const SEED: &str = "KVTIDE_CROWD_SEED";
/// What a member is told in its environment: its number, its seed, and the socket.
const MEMBER: &str = "CROWD_MEMBER";

/// A member's process.
struct Member {
    child: Child,
    number: usize,
    log: PathBuf,
    /// Until when it is stopped.
    stopped: Option<Instant>,
}

impl Member {
    fn start(place: &Place, number: usize, seed: u64) -> Self {
        let log = place.path(&format!("member-{number}-{seed:x}"));
        let said = File::create(&log).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "one_of_the_crowd", "--ignored", "--nocapture"])
            .env(
                MEMBER,
                format!("{number} {seed} {}", place.socket().display()),
            )
            .stdin(Stdio::piped())
            .stdout(said.try_clone().unwrap())
            .stderr(said)
            .spawn();
        Self {
            child: child.unwrap(),
            number,
            log,
            stopped: None,
        }
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Nobody ends but by the test's hand, or when it says so.
    fn check(&mut self) {
        let ended = self.child.try_wait().unwrap();
        assert!(ended.is_none(), "{ended:?}: {}", tail(&self.said()));
    }

    /// What it counted. Its log is not needed any more.
    fn kill(mut self) -> Tally {
        self.check();
        self.signal(Signal::KILL);
        self.child.wait().unwrap();
        self.take_tally()
    }

    /// Its input ends, and with it the member, by itself.
    fn end(mut self) -> Tally {
        drop(self.child.stdin.take());
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status:?}: {}", tail(&self.said()));
        self.take_tally()
    }

    fn take_tally(&self) -> Tally {
        let tally = Tally::last_of(&self.said());
        fs::remove_file(&self.log).unwrap();
        tally
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tail(said: &str) -> String {
    let lines: Vec<&str> = said.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

/// Everything, and what was killed of it.
struct Crowd {
    place: Place,
    daemon: Option<Daemon>,
    members: Vec<Member>,
    random: Random,
    /// Of those that are gone.
    tally: Tally,
    /// Processes that were killed, and since when the daemon has had to notice.
    killed: Vec<(u32, Instant)>,
    /// How long that took at most.
    noticed: Duration,
    kills: [usize; 3],
}

impl Crowd {
    fn gather(seed: u64) -> Self {
        let place = Place::with("48MiB", "2MiB");
        let daemon = Some(place.start());
        let mut random = Random::new(seed);
        let members = (0..MEMBERS).map(|number| Member::start(&place, number, random.next()));
        Self {
            members: members.collect(),
            place,
            daemon,
            random,
            tally: Tally::default(),
            killed: Vec::new(),
            noticed: Duration::ZERO,
            kills: [0; 3],
        }
    }

    /// Something befalls somebody.
    fn strike(&mut self) {
        self.wake(Instant::now());
        let at = self.random.within(0..self.members.len());
        let stopped = self.members.iter().filter(|m| m.stopped.is_some()).count();
        if self.random.percent(50) {
            let seed = self.random.next();
            let number = self.members[at].number;
            let fresh = Member::start(&self.place, number, seed);
            let victim = std::mem::replace(&mut self.members[at], fresh);
            self.killed.push((victim.child.id(), Instant::now()));
            self.tally += victim.kill();
            self.kills[0] += 1;
        } else if stopped < STOPPED_MAX && self.members[at].stopped.is_none() {
            self.members[at].check();
            self.members[at].signal(Signal::STOP);
            self.members[at].stopped = Some(Instant::now() + self.random.ms(50..4000));
            self.kills[1] += 1;
        }
    }

    /// Lets those go on that were stopped until then.
    fn wake(&mut self, until: Instant) {
        for member in &mut self.members {
            if member.stopped.take_if(|then| *then <= until).is_some() {
                member.signal(Signal::CONT);
            }
        }
    }

    /// The daemon ends and another one begins, which has not noticed anything yet.
    fn replace_daemon(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            if self.random.percent(60) {
                daemon.kill();
            } else {
                let (status, log) = daemon.stop();
                assert!(status.success(), "{status:?}: {}", tail(&log));
            }
        }
        sleep(self.random.ms(0..300));
        self.daemon = Some(self.place.start());
        self.kills[2] += 1;
        self.killed
            .iter_mut()
            .for_each(|(_, since)| *since = Instant::now());
    }

    /// What holds at any time.
    fn look(&mut self) -> Status {
        let status = self.place.status();
        for each in &status.namespaces {
            assert!(each.free_rows + each.held_blocks <= each.rows, "{each:#?}");
            assert_eq!(each.totals.damaged_blocks, 0, "{each:#?}");
        }
        let has = |pid: u32| {
            let mut processes = status.sessions.iter().flat_map(|s| &s.processes);
            // Nobody else has that number in so short a time.
            processes.any(|process| process.pid == pid)
                || status
                    .sessions
                    .iter()
                    .any(|s| s.engine_id.contains(&format!("-{pid}-")))
        };
        let noticed = &mut self.noticed;
        self.killed.retain(|&(pid, since)| {
            let waited = since.elapsed();
            let is_there = has(pid);
            assert!(
                !is_there || waited < LIMIT,
                "{pid} holds what it held: {status:#?}"
            );
            if !is_there {
                *noticed = waited.max(*noticed);
            }
            is_there
        });
        status
    }

    /// Everybody goes, and everything is free or held by nobody.
    fn disperse(mut self) {
        self.wake(Instant::now() + LIMIT);
        for member in &mut self.members {
            drop(member.child.stdin.take());
        }
        for member in self.members.drain(..) {
            self.tally += member.end();
        }
        let status = self.place.until(|status| {
            let mut each = status.namespaces.iter();
            status.sessions.is_empty()
                && each.all(|n| {
                    n.pinned_blocks == 0
                        && n.saving_blocks == 0
                        && n.free_rows + n.held_blocks == n.rows
                })
        });
        let used: u64 = status.namespaces.iter().map(|each| each.bytes).sum();
        assert_eq!(
            used + status.tiers[0].free_bytes,
            status.tiers[0].capacity_bytes
        );
        assert!(self.look().sessions.is_empty());
        println!(
            "{:?}; killed, stopped, daemons {:?}; noticed after {:?} at most",
            self.tally, self.kills, self.noticed
        );
        let Tally {
            attached,
            full,
            again,
            looked,
            loaded,
            saved,
        } = self.tally;
        for (what, count) in [
            ("let in", attached.saturating_sub(MEMBERS)),
            ("refused", full),
            ("attached again", again),
            ("looked up", looked),
            ("loaded", loaded),
            ("saved", saved),
        ] {
            assert!(count > 0, "nothing was {what}");
        }
        let (status, log) = self.daemon.take().unwrap().stop();
        assert!(status.success(), "{status:?}: {}", tail(&log));
        assert!(!log.contains("panicked"), "{}", tail(&log));
    }
}

#[test]
fn a_crowd_of_engines_that_are_killed_and_stopped_leaves_nothing_wrong_and_nothing_behind() {
    let seed = Random::seed_of(SEED);
    let seconds = std::env::var("KVTIDE_CROWD_SECONDS").ok();
    let seconds: usize = seconds.map_or(12, |text| text.parse().expect("a number"));
    println!("{SEED}={seed} KVTIDE_CROWD_SECONDS={seconds}");
    let mut crowd = Crowd::gather(seed);
    // Three daemons end, or one in ten seconds, each at a random instant of its part of the time.
    let lives = 3.max(seconds / 10);
    let part_ms = seconds * 1000 / lives;
    for _ in 0..lives {
        let life = crowd.random.ms(part_ms / 4..part_ms);
        let begun = Instant::now();
        while begun.elapsed() < life {
            sleep(crowd.random.ms(5..80));
            crowd.strike();
            crowd.look();
        }
        crowd.replace_daemon();
    }
    crowd.disperse();
}

/// The processes that the test above starts.
#[test]
#[ignore = "one of many processes; the test above starts them"]
fn one_of_the_crowd() {
    let Ok(told) = std::env::var(MEMBER) else {
        return;
    };
    let [number, seed, socket] = told.splitn(3, ' ').collect::<Vec<_>>()[..] else {
        panic!("{MEMBER}={told}");
    };
    let (number, seed) = (number.parse().unwrap(), seed.parse().unwrap());
    member::run(Path::new(socket), number, seed);
}
