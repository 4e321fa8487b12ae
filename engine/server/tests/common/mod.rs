//! A node without memory, which answers what it was given and remembers what it was told; beside it the
//! real program and engines for it.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

pub(crate) mod engine;
pub(crate) mod place;
pub(crate) mod random;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use kvtide_server::ask::Ask;
use kvtide_server::config::{Config, Settings, Sources};
use kvtide_server::node::{
    Block, Closed, Connection, Inspect, Inspection, Node, Pinned, Purge, Purged, Refusal, Unpinned,
};
use kvtide_server::operator::Operator;
use kvtide_server::status::{
    Namespace, Process, Readiness, Session, SessionState, Status, Tier, Totals,
};

pub(crate) const LLAMA: &str = "8f3a11c0d4e5f60718293a4b5c6d7e8f";
pub(crate) const QWEN: &str = "0c0ffee0d4e5f60718293a4b5c6d7e8f";
/// When the node of the tests has started.
pub(crate) const STARTED: u64 = 1_790_000_000;
const GIB: u64 = 1 << 30;

/// See the module's documentation.
#[derive(Default)]
pub(crate) struct Idle {
    pub(crate) status: Status,
    pub(crate) told: Mutex<Vec<String>>,
    pub(crate) engines: Mutex<Vec<Connection>>,
    /// How long its end takes, whatever it is granted.
    pub(crate) closes_for: Duration,
}

impl Idle {
    pub(crate) fn busy() -> Self {
        Self {
            status: busy(),
            ..Self::default()
        }
    }

    fn tell(&self, what: String) {
        self.told.lock().unwrap().push(what);
    }

    pub(crate) fn told(&self) -> Vec<String> {
        self.told.lock().unwrap().clone()
    }
}

impl Node for Idle {
    fn readiness(&self) -> Readiness {
        self.status.readiness.clone()
    }

    fn status(&self) -> Status {
        self.status.clone()
    }

    fn inspect(&self, query: &Inspect) -> Result<Inspection, Refusal> {
        self.tell(format!("inspect {query:?}"));
        if query.key.as_deref() == Some("long") {
            // More than a frame holds.
            let block = Block {
                key: "k".repeat(9 << 20),
                ..block(0)
            };
            return Ok(Inspection {
                blocks: vec![block],
                more: 0,
            });
        }
        Ok(Inspection {
            blocks: vec![block(0), block(7)],
            more: 3,
        })
    }

    fn purge(&self, what: &Purge) -> Result<Purged, Refusal> {
        self.tell(format!("purge {what:?}"));
        Ok(Purged {
            blocks: 16_000,
            bytes: 4 * GIB,
            later_blocks: 12,
        })
    }

    fn pin(&self, namespace: &str, ttl: Duration) -> Result<Pinned, Refusal> {
        self.tell(format!("pin {namespace} {}", ttl.as_secs()));
        Ok(Pinned {
            namespace: namespace.to_owned(),
            blocks: 16_000,
            bytes: 4 * GIB,
            until_unix_s: STARTED + ttl.as_secs(),
        })
    }

    fn unpin(&self, namespace: &str) -> Result<Unpinned, Refusal> {
        self.tell(format!("unpin {namespace}"));
        Ok(Unpinned {
            namespace: namespace.to_owned(),
            was_pinned: true,
        })
    }

    fn attach(&self, connection: Connection) {
        self.tell(format!("attach {}", connection.hello.engine_id));
        self.engines.lock().unwrap().push(connection);
    }

    fn close(&self, deadline: Instant) -> Closed {
        let granted = deadline.saturating_duration_since(Instant::now());
        self.tell(format!("close in {} s", granted.as_secs_f64().round()));
        std::thread::sleep(self.closes_for);
        Closed::default()
    }
}

pub(crate) fn block(slot: u32) -> Block {
    Block {
        key: format!("{slot:032x}"),
        namespace: LLAMA.to_owned(),
        tier: "host".to_owned(),
        slot,
        generation: 2,
        state: "held".to_owned(),
        pins: 1,
        bytes: 2 << 20,
    }
}

