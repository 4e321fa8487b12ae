//! An answer of the upstream, read as it arrives: short ones into memory, long ones into a scratch
//! file; in one line ([`LineEnds`]).

mod structure;
mod usage;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::http::{HeaderMap, Response};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::json;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout_at};

use crate::blobs::{Blobs, Piece};
use crate::error::Failure;
use crate::run::line_ends::{GROWTH_MAX, LineEnds, escaped};
use crate::run::retry::{Verdict, retry_after};
use crate::run::shortage::Shortage;
use crate::run::upstream::NoAnswer;
use crate::state::Usage;

use usage::{Fault, Seen, look, look_at_file};

/// Bytes of an answer at most.
pub(super) const ANSWER_BYTES_MAX: u64 = 32 << 20;
/// Bytes of an answer that are kept in memory.
pub(super) const MEMORY_BYTES: usize = 32 << 10;
/// Bytes of an answer that is no JSON that are shown.
const EXCERPT_BYTES: usize = 2 << 10;

/// A whole answer, whose body is JSON in one line.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) request_id: Option<String>,
    pub(super) body: Piece,
    pub(super) usage: Usage,
    pub(super) verdict: Verdict,
    pub(super) retry_after: Option<Duration>,
}

/// How long the upstream may take; what is waited for here does not count.
#[derive(Debug)]
pub(super) struct Patience {
    timeout: Duration,
    until: Instant,
}

impl Patience {
    pub(super) fn new(timeout: Duration) -> Patience {
        Patience {
            timeout,
            until: Instant::now() + timeout,
        }
    }

    /// Waits for the upstream.
    pub(super) async fn wait_for<T>(&self, reply: impl Future<Output = T>) -> Result<T, NoAnswer> {
        timeout_at(self.until, reply)
            .await
            .map_err(|_| NoAnswer::TimedOut(self.timeout))
    }
}

/// Where long answers are kept.
pub(super) struct Keep<'a> {
    pub(super) blobs: &'a dyn Blobs,
    pub(super) shortage: &'a Shortage,
    /// For the log.
    pub(super) batch: &'a str,
}

impl Keep<'_> {
    /// Tries until the disk lets it: the answer is held meanwhile, and the upstream with it.
    async fn put(&self, scratch: &mut Option<Scratch>, bytes: BytesMut) -> Result<(), NoAnswer> {
        let bytes = bytes.freeze();
        let mut trouble = None;
        loop {
            let written = match scratch {
                Some(scratch) => scratch.append(bytes.clone()).await,
                None => match self.blobs.scratch() {
                    Ok(file) => {
                        *scratch = Some(Scratch::new(file));
                        continue;
                    }
                    Err(failure) => Err(failure),
                },
            };
            match written {
                Ok(()) => return Ok(()),
                Err(failure) => {
                    let trouble = trouble.get_or_insert_with(|| self.shortage.of_room());
                    trouble.wait(self.batch, &failure).await;
                }
            }
        }
    }
}

/// Reads an answer to its end.
pub(super) async fn read(
    response: Response<Incoming>,
    keep: Keep<'_>,
    patience: &mut Patience,
) -> Result<Answer, NoAnswer> {
    let (head, mut body) = response.into_parts();
    let mut spool = Spool::default();
    while let Some(frame) = patience.wait_for(body.frame()).await? {
        let frame = frame.map_err(|error| NoAnswer::Broken(error.to_string()))?;
        if let Ok(data) = frame.into_data() {
            let began = Instant::now();
            spool.take(data, &keep).await?;
            patience.until += began.elapsed();
        }
    }
    let header = |name: &str| header(&head.headers, name);
    let after = retry_after(
        header("retry-after-ms"),
        header("retry-after"),
        SystemTime::now(),
    );
    let status = head.status.as_u16();
    let promised = head.status.is_success();
    let (body, seen) = spool.finish(&keep).await?;
    let (body, seen) = match seen {
        Ok(seen) => (body, seen),
        Err(reason) if promised => return Err(NoAnswer::NotJson(reason)),
        Err(_) => (described(status, &body), Seen::default()),
    };
    Ok(Answer {
        status,
        request_id: header("x-request-id").map(str::to_owned),
        body,
        usage: seen.usage,
        verdict: verdict(status, seen.fault),
        retry_after: after,
    })
}

