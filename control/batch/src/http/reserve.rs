//! Bytes of uploads that have begun to arrive here and that the database does not know yet. Together with
//! what it knows they must not exceed a tenant's quota: else uploads at the same time would each be
//! given all that is left. (When an upload is entered, the database looks once more: servers do not
//! know of each other's.)

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub struct Reservations(Arc<Mutex<HashMap<String, u64>>>);

/// Bytes of one upload, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    all: Reservations,
    tenant: String,
    bytes: u64,
}

impl Reservations {
    /// Of no bytes yet.
    pub(super) fn begin(&self, tenant: &str) -> Reservation {
        Reservation {
            all: self.clone(),
            tenant: tenant.to_owned(),
            bytes: 0,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reservation {
    /// Reserves `more` bytes if these are `left` for all uploads of the tenant together.
    pub(super) fn grow(&mut self, more: u64, left: u64) -> bool {
        let mut all = self.all.lock();
        let reserved = all.get(&self.tenant).copied().unwrap_or(0);
        let together = reserved.saturating_add(more);
        if together > left {
            return false;
        }
        all.insert(self.tenant.clone(), together);
        self.bytes += more;
        true
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut all = self.all.lock();
        if let Some(reserved) = all.get_mut(&self.tenant) {
            *reserved = reserved.saturating_sub(self.bytes);
            if *reserved == 0 {
                all.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uploads_of_a_tenant_share_what_is_left_and_give_it_back() {
        let all = Reservations::default();
        let (mut one, mut two) = (all.begin("a"), all.begin("a"));
        let mut other = all.begin("b");
        assert!(one.grow(60, 100));
        assert!(!two.grow(60, 100));
        assert!(two.grow(40, 100));
        assert!(other.grow(100, 100));
        drop(one);
        assert!(two.grow(60, 100));
        assert!(!two.grow(1, 100));
        drop((two, other));
        assert!(all.lock().is_empty());
    }
}
