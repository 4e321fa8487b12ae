//! Bytes: uploaded files, results, output files. [`Blobs`] is implemented on a local directory and
//! on object stores. Keys are made by this program alone, from ids that it gave out.

mod local;
mod object;

use std::fs;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;

use crate::error::Failure;
use crate::store::{Fence, Stream};

pub use local::Local;
pub use object::{Objects, TRANSFER_BYTES};

/// The bytes of a blob, in pieces.
pub type ByteStream = BoxStream<'static, Result<Bytes, Failure>>;

/// Bytes that wait to be written: in memory or, where they were many, in a scratch file.
#[derive(Debug)]
pub enum Piece {
    /// In memory.
    Memory(Bytes),
    /// In a file that has no name, from its beginning.
    Scratch(fs::File, u64),
}

impl Piece {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Piece::Memory(bytes) => bytes.len() as u64,
            Piece::Scratch(_, bytes) => *bytes,
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where appended bytes went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The blob.
    pub key: String,
    /// Where in it they begin.
    pub offset: u64,
    /// How many they are.
    pub bytes: u64,
}

/// A blob that is being written. It can be seen only once it is finished; dropped before, it leaves
/// at most litter that [`Blobs`] clears away.
#[async_trait]
pub trait BlobWriter: Send {
    /// Adds bytes.
    async fn write(&mut self, bytes: Bytes) -> Result<(), Failure>;
    /// Makes the blob durable and visible.
    async fn finish(self: Box<Self>) -> Result<(), Failure>;
    /// Throws away what was written.
    async fn abandon(self: Box<Self>);
}

/// Writes the results of one batch under one lease. Two leases never write to the same blob.
#[async_trait]
pub trait PartWriter: Send + Sync {
    /// Makes the bytes durable; what fails leaves nothing that a later append could run into.
    async fn append(&mut self, stream: Stream, pieces: Arc<Vec<Piece>>) -> Result<Extent, Failure>;
}

/// See the module's documentation.
#[async_trait]
pub trait Blobs: Send + Sync {
    /// Whether the store answers.
    async fn ping(&self) -> Result<(), Failure>;
    /// Begins a blob.
    async fn create(&self, key: &str) -> Result<Box<dyn BlobWriter>, Failure>;
    /// Memory that one stream of [`Blobs::read`] takes while it is read.
    fn stream_bytes(&self) -> u64;
    /// Reads part of a blob.
    async fn read(&self, key: &str, range: Range<u64>) -> Result<ByteStream, Failure>;
    /// The blob as a file for random access, copied to this machine if need be.
    async fn local(&self, key: &str) -> Result<fs::File, Failure>;
    /// Removes a blob, if it is there.
    async fn delete(&self, key: &str) -> Result<(), Failure>;
    /// Begins to write the results of a batch.
    fn part_writer(&self, fence: &Fence) -> Box<dyn PartWriter>;
    /// Removes all results of a batch, whoever wrote them.
    async fn delete_parts(&self, batch: &str) -> Result<(), Failure>;
    /// How long results are gathered before they are written.
    fn gather(&self) -> Duration;
    /// A file without a name, for bytes that memory should not hold.
    fn scratch(&self) -> Result<fs::File, Failure>;
    /// Ids of the files whose bytes are there and older than `age`, known to the database or not.
    async fn stored_files(&self, age: Duration) -> Result<Vec<String>, Failure>;
    /// The batches for which parts are there, known to the database or not.
    async fn batches_with_parts(&self) -> Result<Vec<String>, Failure>;
    /// How many bytes a blob has; none if it is not there.
    async fn length(&self, key: &str) -> Result<Option<u64>, Failure>;
}

/// Where the results of a batch are.
fn parts_of(batch: &str) -> String {
    format!("parts/{batch}")
}
