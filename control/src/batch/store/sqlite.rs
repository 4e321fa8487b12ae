//! [`Metadata`] in one SQLite file, for one server.
//!
//! All writes happen on the thread `batch-db`: it takes what has queued up while it was committing,
//! runs each piece of work in a savepoint of one transaction, commits (with fsync), and only then
//! answers all of them. Under load a commit thus carries many writes; alone, a write waits for
//! nobody. Reads have a connection of their own and see the last commit.

mod queries;
mod writer;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use rusqlite::Connection;

use crate::batch::clock::{self, Seconds};
use crate::batch::error::Failure;
use crate::batch::file::{File, Purpose};
use crate::batch::state::{Batch, Change};
use crate::batch::store::{
    Create, Deletion, Fence, Listed, Metadata, Page, Part, Places, Queue, Share, Stage, User,
};
use writer::Writer;

/// See the module's documentation.
pub struct Sqlite {
    writer: Writer,
    reader: Arc<Mutex<Connection>>,
}

impl Sqlite {
    /// Opens the database at `path`, which nobody else may have open, and creates it if need be.
    /// Leases of earlier servers are void: their owners are gone.
    ///
    /// # Errors
    /// When the file cannot be opened or is of a later version.
    pub fn open(path: &Path) -> Result<Sqlite, Failure> {
        let writing = queries::connect(path)?;
        queries::prepare(&writing)?;
        Ok(Sqlite {
            writer: Writer::start(writing)?,
            reader: Arc::new(Mutex::new(queries::connect(path)?)),
        })
    }

    async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let reader = Arc::clone(&self.reader);
        tokio::task::spawn_blocking(move || {
            // A query that panicked has left nothing behind: it only read.
            query(&reader.lock().unwrap_or_else(PoisonError::into_inner))
        })
        .await
        .map_err(Failure::when("a database query"))?
    }
}

#[async_trait]
impl Metadata for Sqlite {
    async fn ping(&self) -> Result<(), Failure> {
        self.writer.run(|_| Ok(())).await
    }

    async fn add_file(
        &self,
        file: File,
        create: Create,
        quota_bytes: Option<u64>,
    ) -> Result<File, Failure> {
        self.writer
            .run(move |db| queries::add_file(db, file, &create, quota_bytes))
            .await
    }

