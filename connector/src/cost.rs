//! The cost of loads.

use std::time::Duration;

use pyo3::prelude::*;

/// What a load costs against what the model computes meanwhile.
#[pyclass(module = "kvtide._native")]
pub(crate) struct CostModel(kvtide_engine::CostModel);

#[pymethods]
impl CostModel {
    #[new]
    fn new() -> Self {
        Self(kvtide_engine::CostModel::new())
    }

    /// A worker's loads reach `bytes_per_s`.
    fn set_load_rate(&mut self, bytes_per_s: f64) {
        self.0.set_load_rate(bytes_per_s);
    }

    /// A step with `prompt_tokens` is scheduled at `now`, in seconds of a clock that never goes back;
    /// `loads` if it waits for a layered load.
    fn observe_step(&mut self, now: f64, prompt_tokens: u64, loads: bool) {
        if let Ok(now) = Duration::try_from_secs_f64(now) {
            self.0.observe_step(now, prompt_tokens, loads);
        }
    }

    /// The engine has nothing to do.
    fn idle(&mut self) {
        self.0.idle();
    }

    /// Whether a step that computes `prompt_tokens`, and the next token of others if they are
    /// `decoding`, takes longer than loading `bytes` on each worker.
    fn hides(&self, bytes: u64, prompt_tokens: u64, decoding: bool) -> bool {
        self.0.hides(bytes, prompt_tokens, decoding)
    }
}
