//! Reads an input file once, from front to back, in chunks, and makes its [`Index`] or the list of
//! what is wrong with it. Blocking: runs on a thread for blocking work.

use std::collections::HashSet;
use std::io::{self, Read};

use crate::input::line::{self, Checked, Rules, Wrong};
use crate::input::{BYTE_ORDER_MARK, FILE_BYTES_MAX, LINE_BYTES_MAX};
use crate::input::{EMBEDDING_INPUTS_MAX, Entry, Index, MODELS_MAX, REQUESTS_MAX};
use crate::state::{ERRORS_KEPT, LineError};

/// Bytes read at once. Lines that fit are looked at where they were read.
const CHUNK_BYTES: usize = 1 << 20;

/// What came of a file.
#[derive(Debug)]
pub enum Scan {
    /// All lines are good.
    Good(Index),
    /// At least one is not; the first [`ERRORS_KEPT`] faults.
    Bad(Vec<LineError>),
}

/// Checks the whole of `source`. `go_on` is asked before every chunk; when it says no, the scan ends
/// with an error of the kind [`io::ErrorKind::Interrupted`].
///
/// # Errors
/// When `source` cannot be read.
pub fn scan(mut source: impl Read, rules: Rules, go_on: impl Fn() -> bool) -> io::Result<Scan> {
    let mut scanner = Scanner::new(rules);
    let mut buffer = vec![0u8; CHUNK_BYTES];
    // Bytes of an unfinished line at the buffer's front.
    let mut held = 0;
    loop {
        if !go_on() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        if held == buffer.len() {
            // Long enough for a line one byte too long, which is then reported as such.
            buffer.resize((buffer.len() * 2).min(LINE_BYTES_MAX + 1), 0);
        }
        let read = match source.read(&mut buffer[held..]) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let filled = held + read;
        let mut begin = 0;
        for end in memchr::memchr_iter(b'\n', &buffer[held..filled]) {
            scanner.line(&buffer[begin..held + end], 1);
            begin = held + end + 1;
        }
        if begin == 0 && filled > LINE_BYTES_MAX {
            // Its end is not needed to know that it is too long.
            scanner.cut_line(filled);
            begin = filled;
        }
        if scanner.is_full() {
            break;
        }
        buffer.copy_within(begin..filled, 0);
        held = filled - begin;
    }
    if held > 0 && !scanner.is_full() {
        scanner.line(&buffer[..held], 0);
    }
    Ok(scanner.finish())
}

struct Scanner {
    rules: Rules,
    index: Index,
    /// Hashes of the names seen: 128 bits, so that two names never share one.
    custom_ids: HashSet<[u8; 16]>,
    errors: Vec<LineError>,
    /// Where the next line begins.
    offset: u64,
    /// The number of the line last seen.
    line: u32,
    requests: u32,
    inputs: u64,
    /// Whether a line that was too long is still going on.
    within_cut_line: bool,
    /// Set when reading on makes no sense.
    full: bool,
}

impl Scanner {
    fn new(rules: Rules) -> Scanner {
        Scanner {
            rules,
            index: Index::default(),
            custom_ids: HashSet::new(),
            errors: Vec::new(),
            offset: 0,
            line: 0,
            requests: 0,
            inputs: 0,
            within_cut_line: false,
            full: false,
        }
    }

    fn is_full(&self) -> bool {
        self.full || self.errors.len() >= ERRORS_KEPT
    }

