//! One engine of a node, and its processes.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtide_model::NamespaceId;
use kvtide_model::wire::Role;
use rustix::fs::{FlockOperation, flock};

use super::error::{NodeError, io_error};
use super::ledger::EngineEntry;
use super::link::Link;
use crate::session::SessionId;

/// See [`Engine::is_long_gone`].
const AFTERMATH: Duration = Duration::from_millis(500);

/// A process of an engine that is connected.
#[derive(Clone, Debug)]
pub(super) struct Process {
    /// Tells connections apart.
    pub(super) connection: u64,
    pub(super) role: Role,
    pub(super) link: Arc<Link>,
    pub(super) pid: u32,
    pub(super) uid: u32,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) entry: EngineEntry,
    /// In the pool of its namespace.
    pub(super) session: SessionId,
    pub(super) processes: Vec<Process>,
    /// Its scheduler's, while that is connected.
    pub(super) link: Option<Arc<Link>>,
    /// Whether nobody waits any more for what it was saving when its scheduler was last connected.
    pub(super) abandoned: bool,
    /// Since when none of its processes is left.
    gone_since: Option<Instant>,
    own: PathBuf,
    /// An open of its own file, to look whether others hold it.
    watch: File,
}

impl Engine {
    pub(super) fn new(
        entry: EngineEntry,
        session: SessionId,
        own: PathBuf,
    ) -> Result<Self, NodeError> {
        Ok(Self {
            watch: open(&own)?,
            own,
            entry,
            session,
            processes: Vec::new(),
            link: None,
            abandoned: false,
            gone_since: None,
        })
    }

    pub(super) fn namespace(&self) -> NamespaceId {
        NamespaceId::from_bytes(self.entry.namespace)
    }

    /// What one of its processes gets of its own file. The lock on it is that process's: it lasts as
    /// long as the process has the descriptor or maps the file, however it ends, and whether the daemon
    /// lives or not.
    pub(super) fn open_own(&self) -> Result<File, NodeError> {
        let own = open(&self.own)?;
        let locked = flock(&own, FlockOperation::NonBlockingLockShared);
        locked.map_err(|errno| io_error("lock", &self.own)(errno.into()))?;
        Ok(own)
    }

    /// Whether none of its processes is left.
    pub(super) fn is_gone(&self) -> bool {
        let gone = flock(&self.watch, FlockOperation::NonBlockingLockExclusive).is_ok();
        if gone {
            // In case that somebody comes.
            let _ = flock(&self.watch, FlockOperation::Unlock);
        }
        gone
    }

    /// The same, for so long that nothing is under way of it any more: what a killed process had
    /// enqueued on a GPU may be copied for a moment after its memory is given back.
    pub(super) fn is_long_gone(&mut self) -> bool {
        if !self.is_gone() {
            self.gone_since = None;
            return false;
        }
        let since = *self.gone_since.get_or_insert_with(Instant::now);
        since.elapsed() >= AFTERMATH
    }

    /// The path of its own file.
    pub(super) fn own(&self) -> &std::path::Path {
        &self.own
    }
}

fn open(path: &std::path::Path) -> Result<File, NodeError> {
    let mut options = File::options();
    options
        .read(true)
        .write(true)
        .open(path)
        .map_err(io_error("open", path))
}
