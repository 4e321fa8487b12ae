//! Something of which there is only so much, places or memory, shared by callers of whom none may have
//! it all.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

/// How long a request waits for its share before it is refused: shorter than what clients wait for.
pub(super) const WAIT: Duration = Duration::from_secs(10);
/// Names kept though nobody of them has anything now.
const NAMES_MAX: usize = 1024;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Shares {
    all: Arc<Semaphore>,
    each: u32,
    of: Mutex<HashMap<String, Arc<Semaphore>>>,
}

/// What somebody has of it; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Share {
    own: OwnedSemaphorePermit,
    all: OwnedSemaphorePermit,
}

/// Why there was nothing to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Full {
    /// Whoever asked has all that he may have.
    Own,
    /// Others have it.
    All,
}

impl Shares {
    /// Of `all` units, of which each caller may have `each`.
    pub(super) fn new(all: u32, each: u32) -> Shares {
        Shares {
            all: Arc::new(Semaphore::new(all as usize)),
            each: each.min(all),
            of: Mutex::default(),
        }
    }

    /// Units for `who`, if they are there now. More than he may ever have is all that he may have.
    pub(super) fn try_take(&self, who: &str, units: u32) -> Result<Share, Full> {
        let units = units.min(self.each);
        let own = self.of(who).try_acquire_many_owned(units);
        let own = own.map_err(|_| Full::Own)?;
        let all = Arc::clone(&self.all).try_acquire_many_owned(units);
        let all = all.map_err(|_| Full::All)?;
        Ok(Share { own, all })
    }

    /// The same, waiting for up to [`WAIT`]. Who has asked first is served first.
    pub(super) async fn take(&self, who: &str, units: u32) -> Result<Share, Full> {
        let deadline = Instant::now() + WAIT;
        let units = units.min(self.each);
        // Neither semaphore is ever closed.
        let own = timeout_at(deadline, self.of(who).acquire_many_owned(units)).await;
        let own = own.ok().and_then(Result::ok).ok_or(Full::Own)?;
        let all = Arc::clone(&self.all).acquire_many_owned(units);
        let all = timeout_at(deadline, all).await;
        let all = all.ok().and_then(Result::ok).ok_or(Full::All)?;
        Ok(Share { own, all })
    }

    /// Units that one caller may have.
    pub(super) fn each(&self) -> u32 {
        self.each
    }

    fn of(&self, who: &str) -> Arc<Semaphore> {
        let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = of.get(who) {
            return Arc::clone(own);
        }
        if of.len() >= NAMES_MAX {
            // Whose semaphore nobody else holds has nothing and waits for nothing.
            of.retain(|_, own| Arc::strong_count(own) > 1);
        }
        let own = Arc::new(Semaphore::new(self.each as usize));
        of.insert(who.to_owned(), Arc::clone(&own));
        own
    }
}

impl Share {
    /// Gives back all but so many units.
    pub(super) fn keep(&mut self, units: usize) {
        for permit in [&mut self.own, &mut self.all] {
            let superfluous = permit.num_permits().saturating_sub(units);
            drop(permit.split(superfluous));
        }
    }

    /// Adds what another has.
    pub(super) fn merge(&mut self, other: Share) {
        self.own.merge(other.own);
        self.all.merge(other.all);
    }

    /// Units.
    pub(super) fn units(&self) -> usize {
        self.all.num_permits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_has_all_and_what_is_dropped_is_there_again() {
        let shares = Shares::new(4, 3);
        let ann = shares.try_take("ann", 3).unwrap();
        assert_eq!(shares.try_take("ann", 1).unwrap_err(), Full::Own);
        let bob = shares.try_take("bob", 1).unwrap();
        assert_eq!(shares.try_take("bob", 1).unwrap_err(), Full::All);
        drop(ann);
        assert_eq!(shares.try_take("bob", 2).unwrap().units(), 2);
        drop(bob);
        assert_eq!(shares.try_take("ann", 99).unwrap().units(), 3);
    }

    #[test]
    fn a_share_shrinks_and_grows() {
        let shares = Shares::new(10, 10);
        let mut share = shares.try_take("ann", 8).unwrap();
        share.keep(3);
        share.merge(shares.try_take("ann", 7).unwrap());
        assert_eq!(share.units(), 10);
        drop(share);
        assert_eq!(shares.try_take("bob", 10).unwrap().units(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_served_in_time_or_refused() {
        let shares = Arc::new(Shares::new(2, 1));
        let held = shares.try_take("ann", 1).unwrap();
        assert_eq!(shares.take("ann", 1).await.unwrap_err(), Full::Own);
        let waiting = tokio::spawn({
            let shares = Arc::clone(&shares);
            async move { shares.take("ann", 1).await.is_ok() }
        });
        tokio::time::sleep(WAIT / 2).await;
        drop(held);
        assert!(waiting.await.unwrap());
        let _others = [shares.try_take("ann", 1), shares.try_take("bob", 1)];
        assert_eq!(shares.take("cyd", 1).await.unwrap_err(), Full::All);
    }

    #[test]
    fn names_of_whom_nobody_is_there_are_forgotten() {
        let shares = Shares::new(4, 2);
        let held = shares.try_take("here", 2).unwrap();
        for n in 0..10_000 {
            shares.try_take(&n.to_string(), 1).unwrap();
        }
        assert!(shares.of.lock().unwrap().len() <= NAMES_MAX);
        assert_eq!(shares.try_take("here", 1).unwrap_err(), Full::Own);
        drop(held);
    }
}
