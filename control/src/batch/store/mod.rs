//! Metadata: files, batches, leases, and which results are recorded where. The only truth there is;
//! servers keep nothing that they could not read again from here.
//!
//! [`Metadata`] is implemented on SQLite, for one server, and on PostgreSQL, for several.

mod postgres;
mod sqlite;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::batch::clock::Seconds;
use crate::batch::error::Failure;
use crate::batch::file::{File, Purpose};
use crate::batch::state::{Batch, Change};

pub use postgres::Postgres;
pub use sqlite::Sqlite;

/// How long a create that a client sends again is recognised.
pub const RETRY_WINDOW_S: Seconds = 15 * 60;

/// The right to work on a batch: given by [`Metadata::acquire`], void as soon as somebody else was
/// given a higher epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    /// The batch.
    pub batch: String,
    /// Counts the owners that the batch has had.
    pub epoch: i64,
}

/// What a batch needs next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Its input file has to be validated.
    Validate,
    /// Its requests have to be sent.
    Run,
}

impl Stage {
    /// The stage of a live batch.
    #[must_use]
    pub fn of(batch: &Batch) -> Stage {
        // A file without requests does not become valid.
        if batch.counts().total == 0 {
            Stage::Validate
        } else {
            Stage::Run
        }
    }
}

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
    fn packed_lines(&self) -> Vec<u8> {
        self.lines
            .iter()
            .flat_map(|line| line.to_le_bytes())
            .collect()
    }

    fn unpacked_lines(packed: &[u8]) -> Vec<u32> {
        let (lines, _) = packed.as_chunks::<4>();
        lines.iter().map(|line| u32::from_le_bytes(*line)).collect()
    }
}

/// Which part of a list is wanted.
#[derive(Clone, Debug)]
pub struct Page {
    /// The id after which it begins.
    pub after: Option<String>,
    /// Items at most.
    pub limit: u32,
    /// Oldest first.
    pub ascending: bool,
}

/// Items of a list, and whether there are more.
#[derive(Debug)]
pub struct Listed<T> {
    /// The items.
    pub items: Vec<T>,
    /// Whether others follow.
    pub has_more: bool,
}

impl<T> Listed<T> {
    /// From a query for one item more than was asked for.
    fn of(mut items: Vec<T>, limit: u32) -> Listed<T> {
        let has_more = items.len() > limit as usize;
        items.truncate(limit as usize);
        Listed { items, has_more }
    }
}

/// A create that may be the repetition of an earlier one.
#[derive(Clone, Debug)]
pub struct Create {
    /// Hash of what was asked for.
    pub digest: String,
    /// Whether the client says that it has tried before.
    pub is_retry: bool,
}

/// A user of AIBrix's metadata API: limits for the router.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// Its name.
    pub name: String,
    /// Requests a minute.
    #[serde(default)]
    pub rpm: u64,
    /// Tokens a minute.
    #[serde(default)]
    pub tpm: u64,
}

/// What the queue looks like, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// Batches that have not ended.
    pub live: u64,
    /// Of these, those that nobody works on.
    pub waiting: u64,
    /// When the oldest of these was created.
    pub oldest_waiting_at: Option<Seconds>,
}

/// See the module's documentation. All methods are atomic; what has returned survives a crash.
#[async_trait]
pub trait Metadata: Send + Sync {
    /// Whether the database answers.
    async fn ping(&self) -> Result<(), Failure>;

