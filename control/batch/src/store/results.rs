//! Which results are recorded where.

use async_trait::async_trait;

use crate::error::Failure;
use crate::store::values::natural;

/// Which file a result line is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// The output file.
    Output,
    /// The error file.
    Error,
}

impl Stream {
    /// Name in keys, and in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Stream::Output => "output",
            Stream::Error => "error",
        }
    }

    fn from_str(name: &str) -> Result<Stream, Failure> {
        match name {
            "output" => Ok(Stream::Output),
            "error" => Ok(Stream::Error),
            _ => Err(Failure::internal("an unknown kind of part", name)),
        }
    }
}

/// Result lines that lie together in one blob. A result exists once its part is recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which file the lines are for.
    pub stream: Stream,
    /// The blob.
    pub key: String,
    /// Where in the blob they begin.
    pub offset: u64,
    /// How many bytes they are.
    pub bytes: u64,
    /// The numbers of the input lines that they answer.
    pub lines: Vec<u32>,
}

impl Part {
    /// The lines as they are kept.
    pub(super) fn packed_lines(&self) -> Vec<u8> {
        self.lines
            .iter()
            .flat_map(|line| line.to_le_bytes())
            .collect()
    }
}

/// A part as both databases keep it.
pub(super) struct PartRow {
    pub(super) stream: String,
    pub(super) key: String,
    pub(super) start: i64,
    pub(super) bytes: i64,
    pub(super) lines: Vec<u8>,
}

impl TryFrom<PartRow> for Part {
    type Error = Failure;

    fn try_from(row: PartRow) -> Result<Part, Failure> {
        let (lines, _) = row.lines.as_chunks::<4>();
        Ok(Part {
            stream: Stream::from_str(&row.stream)?,
            key: row.key,
            offset: natural(row.start),
            bytes: natural(row.bytes),
            lines: lines.iter().map(|line| u32::from_le_bytes(*line)).collect(),
        })
    }
}

/// Recorded results of batches. See [`Metadata`](super::Metadata).
#[async_trait]
pub trait Results: Send + Sync {
    /// The parts recorded for a batch, in the order of their recording.
    async fn parts(&self, batch: &str) -> Result<Vec<Part>, Failure>;
    /// Ended batches whose parts are still there, in the order of their ids from behind `after`; at most
    /// `limit`.
    async fn batches_with_parts_to_drop(
        &self,
        after: &str,
        limit: u32,
    ) -> Result<Vec<String>, Failure>;
    /// Whether a batch still needs what is stored for it as parts.
    async fn needs_parts(&self, batch: &str) -> Result<bool, Failure>;
    /// Forgets a batch's parts, once their blobs are gone.
    async fn drop_parts(&self, batch: &str) -> Result<(), Failure>;
}