/// Two models, two engines.
pub(crate) fn busy() -> Status {
    let llama = Namespace {
        namespace: LLAMA.to_owned(),
        model: "meta-llama/Llama-3.1-8B".to_owned(),
        group: 0,
        ranks: 1,
        block_tokens: 16,
        row_bytes: 2 << 20,
        rows: 16_384,
        free_rows: 384,
        bytes: 32 * GIB,
        minimum_bytes: 4 * GIB,
        held_blocks: 16_000,
        saving_blocks: 3,
        pinned_blocks: 12,
        pinned_until_unix_s: Some(STARTED + 11_525 + 3600),
        totals: Totals {
            hit_blocks: 123_456,
            saved_blocks: 20_000,
            failed_blocks: 1,
            throttled_blocks: 2,
            evicted_blocks: 4000,
            damaged_blocks: 0,
            scrubbed_blocks: 99,
        },
    };
    let qwen = Namespace {
        namespace: QWEN.to_owned(),
        model: "Qwen\u{1b}[2J".to_owned(),
        bytes: 256 << 20,
        ..Namespace::default()
    };
    Status {
        version: "0.1.0".to_owned(),
        boot: "feedfacecafebeef0123456789abcdef".to_owned(),
        started_unix_s: STARTED,
        readiness: Readiness {
            ready: true,
            reasons: Vec::new(),
        },
        tiers: vec![Tier {
            tier: "host".to_owned(),
            capacity_bytes: 64 * GIB,
            used_bytes: 32 * GIB + (256 << 20),
            free_bytes: 64 * GIB - 32 * GIB - (256 << 20),
            extent_bytes: 256 << 20,
            index_bytes: 3 << 20,
        }],
        namespaces: vec![llama, qwen],
        sessions: sessions(),
    }
}

fn sessions() -> Vec<Session> {
    let process = |role: &str, rank, pid| Process {
        role: role.to_owned(),
        rank,
        pid,
        uid: 1000,
    };
    vec![
        Session {
            session: 0,
            engine_id: "engine-a".to_owned(),
            client: "kvtide 0.1.0".to_owned(),
            state: SessionState::Attached,
            namespace: LLAMA.to_owned(),
            model: "meta-llama/Llama-3.1-8B".to_owned(),
            tenant: "team-a".to_owned(),
            since_unix_s: STARTED + 25,
            processes: vec![
                process("scheduler", None, 4711),
                process("worker", Some(0), 4712),
            ],
            pinned_blocks: 12,
            saving_blocks: 3,
        },
        Session {
            session: 1,
            engine_id: "engine-b".to_owned(),
            state: SessionState::Joining,
            namespace: QWEN.to_owned(),
            model: "Qwen\u{1b}[2J".to_owned(),
            since_unix_s: STARTED + 11_520,
            processes: vec![process("worker", Some(0), 0)],
            ..Session::default()
        },
    ]
}

/// A configuration with what `text` says, a socket at `socket`, and nothing served over HTTP.
pub(crate) fn config(socket: &Path, text: &str) -> Config {
    let environment = BTreeMap::from([
        ("KVTIDE_SERVE_SOCKET_PATH".into(), socket.into()),
        ("KVTIDE_SERVE_HTTP_LISTEN".into(), "none".into()),
    ]);
    let settings = Settings::read(&Sources {
        file: Some((Path::new("kvtide.toml"), text)),
        environment: &environment,
        arguments: &[],
        available_bytes: Some(64 << 30),
    });
    settings.unwrap().config
}

/// Waits until the daemon at `socket` serves engines, for at most 20 s.
pub(crate) fn until_ready(socket: &Path) -> Status {
    let begun = Instant::now();
    loop {
        let asked: Result<Status, _> =
            Operator::connect(socket).and_then(|mut daemon| daemon.ask(&Ask::Status {}));
        match asked {
            Ok(status) if status.readiness.ready => return status,
            other => assert!(begun.elapsed() < Duration::from_secs(20), "{other:?}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
