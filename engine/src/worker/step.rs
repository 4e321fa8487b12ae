//! Progress of one step through the model's layers, shared by the forward pass and a copy thread.

use std::ops::Range;
use std::sync::{Arc, PoisonError};

use kvtide_kernels::copy::Mark;

use super::patience::{Patience, Stuck};
use crate::sync::{Condvar, Mutex, lock};

/// Which layers have been done, by whoever produces them.
#[derive(Debug)]
pub(super) struct Layers {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Behind which mark a layer is done.
    done: Vec<Option<Arc<Mark>>>,
    aborted: bool,
}

/// Layers that are done, and what has to be waited for before they are read.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) layers: Range<usize>,
    /// In the order in which they were made; the last layers of a step have one in common.
    pub(super) marks: Vec<Arc<Mark>>,
}

impl Layers {
    pub(super) fn new(count: usize) -> Self {
        Self {
            state: Mutex::new(State {
                done: vec![None; count],
                aborted: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut lock(&self.state));
        self.changed.notify_all();
    }

    /// `layer` is done behind `mark`.
    pub(super) fn finish(&self, layer: usize, mark: Mark) {
        self.change(|state| {
            if let Some(done) = state.done.get_mut(layer) {
                done.get_or_insert(Arc::new(mark));
            }
        });
    }

    /// All layers are done, those that were not before behind `mark`.
    pub(super) fn finish_all(&self, mark: Mark) {
        let mark = Arc::new(mark);
        self.change(|state| {
            for done in &mut state.done {
                done.get_or_insert_with(|| Arc::clone(&mark));
            }
        });
    }

    /// The remaining layers will never be done.
    pub(super) fn abort(&self) {
        self.change(|state| state.aborted = true);
    }

    /// Waits until `layer` is done; `false` if it never will be.
    pub(super) fn wait(&self, layer: usize, mut patience: Patience) -> Result<bool, Stuck> {
        let mut state = lock(&self.state);
        loop {
            if state.done.get(layer).is_none_or(Option::is_some) {
                return Ok(true);
            }
            if state.aborted {
                return Ok(false);
            }
            state = patience.wait(&self.changed, state)?;
        }
    }

    /// Waits until `at_once` neighbouring layers that are not in `taken` are done, or fewer that are
    /// the last, and returns them with those behind them that are done too; `None` when all are
    /// taken or no more will be done.
    ///
    /// The copy thread waits here without a deadline, for the forward pass: each ends in `finish_all`
    /// or `abort`, one that failed when the next begins, and the last when the worker is dropped.
    pub(super) fn next(&self, taken: &[bool], at_once: usize) -> Option<Done> {
        let mut state = lock(&self.state);
        loop {
            let ready = |layer: usize| state.done[layer].is_some() && !taken[layer];
            let count = state.done.len();
            let more_to_come = !state.aborted && state.done.iter().any(Option::is_none);
            let wanted = if more_to_come { at_once } else { 1 };
            let runs = (0..count).filter(|&start| ready(start)).map(|start| {
                let end = (start..count).find(|&layer| !ready(layer));
                start..end.unwrap_or(count)
            });
            if let Some(layers) = runs.into_iter().find(|run| run.len() >= wanted) {
                let mut marks: Vec<Arc<Mark>> = state.done[layers.clone()]
                    .iter()
                    .flatten()
                    .cloned()
                    .collect();
                marks.dedup_by(|a, b| Arc::ptr_eq(a, b));
                return Some(Done { layers, marks });
            }
            if state.aborted || taken.iter().all(|&taken| taken) {
                return None;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn layers_that_are_done_are_taken_in_one_piece() {
        let layers = Layers::new(4);
        layers.finish(1, Mark::passed());
        let first = layers.next(&[false; 4], 1).unwrap();
        assert_eq!((first.layers, first.marks.len()), (1..2, 1));
        layers.finish_all(Mark::passed());
        let before = layers.next(&[false, true, false, false], 1).unwrap();
        assert_eq!(before.layers, 0..1);
        let behind = layers.next(&[true, true, false, false], 1).unwrap();
        assert_eq!((behind.layers, behind.marks.len()), (2..4, 1));
        assert!(layers.next(&[true; 4], 1).is_none());
    }

    #[test]
    fn layers_that_are_wanted_together_are_taken_when_so_many_are_done_or_no_more_will_be() {
        let layers = Layers::new(5);
        for layer in [0, 1, 2] {
            layers.finish(layer, Mark::passed());
        }
        assert_eq!(layers.next(&[false; 5], 2).unwrap().layers, 0..3);
        layers.finish(3, Mark::passed());
        let taken = [true, true, true, false, false];
        layers.finish(4, Mark::passed());
        assert_eq!(layers.next(&taken, 4).unwrap().layers, 3..5);
    }

    #[test]
    fn a_layer_that_nobody_loads_is_not_waited_for_for_ever() {
        let short = Patience::of(3, std::time::Duration::from_millis(1));
        assert_eq!(Layers::new(1).wait(0, short), Err(Stuck));
    }

    #[test]
    fn after_an_abort_only_what_was_done_is_taken() {
        let layers = Layers::new(2);
        layers.finish(0, Mark::passed());
        layers.abort();
        assert_eq!(layers.next(&[false; 2], 2).unwrap().layers, 0..1);
        assert!(layers.next(&[true, false], 1).is_none());
        assert_eq!(layers.wait(0, Patience::COPY), Ok(true));
        assert_eq!(layers.wait(1, Patience::COPY), Ok(false));
    }
}
