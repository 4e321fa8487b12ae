//! The one thread that compares all rows of a node with their checksums, slowly and round and
//! round.

use std::ops::Bound;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use kvtide_model::NamespaceId;

use super::Inner;
use super::error::NodeError;
use crate::pool::Pool;
use crate::pool::scrub::scrub_row;
use crate::sync::lock;

/// One burst in so long keeps the thread asleep nearly always.
const TICK: Duration = Duration::from_millis(100);
/// Ticks in a second.
const TICKS: u64 = 10;

/// It ends when this is dropped.
#[derive(Debug)]
pub(super) struct NodeScrub {
    stop: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Where the thread is.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    namespace: Option<NamespaceId>,
    row: u32,
}

impl NodeScrub {
    /// Scrubs all pools of a node at its rate. `None` if that is zero.
    pub(super) fn start(inner: &Arc<Inner>) -> Result<Option<Self>, NodeError> {
        let rate = inner.options.scrub_bytes_per_second;
        if rate == 0 {
            return Ok(None);
        }
        let (stop, stopped) = sync_channel(1);
        let inner: Weak<Inner> = Arc::downgrade(inner);
        let thread = std::thread::Builder::new().name("kvtide-scrub".into());
        let thread = thread.spawn(move || {
            let (mut place, mut allowed_bytes) = (Place::default(), 0u64);
            while stopped.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                let Some(inner) = inner.upgrade() else { return };
                // A row may be more than what a tick allows: then it has to wait for some.
                allowed_bytes = allowed_bytes.saturating_add(rate.div_ceil(TICKS));
                allowed_bytes = inner.scrub(&mut place, allowed_bytes);
            }
        });
        let what = "a thread";
        let thread = thread.map_err(|source| NodeError::System { what, source })?;
        Ok(Some(Self {
            stop: Some(stop),
            thread: Some(thread),
        }))
    }
}

impl Drop for NodeScrub {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic has been printed already, and nothing depends on the scrub.
            let _ = thread.join();
        }
    }
}

impl Inner {
    /// Compares rows for as long as `allowed_bytes` last; what is left of them.
    fn scrub(&self, place: &mut Place, mut allowed_bytes: u64) -> u64 {
        let pools = lock(&self.state).models.len();
        let mut empty = 0;
        while empty <= pools {
            let Some((namespace, pool)) = self.pool_at(place.namespace) else {
                return 0;
            };
            if place.namespace != Some(namespace) {
                *place = Place {
                    namespace: Some(namespace),
                    row: 0,
                };
            }
            let row_bytes = pool.segment().geometry().row_bytes() as u64;
            // The pool begins from its first row again when it is through.
            let Some(row) = pool.next_row(place.row).filter(|row| *row >= place.row) else {
                empty += 1;
                let next = self.pool_after(namespace);
                *place = Place {
                    namespace: next,
                    row: 0,
                };
                continue;
            };
            if allowed_bytes < row_bytes {
                return allowed_bytes;
            }
            scrub_row(&pool, row);
            place.row = row + 1;
            empty = 0;
            allowed_bytes -= row_bytes;
        }
        // There is nothing: what is not used now is not kept for later.
        0
    }

    /// The pool of a namespace, or the first of those behind it, or the first of all.
    fn pool_at(&self, namespace: Option<NamespaceId>) -> Option<(NamespaceId, Arc<Pool>)> {
        let models = &lock(&self.state).models;
        let from = namespace.map_or(Bound::Unbounded, Bound::Included);
        let mut found = models.range((from, Bound::Unbounded));
        let (namespace, model) = found.next().or_else(|| models.iter().next())?;
        Some((*namespace, Arc::clone(&model.pool)))
    }

    fn pool_after(&self, namespace: NamespaceId) -> Option<NamespaceId> {
        let models = &lock(&self.state).models;
        let behind = (Bound::Excluded(namespace), Bound::Unbounded);
        models.range(behind).next().map(|(namespace, _)| *namespace)
    }
}
