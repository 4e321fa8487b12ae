//! Creates of batches that this server has refused, or that have failed. A client that sends such a
//! create again has made nothing by it, whatever else of the same content there is; only where the
//! failure was that of the database may the batch be there all the same, under the id that it would
//! have had.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::store::RETRY_WINDOW_S;

/// Refused creates that are remembered for each tenant. A client has a few under way; what is forgotten
/// is taken for the repetition of an earlier create, as long as that one is not over.
const REMEMBERED_MAX: usize = 64;

/// No repetition comes later.
const WINDOW: Duration = Duration::from_secs(RETRY_WINDOW_S);
/// Nor one of a create that nobody read: it is told to come again in five seconds. Not much longer, for it
/// is not known what it asked for, and a client that gave up leaves it to the next one that repeats any.
const UNREAD_WINDOW: Duration = Duration::from_secs(30);

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Refusals {
    read: Mutex<HashMap<String, VecDeque<Refusal>>>,
    /// By tenant, when creates were refused before anybody read what they asked for.
    unread: Mutex<HashMap<String, VecDeque<Instant>>>,
}

#[derive(Debug)]
struct Refusal {
    digest: String,
    /// The id that the batch would have had.
    batch: String,
    at: Instant,
}

impl Refusals {
    /// A create that asks for this was not carried out.
    pub(super) fn note(&self, tenant: &str, digest: &str, batch: &str) {
        self.forget(tenant, digest);
        let mut tenants = self.lock();
        let refusals = tenants.entry(tenant.to_owned()).or_default();
        if refusals.len() >= REMEMBERED_MAX {
            refusals.pop_front();
        }
        refusals.push_back(Refusal {
            digest: digest.to_owned(),
            batch: batch.to_owned(),
            at: Instant::now(),
        });
    }

    /// A create was refused before anybody read what it asks for, and was no repetition: what was sent
    /// before it may have made a batch, but not this.
    pub(super) fn note_unread(&self, tenant: &str) {
        let mut tenants = self.unread.lock().unwrap_or_else(PoisonError::into_inner);
        for refused in tenants.values_mut() {
            refused.retain(|at| at.elapsed() <= UNREAD_WINDOW);
        }
        tenants.retain(|_, refused| !refused.is_empty());
        let refused = tenants.entry(tenant.to_owned()).or_default();
        if refused.len() >= REMEMBERED_MAX {
            refused.pop_front();
        }
        refused.push_back(Instant::now());
    }

    /// Whether a repetition may be that of a create that nobody read. One stands for one.
    pub(super) fn take_unread(&self, tenant: &str) -> bool {
        let mut tenants = self.unread.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(refused) = tenants.get_mut(tenant) else {
            return false;
        };
        refused.retain(|at| at.elapsed() <= UNREAD_WINDOW);
        refused.pop_front().is_some()
    }

    /// The id that the batch would have had, if the last create that asked for this was not carried out.
    pub(super) fn of(&self, tenant: &str, digest: &str) -> Option<String> {
        let tenants = self.lock();
        let mut refusals = tenants.get(tenant)?.iter();
        let refusal = refusals.find(|refusal| refusal.digest == digest)?;
        Some(refusal.batch.clone())
    }

    /// One was carried out; and what is older than any repetition is not needed any more.
    pub(super) fn forget(&self, tenant: &str, digest: &str) {
        let mut tenants = self.lock();
        for refusals in tenants.values_mut() {
            refusals.retain(|refusal| refusal.at.elapsed() <= WINDOW);
        }
        if let Some(refusals) = tenants.get_mut(tenant) {
            refusals.retain(|refusal| refusal.digest != digest);
        }
        tenants.retain(|_, refusals| !refusals.is_empty());
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, VecDeque<Refusal>>> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_create_that_nobody_read_stands_for_one_repetition_of_its_tenant() {
        let refusals = Refusals::default();
        refusals.note_unread("a");
        assert!(!refusals.take_unread("b"));
        assert!(refusals.take_unread("a"));
        assert!(!refusals.take_unread("a"));
        (0..=REMEMBERED_MAX).for_each(|_| refusals.note_unread("a"));
        let taken = std::iter::repeat_with(|| refusals.take_unread("a"));
        assert_eq!(taken.take_while(|&taken| taken).count(), REMEMBERED_MAX);
    }

    #[test]
    fn the_last_refusals_of_each_tenant_are_remembered() {
        let refusals = Refusals::default();
        refusals.note("a", "same", "batch_1");
        refusals.note("a", "same", "batch_2");
        assert_eq!(refusals.of("a", "same").as_deref(), Some("batch_2"));
        assert_eq!(refusals.of("b", "same"), None);
        for n in 0..REMEMBERED_MAX {
            refusals.note("b", &n.to_string(), "batch_3");
        }
        assert!(
            refusals.of("a", "same").is_some(),
            "another's are no matter"
        );
        refusals.note("b", "one more", "batch_3");
        assert_eq!(refusals.of("b", "0"), None);
        assert!(refusals.of("b", "1").is_some());
        refusals.forget("a", "same");
        assert_eq!(refusals.of("a", "same"), None);
        assert_eq!(refusals.lock().len(), 1);
    }
}
