//! Jobs that a device's threads run, and the memory those jobs use.
//!
//! A job's resources (the registration that keeps segment and tensors mapped) are owned by this
//! table from the moment the job is accepted until the thread that runs it reports its end. Whoever
//! asked for the job may lose interest at any time; that only detaches.

use std::collections::HashMap;

use super::patience::{Patience, Stuck};
use crate::sync::{Condvar, Mutex, lock};

type Entries<R, O, M> = HashMap<u64, Entry<R, O, M>>;

#[derive(Debug)]
enum Entry<R, O, M> {
    Running {
        resources: R,
        detached: bool,
        cancelled: bool,
        mark: Option<M>,
    },
    Done(O),
}

/// Jobs by id; `R` is what a job keeps alive, `O` how it ends, `M` the mark behind which it has.
#[derive(Debug)]
pub(crate) struct InFlight<R, O, M = ()> {
    entries: Mutex<Entries<R, O, M>>,
    changed: Condvar,
}

impl<R, O, M: Clone> InFlight<R, O, M> {
    pub(crate) fn new() -> Self {
        Self {
            entries: Mutex::new(HashMap::new()),
            changed: Condvar::new(),
        }
    }

    /// Accepts a job. `resources` live at least until [`InFlight::complete`].
    pub(crate) fn begin(&self, job: u64, resources: R) {
        lock(&self.entries).insert(
            job,
            Entry::Running {
                resources,
                detached: false,
                cancelled: false,
                mark: None,
            },
        );
    }

    /// All of the job is enqueued on the device; behind `end`, it touches its memory no more.
    pub(crate) fn enqueued(&self, job: u64, end: M) {
        if let Some(Entry::Running { mark, .. }) = lock(&self.entries).get_mut(&job) {
            *mark = Some(end);
        }
        self.changed.notify_all();
    }

    /// The job has ended: nothing touches its memory any more.
    pub(crate) fn complete(&self, job: u64, outcome: O) {
        let mut entries = lock(&self.entries);
        let released = match entries.remove(&job) {
            Some(Entry::Running {
                resources,
                detached,
                ..
            }) => {
                if !detached {
                    entries.insert(job, Entry::Done(outcome));
                }
                Some(resources)
            }
            _ => None,
        };
        drop(entries);
        // Unmapping can take long, and must not happen under the lock.
        drop(released);
        self.changed.notify_all();
    }

    /// Nobody will ask for the job's outcome. A job that runs goes on, and keeps its memory.
    pub(crate) fn detach(&self, job: u64) {
        let mut entries = lock(&self.entries);
        match entries.get_mut(&job) {
            Some(Entry::Running { detached, .. }) => *detached = true,
            Some(Entry::Done(_)) => drop(entries.remove(&job)),
            None => {}
        }
    }

    /// Nobody wants the job's result any more: it may end early. It goes on to use its memory until
    /// [`InFlight::complete`]. Whether its outcome is still to be taken.
    pub(crate) fn cancel(&self, job: u64) -> bool {
        let mut entries = lock(&self.entries);
        if let Some(Entry::Running { cancelled, .. }) = entries.get_mut(&job) {
            *cancelled = true;
        }
        entries.contains_key(&job)
    }

    /// Jobs that run although they were cancelled.
    pub(crate) fn cancelled(&self) -> Vec<u64> {
        let entries = lock(&self.entries);
        let runs_cancelled = |entry: &Entry<R, O, M>| {
            matches!(
                entry,
                Entry::Running {
                    cancelled: true,
                    ..
                }
            )
        };
        let found = entries.iter().filter(|(_, entry)| runs_cancelled(entry));
        found.map(|(&job, _)| job).collect()
    }

    /// Waits until the job is not running.
    pub(crate) fn wait(&self, job: u64, mut patience: Patience) -> Result<(), Stuck> {
        let mut entries = lock(&self.entries);
        while matches!(entries.get(&job), Some(Entry::Running { .. })) {
            entries = patience.wait(&self.changed, entries)?;
        }
        Ok(())
    }

    /// Waits until all of the job is enqueued, for the mark behind which it has ended; `None` if it
    /// is not running.
    pub(crate) fn wait_enqueued(
        &self,
        job: u64,
        mut patience: Patience,
    ) -> Result<Option<M>, Stuck> {
        let mut entries = lock(&self.entries);
        while let Some(Entry::Running { mark, .. }) = entries.get(&job) {
            if mark.is_some() {
                return Ok(mark.clone());
            }
            entries = patience.wait(&self.changed, entries)?;
        }
        Ok(None)
    }

