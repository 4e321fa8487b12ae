//! Which route is taken for what, by trying them.
//!
//! Some blocks are saved and loaded back over every route, with the pieces and strides of the
//! real layout. What a block holds is written to a row and back, so the KV cache does not change, or
//! not more than encoding changes it; neither blocks nor rows hold anything yet.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::copier::{Copier, Lane};
use super::device::{CudaOptions, Shared, rate_of};
use super::launches::layers_in_time;
use super::route::{Measured, Route, Routes, STAGED_BLOCKS};
use crate::copy::{Batch, CopyBackend, CopyError, Direction, RowMove};
use crate::cuda::Priority;

/// What is copied at a time: long enough to time, short enough to try everything.
const SAMPLE_BYTES: usize = 256 << 20;
/// After the first time, which also finds what is far slower than the fastest, and not tried again.
const REPEATS: u32 = 2;
const FAR_SLOWER: u32 = 6;

/// One use of routes: the candidates in the order of preference, and the share of the fastest one's
/// rate from which on a preferred one is taken.
struct Purpose {
    name: &'static str,
    direction: Direction,
    layer_by_layer: bool,
    /// Whether the time for putting copies on the stream is added to the time that they take:
    /// whoever does it puts the model on its stream afterwards.
    enqueued_first: bool,
    candidates: &'static [Route],
    /// The same where rows are encoded, which takes a kernel.
    encoding: &'static [Route],
    good_enough: f64,
}

const STAGED: Route = Route::Staged(STAGED_BLOCKS);

/// A model makes a tenth of what the link carries, so what disturbs it least comes first: a copy
/// kernel keeps multiprocessors from the next matrix product, and tens of thousands of small copies
/// the driver from the engine's launches (`docs/benchmarks.md`).
const SAVE: Purpose = Purpose {
    name: "save",
    direction: Direction::Save,
    layer_by_layer: true,
    enqueued_first: false,
    candidates: &[STAGED, Route::Dma, Route::Kernel(4)],
    encoding: &[STAGED],
    good_enough: 0.4,
};
/// Others compute meanwhile: what takes few multiprocessors for a short time comes first.
const LOAD: Purpose = Purpose {
    name: "load",
    direction: Direction::Load,
    layer_by_layer: false,
    enqueued_first: false,
    candidates: &[STAGED, Route::Dma, Route::Kernel(4), Route::Kernel(16)],
    encoding: &[STAGED, Route::Kernel(16)],
    good_enough: 0.9,
};
/// A step waits for it, and the thread that runs the model enqueues it before the step. A matrix
/// product whose tiles fill all multiprocessors once takes twice as long without one of them, so
/// kernels that run beside the whole step come after the copy engine, which a short kernel follows
/// for every launch (`docs/benchmarks.md`).
const LAYERED: Purpose = Purpose {
    name: "layered",
    direction: Direction::Load,
    layer_by_layer: true,
    enqueued_first: true,
    candidates: &[STAGED, Route::Kernel(8), Route::Kernel(16), Route::Dma],
    encoding: &[
        STAGED,
        Route::Kernel(8),
        Route::Kernel(16),
        Route::Kernel(32),
    ],
    good_enough: 0.8,
};
/// The same where rows lie apart: a kernel takes no longer to be enqueued for that.
const SCATTERED: Purpose = Purpose {
    name: "scattered",
    candidates: &[Route::Kernel(4), Route::Kernel(8), Route::Kernel(16)],
    encoding: &[Route::Kernel(8), Route::Kernel(16), Route::Kernel(32)],
    good_enough: 0.9,
    ..LAYERED
};

/// The routes to take, and what was measured to choose them.
pub(super) fn measure(
    shared: &Arc<Shared>,
    options: CudaOptions,
) -> Result<(Routes, Vec<Measured>), CopyError> {
    let mut trial = Trial::new(shared)?;
    let (save, _) = trial.choose(&SAVE, options.save)?;
    let (load, rate) = trial.choose(&LOAD, options.load)?;
    trial.load_rate = rate;
    let (layered, _) = trial.choose(&LAYERED, options.layered)?;
    // Who asks for a route gets it for all rows.
    let (scattered, _) = trial.choose(&SCATTERED, options.layered)?;
    let routes = Routes {
        save,
        load,
        layered,
        scattered,
    };
    Ok((routes, trial.measured))
}

/// Routes being tried, one at a time.
struct Trial {
    copier: Copier,
    moves: Vec<RowMove>,
    /// Bytes of the moves.
    bytes: usize,
    encoded: bool,
    /// Bytes per second of async loads, once it is known.
    load_rate: Option<f64>,
    measured: Vec<Measured>,
}

impl Trial {
    fn new(shared: &Arc<Shared>) -> Result<Self, CopyError> {
        let layout = shared.registration.layout();
        let moves = sample(shared);
        let lane = Arc::new(Lane::new(shared, Priority::High, STAGED)?);
        let mut copier = Copier::new(shared, &lane, STAGED)?;
        // Rows are filled by a save before anything is loaded from them; and what the first copies
        // of a process take longer, no route is to be blamed for.
        for direction in [Direction::Save, Direction::Load] {
            let first = Batch {
                direction,
                moves: &moves,
                digests: false,
            };
            run(&mut copier, &first, false, None)?;
        }
        Ok(Self {
            bytes: moves.len() * layout.shard_bytes(),
            encoded: layout.encoding().is_some(),
            copier,
            moves,
            load_rate: None,
            measured: Vec::new(),
        })
    }

