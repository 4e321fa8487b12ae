//! How often the requests of batches have failed that were stopped half way: without it, a batch that
//! has to make way again and again would begin to count anew each time, and never end.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::run::retry::Failures;

/// Requests remembered, of all batches together: some megabytes. What is forgotten is tried more often.
const REQUESTS_MAX: usize = 100_000;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Remembered(Mutex<VecDeque<Stopped>>);

#[derive(Debug)]
struct Stopped {
    batch: String,
    model: String,
    failures: HashMap<u32, Failures>,
}

impl Remembered {
    /// The requests of a batch for one model have failed so often, by their lines.
    pub(super) fn keep(&self, batch: &str, model: &str, failures: HashMap<u32, Failures>) {
        if failures.is_empty() {
            return;
        }
        let mut all = self.lock();
        all.push_back(Stopped {
            batch: batch.to_owned(),
            model: model.to_owned(),
            failures,
        });
        let mut count: usize = all.iter().map(|stopped| stopped.failures.len()).sum();
        while count > REQUESTS_MAX
            && let Some(oldest) = all.pop_front()
        {
            count -= oldest.failures.len();
        }
    }

    /// What was kept of them, for whoever goes on with it.
    pub(super) fn take(&self, batch: &str, model: &str) -> HashMap<u32, Failures> {
        let mut all = self.lock();
        let mut of_these = all.iter();
        let position =
            of_these.position(|stopped| stopped.batch == batch && stopped.model == model);
        let stopped = position.and_then(|position| all.remove(position));
        stopped.map(|stopped| stopped.failures).unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Stopped>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failures(count: usize) -> HashMap<u32, Failures> {
        let lines = (0..count).map(|line| u32::try_from(line).unwrap());
        lines.map(|line| (line, Failures::new(0))).collect()
    }

    #[test]
    fn what_was_kept_is_taken_once_and_the_oldest_are_forgotten() {
        let remembered = Remembered::default();
        remembered.keep("batch_1", "m", failures(3));
        remembered.keep("batch_1", "n", failures(4));
        assert_eq!(remembered.take("batch_1", "m").len(), 3);
        assert!(remembered.take("batch_1", "m").is_empty());
        for n in 0..5 {
            remembered.keep(&n.to_string(), "m", failures(REQUESTS_MAX / 4));
        }
        assert!(remembered.take("batch_1", "n").is_empty());
        assert!(remembered.take("0", "m").is_empty());
        assert!(!remembered.take("4", "m").is_empty());
    }
}
