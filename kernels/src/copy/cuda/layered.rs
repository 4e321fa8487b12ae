//! A load of which every layer's copy is on the device's stream before the step begins.

use std::sync::{Arc, Mutex, PoisonError};

use kvtide_model::BlockMove;

use super::copier::Copier;
use super::device::STAGING_BYTES;
use super::route::{Route, Routes};
use crate::copy::{Batch, CopyBackend, CopyError, Direction, LayeredLoad, Mark};
use crate::cuda::{ComputeStream, Event, EventPool};

/// Time of the link in which the gap between two launches is lost, and by which the first layers
/// come later.
const LAUNCH_SECONDS: f64 = 1.5e-3;
/// Bytes of a launch of more than one layer: as many as are staged at once.
const LAUNCH_BYTES_MAX: usize = STAGING_BYTES;

/// Bytes of a copy engine's command from which on the eight microseconds that each takes besides them
/// matter little (`docs/benchmarks.md`). They are the launching thread's too.
const COMMAND_BYTES: usize = 2 << 20;
/// Launches that a load is made of all the same, if it has so many layers: the first layer waits for
/// the whole of the first.
const LAUNCHES_MIN: usize = 8;
/// What the thread that runs the model may spend on putting rows on the stream, in pieces: about two
/// milliseconds, less than what kernels, which reach all rows with one launch, cost a step.
const PIECES_MAX: usize = 4096;

/// Layers of a layered load of `blocks` blocks that one launch copies, where the link carries `rate`
/// bytes per second.
pub(super) fn layers_at_once(rate: Option<f64>, blocks: usize, layer_bytes: usize) -> usize {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a size of megabytes; a cast of floats saturates"
    )]
    let in_time = rate.map_or(0, |rate| (rate * LAUNCH_SECONDS) as usize);
    (in_time.min(LAUNCH_BYTES_MAX) / (blocks * layer_bytes).max(1)).max(1)
}

/// Layers of rows, of which `neighbours` lie next to each other, that make a command of a copy engine
/// large enough, of a load of `layers`.
fn layers_a_command(neighbours: usize, layer_bytes: usize, layers: usize) -> usize {
    let wanted = COMMAND_BYTES.div_ceil((neighbours * layer_bytes).max(1));
    wanted.min(layers / LAUNCHES_MIN).max(1)
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Layered {
    /// None once the load has ended.
    copier: Option<Copier>,
    /// Where the copier goes then.
    pool: Arc<Mutex<Vec<Copier>>>,
    /// Of so many layers each.
    at_once: usize,
    launches: Vec<Event>,
    end: Mark,
}

impl Layered {
    /// Enqueues all layers and their events, behind `begin`: waiting for an event that is not yet
    /// recorded would be no wait at all.
    pub(super) fn enqueue(
        mut copier: Copier,
        pool: Arc<Mutex<Vec<Copier>>>,
        events: &EventPool,
        moves: &[BlockMove],
        routes: Routes,
        rate: Option<f64>,
        begin: &Mark,
    ) -> Result<Self, CopyError> {
        copier.set_route(routes.layered);
        copier.begin(&Batch {
            direction: Direction::Load,
            moves,
            digests: true,
        })?;
        if let Some(begin) = &begin.0 {
            copier.stream().wait_for(begin)?;
        }
        let (layers, layer_bytes) = (copier.layers(), copier.layer_bytes());
        let mut at_once = layers_at_once(rate, moves.len(), layer_bytes);
        if let Route::Staged(_) = routes.layered {
            let few = layers_a_command(copier.neighbours(), layer_bytes, layers).max(at_once);
            if copier.cost_of_rows() * layers.div_ceil(few) <= PIECES_MAX {
                at_once = few;
            } else {
                copier.set_route(routes.scattered);
            }
        }
        let mut launches = Vec::new();
        for first in (0..layers).step_by(at_once) {
            copier.copy(first..layers.min(first + at_once))?;
            let event = events.take()?;
            event.record(copier.stream())?;
            launches.push(event);
        }
        let end = copier.close()?;
        Ok(Self {
            copier: Some(copier),
            pool,
            at_once,
            launches,
            end,
        })
    }
}

impl LayeredLoad for Layered {
    fn hold_back(&self, stream: ComputeStream, layer: usize) -> Result<(), CopyError> {
        let event = self
            .launches
            .get(layer / self.at_once)
            .ok_or(CopyError::NoSuchLayer { layer })?;
        Ok(stream.wait_for(event)?)
    }

    fn hold_back_until_end(&self, stream: ComputeStream) -> Result<(), CopyError> {
        match (&self.copier, &self.end.0) {
            (Some(_), Some(end)) => Ok(stream.wait_for(end)?),
            _ => Ok(()),
        }
    }

    fn wait(&self) -> Result<(), CopyError> {
        self.launches.last().map_or(Ok(()), |last| Ok(last.wait()?))
    }

    fn poll(&mut self) -> Option<Result<Vec<u64>, CopyError>> {
        match self.copier.as_ref()?.is_done() {
            Ok(false) => None,
            Err(error) => Some(Err(error.into())),
            Ok(true) => {
                let mut copier = self.copier.take()?;
                let digests = copier.take_digests();
                let mut free = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
                free.push(copier);
                Some(Ok(digests))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_loads_take_few_launches_and_large_ones_one_a_layer() {
        assert_eq!(layers_at_once(Some(50e9), 256, 64 << 10), 2);
        assert_eq!(layers_at_once(Some(50e9), 4096, 64 << 10), 1);
        assert_eq!(layers_at_once(Some(50e9), 1, 64 << 10), 512);
        assert_eq!(layers_at_once(Some(6e9), 64, 64 << 10), 2, "a slow link");
        assert_eq!(layers_at_once(None, 1, 64 << 10), 1);
    }

    #[test]
    fn rows_in_short_stretches_are_loaded_by_commands_of_several_layers() {
        assert_eq!(layers_a_command(512, 64 << 10, 32), 1, "rows together");
        assert_eq!(layers_a_command(8, 64 << 10, 32), 4);
        assert_eq!(
            layers_a_command(1, 64 << 10, 32),
            4,
            "never too much of a load"
        );
        assert_eq!(layers_a_command(8, 32 << 10, 80), 8);
        assert_eq!(layers_a_command(1, 64 << 10, 3), 1, "few layers");
    }
}