    /// Takes one line; `feed_bytes` is the length of what ended it.
    fn line(&mut self, line: &[u8], feed_bytes: u64) {
        if self.full {
            return;
        }
        let offset = self.offset;
        self.offset += line.len() as u64 + feed_bytes;
        if std::mem::take(&mut self.within_cut_line) {
            return;
        }
        if self.offset > FILE_BYTES_MAX {
            self.refuse_file(
                "file_too_large",
                format!("An input file may have at most {FILE_BYTES_MAX} bytes."),
            );
            return;
        }
        self.line = self.line.saturating_add(1);
        let (line, offset) = match line.strip_prefix(BYTE_ORDER_MARK) {
            Some(rest) if offset == 0 => (rest, BYTE_ORDER_MARK.len() as u64),
            _ => (line, offset),
        };
        if line.trim_ascii().is_empty() {
            return;
        }
        self.requests += 1;
        if self.requests > REQUESTS_MAX {
            self.refuse_file(
                "too_many_requests",
                format!("A batch may have at most {REQUESTS_MAX} requests: split the file."),
            );
            return;
        }
        let judged = line::check(line, &self.rules).and_then(|checked| self.admit(&checked));
        match judged {
            Ok((model, prefix)) => self.index.entries.push(Entry {
                offset,
                // Lines are shorter than [`LINE_BYTES_MAX`], which `check` has seen to.
                bytes: u32::try_from(line.len()).unwrap_or(u32::MAX),
                line: self.line,
                model,
                prefix,
            }),
            Err(wrong) => self.refuse(wrong),
        }
    }

    /// Takes the beginning, or a middle part, of a line that is too long.
    fn cut_line(&mut self, bytes: usize) {
        if !self.within_cut_line {
            self.line = self.line.saturating_add(1);
            self.requests += 1;
            self.refuse(line::too_long());
        }
        self.offset += bytes as u64;
        self.within_cut_line = true;
    }

    /// What other lines decide: whether name and model fit theirs.
    fn admit(
        &mut self,
        checked: &Checked<'_>,
    ) -> Result<(u16, crate::input::prefix::Prefix), Wrong> {
        let mut digest = [0; 16];
        digest.copy_from_slice(&blake3::hash(checked.custom_id.as_bytes()).as_bytes()[..16]);
        if !self.custom_ids.insert(digest) {
            let message = format!(
                "custom_id {} was used on an earlier line; every request needs its own.",
                line::quoted(&checked.custom_id)
            );
            return Err(Wrong::new(
                "duplicate_custom_id",
                Some("custom_id"),
                message,
            ));
        }
        self.inputs = self.inputs.saturating_add(checked.inputs - 1) + 1;
        if self.inputs > EMBEDDING_INPUTS_MAX {
            let message = format!(
                "The requests of a batch may have at most {EMBEDDING_INPUTS_MAX} inputs together."
            );
            return Err(Wrong::new(
                "too_many_embedding_inputs",
                Some("body.input"),
                message,
            ));
        }
        Ok((self.model(&checked.model)?, checked.prefix))
    }

    fn model(&mut self, model: &str) -> Result<u16, Wrong> {
        let models = &mut self.index.models;
        let mismatch = |message| Err(Wrong::new("mismatched_model", Some("body.model"), message));
        let position = match models.iter().position(|known| known == model) {
            Some(position) => position,
            None if models.is_empty() || self.rules.mixed_models => {
                if models.len() == MODELS_MAX {
                    return mismatch(format!("A batch may name at most {MODELS_MAX} models."));
                }
                models.push(model.to_owned());
                models.len() - 1
            }
            None => {
                let (model, first) = (line::quoted(model), line::quoted(&models[0]));
                return mismatch(format!(
                    "All requests of a batch must name one model: this line has {model}, the \
                     first has {first}."
                ));
            }
        };
        Ok(u16::try_from(position).unwrap_or(u16::MAX))
    }

    fn refuse(&mut self, wrong: Wrong) {
        self.errors.push(LineError {
            code: wrong.code.to_owned(),
            message: wrong.message,
            param: wrong.param.map(str::to_owned),
            line: Some(u64::from(self.line)),
        });
    }

    /// Something about the file as a whole, after which no line matters.
    fn refuse_file(&mut self, code: &str, message: String) {
        self.full = true;
        self.errors.push(LineError {
            code: code.to_owned(),
            message,
            param: None,
            line: None,
        });
    }

    fn finish(mut self) -> Scan {
        if self.requests == 0 && self.errors.is_empty() {
            self.refuse_file(
                "empty_file",
                "The input file has no requests: it needs at least one line.".to_owned(),
            );
        }
        if self.errors.is_empty() {
            Scan::Good(self.index)
        } else {
            Scan::Bad(self.errors)
        }
    }
}

#[cfg(test)]
mod tests;