    async fn file(&self, tenant: &str, id: &str) -> Result<Option<File>, Failure> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.read(move |db| queries::file(db, &tenant, &id)).await
    }

    async fn files(
        &self,
        tenant: &str,
        purpose: Option<Purpose>,
        page: Page,
    ) -> Result<Option<Listed<File>>, Failure> {
        let tenant = tenant.to_owned();
        self.read(move |db| queries::files(db, &tenant, purpose, &page))
            .await
    }

    async fn stored_bytes(&self, tenant: &str) -> Result<u64, Failure> {
        let tenant = tenant.to_owned();
        self.read(move |db| queries::stored_bytes(db, &tenant))
            .await
    }

    async fn delete_file(&self, tenant: &str, id: &str) -> Result<Deletion, Failure> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.writer
            .run(move |db| queries::delete_file(db, &tenant, &id))
            .await
    }

    async fn expire_files(&self, now: Seconds) -> Result<u64, Failure> {
        self.writer
            .run(move |db| queries::expire_files(db, now))
            .await
    }

    async fn unused_files(&self, after: &str, limit: u32) -> Result<Vec<String>, Failure> {
        let after = after.to_owned();
        self.read(move |db| queries::unused_files(db, &after, limit))
            .await
    }

    async fn forget_file(&self, id: &str, now: Seconds) -> Result<(), Failure> {
        let id = id.to_owned();
        self.writer
            .run(move |db| queries::forget_file(db, &id, now))
            .await
    }

    async fn purge_files(&self, before: Seconds) -> Result<(), Failure> {
        self.writer
            .run(move |db| queries::purge_files(db, before))
            .await
    }

    async fn knows_file(&self, id: &str) -> Result<bool, Failure> {
        let id = id.to_owned();
        self.read(move |db| queries::knows_file(db, &id)).await
    }

    async fn add_batch(
        &self,
        batch: Batch,
        create: Create,
        places: Places,
    ) -> Result<Batch, Failure> {
        self.writer
            .run(move |db| queries::add_batch(db, batch, &create, places))
            .await
    }

    async fn batch(&self, tenant: &str, id: &str) -> Result<Option<Batch>, Failure> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.read(move |db| queries::batch(db, &tenant, &id)).await
    }

    async fn batches(&self, tenant: &str, page: Page) -> Result<Option<Listed<Batch>>, Failure> {
        let tenant = tenant.to_owned();
        self.read(move |db| queries::batches(db, &tenant, &page))
            .await
    }

    async fn cancel(&self, tenant: &str, id: &str, now: Seconds) -> Result<Option<Batch>, Failure> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.writer
            .run(move |db| queries::cancel(db, &tenant, &id, now))
            .await
    }

    async fn acquire(
        &self,
        server: &str,
        stage: Stage,
        last: &[Share],
        lease_ms: i64,
        limit: u32,
    ) -> Result<Vec<(Batch, Fence)>, Failure> {
        let (server, last) = (server.to_owned(), last.to_vec());
        self.writer
            .run(move |db| {
                let now_ms = clock::now_ms();
                queries::acquire(db, &server, stage, &last, now_ms, lease_ms, limit)
            })
            .await
    }

    async fn waiting(&self, limit: u32) -> Result<Vec<Share>, Failure> {
        self.read(move |db| queries::waiting(db, clock::now_ms(), limit))
            .await
    }

    async fn renew(&self, fence: &Fence, lease_ms: i64) -> Result<Batch, Failure> {
        let fence = fence.clone();
        self.writer
            .run(move |db| queries::renew(db, &fence, clock::now_ms().saturating_add(lease_ms)))
            .await
    }

    async fn release(&self, fence: &Fence, pause_ms: i64) -> Result<(), Failure> {
        let fence = fence.clone();
        self.writer
            .run(move |db| queries::release(db, &fence, clock::now_ms().saturating_add(pause_ms)))
            .await
    }

    async fn change(
        &self,
        fence: &Fence,
        change: Change,
        parts: Vec<Part>,
        files: Vec<File>,
    ) -> Result<Batch, Failure> {
        let fence = fence.clone();
        self.writer
            .run(move |db| queries::change(db, &fence, change, &parts, &files))
            .await
    }

    async fn parts(&self, batch: &str) -> Result<Vec<Part>, Failure> {
        let batch = batch.to_owned();
        self.read(move |db| queries::parts(db, &batch)).await
    }

    async fn batches_with_parts_to_drop(
        &self,
        after: &str,
        limit: u32,
    ) -> Result<Vec<String>, Failure> {
        let after = after.to_owned();
        self.read(move |db| queries::batches_with_parts_to_drop(db, &after, limit))
            .await
    }

    async fn needs_parts(&self, batch: &str) -> Result<bool, Failure> {
        let batch = batch.to_owned();
        // By the writer: whoever asks is about to remove what is not needed.
        self.writer
            .run(move |db| queries::needs_parts(db, &batch))
            .await
    }

    async fn drop_parts(&self, batch: &str) -> Result<(), Failure> {
        let batch = batch.to_owned();
        self.writer
            .run(move |db| queries::drop_parts(db, &batch))
            .await
    }

    async fn queue(&self) -> Result<Queue, Failure> {
        self.read(|db| queries::queue(db, clock::now_ms())).await
    }

    async fn create_user(&self, user: &User) -> Result<bool, Failure> {
        let user = user.clone();
        self.writer
            .run(move |db| queries::create_user(db, &user))
            .await
    }

    async fn user(&self, name: &str) -> Result<Option<User>, Failure> {
        let name = name.to_owned();
        self.read(move |db| queries::user(db, &name)).await
    }

    async fn update_user(&self, user: &User) -> Result<bool, Failure> {
        let user = user.clone();
        self.writer
            .run(move |db| queries::update_user(db, &user))
            .await
    }

    async fn delete_user(&self, name: &str) -> Result<Option<User>, Failure> {
        let name = name.to_owned();
        self.writer
            .run(move |db| queries::delete_user(db, &name))
            .await
    }
}

#[cfg(test)]
mod tests;
