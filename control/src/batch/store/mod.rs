//! Metadata: files, batches, leases, and which results are recorded where. The only truth there is;
//! servers keep nothing that they could not read again from here.
//!
//! [`Metadata`] is implemented on SQLite, for one server, and on PostgreSQL, for several.

mod postgres;
mod sqlite;
mod values;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::batch::clock::Seconds;
use crate::batch::error::Failure;
use crate::batch::file::{File, Purpose};
use crate::batch::state::{Batch, Change, Status};

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
    /// It has to be ended without sending more: it was cancelled, or its window has ended.
    End,
}

/// A tenant's work for one model: what job slots are shared out by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Share {
    /// Whose work it is.
    pub tenant: String,
    /// For which model; none while that is not known, or where it is for several.
    pub model: Option<String>,
}

impl Share {
    /// What a batch is part of.
    #[must_use]
    pub fn of(batch: &Batch) -> Share {
        Share {
            tenant: batch.tenant.clone(),
            model: batch.model.clone(),
        }
    }

    /// As the databases compare it. Tenants' names have no line feeds.
    fn key(&self) -> String {
        let model = self.model.as_deref().unwrap_or_default();
        format!("{}\n{model}", self.tenant)
    }
}

/// How many batches may be waiting or in progress.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// Of all tenants together.
    pub all: u64,
    /// Of each tenant.
    pub tenant: u64,
}

impl Places {
    /// Whether one more batch may be added to so many.
    fn check(&self, all: u64, tenant: u64) -> Result<(), Failure> {
        if tenant >= self.tenant {
            return Err(Failure::Crowded {
                live: tenant,
                whose: "of your",
            });
        }
        if all >= self.all {
            return Err(Failure::Crowded {
                live: all,
                whose: "of all tenants'",
            });
        }
        Ok(())
    }
}

/// What came of deleting a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deletion {
    /// There is no such file.
    Unknown,
    /// A batch still reads it: its bytes stay for now.
    InUse,
    /// Its bytes can be removed.
    Unused,
}

/// What batches are selected by, beside their document.
struct Columns<'a> {
    live: bool,
    validated: bool,
    model: Option<&'a str>,
    /// When it has to end without sending more: 0 if that was asked for, else when its window ends.
    due_at: Seconds,
}

impl Columns<'_> {
    fn of(batch: &Batch) -> Columns<'_> {
        let cancelling = batch.status() == Status::Cancelling;
        Columns {
            live: !batch.status().is_terminal(),
            // A file without requests does not become valid.
            validated: batch.counts().total > 0,
            model: batch.model.as_deref(),
            due_at: if cancelling { 0 } else { batch.expires_at },
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
    /// Bytes of this tenant's files, deleted ones too for as long as their bytes are there.
    async fn stored_bytes(&self, tenant: &str) -> Result<u64, Failure>;
    /// Takes a file from its owner's sight.
    async fn delete_file(&self, tenant: &str, id: &str) -> Result<Deletion, Failure>;
    /// Marks files that have expired as deleted.
    async fn expire_files(&self, now: Seconds) -> Result<u64, Failure>;
    /// Files that are deleted and that no live batch reads, in the order of their ids from behind
    /// `after`; at most `limit`.
    async fn unused_files(&self, after: &str, limit: u32) -> Result<Vec<String>, Failure>;
    /// Notes that a deleted file's bytes are gone. A list can still be continued from behind it, until
    /// [`Metadata::purge_files`].
    async fn forget_file(&self, id: &str, now: Seconds) -> Result<(), Failure>;
    /// Removes the last traces of files that were forgotten before `before`.
    async fn purge_files(&self, before: Seconds) -> Result<(), Failure>;
    /// Whether a file, deleted or not, has bytes.
    async fn knows_file(&self, id: &str) -> Result<bool, Failure>;

    /// Adds a batch, or gives back the one that the same create has added before.
    ///
    /// # Errors
    /// [`Failure::Crowded`] when there are as many as `places` allows.
    async fn add_batch(
        &self,
        batch: Batch,
        create: Create,
        places: Places,
    ) -> Result<Batch, Failure>;
    /// A batch of this tenant.
    async fn batch(&self, tenant: &str, id: &str) -> Result<Option<Batch>, Failure>;
    /// The batches of this tenant, if `page.after` is none or one of them.
    async fn batches(&self, tenant: &str, page: Page) -> Result<Option<Listed<Batch>>, Failure>;
    /// Marks a batch of this tenant for cancellation.
    ///
    /// # Errors
    /// [`Failure::Illegal`] when it has ended otherwise.
    async fn cancel(&self, tenant: &str, id: &str, now: Seconds) -> Result<Option<Batch>, Failure>;

    /// Takes up to `limit` live batches at this stage that nobody works on, for `lease_ms`: those of
    /// the shares in `last` after all others; first those of tenants, then of models, for whom the
    /// fewest are being worked on; then the oldest.
    async fn acquire(
        &self,
        server: &str,
        stage: Stage,
        last: &[Share],
        lease_ms: i64,
        limit: u32,
    ) -> Result<Vec<(Batch, Fence)>, Failure>;
    /// Of which shares validated batches wait to be run; at most `limit`.
    async fn waiting(&self, limit: u32) -> Result<Vec<Share>, Failure>;
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
