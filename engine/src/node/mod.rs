//! The cache of a node: one memory, a pool of each model and tenant in it, and the engines that use
//! them.
//!
//! It outlives its engines, which come and go over a socket, and its memory outlives it. Engines read
//! the pools' tables and copy rows by themselves; what changes a pool they ask for. An engine that ends,
//! however it ends, is seen by its connection and by the lock on its own file, which the kernel gives
//! back with the last of its processes: from then on nothing of it reads or writes a row, and what it
//! held is free. Until then its bit keeps what it had pinned, also through another life of the node.
//!
//! One lock guards which models and engines there are. It is held while memory moves between models,
//! never while a pool's own lock is waited for by an engine, and never while all records of a pool are
//! read.

mod engine;
mod error;
mod growth;
mod keeper;
mod ledger;
mod limits;
mod link;
mod memory;
mod model_pool;
mod options;
mod outlook;
mod report;
mod scrub;
mod serving;
mod shares;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvtide_model::NamespaceId;
use kvtide_model::wire::Hello;

use crate::pool::adoption::Survivor;
use crate::pool::holders::SlotHolder;
use crate::sync::{Mutex, lock};
use engine::Engine;
use growth::Ages;
use keeper::Keeper;
use ledger::{EngineEntry, Ledger};
use memory::Memory;
use model_pool::ModelPool;
use scrub::NodeScrub;

pub use error::NodeError;
pub use growth::DenialCounts;
pub use limits::Limits;
pub use options::NodeOptions;
pub use outlook::Outlook;
pub use report::{
    BlockReport, EngineReport, ModelReport, NodeReport, PinReport, ProcessReport, PurgeReport,
    TenantReport, Which,
};

/// How often the end of a closing is looked for.
const CLOSING_POLL: Duration = Duration::from_millis(20);

/// See the module's documentation.
#[derive(Debug)]
pub struct Node {
    inner: Arc<Inner>,
    /// They end with the node.
    _keeper: Keeper,
    _scrub: Option<NodeScrub>,
}

#[derive(Debug)]
struct Inner {
    memory: Memory,
    options: NodeOptions,
    /// Life of the memory, and bytes that no other life has.
    boot: [u8; 16],
    state: Mutex<State>,
    closing: AtomicBool,
}

#[derive(Debug)]
struct State {
    ledger: Ledger,
    models: BTreeMap<NamespaceId, ModelPool>,
    engines: BTreeMap<u8, Engine>,
    connections: u64,
    ages: Ages,
    /// How often the pools of each tenant got no memory.
    denied: BTreeMap<String, DenialCounts>,
}

/// Who is at the other end of a connection, as the kernel knows it.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// 0 where it lives in a PID namespace that this process cannot see into.
    pub pid: u32,
    /// The user that it runs as.
    pub uid: u32,
}

impl Node {
    /// Opens the node's memory, with what its last life left in it. `progress` hears of bytes taken,
    /// and of bytes in all, when the memory is made anew.
    ///
    /// # Errors
    /// [`NodeError`] when the memory cannot be had, or another daemon has it.
    pub fn open(options: NodeOptions, progress: &dyn Fn(usize, usize)) -> Result<Self, NodeError> {
        let nonce = u64::from_le_bytes(random()?).max(1);
        let (memory, mut ledger) = Memory::open(&options, nonce, progress)?;
        ledger.life += 1;
        let [life, salt] = [ledger.life.to_le_bytes(), random()?];
        let mut boot = [0; 16];
        boot[..8].copy_from_slice(&life);
        boot[8..].copy_from_slice(&salt);
        let inner = Inner {
            memory,
            options,
            boot,
            closing: AtomicBool::new(false),
            state: Mutex::new(State {
                ledger: ledger.clone(),
                models: BTreeMap::new(),
                engines: BTreeMap::new(),
                connections: 0,
                ages: Ages::default(),
                denied: BTreeMap::new(),
            }),
        };
        inner.adopt(ledger)?;
        let inner = Arc::new(inner);
        Ok(Self {
            _keeper: Keeper::start(&inner)?,
            _scrub: NodeScrub::start(&inner)?,
            inner,
        })
    }

