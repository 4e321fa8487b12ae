//! What a step saves and loads: each kind is planned for all requests at once, so that the interpreter
//! lock is released and taken once.

use std::time::Instant;

use kvtide_engine::{LoadPlan, SavePlan};
use kvtide_model::BlockMove;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::fence::enter;
use crate::pool::Pool;
use crate::sequence::Sequence;

/// (sequence, first block to save, the engine's blocks).
pub(crate) type DueSave<'py> = (PyRef<'py, Sequence>, usize, Vec<u32>);
/// (job, moves, covered blocks).
pub(crate) type PlannedSave<'py> = (u64, Bound<'py, PyBytes>, usize);
/// (moves, blocks that will not be loaded).
pub(crate) type PlannedLoad<'py> = (Bound<'py, PyBytes>, Vec<u32>);

/// Blocks on their way into the engine's KV cache.
#[pyclass(frozen, module = "kvtide._native")]
pub(crate) struct Load(pub(crate) kvtide_engine::Load);

fn encoded<'py>(py: Python<'py>, moves: &[BlockMove]) -> Bound<'py, PyBytes> {
    PyBytes::new(py, &BlockMove::encode_all(moves))
}

/// See [`Pool::plan_saves`].
pub(crate) fn plan_saves<'py>(
    py: Python<'py>,
    pool: &Pool,
    due: Vec<DueSave<'py>>,
) -> Vec<PlannedSave<'py>> {
    let saves: Vec<(&kvtide_engine::Sequence, usize, &[u32])> = due
        .iter()
        .map(|(sequence, start, blocks)| (&sequence.0, *start, blocks.as_slice()))
        .collect();
    let plan = |(sequence, start, blocks): (&kvtide_engine::Sequence, usize, &[u32])| {
        sequence.plan_save(&pool.session, start, blocks)
    };
    let plans: Vec<SavePlan> = enter(py, || saves.into_iter().map(plan).collect());
    plans
        .into_iter()
        .map(|plan| (plan.job, encoded(py, &plan.moves), plan.covered))
        .collect()
}

/// See [`Pool::plan_loads`].
pub(crate) fn plan_loads<'py>(
    py: Python<'py>,
    pool: &Pool,
    loads: &[PyRef<'py, Load>],
) -> Vec<Option<PlannedLoad<'py>>> {
    let loads: Vec<&kvtide_engine::Load> = loads.iter().map(|load| &load.0).collect();
    let (now, timeout) = (Instant::now(), pool.config.join_timeout);
    let plans: Vec<Option<LoadPlan>> = enter(py, || {
        loads.iter().map(|load| load.plan(now, timeout)).collect()
    });
    let converted = |plan: LoadPlan| (encoded(py, &plan.moves), plan.lost);
    plans.into_iter().map(|plan| plan.map(converted)).collect()
}
