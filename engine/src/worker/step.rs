//! Progress of one step through the model's layers, shared by the forward pass and a copy thread.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Which layers have been done, by whoever produces them.
#[derive(Debug)]
pub(super) struct Layers {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    done: Vec<bool>,
    aborted: bool,
}

impl Layers {
    pub(super) fn new(count: usize) -> Self {
        Self {
            state: Mutex::new(State {
                done: vec![false; count],
                aborted: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// `layer` is done.
    pub(super) fn finish(&self, layer: usize) {
        self.change(|state| {
            if let Some(done) = state.done.get_mut(layer) {
                *done = true;
            }
        });
    }

    /// All layers are done.
    pub(super) fn finish_all(&self) {
        self.change(|state| state.done.fill(true));
    }

    /// The remaining layers will never be done.
    pub(super) fn abort(&self) {
        self.change(|state| state.aborted = true);
    }

    /// Waits until `layer` is done; `false` if it never will be.
    pub(super) fn wait(&self, layer: usize) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if state.done.get(layer).copied().unwrap_or(true) {
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

    /// Aborts when dropped: a thread that ends early, whatever the reason, leaves nobody waiting.
    pub(super) fn abort_on_drop(self: &Arc<Self>) -> AbortOnDrop {
        AbortOnDrop(Arc::clone(self))
    }

    /// Waits until a layer that is not in `taken` is done and returns it; `None` when all are taken
    /// or no more will be done.
    pub(super) fn next(&self, taken: &[bool]) -> Option<usize> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut pairs = state.done.iter().zip(taken);
            if let Some(layer) = pairs.position(|(&done, &taken)| done && !taken) {
                return Some(layer);
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

/// See [`Layers::abort_on_drop`]. Layers that are done by then stay so.
pub(super) struct AbortOnDrop(Arc<Layers>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