    /// Takes over the connection of an engine's process, which has said `hello` and waits for an
    /// answer. Returns at once.
    ///
    /// # Errors
    /// When the operating system refuses another thread.
    pub fn attach(&self, stream: UnixStream, peer: Peer, hello: Hello) -> std::io::Result<()> {
        let inner = Arc::clone(&self.inner);
        let thread = std::thread::Builder::new().name("kvtide-engine".into());
        // It ends with its connection, of which there are few.
        thread.spawn(move || inner.serve(stream, peer, hello))?;
        Ok(())
    }

    /// Takes no engines and no saves any more, and waits until saves in flight have ended or `deadline`
    /// has passed. Returns how many blocks were still being saved.
    pub fn close(&self, deadline: Instant) -> usize {
        self.inner.closing.store(true, Ordering::Release);
        loop {
            let saving = self.inner.saving_blocks();
            if saving == 0 || Instant::now() >= deadline {
                return saving;
            }
            std::thread::sleep(CLOSING_POLL);
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let state = lock(&self.inner.state);
        for engine in state.engines.values() {
            engine.processes.iter().for_each(|p| p.link.close());
        }
    }
}

impl Inner {
    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Opens everything that the last life wrote down, and drops what is of no use.
    fn adopt(&self, last: Ledger) -> Result<(), NodeError> {
        let mut state = lock(&self.state);
        state.ledger.pools.clear();
        state.ledger.engines.clear();
        let mut survivors: Vec<EngineEntry> = Vec::new();
        for entry in last.engines {
            if self.is_alive(&entry)? {
                survivors.push(entry);
            } else {
                memory::remove(&self.memory.own_path(entry.number))?;
            }
        }
        for entry in last.pools {
            let namespace = entry.namespace();
            let engines = survivors.iter().filter(|e| e.namespace == entry.namespace);
            let is_pinned = entry.pinned_until_unix_s > unix_seconds();
            if entry.extents.is_empty() && engines.clone().count() == 0 && !is_pinned {
                self.memory.remove_tables(namespace)?;
                continue;
            }
            let (extents, bytes) = (last.extents, last.extent_bytes);
            let Ok(rows) = model_pool::rows(&entry.geometry(), extents, bytes) else {
                continue; // Its extents belong to nobody then.
            };
            let model = ModelPool::open(&self.memory, &self.options, namespace, rows)?;
            let mut living = Vec::new();
            for engine in engines {
                let Some(holder) = SlotHolder::of_session(engine.number.into()) else {
                    continue;
                };
                let session = model.pool.open_session_as(holder, engine.events);
                let own = self.memory.own_path(engine.number);
                let adopted = Engine::new(engine.clone(), session, own)?;
                state.engines.insert(engine.number, adopted);
                state.ledger.engines.push(engine.clone());
                living.push(Survivor { holder, session });
            }
            let mut extents = Vec::new();
            for &extent in &entry.extents {
                model.reserve_tables(extent)?;
                extents.push(model.rows_of(extent));
            }
            model.pool.adopt(&extents, &living);
            model.pool.pin_until(entry.pinned_until_unix_s);
            state.models.insert(namespace, model);
            state.ledger.pools.push(entry);
        }
        self.memory.note(&state.ledger)
    }

    /// Whether a process of an engine of the last life still has what is its own.
    fn is_alive(&self, entry: &EngineEntry) -> Result<bool, NodeError> {
        let own = self.memory.own_path(entry.number);
        let nobody = crate::session::SessionId::new(0);
        match Engine::new(entry.clone(), nobody, own) {
            Ok(engine) => Ok(!engine.is_gone()),
            Err(NodeError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(false)
            }
            // It may be alive: its rows must not be given away.
            Err(error) => Err(error),
        }
    }

    fn saving_blocks(&self) -> usize {
        let state = lock(&self.state);
        let saving = |model: &ModelPool| model.pool.gauges().saving;
        state.models.values().map(saving).sum()
    }
}

/// Random bytes of the operating system.
fn random() -> Result<[u8; 8], NodeError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| {
        let source = std::io::Error::other(error.to_string());
        NodeError::System {
            what: "random bytes",
            source,
        }
    })?;
    Ok(bytes)
}

fn unix_seconds() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
