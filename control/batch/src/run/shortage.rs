//! What this server lacks. While somebody cannot write, because the disk is full, or
//! cannot connect, because there are no file descriptors, no further requests are sent: their answers
//! could not be kept either. What was answered already is held, and written when there is room.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use crate::error::Failure;
use crate::run::upstream::NoAnswer;

/// The first pause before a write is tried again; it doubles up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub(super) struct Shortage(Arc<watch::Sender<Troubled>>);

/// How many are in trouble.
#[derive(Debug, Default)]
struct Troubled {
    writers: usize,
    senders: usize,
}

impl Troubled {
    fn with(&mut self, lack: Lack) -> &mut usize {
        match lack {
            Lack::Room => &mut self.writers,
            Lack::Connections => &mut self.senders,
        }
    }
}

/// What is lacking.
#[derive(Clone, Copy, Debug)]
enum Lack {
    Room,
    Connections,
}

/// Somebody lacks something; over when it is dropped.
#[derive(Debug)]
pub(super) struct Trouble {
    shortage: Shortage,
    lack: Lack,
    pause: Duration,
}

impl Shortage {
    /// Waits until nobody is in trouble.
    pub(super) async fn well(&self) {
        // The channel is closed only with `self`.
        let well = |troubled: &Troubled| troubled.writers == 0 && troubled.senders == 0;
        self.0.subscribe().wait_for(well).await.ok();
    }

    /// Somebody cannot write.
    pub(super) fn of_room(&self) -> Trouble {
        self.begin(Lack::Room).0
    }

    /// Somebody cannot connect. Requests are many and are told the same, so it is said once, by the
    /// first, why.
    pub(super) fn of_connections(&self, batch: &str, error: &NoAnswer) -> Trouble {
        let (trouble, is_first) = self.begin(Lack::Connections);
        if is_first {
            tracing::error!(batch, %error, "requests cannot be sent; trying again");
        }
        trouble
    }

    /// A trouble, and whether it is the first of its kind.
    fn begin(&self, lack: Lack) -> (Trouble, bool) {
        let mut is_first = false;
        self.0.send_modify(|troubled| {
            let count = troubled.with(lack);
            is_first = *count == 0;
            *count += 1;
        });
        let trouble = Trouble {
            shortage: self.clone(),
            lack,
            pause: PAUSE_FIRST,
        };
        (trouble, is_first)
    }

    fn end(&self, lack: Lack) {
        let mut left = 0;
        self.0.send_modify(|troubled| {
            let count = troubled.with(lack);
            *count -= 1;
            left = *count;
        });
        if left == 0 && matches!(lack, Lack::Connections) {
            tracing::info!("no request waits for a connection any more");
        }
    }
}

impl Trouble {
    /// Says that a result cannot be kept and why, and waits before the next attempt.
    pub(super) async fn wait(&mut self, batch: &str, error: &Failure) {
        tracing::error!(batch, %error, "results cannot be recorded; trying again");
        self.rest().await;
    }

    /// Waits before the next attempt.
    pub(super) async fn rest(&mut self) {
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }
}

impl Drop for Trouble {
    fn drop(&mut self) {
        self.shortage.end(self.lack);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_wait_until_the_last_trouble_is_over() {
        let shortage = Shortage::default();
        shortage.well().await;
        let (one, other) = (shortage.of_room(), shortage.of_room());
        let waiting = tokio::spawn({
            let shortage = shortage.clone();
            async move { shortage.well().await }
        });
        drop(one);
        sleep(Duration::from_secs(60)).await;
        assert!(!waiting.is_finished());
        drop(other);
        waiting.await.unwrap();
    }

    #[test]
    fn a_shortage_of_many_has_one_beginning() {
        let shortage = Shortage::default();
        let begin = || shortage.begin(Lack::Connections);
        let written = shortage.of_room();
        let (one, first) = begin();
        assert!(first, "who cannot write lacks something else");
        let (other, second) = begin();
        assert!(!second);
        drop((one, written));
        assert!(!begin().1, "another still waits");
        drop(other);
        assert!(begin().1);
    }
}