    /// Takes the outcomes of all jobs that have ended.
    pub(crate) fn take_done(&self) -> Vec<(u64, O)> {
        let mut entries = lock(&self.entries);
        let done: Vec<u64> = entries
            .iter()
            .filter(|(_, e)| matches!(e, Entry::Done(_)))
            .map(|(&id, _)| id)
            .collect();
        done.into_iter()
            .filter_map(|id| match entries.remove(&id) {
                Some(Entry::Done(outcome)) => Some((id, outcome)),
                _ => None,
            })
            .collect()
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn memory_of_a_detached_job_lives_until_the_job_ends() {
        let table = InFlight::<Arc<()>, ()>::new();
        let memory = Arc::new(());
        table.begin(1, Arc::clone(&memory));
        table.detach(1);
        assert_eq!(Arc::strong_count(&memory), 2);
        table.complete(1, ());
        assert_eq!(Arc::strong_count(&memory), 1);
        assert!(table.take_done().is_empty(), "nobody asked for the outcome");
    }

    #[test]
    fn an_outcome_is_taken_once() {
        let table = InFlight::<(), u8>::new();
        table.begin(1, ());
        assert!(table.take_done().is_empty());
        table.complete(1, 7);
        assert_eq!(table.take_done(), [(1, 7)]);
        assert!(table.take_done().is_empty());
        table.wait(1, Patience::COPY).unwrap();
    }

    #[test]
    fn a_cancelled_job_keeps_its_memory_until_it_ends() {
        let table = InFlight::<Arc<()>, u8>::new();
        let memory = Arc::new(());
        table.begin(1, Arc::clone(&memory));
        table.begin(2, Arc::clone(&memory));
        assert!(table.cancel(1));
        assert_eq!(table.cancelled(), [1]);
        assert_eq!(Arc::strong_count(&memory), 3);
        table.complete(1, 7);
        assert!(table.cancelled().is_empty());
        assert!(table.cancel(1), "its outcome was not taken");
        assert_eq!(table.take_done(), [(1, 7)]);
        assert!(!table.cancel(1));
        assert!(!table.cancel(3), "it never began");
    }

    #[test]
    fn a_job_that_does_not_end_is_not_waited_for_for_ever() {
        let table = InFlight::<(), (), u8>::new();
        table.begin(1, ());
        let short = Patience::of(3, std::time::Duration::from_millis(1));
        assert_eq!(table.wait(1, short), Err(Stuck));
        assert_eq!(table.wait_enqueued(1, short), Err(Stuck));
    }

    #[test]
    fn the_mark_of_an_enqueued_job_is_there_until_the_job_ends() {
        let table = InFlight::<(), (), u8>::new();
        table.begin(1, ());
        table.enqueued(1, 7);
        assert_eq!(table.wait_enqueued(1, Patience::COPY), Ok(Some(7)));
        table.complete(1, ());
        assert_eq!(table.wait_enqueued(1, Patience::COPY), Ok(None));
    }
}

/// `make test-loom`.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicBool, Ordering};
    use loom::thread;

    /// Memory that knows whether it was released.
    struct Memory(Arc<AtomicBool>);

    impl Drop for Memory {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    fn copy_races_detach(free_at_detach: bool) {
        loom::model(move || {
            let released = Arc::new(AtomicBool::new(false));
            let table = Arc::new(InFlight::<Memory, ()>::new());
            table.begin(1, Memory(Arc::clone(&released)));
            let device = {
                let (table, released) = (Arc::clone(&table), Arc::clone(&released));
                thread::spawn(move || {
                    assert!(
                        !released.load(Ordering::SeqCst),
                        "copied through released memory"
                    );
                    table.complete(1, ());
                })
            };
            if free_at_detach {
                lock(&table.entries).remove(&1);
            } else {
                table.detach(1);
            }
            device.join().unwrap();
            assert!(released.load(Ordering::SeqCst), "memory outlived its job");
        });
    }

    #[test]
    fn memory_outlives_the_copy_that_uses_it() {
        copy_races_detach(false);
    }

    /// The control: freeing when the caller loses interest must be caught.
    #[test]
    #[should_panic(expected = "copied through released memory")]
    fn control_freeing_at_detach_is_caught() {
        copy_races_detach(true);
    }

    #[test]
    fn a_waiter_always_wakes() {
        loom::model(|| {
            let table = Arc::new(InFlight::<(), ()>::new());
            table.begin(1, ());
            let device = {
                let table = Arc::clone(&table);
                thread::spawn(move || table.complete(1, ()))
            };
            table.wait(1, Patience::COPY).unwrap();
            device.join().unwrap();
        });
    }

    #[test]
    fn whoever_waits_for_the_mark_wakes_whether_the_job_is_enqueued_or_ends() {
        loom::model(|| {
            let table = Arc::new(InFlight::<(), (), u8>::new());
            table.begin(1, ());
            let device = {
                let table = Arc::clone(&table);
                thread::spawn(move || {
                    table.enqueued(1, 7);
                    table.complete(1, ());
                })
            };
            assert!(matches!(
                table.wait_enqueued(1, Patience::COPY),
                Ok(None | Some(7))
            ));
            device.join().unwrap();
        });
    }
}