/// What an answer means. One that says that all is well, and tells of an error in its body, is judged by
/// that error.
fn verdict(status: u16, fault: Option<Fault>) -> Verdict {
    let quota_ended = fault == Some(Fault::QuotaEnded);
    match (Verdict::of_status(status, quota_ended), fault) {
        (Verdict::Success, Some(Fault::QuotaEnded)) => Verdict::Permanent,
        (Verdict::Success, Some(Fault::Status(status))) => Verdict::of_status(status, false),
        (Verdict::Success, Some(Fault::Other)) => Verdict::Transient,
        (verdict, _) => verdict,
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// What somebody before the upstream, a proxy perhaps, has to say in its own words.
fn described(status: u16, body: &Piece) -> Piece {
    let text = match body {
        Piece::Memory(bytes) => {
            String::from_utf8_lossy(&bytes[..bytes.len().min(EXCERPT_BYTES)]).into_owned()
        }
        Piece::Scratch(..) => String::new(),
    };
    let body = json!({"error": {
        "message": if text.is_empty() { format!("HTTP status {status}") } else { text },
        "type": "upstream_error",
        "param": null,
        "code": null,
    }});
    Piece::Memory(Bytes::from(escaped(body.to_string())))
}

/// Bytes on their way to memory or a scratch file.
#[derive(Default)]
struct Spool {
    line_ends: LineEnds,
    memory: BytesMut,
    scratch: Option<Scratch>,
    bytes: u64,
}

impl Spool {
    async fn take(&mut self, data: Bytes, keep: &Keep<'_>) -> Result<(), NoAnswer> {
        self.bytes += data.len() as u64;
        if self.bytes > ANSWER_BYTES_MAX {
            return Err(NoAnswer::TooLarge(ANSWER_BYTES_MAX));
        }
        // However much it grows, no piece is more than memory may hold.
        for piece in data.chunks(MEMORY_BYTES / GROWTH_MAX) {
            let mut flat = BytesMut::with_capacity(piece.len());
            self.line_ends.flatten(piece, &mut flat);
            self.put(flat, keep).await?;
        }
        Ok(())
    }

    async fn put(&mut self, flat: BytesMut, keep: &Keep<'_>) -> Result<(), NoAnswer> {
        let together = self.memory.len() + flat.len();
        if together > MEMORY_BYTES {
            let full = std::mem::replace(&mut self.memory, flat);
            return keep.put(&mut self.scratch, full).await;
        }
        // By powers of two, so that it never has more than it may.
        self.memory
            .reserve(together.next_power_of_two() - self.memory.len());
        self.memory.extend_from_slice(&flat);
        Ok(())
    }

    /// All bytes, and what they say if they are JSON.
    async fn finish(mut self, keep: &Keep<'_>) -> Result<(Piece, Result<Seen, String>), NoAnswer> {
        let mut flat = BytesMut::new();
        self.line_ends.end(&mut flat);
        self.put(flat, keep).await?;
        if self.scratch.is_none() {
            let seen = look(&self.memory);
            return Ok((Piece::Memory(self.memory.freeze()), seen));
        }
        keep.put(&mut self.scratch, self.memory).await?;
        let scratch = self
            .scratch
            .map(|Scratch { file, bytes }| (Arc::into_inner(file), bytes));
        let Some((Some(file), bytes)) = scratch else {
            return Err(Failure::internal("reading a scratch file", "it is in use").into());
        };
        let (file, seen) = spawn_blocking(move || {
            let seen = look_at_file(&file);
            (file, seen)
        })
        .await
        .map_err(Failure::when("reading a scratch file"))?;
        Ok((Piece::Scratch(file, bytes), seen))
    }
}

/// A scratch file that is written from its beginning.
struct Scratch {
    file: Arc<File>,
    bytes: u64,
}

impl Scratch {
    fn new(file: File) -> Scratch {
        Scratch {
            file: Arc::new(file),
            bytes: 0,
        }
    }

    /// What fails leaves nothing that the next attempt would not write over.
    async fn append(&mut self, bytes: Bytes) -> Result<(), Failure> {
        const WHAT: &str = "writing a scratch file";
        let (file, at, length) = (Arc::clone(&self.file), self.bytes, bytes.len() as u64);
        spawn_blocking(move || file.write_all_at(&bytes, at))
            .await
            .map_err(Failure::when(WHAT))?
            .map_err(Failure::when(WHAT))?;
        self.bytes += length;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::pace::Absence;

    #[test]
    fn an_error_under_a_status_that_says_that_all_is_well_is_judged_by_what_it_says() {
        for (fault, expected) in [
            (None, Verdict::Success),
            (Some(Fault::Other), Verdict::Transient),
            (Some(Fault::QuotaEnded), Verdict::Permanent),
            (Some(Fault::Status(400)), Verdict::Permanent),
            (Some(Fault::Status(429)), Verdict::Overloaded),
            (
                Some(Fault::Status(503)),
                Verdict::Absent(Absence::Unavailable),
            ),
        ] {
            assert_eq!(verdict(200, fault), expected, "{fault:?}");
        }
        assert_eq!(verdict(400, Some(Fault::Status(503))), Verdict::Permanent);
        assert_eq!(verdict(429, Some(Fault::QuotaEnded)), Verdict::Permanent);
        assert_eq!(verdict(429, Some(Fault::Other)), Verdict::Overloaded);
    }
}
