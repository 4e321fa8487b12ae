//! Asks for an object to be reconciled, a little later, so that a burst of events costs one look.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::channel::mpsc;
use futures::{SinkExt, Stream};
use kvtide_control_api::meta::Key;

/// Requests waiting for the controller to take them; beyond that, senders wait.
const REQUESTS_MAX: usize = 256;

/// The asking side. An object that was asked for is not asked for again until `window` is over, and
/// then once: events are neither lost nor put off for ever.
#[derive(Clone, Debug)]
pub struct Trigger {
    window: Duration,
    pending: Arc<Mutex<HashSet<Key>>>,
    requests: mpsc::Sender<Key>,
}

impl Trigger {
    /// The asking side and the stream of requests.
    pub fn new(window: Duration) -> (Self, impl Stream<Item = Key> + Send + 'static) {
        let (requests, stream) = mpsc::channel(REQUESTS_MAX);
        (
            Self {
                window,
                pending: Arc::default(),
                requests,
            },
            stream,
        )
    }

    /// Asks for an object. Must be called within a tokio runtime.
    pub fn fire(&self, key: Key) {
        if !self
            .pending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key.clone())
        {
            return;
        }
        let Self {
            window,
            pending,
            mut requests,
        } = self.clone();
        // At most one task for each object.
        tokio::spawn(async move {
            tokio::time::sleep(window).await;
            pending
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&key);
            // The receiver is gone only when the controller stops.
            if requests.send(key).await.is_err() {
                tracing::debug!("a request came after the controller stopped");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    #[tokio::test]
    async fn a_burst_is_one_request_and_a_later_event_another() {
        let (trigger, requests) = Trigger::new(Duration::from_millis(20));
        let key = Key {
            namespace: "n".into(),
            name: "a".into(),
        };
        for _ in 0..50 {
            trigger.fire(key.clone());
        }
        let mut requests = Box::pin(requests);
        assert_eq!(requests.next().await, Some(key.clone()));
        trigger.fire(key.clone());
        assert_eq!(requests.next().await, Some(key));
    }
}
