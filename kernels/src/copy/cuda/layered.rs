//! A load of which every layer's copy is on the device's stream before the step begins.

use std::sync::{Arc, Mutex, PoisonError};

use kvtide_model::BlockMove;

use super::copier::Copier;
use crate::copy::{Batch, CopyBackend, CopyError, Direction, LayeredLoad, Mark};
use crate::cuda::{ComputeStream, Event, EventPool};

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Layered {
    /// None once the load has ended.
    copier: Option<Copier>,
    /// Where the copier goes then.
    pool: Arc<Mutex<Vec<Copier>>>,
    layers: Vec<Event>,
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
        begin: &Event,
    ) -> Result<Self, CopyError> {
        copier.begin(&Batch {
            direction: Direction::Load,
            moves,
            digests: true,
        })?;
        copier.stream().wait_for(begin)?;
        let mut layers = Vec::new();
        for layer in 0..copier.layers() {
            copier.copy(layer..layer + 1)?;
            let event = events.take()?;
            event.record(copier.stream())?;
            layers.push(event);
        }
        let end = copier.close()?;
        Ok(Self {
            copier: Some(copier),
            pool,
            layers,
            end,
        })
    }
}

impl LayeredLoad for Layered {
    fn hold_back(&self, stream: ComputeStream, layer: usize) -> Result<(), CopyError> {
        let event = self
            .layers
            .get(layer)
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
        match &self.copier {
            Some(copier) => Ok(copier.wait()?),
            None => Ok(()),
        }
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
