//! Which load's slice is copied next.

/// Loads with blocks that are in no slice yet, in the order in which they came.
///
/// Every other slice goes to the load that has the least left, the others to the oldest. So loads of
/// one length run one after the other, and the first of them ends early; a short load is not held up
/// by a long one; and a long one has half of the link, however many short ones come.
#[derive(Debug, Default)]
pub(super) struct Turns {
    waiting: Vec<Waiting>,
    oldest_next: bool,
}

#[derive(Debug)]
struct Waiting {
    job: u64,
    /// Blocks that are in no slice yet.
    left: usize,
}

impl Turns {
    /// A load of `blocks`, more than none, has come.
    pub(super) fn push(&mut self, job: u64, blocks: usize) {
        self.waiting.push(Waiting { job, left: blocks });
    }

    /// No more of a load is copied.
    pub(super) fn remove(&mut self, job: u64) {
        self.waiting.retain(|waiting| waiting.job != job);
    }

    /// The load whose next slice, of up to `slice` blocks, is copied now.
    pub(super) fn next(&mut self, slice: usize) -> Option<u64> {
        let shortest = || {
            let by_left = self.waiting.iter().enumerate();
            by_left.min_by_key(|(_, w)| w.left).map(|(place, _)| place)
        };
        let place = if self.oldest_next {
            Some(0)
        } else {
            shortest()
        };
        let waiting = self.waiting.get_mut(place?)?;
        self.oldest_next = !self.oldest_next;
        let job = waiting.job;
        waiting.left = waiting.left.saturating_sub(slice);
        self.waiting.retain(|waiting| waiting.left > 0);
        Some(job)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(turns: &mut Turns) -> Vec<u64> {
        std::iter::from_fn(|| turns.next(1)).collect()
    }

    #[test]
    fn loads_of_one_length_run_one_after_the_other() {
        let mut turns = Turns::default();
        turns.push(1, 3);
        turns.push(2, 3);
        assert_eq!(order(&mut turns), [1, 1, 1, 2, 2, 2]);
    }

    #[test]
    fn a_short_load_is_done_soon_after_it_came() {
        let mut turns = Turns::default();
        turns.push(1, 100);
        assert_eq!(turns.next(1), Some(1));
        turns.push(2, 2);
        assert_eq!(order(&mut turns)[..4], [1, 2, 1, 2]);
    }

    #[test]
    fn a_long_load_goes_on_while_short_ones_keep_coming() {
        let mut turns = Turns::default();
        turns.push(1, 10);
        for job in 2..12 {
            turns.push(job, 1);
        }
        let slices = order(&mut turns);
        assert_eq!(slices.len(), 20);
        let own = slices.chunks(2).take_while(|pair| pair.contains(&1));
        assert!(own.count() >= 9, "{slices:?}");
    }

    #[test]
    fn a_load_that_was_removed_gets_no_turn() {
        let mut turns = Turns::default();
        turns.push(1, 2);
        turns.push(2, 2);
        turns.remove(1);
        assert_eq!(order(&mut turns), [2, 2]);
    }

    #[test]
    fn a_turn_without_loads_changes_nothing() {
        let mut turns = Turns::default();
        assert_eq!(turns.next(1), None);
        turns.push(1, 5);
        turns.push(2, 1);
        assert_eq!(turns.next(1), Some(2));
    }
}
