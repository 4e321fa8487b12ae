//! An answer of the upstream, read as it arrives: short ones into memory, long ones into a scratch
//! file. Line feeds become spaces on the way, since a result is one line; in JSON they can only be
//! white space.

use std::fs::File;
use std::io::{BufReader, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::http::{HeaderMap, Response};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny, MapAccess};
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout_at};

use crate::batch::blobs::{Blobs, Piece};
use crate::batch::error::Failure;
use crate::batch::input::Object;
use crate::batch::run::lenient::{Lenient, Value, fields};
use crate::batch::run::retry::{Verdict, retry_after};
use crate::batch::run::storage::Storage;
use crate::batch::run::upstream::NoAnswer;
use crate::batch::state::Usage;

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
    pub(super) storage: &'a Storage,
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
                    let trouble = trouble.get_or_insert_with(|| self.storage.trouble());
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
        verdict: Verdict::of_status(status, seen.quota_ended),
        retry_after: after,
    })
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
    Piece::Memory(Bytes::from(body.to_string()))
}

/// What matters in an answer's body.
#[derive(Default)]
struct Seen {
    usage: Usage,
    /// Whether the error says that no tokens are left to be bought.
    quota_ended: bool,
}

/// Bytes on their way to memory or a scratch file.
#[derive(Default)]
struct Spool {
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
        let together = self.memory.len() + data.len();
        if together > MEMORY_BYTES {
            if !self.memory.is_empty() {
                let full = self.memory.split();
                keep.put(&mut self.scratch, full).await?;
            }
            let mut data = BytesMut::from(data);
            flatten(&mut data);
            return keep.put(&mut self.scratch, data).await;
        }
        // By powers of two, so that it never has more than it may.
        self.memory
            .reserve(together.next_power_of_two() - self.memory.len());
        let before = self.memory.len();
        self.memory.extend_from_slice(&data);
        flatten(&mut self.memory[before..]);
        Ok(())
    }

    /// All bytes, and what they say if they are JSON.
    async fn finish(mut self, keep: &Keep<'_>) -> Result<(Piece, Result<Seen, String>), NoAnswer> {
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
        // One at a time: what an odd answer has in the place of a number is read into memory.
        static LOOKS: Semaphore = Semaphore::const_new(1);
        let _turn = LOOKS.acquire().await;
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

fn flatten(bytes: &mut [u8]) {
    for byte in bytes {
        if matches!(byte, b'\n' | b'\r') {
            *byte = b' ';
        }
    }
}

/// The parts of a body that are read, whichever endpoint it is from. Whatever else is there, and
/// however much, is passed over.
#[derive(Deserialize)]
struct Root {
    #[serde(default)]
    usage: Lenient<Counts>,
    #[serde(default)]
    error: Lenient<Problem>,
}

#[derive(Default, Deserialize)]
struct Counts {
    #[serde(default)]
    prompt_tokens: Lenient<u64>,
    #[serde(default)]
    input_tokens: Lenient<u64>,
    #[serde(default)]
    completion_tokens: Lenient<u64>,
    #[serde(default)]
    output_tokens: Lenient<u64>,
    #[serde(default)]
    total_tokens: Lenient<u64>,
    #[serde(default)]
    prompt_tokens_details: Lenient<Details>,
    #[serde(default)]
    input_tokens_details: Lenient<Details>,
    #[serde(default)]
    completion_tokens_details: Lenient<Details>,
    #[serde(default)]
    output_tokens_details: Lenient<Details>,
}

#[derive(Default, Deserialize)]
struct Details {
    #[serde(default)]
    cached_tokens: Lenient<u64>,
    #[serde(default)]
    reasoning_tokens: Lenient<u64>,
}

#[derive(Default, Deserialize)]
struct Problem {
    #[serde(default)]
    code: Lenient<QuotaEnded>,
}

/// Whether the code is that of a quota that has ended.
struct QuotaEnded;

impl Value for QuotaEnded {
    fn text(code: &str) -> Option<QuotaEnded> {
        (code == "insufficient_quota").then_some(QuotaEnded)
    }
}

impl Value for Counts {
    fn object<'de, A: MapAccess<'de>>(map: A) -> Result<Option<Counts>, A::Error> {
        fields(map)
    }
}

impl Value for Details {
    fn object<'de, A: MapAccess<'de>>(map: A) -> Result<Option<Details>, A::Error> {
        fields(map)
    }
}

impl Value for Problem {
    fn object<'de, A: MapAccess<'de>>(map: A) -> Result<Option<Problem>, A::Error> {
        fields(map)
    }
}

impl Root {
    fn seen(self) -> Seen {
        let counts = self.usage.0.unwrap_or_default();
        let input = counts.prompt_tokens.0.or(counts.input_tokens.0);
        let output = counts.completion_tokens.0.or(counts.output_tokens.0);
        let (input, output) = (input.unwrap_or(0), output.unwrap_or(0));
        let prompt = counts.prompt_tokens_details.0.unwrap_or_default();
        let prompt = prompt.or(counts.input_tokens_details.0);
        let completion = counts.completion_tokens_details.0.unwrap_or_default();
        let completion = completion.or(counts.output_tokens_details.0);
        Seen {
            usage: Usage {
                input_tokens: input,
                cached_tokens: prompt.cached_tokens.0.unwrap_or(0),
                output_tokens: output,
                reasoning_tokens: completion.reasoning_tokens.0.unwrap_or(0),
                total_tokens: counts
                    .total_tokens
                    .0
                    .unwrap_or(input.saturating_add(output)),
            },
            quota_ended: self.error.0.is_some_and(|error| error.code.0.is_some()),
        }
    }
}

impl Details {
    fn or(self, other: Option<Details>) -> Details {
        let other = other.unwrap_or_default();
        Details {
            cached_tokens: Lenient(self.cached_tokens.0.or(other.cached_tokens.0)),
            reasoning_tokens: Lenient(self.reasoning_tokens.0.or(other.reasoning_tokens.0)),
        }
    }
}

fn look(body: &[u8]) -> Result<Seen, String> {
    let text = str::from_utf8(body).map_err(|error| error.to_string())?;
    match serde_json::from_str::<Object<Root>>(text) {
        Ok(Object(root)) => Ok(root.seen()),
        // JSON, perhaps, but no object: there is nothing in it to look at.
        Err(error) if error.is_data() => serde_json::from_str::<IgnoredAny>(text)
            .map(|_| Seen::default())
            .map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

/// The same for a file, without holding more of it than a buffer.
fn look_at_file(file: &File) -> Result<Seen, String> {
    match read_file::<Object<Root>>(file)? {
        Ok(Object(root)) => Ok(root.seen()),
        Err(error) if error.is_data() => read_file::<IgnoredAny>(file)?
            .map(|_| Seen::default())
            .map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

fn read_file<T: DeserializeOwned>(mut file: &File) -> Result<serde_json::Result<T>, String> {
    file.seek(SeekFrom::Start(0)).map_err(|e| e.to_string())?;
    let reader = BufReader::with_capacity(MEMORY_BYTES, Utf8Only::new(file));
    Ok(serde_json::from_reader(reader))
}

/// Passes bytes through as long as they are UTF-8: the parser does not look into strings that it
/// skips.
struct Utf8Only<R> {
    source: R,
    /// The beginning of a character whose end has not been read yet.
    tail: Vec<u8>,
}

impl<R> Utf8Only<R> {
    fn new(source: R) -> Utf8Only<R> {
        Utf8Only {
            source,
            tail: Vec::with_capacity(4),
        }
    }
}

impl<R: std::io::Read> std::io::Read for Utf8Only<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.source.read(buffer)?;
        let mut pending = std::mem::take(&mut self.tail);
        pending.extend_from_slice(&buffer[..read]);
        match str::from_utf8(&pending) {
            Ok(_) => Ok(read),
            Err(error) if error.error_len().is_none() && read > 0 => {
                self.tail = pending.split_off(error.valid_up_to());
                Ok(read)
            }
            Err(_) => Err(std::io::Error::other("it is not UTF-8")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn file(body: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(body).unwrap();
        file
    }

    #[test]
    fn usage_is_read_in_both_of_openai_s_spellings() {
        let chat = br#"{"usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 3}}}"#;
        let responses = br#"{"usage": {"input_tokens": 5, "output_tokens": 7,
            "input_tokens_details": {"cached_tokens": 4},
            "output_tokens_details": {"reasoning_tokens": 3}}}"#;
        let expected = Usage {
            input_tokens: 5,
            cached_tokens: 4,
            output_tokens: 7,
            reasoning_tokens: 3,
            total_tokens: 12,
        };
        for body in [&chat[..], responses] {
            assert_eq!(look(body).unwrap().usage, expected);
            assert_eq!(look_at_file(&file(body)).unwrap().usage, expected);
        }
        for odd in [
            &b"[1]"[..],
            b"[1, 2, 3]",
            b"[{}, {\"code\": \"insufficient_quota\"}]",
            b"[]",
            b"{}",
            b"{\"error\": 1, \"error\": 2}",
            b"{\"usage\": null}",
            b"{\"usage\": {\"prompt_tokens\": -1.5}}",
            b"\"text\"",
        ] {
            for seen in [look(odd), look_at_file(&file(odd))] {
                let seen = seen.unwrap();
                assert_eq!(seen.usage, Usage::default());
                assert!(!seen.quota_ended);
            }
        }
        for broken in [
            &b""[..],
            b"{",
            b"<html>",
            b"[1",
            b"[\"\xff\"]",
            b"{\"a\": \"\xff\"}",
        ] {
            assert!(look(broken).is_err());
            assert!(look_at_file(&file(broken)).is_err());
        }
    }

    #[test]
    fn a_quota_that_has_ended_is_told_from_one_that_comes_back() {
        let ended = br#"{"error": {"code": "insufficient_quota"}}"#;
        assert!(look(ended).unwrap().quota_ended);
        let slow = br#"{"error": {"code": "rate_limit_exceeded"}}"#;
        assert!(!look(slow).unwrap().quota_ended);
    }

    #[test]
    fn characters_may_be_cut_anywhere_but_must_be_characters() {
        struct OneByOne<'a>(&'a [u8]);
        impl Read for OneByOne<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
                let count = self.0.len().min(1).min(buffer.len());
                buffer[..count].copy_from_slice(&self.0[..count]);
                self.0 = &self.0[count..];
                Ok(count)
            }
        }
        let read = |bytes: &[u8]| {
            let mut out = Vec::new();
            Utf8Only::new(OneByOne(bytes))
                .read_to_end(&mut out)
                .map(|_| out)
        };
        assert_eq!(read("aé€😀".as_bytes()).unwrap(), "aé€😀".as_bytes());
        assert!(read(b"a\xffb").is_err());
        assert!(read(&"€".as_bytes()[..2]).is_err(), "cut off at the end");
    }
}
