//! Who is waited for has to get on: a body that is sent, or an answer that is read, byte by byte with
//! long pauses would otherwise hold a place for ever.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// How long a caller is waited for, all pauses together, until [`LEAST_BYTES`] have to have moved. A
/// program that looks at what it downloads line by line may pause for so long.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// A kibibyte for each second: less than the slowest line that files are sent over.
pub(super) const LEAST_BYTES: u64 = 60 << 10;

/// A caller was too slow.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error(
    "fewer than {LEAST_BYTES} bytes were sent or read while they were waited for, for {} seconds",
    PATIENCE.as_secs()
)]
pub(super) struct Stalled;

/// How a caller gets on. Only time in which he is waited for counts.
#[derive(Debug, Default)]
struct Progress {
    /// How long he was waited for, and how many bytes moved since.
    waited: Duration,
    bytes: u64,
    /// Since when he is waited for now.
    since: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Progress {
    fn moved(&mut self, bytes: u64) {
        if let Some(since) = self.since.take() {
            self.waited += since.elapsed();
        }
        self.bytes = self.bytes.saturating_add(bytes);
        self.forget_if_enough();
    }

    fn forget_if_enough(&mut self) {
        if self.waited >= PATIENCE && self.bytes >= LEAST_BYTES {
            (self.waited, self.bytes) = (Duration::ZERO, 0);
        }
    }

    /// To be asked whenever nothing moves; ready when it has taken too long.
    fn poll_stalled(&mut self, context: &mut Context<'_>) -> Poll<Stalled> {
        let now = Instant::now();
        let since = *self.since.get_or_insert(now);
        let deadline = since + PATIENCE.saturating_sub(self.waited);
        let timer = match &mut self.timer {
            Some(timer) => timer,
            None => self
                .timer
                .insert(Box::pin(tokio::time::sleep_until(deadline))),
        };
        if timer.deadline() != deadline {
            timer.as_mut().reset(deadline);
        }
        std::task::ready!(timer.as_mut().poll(context));
        if self.bytes < LEAST_BYTES {
            return Poll::Ready(Stalled);
        }
        // Enough has moved: the next stretch begins.
        self.moved(0);
        self.poll_stalled(context)
    }
}

/// The body of a request, which has to arrive.
#[derive(Debug)]
pub(super) struct Arrives<B> {
    body: B,
    progress: Progress,
}

impl<B> Arrives<B> {
    pub(super) fn new(body: B) -> Arrives<B> {
        Arrives {
            body,
            progress: Progress::default(),
        }
    }
}

impl<B> Body for Arrives<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<axum::BoxError>,
{
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        let this = self.get_mut();
        match Pin::new(&mut this.body).poll_frame(context) {
            Poll::Ready(frame) => {
                let data = frame.as_ref().and_then(|frame| frame.as_ref().ok());
                let bytes = data.and_then(Frame::data_ref).map_or(0, Bytes::len);
                this.progress.moved(bytes as u64);
                Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
            }
            Poll::Pending => this
                .progress
                .poll_stalled(context)
                .map(|stalled| Some(Err(stalled.into()))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A connection over which answers have to be read.
#[derive(Debug)]
pub(super) struct IsRead<S> {
    stream: S,
    progress: Progress,
}

impl<S> IsRead<S> {
    pub(super) fn new(stream: S) -> IsRead<S> {
        IsRead {
            stream,
            progress: Progress::default(),
        }
    }

    fn judge<T>(
        &mut self,
        written: Poll<io::Result<T>>,
        bytes: impl Fn(&T) -> usize,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        match &written {
            Poll::Ready(Ok(moved)) => self.progress.moved(bytes(moved) as u64),
            Poll::Ready(Err(_)) => {}
            Poll::Pending => {
                let stalled = std::task::ready!(self.progress.poll_stalled(context));
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, stalled)));
            }
        }
        written
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for IsRead<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for IsRead<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(context, bytes);
        this.judge(written, |&written| written, context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write_vectored(context, slices);
        this.judge(written, |&written| written, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = Pin::new(&mut this.stream).poll_flush(context);
        this.judge(flushed, |()| 0, context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let ended = Pin::new(&mut this.stream).poll_shutdown(context);
        this.judge(ended, |()| 0, context)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
    use http_body_util::{BodyExt, StreamBody};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    type Sent = Result<Frame<Bytes>, std::convert::Infallible>;

    /// What becomes of a body of which so much comes, and then after each pause.
    async fn arrive(pieces: usize, bytes: usize, pause: Duration) -> Result<usize, String> {
        let pieces = futures_util::stream::iter(0..pieces).then(move |_| async move {
            tokio::time::sleep(pause).await;
            Sent::Ok(Frame::data(Bytes::from(vec![b'x'; bytes])))
        });
        let body = Arrives::new(StreamBody::new(Box::pin(pieces)));
        let whole = body.collect().await.map_err(|error| error.to_string())?;
        Ok(whole.to_bytes().len())
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_has_to_arrive_and_a_byte_now_and_then_is_not_enough() {
        let second = Duration::from_secs(1);
        assert_eq!(arrive(600, 2048, second).await, Ok(600 * 2048));
        assert_eq!(arrive(3, 1, 15 * second).await, Ok(3));
        for (bytes, pause) in [(1, second), (512, second), (0, second), (1, 3600 * second)] {
            let error = arrive(10_000, bytes, pause).await.unwrap_err();
            assert!(error.contains("61440 bytes"), "{error}");
        }
        // A burst is no licence: what was sent before a stretch does not count in it.
        let pieces = [0u64, 1, 100].map(Duration::from_secs);
        let pieces = futures_util::stream::iter(pieces).then(|pause| async move {
            tokio::time::sleep(pause).await;
            Sent::Ok(Frame::data(Bytes::from(vec![b'x'; 50 << 10])))
        });
        let body = Arrives::new(StreamBody::new(Box::pin(pieces)));
        body.collect().await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_has_to_be_read_and_a_byte_now_and_then_is_not_enough() {
        for (bytes, well) in [(1024 * 1024, true), (2048, true), (1, false), (0, false)] {
            let (ours, mut theirs) = tokio::io::duplex(1024);
            let reading = tokio::spawn(async move {
                let mut buffer = vec![0; bytes];
                loop {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    match theirs.read(&mut buffer).await {
                        Ok(0) if bytes > 0 => return,
                        Ok(_) => {}
                        Err(_) => return,
                    }
                }
            });
            let mut connection = IsRead::new(ours);
            let written = connection.write_all(&vec![b'x'; 200 << 10]).await;
            match written {
                Ok(()) => assert!(well),
                Err(error) => {
                    assert!(!well, "{bytes}: {error}");
                    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
                }
            }
            reading.abort();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_which_nobody_waits_does_not_count() {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        let mut connection = IsRead::new(ours);
        for _ in 0..10 {
            connection.write_all(b"x").await.unwrap();
            theirs.read_exact(&mut [0]).await.unwrap();
            tokio::time::sleep(2 * PATIENCE).await;
        }
    }
}
