//! Tells the runner, within one process, what the HTTP side has just written to the database. Only
//! haste: whoever misses it finds the same in the database a moment later.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::Notify;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Bell {
    work: Notify,
    jobs: Mutex<HashMap<String, Weak<Notify>>>,
}

impl Bell {
    /// A batch waits.
    pub fn batch_added(&self) {
        self.ring();
    }

    /// A batch was cancelled.
    pub fn batch_cancelled(&self, id: &str) {
        let job = self.lock().get(id).and_then(Weak::upgrade);
        match job {
            Some(job) => job.notify_one(),
            // Perhaps nobody works on it.
            None => self.ring(),
        }
    }

    /// There may be work.
    pub(super) fn ring(&self) {
        self.work.notify_one();
    }

    pub(super) async fn rung(&self) {
        self.work.notified().await;
    }

    /// What tells of news about one batch, for as long as it is held.
    pub(super) fn listen(&self, id: &str) -> Arc<Notify> {
        let nudge = Arc::new(Notify::new());
        let mut jobs = self.lock();
        jobs.retain(|_, job| job.strong_count() > 0);
        jobs.insert(id.to_owned(), Arc::downgrade(&nudge));
        nudge
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Weak<Notify>>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
