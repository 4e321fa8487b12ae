//! The body of an upload as it arrives.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};

use crate::http::ApiError;
use crate::http::extract::broken;

/// Bytes of a form before its first part and in the head of each, which are kept in memory.
pub(super) const OUTSIDE_BYTES_MAX: usize = 64 << 10;
/// Bytes given to the form's reader at once: it takes in all that it is given.
const CHUNK_BYTES: usize = 16 << 10;
/// What is read of an upload after it was refused, so that the client reads the answer instead of
/// failing at writing.
const DRAINED_BYTES_MAX: usize = 256 << 20;
/// How long that may take.
const DRAINED_WITHIN: Duration = Duration::from_secs(20);
const FORM: &str = "The multipart form";

/// The body of a request; what is left of it can be read after the form was given up.
#[derive(Clone)]
pub(super) struct Arriving {
    body: Arc<Mutex<BodyDataStream>>,
    /// Bytes that may still arrive before something has to come of them.
    allowed: Arc<AtomicUsize>,
}

/// Why a form is not read on.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error(
        "it has more than {OUTSIDE_BYTES_MAX} bytes before its first part or in the head of one; is \
         its boundary that of the Content-Type?"
    )]
    Outside,
    #[error(transparent)]
    Body(#[from] axum::Error),
}

impl Arriving {
    pub(super) fn new(body: Body) -> Arriving {
        Arriving {
            body: Arc::new(Mutex::new(body.into_data_stream())),
            allowed: Arc::new(AtomicUsize::new(usize::MAX)),
        }
    }

    /// Only so many bytes are read from now on.
    pub(super) fn allow(&self, bytes: usize) {
        self.allowed.store(bytes, Ordering::Relaxed);
    }

    /// What arrives, in pieces. Between two of them it says that it has to be waited for: whoever
    /// reads then looks at what he has, instead of taking in ever more.
    pub(super) fn stream(&self) -> impl Stream<Item = Result<Bytes, Broken>> + Send + use<> {
        let (body, allowed) = (Arc::clone(&self.body), Arc::clone(&self.allowed));
        let mut rest = Bytes::new();
        let mut paused = true;
        futures_util::stream::poll_fn(move |context| {
            paused = !paused;
            if paused {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            if rest.is_empty() {
                // Only one of form and drain reads, and neither panics while it does.
                let mut body = body.lock().unwrap_or_else(PoisonError::into_inner);
                let next = body.poll_next_unpin(context);
                rest = match next {
                    Poll::Ready(Some(Ok(chunk))) => chunk,
                    other => {
                        paused = true;
                        return other.map(|end| end.map(|chunk| chunk.map_err(Broken::Body)));
                    }
                };
            }
            let chunk = rest.split_to(rest.len().min(CHUNK_BYTES));
            let left = allowed.load(Ordering::Relaxed).checked_sub(chunk.len());
            Poll::Ready(Some(match left {
                Some(left) => {
                    allowed.store(left, Ordering::Relaxed);
                    Ok(chunk)
                }
                None => Err(Broken::Outside),
            }))
        })
    }

    pub(super) async fn drain(self) {
        self.allow(DRAINED_BYTES_MAX);
        let mut rest = Box::pin(self.stream());
        let reading = async { while let Some(Ok(_)) = rest.next().await {} };
        // A client that is slower than this sees a closed connection.
        tokio::time::timeout(DRAINED_WITHIN, reading).await.ok();
    }
}

/// What was read of a form, or why it could not be read.
pub(super) fn arrived<T>(read: multer::Result<T>) -> Result<T, ApiError> {
    read.map_err(|error| match &error {
        // What is wrong with the body is in the cause.
        multer::Error::StreamReadFailed(cause) => broken(FORM, cause.as_ref()),
        error => broken(FORM, error),
    })
}

#[cfg(test)]
mod tests {
    use multer::Multipart;

    use super::*;

    /// How many bytes a form whose boundary never comes is read for, and the error.
    async fn never_a_boundary(pieces: usize, piece: &'static [u8]) -> (usize, String) {
        let sent = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&sent);
        let body = futures_util::stream::iter(0..pieces).map(move |_| {
            counter.fetch_add(piece.len(), Ordering::Relaxed);
            Ok::<_, std::io::Error>(Bytes::from_static(piece))
        });
        let arriving = Arriving::new(Body::from_stream(body));
        let mut form = Multipart::new(arriving.stream(), "b");
        arriving.allow(OUTSIDE_BYTES_MAX);
        let error = arrived(form.next_field().await).unwrap_err();
        (sent.load(Ordering::Relaxed), format!("{error:?}"))
    }

    #[tokio::test]
    async fn what_is_outside_of_fields_is_not_read_without_end() {
        for piece in [&[b'x'; 1000][..], &[b'x'; 300_000]] {
            let (read, error) = never_a_boundary(1000, piece).await;
            assert!(read <= OUTSIDE_BYTES_MAX + piece.len(), "{read}");
            assert!(error.contains("more than 65536 bytes before"), "{error}");
        }
    }
}