    /// Adds an uploaded file, or gives back the one that the same create has added before.
    ///
    /// # Errors
    /// [`Failure::Quota`] when the owner's files would take more than `quota_bytes`.
    async fn add_file(
        &self,
        file: File,
        create: Create,
        quota_bytes: Option<u64>,
    ) -> Result<File, Failure>;
    /// A file of this tenant.
    async fn file(&self, tenant: &str, id: &str) -> Result<Option<File>, Failure>;
    /// The files of this tenant, if `page.after` is none or one of them.
    async fn files(
        &self,
        tenant: &str,
        purpose: Option<Purpose>,
        page: Page,
    ) -> Result<Option<Listed<File>>, Failure>;
    /// Bytes of this tenant's files.
    async fn stored_bytes(&self, tenant: &str) -> Result<u64, Failure>;
    /// Takes a file from its owner's sight; its bytes stay until [`Metadata::unused_files`] says so.
    async fn delete_file(&self, tenant: &str, id: &str) -> Result<bool, Failure>;
    /// Marks files that have expired as deleted.
    async fn expire_files(&self, now: Seconds) -> Result<u64, Failure>;
    /// Files that are deleted and that no live batch reads; at most `limit`.
    async fn unused_files(&self, limit: u32) -> Result<Vec<String>, Failure>;
    /// Forgets a deleted file, once its bytes are gone.
    async fn forget_file(&self, id: &str) -> Result<(), Failure>;
    /// Whether a file is known, deleted or not.
    async fn knows_file(&self, id: &str) -> Result<bool, Failure>;

    /// Adds a batch, or gives back the one that the same create has added before.
    async fn add_batch(&self, batch: Batch, create: Create) -> Result<Batch, Failure>;
    /// A batch of this tenant.
    async fn batch(&self, tenant: &str, id: &str) -> Result<Option<Batch>, Failure>;
    /// The batches of this tenant, if `page.after` is none or one of them.
    async fn batches(&self, tenant: &str, page: Page) -> Result<Option<Listed<Batch>>, Failure>;
    /// Marks a batch of this tenant for cancellation.
    ///
    /// # Errors
    /// [`Failure::Illegal`] when it has ended otherwise.
    async fn cancel(&self, tenant: &str, id: &str, now: Seconds) -> Result<Option<Batch>, Failure>;

    /// Takes up to `limit` live batches at this stage that nobody works on, for `lease_ms`: first
    /// those of tenants for whom the fewest are being worked on, then the oldest.
    async fn acquire(
        &self,
        server: &str,
        stage: Stage,
        lease_ms: i64,
        limit: u32,
    ) -> Result<Vec<(Batch, Fence)>, Failure>;
    /// Prolongs a lease, and gives the batch as it is now.
    ///
    /// # Errors
    /// [`Failure::Fenced`] when somebody else has it.
    async fn renew(&self, fence: &Fence, lease_ms: i64) -> Result<Batch, Failure>;
    /// Gives a batch back to whoever takes it next, not before `pause_ms` have passed.
    async fn release(&self, fence: &Fence, pause_ms: i64) -> Result<(), Failure>;
    /// Changes a batch, adds the parts that go with the change and the files that it names. A
    /// change whose parts are there already was made before, and is not made again.
    ///
    /// # Errors
    /// [`Failure::Fenced`] when somebody else has the lease; nothing is then written.
    async fn change(
        &self,
        fence: &Fence,
        change: Change,
        parts: Vec<Part>,
        files: Vec<File>,
    ) -> Result<Batch, Failure>;
    /// The parts recorded for a batch, in the order of their recording.
    async fn parts(&self, batch: &str) -> Result<Vec<Part>, Failure>;
    /// Ended batches whose parts are still there; at most `limit`.
    async fn batches_with_parts_to_drop(&self, limit: u32) -> Result<Vec<String>, Failure>;
    /// Forgets a batch's parts, once their blobs are gone.
    async fn drop_parts(&self, batch: &str) -> Result<(), Failure>;
    /// Counts what waits.
    async fn queue(&self) -> Result<Queue, Failure>;

    /// Adds a user; false if the name is taken.
    async fn create_user(&self, user: &User) -> Result<bool, Failure>;
    /// A user.
    async fn user(&self, name: &str) -> Result<Option<User>, Failure>;
    /// Changes a user; false if there is none of this name.
    async fn update_user(&self, user: &User) -> Result<bool, Failure>;
    /// Removes a user and gives what it was.
    async fn delete_user(&self, name: &str) -> Result<Option<User>, Failure>;
}
