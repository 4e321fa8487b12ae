//! A pool in this process.

use std::sync::Arc;

use kvtide_model::{BlockKey, SlotRef};

use super::{Access, Wanted};
use crate::pool::pins::HolderGuard;
use crate::pool::{Begun, Pool, PoolCounters, PoolEvent, PoolGauges};
use crate::session::{SessionError, SessionId};

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct LocalAccess {
    pool: Arc<Pool>,
    session: SessionId,
}

impl LocalAccess {
    /// A new session of `pool`, and what it holds slots as.
    pub(crate) fn open(
        pool: &Arc<Pool>,
        events: bool,
    ) -> Result<(Self, HolderGuard), SessionError> {
        let (session, holder) = pool.open_session(events)?;
        let pool = Arc::clone(pool);
        Ok((Self { pool, session }, holder))
    }
}

impl Access for LocalAccess {
    fn begin_saves(&self, wanted: &[Wanted<'_>]) -> Vec<Begun> {
        let begin = |wanted: &Wanted<'_>| {
            let &Wanted {
                chain,
                from,
                blocks,
            } = wanted;
            self.pool.begin_save(self.session, chain, from, blocks)
        };
        wanted.iter().map(begin).collect()
    }

    fn mark_used(&self, used: &[SlotRef]) {
        self.pool.mark_used(used);
    }

    fn settle(&self, chain: &[BlockKey]) {
        self.pool.settle(chain);
    }

    fn drop_damaged(&self, damaged: &[SlotRef]) {
        self.pool.drop_damaged(damaged);
    }

    fn clear(&self) -> bool {
        self.pool.clear();
        true
    }

    fn poll(&self) {
        self.pool.poll();
    }

    fn take_events(&self) -> Vec<PoolEvent> {
        self.pool.take_events(self.session)
    }

    fn counters(&self) -> PoolCounters {
        self.pool.counters()
    }

    fn gauges(&self) -> PoolGauges {
        self.pool.gauges()
    }
}

impl Drop for LocalAccess {
    fn drop(&mut self) {
        self.pool.close_session(self.session);
    }
}
