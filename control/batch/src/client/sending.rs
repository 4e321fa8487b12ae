//! A file on its way to a server: does it get on?

use std::time::Duration;

use futures_util::TryStreamExt;
use reqwest::multipart::Part;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::io::ReaderStream;

use crate::client::input::Input;

/// Bytes that are read at once. The connection takes sixteen pieces, and the next when these are gone:
/// they are small so that a slow line is not taken for one that stands still.
const PIECE_BYTES: usize = 16 << 10;

/// For how long an upload is waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// While nothing of the file is taken.
    pub(super) moving: Duration,
    /// For the answer, when all of it was.
    pub(super) answer: Duration,
}

/// How much of a file was taken.
pub(super) struct Sending {
    bytes: u64,
    sent: watch::Receiver<u64>,
}

impl Sending {
    /// The file as a part of a form, and how it gets on.
    pub(super) fn begin(input: Input) -> (Part, Sending) {
        let (note, sent) = watch::channel(0);
        let file = tokio::fs::File::from_std(input.file);
        let pieces = ReaderStream::with_capacity(file, PIECE_BYTES)
            .inspect_ok(move |piece| note.send_modify(|sent| *sent += piece.len() as u64));
        let body = reqwest::Body::wrap_stream(pieces);
        let part = Part::stream_with_length(body, input.bytes).file_name(input.name);
        let bytes = input.bytes;
        (part, Sending { bytes, sent })
    }

    /// Returns when it was waited for in vain.
    pub(super) async fn stalled(mut self, patience: Patience) {
        while *self.sent.borrow_and_update() < self.bytes {
            match timeout(patience.moving, self.sent.changed()).await {
                Ok(Ok(())) => {}
                // The body is gone: what is left is the answer.
                Ok(Err(_)) => break,
                Err(_) => return,
            }
        }
        sleep(patience.answer).await;
    }
}
