//! A load of which every layer's copy is on the device's stream before the step begins.

use std::sync::{Arc, Mutex, PoisonError};

use super::copier::Copier;
use super::launches::Launches;
use super::route::Routes;
use crate::copy::{Batch, CopyBackend, CopyError, Direction, LayeredLoad, Mark, RowMove};
use crate::cuda::{ComputeStream, Event, EventPool};

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
        moves: &[RowMove],
        routes: Routes,
        rate: Option<f64>,
        begin: &Mark,
    ) -> Result<Self, CopyError> {
        copier.begin(&Batch {
            direction: Direction::Load,
            moves,
            digests: true,
        })?;
        if let Some(begin) = &begin.0 {
            copier.stream().wait_for(begin)?;
        }
        let layers = copier.layers();
        let each = Launches::of(copier.rows(), layers, copier.layer_bytes(), routes, rate);
        copier.set_route(each.route);
        let mut launches = Vec::new();
        for first in (0..layers).step_by(each.layers) {
            copier.copy(first..layers.min(first + each.layers))?;
            let event = events.take()?;
            event.record(copier.stream())?;
            launches.push(event);
        }
        let end = copier.close()?;
        Ok(Self {
            copier: Some(copier),
            pool,
            at_once: each.layers,
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
