//! Progress of one step through the model's layers, shared by the forward pass and a copy thread.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use kvtide_kernels::copy::Mark;

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
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
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
    pub(super) fn wait(&self, layer: usize) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if state.done.get(layer).is_none_or(Option::is_some) {
                return true;
            }
            if state.aborted {
                return false;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until a layer that is not in `taken` is done, and returns it with the layers behind it
    /// that are done too; `None` when all are taken or no more will be done.
    pub(super) fn next(&self, taken: &[bool]) -> Option<Done> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let ready = |layer: usize| state.done[layer].is_some() && !taken[layer];
            let count = state.done.len();
            if let Some(start) = (0..count).find(|&layer| ready(layer)) {
                let end = (start..count).find(|&layer| !ready(layer));
                let layers = start..end.unwrap_or(count);
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
        let first = layers.next(&[false; 4]).unwrap();
        assert_eq!((first.layers, first.marks.len()), (1..2, 1));
        layers.finish_all(Mark::passed());
        let before = layers.next(&[false, true, false, false]).unwrap();
        assert_eq!(before.layers, 0..1);
        let behind = layers.next(&[true, true, false, false]).unwrap();
        assert_eq!((behind.layers, behind.marks.len()), (2..4, 1));
        assert!(layers.next(&[true; 4]).is_none());
    }

    #[test]
    fn after_an_abort_only_what_was_done_is_taken() {
        let layers = Layers::new(2);
        layers.finish(0, Mark::passed());
        layers.abort();
        assert_eq!(layers.next(&[false; 2]).unwrap().layers, 0..1);
        assert!(layers.next(&[true, false]).is_none());
        assert!(layers.wait(0) && !layers.wait(1));
    }
}
