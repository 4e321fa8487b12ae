//! The file that is submitted. A pipe (`submit <(make-requests)`) is copied first: how long it is has
//! to be known, and its first line is read twice.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use serde::Deserialize;

use crate::client::ClientError;
use crate::input::{BYTE_ORDER_MARK, FILE_BYTES_MAX, LINE_BYTES_MAX};

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) file: File,
    pub(super) bytes: u64,
    pub(super) name: String,
}

impl Input {
    /// Opens what `path` names, which may be a file, a pipe or a terminal.
    pub(super) fn open(path: &Path) -> Result<Input, ClientError> {
        let failed = |source| ClientError::File {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if metadata.is_dir() {
            return Err(failed(io::ErrorKind::IsADirectory.into()));
        }
        let name = path.file_name().unwrap_or(path.as_os_str());
        let name = name.to_string_lossy().into_owned();
        if metadata.is_file() {
            let bytes = metadata.len();
            return Ok(Input { file, bytes, name });
        }
        let mut copy = tempfile::tempfile().map_err(failed)?;
        // One byte more shows that there is too much, without reading on for ever.
        let bytes = io::copy(&mut file.take(FILE_BYTES_MAX + 1), &mut copy).map_err(failed)?;
        if bytes > FILE_BYTES_MAX {
            let message = format!(
                "{} has more than {FILE_BYTES_MAX} bytes, which is what a batch may have: split it",
                path.display()
            );
            return Err(ClientError::Wrong(message));
        }
        copy.rewind().map_err(failed)?;
        Ok(Input {
            file: copy,
            bytes,
            name: "requests.jsonl".to_owned(),
        })
    }

    /// The endpoint that the first request names.
    pub(super) fn endpoint(&mut self) -> Result<String, ClientError> {
        #[derive(Deserialize)]
        struct Line {
            url: String,
        }
        let first = self.first_line().map_err(|source| ClientError::File {
            path: self.name.clone().into(),
            source,
        })?;
        let Some(first) = first else {
            let message = format!("{} is empty: put one request on each line", self.name);
            return Err(ClientError::Wrong(message));
        };
        let line: Option<Line> = serde_json::from_slice(&first).ok();
        line.map(|line| line.url).ok_or_else(|| {
            ClientError::Wrong(format!(
                "the first line of {} is no request with a \"url\": mend it, or say --endpoint",
                self.name
            ))
        })
    }

    fn first_line(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut begin = BufReader::new((&self.file).take(LINE_BYTES_MAX as u64));
        let mut line = Vec::new();
        let mut is_first = true;
        let found = loop {
            line.clear();
            if begin.read_until(b'\n', &mut line)? == 0 {
                break None;
            }
            let text = match line.strip_prefix(BYTE_ORDER_MARK) {
                Some(rest) if is_first => rest,
                _ => &line,
            };
            if !text.trim_ascii().is_empty() {
                break Some(text.to_vec());
            }
            is_first = false;
        };
        self.file.seek(SeekFrom::Start(0))?;
        Ok(found)
    }
}
