//! What a step saves and loads: each kind is planned for all requests at once, so that the interpreter
//! lock is released and taken once.

use std::time::Instant;

use kvtide_engine::{LoadPart, Save, SavePlan};
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
/// (moves, the first block that will not be loaded, whether it is the last part).
pub(crate) type PlannedLoad<'py> = (Bound<'py, PyBytes>, Option<u32>, bool);

/// Blocks on their way into the engine's KV cache.
#[pyclass(module = "kvtide._native")]
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
    let saves: Vec<Save<'_>> = due
        .iter()
        .map(|(sequence, start, blocks)| Save {
            chain: sequence.0.keys(),
            from: *start,
            blocks,
        })
        .collect();
    let plans: Vec<SavePlan> = enter(py, || pool.session.begin_saves(&saves));
    plans
        .into_iter()
        .map(|plan| (plan.job, encoded(py, &plan.moves), plan.covered))
        .collect()
}

/// See [`Pool::plan_loads`].
pub(crate) fn plan_loads<'py>(
    py: Python<'py>,
    pool: &Pool,
    loads: &mut [PyRefMut<'py, Load>],
    more: &mut [PyRefMut<'py, Load>],
    at_most: usize,
) -> Vec<Option<PlannedLoad<'py>>> {
    let mut loads: Vec<&mut kvtide_engine::Load> = loads.iter_mut().map(|l| &mut l.0).collect();
    let mut more: Vec<&mut kvtide_engine::Load> = more.iter_mut().map(|l| &mut l.0).collect();
    let (now, timeout) = (Instant::now(), pool.config.engine.join_timeout);
    let parts: Vec<Option<LoadPart>> = enter(py, || {
        let loads = loads.iter_mut();
        let mut parts: Vec<_> = loads.map(|load| load.next_part(now, timeout)).collect();
        let mut left = at_most;
        parts.extend(more.iter_mut().map(|load| {
            // A part that is planned has to be copied.
            let part = (left > 0).then(|| load.next_part(now, timeout)).flatten();
            left -= usize::from(part.is_some());
            part
        }));
        parts
    });
    let converted = |part: LoadPart| (encoded(py, &part.moves), part.lost, part.last);
    parts.into_iter().map(|part| part.map(converted)).collect()
}
