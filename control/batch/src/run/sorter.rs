//! Puts the lines of results into the order of the input, by way of a scratch file.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use tokio::task::spawn_blocking;

use crate::blobs::BlobWriter;
use crate::error::Failure;
use crate::run::lease::Lease;

const WHAT: &str = "sorting a batch's results";
/// Bytes read from the scratch file at once.
const CHUNK_BYTES: u64 = 1 << 20;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Sorter {
    scratch: Arc<File>,
    bytes: u64,
    lines: Vec<Line>,
    /// The input's lines that the results to come belong to.
    to_come: VecDeque<u32>,
    /// Where the result that is being written begins.
    begin: u64,
}

/// Where the result for a line of the input is.
#[derive(Clone, Copy, Debug)]
struct Line {
    number: u32,
    offset: u64,
    bytes: u64,
}

impl Sorter {
    pub(super) fn new(scratch: File) -> Sorter {
        Sorter {
            scratch: Arc::new(scratch),
            bytes: 0,
            lines: Vec::new(),
            to_come: VecDeque::new(),
            begin: 0,
        }
    }

    /// What is written next are the results for these lines of the input.
    pub(super) fn announce(&mut self, lines: &[u32]) {
        self.to_come.extend(lines);
    }

    pub(super) async fn write(&mut self, piece: Bytes) -> Result<(), Failure> {
        for end in memchr::memchr_iter(b'\n', &piece) {
            let end = self.bytes + end as u64 + 1;
            let number = self.to_come.pop_front().ok_or_else(unexpected)?;
            self.lines.push(Line {
                number,
                offset: self.begin,
                bytes: end - self.begin,
            });
            self.begin = end;
        }
        let (scratch, at) = (Arc::clone(&self.scratch), self.bytes);
        self.bytes += piece.len() as u64;
        spawn_blocking(move || scratch.write_all_at(&piece, at))
            .await
            .map_err(Failure::when(WHAT))?
            .map_err(Failure::when(WHAT))
    }

    /// Writes all lines in the order of the input.
    pub(super) async fn finish(
        mut self,
        lease: &Lease,
        target: &mut dyn BlobWriter,
    ) -> Result<(), Failure> {
        if self.begin != self.bytes || !self.to_come.is_empty() {
            return Err(unexpected());
        }
        self.lines.sort_unstable_by_key(|line| line.number);
        for chunk in chunks(&self.lines) {
            lease.check()?;
            let scratch = Arc::clone(&self.scratch);
            let read = spawn_blocking(move || read(&scratch, &chunk)).await;
            let read = read.map_err(Failure::when(WHAT))?;
            target.write(read.map_err(Failure::when(WHAT))?).await?;
        }
        Ok(())
    }
}

fn unexpected() -> Failure {
    Failure::internal(WHAT, "there are not as many lines as were recorded")
}

/// Places and lengths, a chunk's worth of them at a time.
fn chunks(lines: &[Line]) -> Vec<Vec<(u64, u64)>> {
    let mut chunks = vec![Vec::new()];
    let mut room = CHUNK_BYTES;
    for line in lines {
        let (mut offset, mut left) = (line.offset, line.bytes);
        while left > 0 {
            if room == 0 {
                chunks.push(Vec::new());
                room = CHUNK_BYTES;
            }
            let bytes = left.min(room);
            if let Some(chunk) = chunks.last_mut() {
                chunk.push((offset, bytes));
            }
            offset += bytes;
            left -= bytes;
            room -= bytes;
        }
    }
    chunks
}

fn read(scratch: &File, chunk: &[(u64, u64)]) -> std::io::Result<Bytes> {
    let mut read = Vec::new();
    for (offset, bytes) in chunk {
        let begin = read.len();
        let bytes = usize::try_from(*bytes).map_err(std::io::Error::other)?;
        read.resize(begin + bytes, 0);
        scratch.read_exact_at(&mut read[begin..], *offset)?;
    }
    Ok(Bytes::from(read))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_hold_all_and_none_is_too_large() {
        let line = |number: u32, offset, bytes| Line {
            number,
            offset,
            bytes,
        };
        let long = 5 * CHUNK_BYTES / 2;
        let chunks = chunks(&[line(1, long, 7), line(2, 0, long), line(3, long + 7, 1)]);
        let bytes = |chunk: &Vec<(u64, u64)>| chunk.iter().map(|(_, bytes)| bytes).sum::<u64>();
        let total: u64 = chunks.iter().map(bytes).sum();
        assert_eq!(total, long + 8);
        assert!(chunks.iter().all(|chunk| bytes(chunk) <= CHUNK_BYTES));
        assert_eq!(chunks[0][..2], [(long, 7), (0, CHUNK_BYTES - 7)]);
        assert_eq!(chunks.last().unwrap().last(), Some(&(long + 7, 1)));
    }

    #[tokio::test]
    async fn results_that_are_more_or_fewer_than_were_recorded_are_refused() {
        let sorter = || Sorter::new(tempfile::tempfile().unwrap());
        let mut more = sorter();
        more.announce(&[1]);
        let two = Bytes::from_static(b"a\nb\n");
        more.write(two).await.unwrap_err();
        let mut cut = sorter();
        cut.announce(&[1, 2]);
        cut.write(Bytes::from_static(b"a\nb")).await.unwrap();
        assert!(cut.begin != cut.bytes);
    }
}
