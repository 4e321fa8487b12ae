//! The synchronisation primitives that loom can model; elsewhere they are std's own.

#[cfg(loom)]
pub(crate) use loom::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering, fence},
};

/// Between two sequentially consistent accesses, whose order loom knows by a fence only.
#[cfg(loom)]
pub(crate) fn in_order() {
    fence(Ordering::SeqCst);
}

/// Between two sequentially consistent accesses: they are in order by themselves.
#[cfg(not(loom))]
pub(crate) const fn in_order() {}
#[cfg(not(loom))]
pub(crate) use std::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};

/// Locks `mutex`, also after a panic elsewhere: what our locks guard is consistent between any two
/// statements that can panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
