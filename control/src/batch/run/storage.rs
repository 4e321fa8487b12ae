//! Whether this server has what it needs. While somebody cannot write, because the disk is full, or
//! cannot connect, because there are no file descriptors, no further requests are sent: their answers
//! could not be kept either. What was answered already is held, and written when there is room.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use crate::batch::error::Failure;
use crate::batch::run::upstream::NoAnswer;

/// The first pause before a write is tried again; it doubles up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// See the module's documentation. Counts those who are in trouble.
#[derive(Clone, Debug, Default)]
pub(super) struct Storage(Arc<watch::Sender<usize>>);

/// Somebody lacks something; over when it is dropped.
#[derive(Debug)]
pub(super) struct Trouble {
    storage: Storage,
    pause: Duration,
}

impl Storage {
    /// Waits until nobody is in trouble.
    pub(super) async fn well(&self) {
        // The channel is closed only with `self`.
        self.0.subscribe().wait_for(|count| *count == 0).await.ok();
    }

    /// Somebody lacks something.
    pub(super) fn trouble(&self) -> Trouble {
        self.0.send_modify(|count| *count += 1);
        Trouble {
            storage: self.clone(),
            pause: PAUSE_FIRST,
        }
    }
}

impl Trouble {
    /// Says that a result cannot be kept and why, and waits before the next attempt.
    pub(super) async fn wait(&mut self, batch: &str, error: &Failure) {
        tracing::error!(batch, %error, "results cannot be recorded; trying again");
        self.rest().await;
    }

    /// Says that a request cannot be sent and why, and waits before the next attempt.
    pub(super) async fn wait_to_send(&mut self, batch: &str, error: &NoAnswer) {
        tracing::error!(batch, %error, "requests cannot be sent; trying again");
        self.rest().await;
    }

    async fn rest(&mut self) {
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }
}

impl Drop for Trouble {
    fn drop(&mut self) {
        self.storage.0.send_modify(|count| *count -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_wait_until_the_last_trouble_is_over() {
        let storage = Storage::default();
        storage.well().await;
        let (one, other) = (storage.trouble(), storage.trouble());
        let waiting = tokio::spawn({
            let storage = storage.clone();
            async move { storage.well().await }
        });
        drop(one);
        sleep(Duration::from_secs(60)).await;
        assert!(!waiting.is_finished());
        drop(other);
        waiting.await.unwrap();
    }
}
