//! What is known of files.

use async_trait::async_trait;

use crate::clock::Seconds;
use crate::error::Failure;
use crate::file::{File, Purpose};
use crate::store::{Create, Listed, Page};

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

impl Deletion {
    /// Of a file that was there.
    pub(super) fn of(in_use: bool) -> Deletion {
        if in_use {
            Deletion::InUse
        } else {
            Deletion::Unused
        }
    }
}

/// Whether a tenant whose files take `stored_bytes` may have this one too.
pub(super) fn check_quota(stored_bytes: u64, file: &File, quota_bytes: u64) -> Result<(), Failure> {
    if stored_bytes.saturating_add(file.bytes) > quota_bytes {
        return Err(Failure::Quota { quota_bytes });
    }
    Ok(())
}

/// Files, and whether their bytes are still needed. See [`Metadata`](super::Metadata).
#[async_trait]
pub trait Files: Send + Sync {
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
    /// [`Files::purge_files`].
    async fn forget_file(&self, id: &str, now: Seconds) -> Result<(), Failure>;
    /// Removes the last traces of files that were forgotten before `before`.
    async fn purge_files(&self, before: Seconds) -> Result<(), Failure>;
    /// Whether a file, deleted or not, has bytes.
    async fn knows_file(&self, id: &str) -> Result<bool, Failure>;
}
