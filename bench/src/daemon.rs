//! A daemon in this process, and engines on its pool, for what a scheduler's thread pays for it.

use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kvtide_engine::{AttachOptions, Attachment, Eviction, Node, NodeOptions, Peer, Session};
use kvtide_model::Namespace;
use kvtide_model::wire::{FrameReader, Geometry, Hello, LONGEST_FRAME, ToDaemon};
use kvtide_segment::{Holder, SharedSegment};
use tempfile::TempDir;

/// A node that takes connections, of blocks of one layer.
pub struct Daemon {
    node: Arc<Node>,
    directory: TempDir,
    layer_bytes: u64,
}

/// An engine's two sides, without its copies.
pub struct Engine {
    /// The scheduler's.
    pub session: Session,
    /// The worker's.
    pub segment: Arc<SharedSegment>,
    _worker: Attachment,
}

fn options(directory: &Path, capacity_bytes: usize) -> NodeOptions {
    NodeOptions {
        directory: directory.to_owned(),
        name: "bench".into(),
        capacity_bytes,
        capacity_is_chosen: true,
        extent_bytes: 16 << 20,
        eviction: Eviction::Lru,
        sessions: NodeOptions::SESSIONS_MAX,
        minimum_bytes: 0,
        scrub_bytes_per_second: 0,
        server: "kvtide bench".into(),
    }
}

impl Daemon {
    /// One with memory for `rows` rows of one layer of `layer_bytes`, and an extent more.
    ///
    /// # Panics
    /// When the machine has not got the memory.
    #[must_use]
    pub fn new(rows: usize, layer_bytes: usize) -> Self {
        let directory = tempfile::tempdir_in("/dev/shm").expect("a directory on shared memory");
        let bytes = rows * layer_bytes.next_multiple_of(4096);
        let capacity = bytes.next_multiple_of(16 << 20) + (16 << 20);
        let node = Node::open(options(directory.path(), capacity), &|_, _| {}).expect("memory");
        let daemon = Self {
            node: Arc::new(node),
            directory,
            layer_bytes: layer_bytes as u64,
        };
        let listener = UnixListener::bind(daemon.socket()).expect("a socket");
        let node = Arc::downgrade(&daemon.node);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let Some((hello, node)) = hello(&mut stream).zip(node.upgrade()) else {
                    return;
                };
                let peer = Peer { pid: 0, uid: 0 };
                node.attach(stream, peer, hello).expect("a thread");
            }
        });
        daemon
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// An engine of the same model as all others.
    ///
    /// # Panics
    /// When the daemon does not take it.
    #[must_use]
    pub fn engine(&self, engine_id: &str) -> Engine {
        Engine::attach(&self.socket(), engine_id, self.layer_bytes)
    }
}

/// What a process says first.
fn hello(stream: &mut UnixStream) -> Option<Hello> {
    let mut reader = FrameReader::new(LONGEST_FRAME);
    loop {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        if let Some(frame) = reader.next_frame(&mut &byte[..]).ok()? {
            return match ToDaemon::decode(frame).ok()? {
                Some(ToDaemon::Hello(hello)) => Some(hello),
                _ => None,
            };
        }
    }
}

impl Engine {
    /// An engine on the pool of the daemon at `socket`, whose blocks have one layer of so many bytes.
    ///
    /// # Panics
    /// When the daemon does not take it.
    #[must_use]
    pub fn attach(socket: &Path, engine_id: &str, layer_bytes: u64) -> Self {
        let options = AttachOptions {
            socket: socket.to_owned(),
            engine_id: engine_id.into(),
            client: "kvtide bench".into(),
            namespace: Namespace::default().id(),
            model: "bench".into(),
            tenant: String::new(),
            geometry: Geometry {
                ranks: 1,
                layers: 1,
                layer_bytes,
                block_tokens: crate::BLOCK_TOKENS,
            },
            events: false,
            timeout: Duration::from_secs(10),
        };
        let worker = Attachment::new(options.clone(), Holder::Worker(0)).expect("attached");
        let scheduler = Attachment::new(options, Holder::Scheduler).expect("attached");
        Self {
            session: Session::attached(scheduler, Duration::from_secs(600)),
            segment: Arc::clone(worker.segment()),
            _worker: worker,
        }
    }

    /// Saves `keys` without copying anything: their shards are sealed as they are.
    ///
    /// # Panics
    /// When there is no room.
    pub fn save(&self, keys: &[kvtide_model::BlockKey]) {
        let mut from = 0;
        while from < keys.len() {
            let blocks = vec![0; (keys.len() - from).min(4096)];
            let plan = self.session.begin_save(keys, from, &blocks);
            for each in &plan.moves {
                let (row, generation) = (each.slot.slot, each.slot.generation);
                let begun = self.segment.begin_shard(row, 0, generation);
                let checksum = self.segment.compute_checksum(row, 0).expect("a row");
                let sealed = self.segment.seal_shard(row, 0, generation, checksum);
                assert!(begun && sealed, "somebody else writes row {row}");
            }
            from += plan.covered;
        }
        assert!(self.session.drain(Duration::from_secs(60)));
    }
}
