//! An answer of the upstream, read as it arrives: short ones into memory, long ones into a scratch
//! file. Line feeds become spaces on the way, since a result is one line; in JSON they can only be
//! white space.

use std::fs::File;
use std::io::{BufReader, Seek, SeekFrom, Write};
use std::time::{Duration, SystemTime};

use axum::http::{HeaderMap, Response};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;

use crate::batch::blobs::{Blobs, Piece};
use crate::batch::error::Failure;
use crate::batch::input::Object;
use crate::batch::run::retry::{Verdict, retry_after};
use crate::batch::run::upstream::NoAnswer;
use crate::batch::state::Usage;

/// Bytes of an answer at most.
pub(super) const ANSWER_BYTES_MAX: u64 = 32 << 20;
/// Bytes of an answer that are kept in memory.
pub(super) const MEMORY_BYTES: usize = 64 << 10;
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

/// Reads an answer to its end.
pub(super) async fn read(
    response: Response<Incoming>,
    blobs: &dyn Blobs,
) -> Result<Answer, NoAnswer> {
    let (head, mut body) = response.into_parts();
    let mut spool = Spool::default();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| NoAnswer::Broken(error.to_string()))?;
        if let Ok(data) = frame.into_data() {
            spool.take(data, blobs).await?;
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
    let (body, seen) = spool.finish().await?;
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
    scratch: Option<File>,
    bytes: u64,
}

impl Spool {
    async fn take(&mut self, data: Bytes, blobs: &dyn Blobs) -> Result<(), NoAnswer> {
        self.bytes += data.len() as u64;
        if self.bytes > ANSWER_BYTES_MAX {
            return Err(NoAnswer::TooLarge(ANSWER_BYTES_MAX));
        }
        self.memory.extend_from_slice(&data);
        if self.memory.len() <= MEMORY_BYTES {
            return Ok(());
        }
        let file = match self.scratch.take() {
            Some(file) => file,
            None => blobs.scratch()?,
        };
        self.scratch = Some(spill(file, self.memory.split()).await?);
        Ok(())
    }

    /// All bytes, and what they say if they are JSON.
    async fn finish(mut self) -> Result<(Piece, Result<Seen, String>), Failure> {
        let Some(file) = self.scratch.take() else {
            flatten(&mut self.memory);
            let seen = look(&self.memory);
            return Ok((Piece::Memory(self.memory.freeze()), seen));
        };
        let file = spill(file, self.memory.split()).await?;
        let bytes = self.bytes;
        let (file, seen) = spawn_blocking(move || {
            let seen = look_at_file(&file);
            (file, seen)
        })
        .await
        .map_err(Failure::when("reading a scratch file"))?;
        Ok((Piece::Scratch(file, bytes), seen))
    }
}

async fn spill(mut file: File, mut bytes: BytesMut) -> Result<File, Failure> {
    const WHAT: &str = "writing a scratch file";
    spawn_blocking(move || {
        flatten(&mut bytes);
        file.write_all(&bytes).map(|()| file)
    })
    .await
    .map_err(Failure::when(WHAT))?
    .map_err(Failure::when(WHAT))
}

fn flatten(bytes: &mut [u8]) {
    for byte in bytes {
        if matches!(byte, b'\n' | b'\r') {
            *byte = b' ';
        }
    }
}

/// The parts of a body that are read, whichever endpoint it is from.
#[derive(Deserialize)]
struct Root {
    usage: Option<Value>,
    error: Option<Value>,
}

impl Root {
    fn seen(&self) -> Seen {
        let count = |names: [&str; 2]| {
            let usage = self.usage.as_ref()?;
            names.iter().find_map(|name| usage[*name].as_u64())
        };
        let detail = |names: [&str; 2], field: &str| {
            let usage = self.usage.as_ref()?;
            names.iter().find_map(|name| usage[*name][field].as_u64())
        };
        let input = count(["prompt_tokens", "input_tokens"]).unwrap_or(0);
        let output = count(["completion_tokens", "output_tokens"]).unwrap_or(0);
        let input_details = ["prompt_tokens_details", "input_tokens_details"];
        let output_details = ["completion_tokens_details", "output_tokens_details"];
        let code = self.error.as_ref().map(|error| &error["code"]);
        Seen {
            usage: Usage {
                input_tokens: input,
                cached_tokens: detail(input_details, "cached_tokens").unwrap_or(0),
                output_tokens: output,
                reasoning_tokens: detail(output_details, "reasoning_tokens").unwrap_or(0),
                total_tokens: count(["total_tokens"; 2]).unwrap_or(input.saturating_add(output)),
            },
            quota_ended: code.is_some_and(|code| code == "insufficient_quota"),
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
    use std::io::Read;

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