    /// The route to take, unless it is `pinned`, and the bytes per second that it reached.
    fn choose(
        &mut self,
        purpose: &Purpose,
        pinned: Option<Route>,
    ) -> Result<(Route, Option<f64>), CopyError> {
        if self.encoded
            && let Some(route @ Route::Dma) = pinned
        {
            let way = format!("the route {route}");
            return Err(CopyError::CannotEncode { way });
        }
        let open = if self.encoded {
            purpose.encoding
        } else {
            purpose.candidates
        };
        let candidates = pinned.as_ref().map_or(open, std::slice::from_ref);
        let mut tried = Vec::new();
        for &route in candidates {
            tried.push((route, self.time(purpose, route)?));
        }
        // By turns, so that what disturbs the machine for a while disturbs all of them.
        let bearable = tried.iter().map(|(_, took)| *took * FAR_SLOWER).min();
        for _ in 0..REPEATS {
            for (route, best) in &mut tried {
                if Some(*best) <= bearable {
                    *best = self.time(purpose, *route)?.min(*best);
                }
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "a rate, not an account")]
        let rates: Vec<_> = tried
            .into_iter()
            .map(|(route, took)| Measured {
                purpose: purpose.name,
                route,
                gb_per_s: self.bytes as f64 / took.as_secs_f64().max(1e-9) / 1e9,
            })
            .collect();
        let route = choice(&rates, purpose.good_enough).unwrap_or(STAGED);
        let rate = rate_of(&rates, purpose.name, route);
        self.measured.extend(rates);
        Ok((route, rate))
    }

    fn time(&mut self, purpose: &Purpose, route: Route) -> Result<Duration, CopyError> {
        self.copier.set_route(route);
        let batch = Batch {
            direction: purpose.direction,
            moves: &self.moves,
            digests: false,
        };
        let took = run(
            &mut self.copier,
            &batch,
            purpose.layer_by_layer,
            self.load_rate,
        )?;
        let before = if purpose.enqueued_first {
            took.enqueuing
        } else {
            Duration::ZERO
        };
        Ok(before + took.all)
    }
}

/// The first route that reaches `good_enough` of the fastest one's rate.
fn choice(rates: &[Measured], good_enough: f64) -> Option<Route> {
    let fastest = rates.iter().map(|m| m.gb_per_s).fold(0.0, f64::max);
    let chosen = rates.iter().find(|m| m.gb_per_s >= fastest * good_enough);
    chosen.map(|m| m.route)
}

/// Times of one batch.
struct Took {
    /// Until all copies were on the stream.
    enqueuing: Duration,
    /// Until all copies had ended.
    all: Duration,
}

/// Copies the batch once; `rate` is what loads are known to reach, in bytes per second.
fn run(
    copier: &mut Copier,
    batch: &Batch<'_>,
    layer_by_layer: bool,
    rate: Option<f64>,
) -> Result<Took, CopyError> {
    let began = Instant::now();
    copier.begin(batch)?;
    let layers = copier.layers();
    if layer_by_layer {
        let at_once = match batch.direction {
            Direction::Save => copier.layers_at_once(),
            Direction::Load => layers_in_time(rate, batch.moves.len(), copier.layer_bytes()),
        };
        for first in (0..layers).step_by(at_once) {
            copier.copy(first..layers.min(first + at_once))?;
        }
    } else {
        copier.copy(0..layers)?;
    }
    let enqueuing = began.elapsed();
    copier.finish()?;
    Ok(Took {
        enqueuing,
        all: began.elapsed(),
    })
}

/// Blocks far from each other, and rows next to each other, as those of a prompt mostly are.
fn sample(shared: &Shared) -> Vec<RowMove> {
    let layout = shared.registration.layout();
    let rows = shared.registration.segment().geometry().rows();
    let wanted = u32::try_from(SAMPLE_BYTES / layout.shard_bytes().max(1)).unwrap_or(u32::MAX);
    // The last block and the last row exist; what precedes them does too.
    let count = wanted.clamp(1, layout.blocks().min(rows));
    let block_step = layout.blocks() / count;
    let half = count.div_ceil(2);
    (0..count)
        .map(|i| RowMove {
            row: i,
            // Even places first, then odd ones, so that neighbours among rows are not neighbours.
            block: (if i < half { 2 * i } else { 2 * (i - half) + 1 }) * block_step,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(rates: &[(Route, f64)]) -> Vec<Measured> {
        let measured = |&(route, gb_per_s)| Measured {
            purpose: "load",
            route,
            gb_per_s,
        };
        rates.iter().map(measured).collect()
    }

    #[test]
    fn a_preferred_route_is_taken_while_it_is_nearly_as_fast() {
        let near = rates(&[(STAGED, 46.0), (Route::Kernel(8), 50.0)]);
        assert_eq!(choice(&near, 0.9), Some(STAGED));
        let far = rates(&[(STAGED, 40.0), (Route::Kernel(8), 50.0)]);
        assert_eq!(choice(&far, 0.9), Some(Route::Kernel(8)));
    }
}
