//! [`Metadata`] in one SQLite file, for one server.
//!
//! All writes happen on the thread `batch-db`: it takes what has queued up while it was committing,
//! runs each piece of work in a savepoint of one transaction, commits (with fsync), and only then
//! answers all of them. Under load a commit thus carries many writes; alone, a write waits for
//! nobody. Reads have a connection of their own and see the last commit.
//!
//! Leases are kept in milliseconds since the database was opened, by a clock that nobody can set: no
//! lease is older than the process. The wall clock says only whether a batch's window has ended.

mod batches;
mod files;
mod leases;
mod results;
mod rows;
mod schema;
mod users;
mod writer;

/// Statements that PostgreSQL understands too.
mod sql {
    statements!("");
}

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use rusqlite::Connection;

use crate::clock::{self, Seconds};
use crate::error::Failure;
use crate::store::Metadata;
use writer::Writer;

/// See the module's documentation.
pub struct Sqlite {
    writer: Writer,
    reader: Arc<Mutex<Connection>>,
    opened: Instant,
}

/// Now, by both clocks.
#[derive(Clone, Copy, Debug)]
struct Now {
    /// Milliseconds since the database was opened; for leases.
    steady_ms: i64,
    /// For the ends of windows.
    wall: Seconds,
}

impl Sqlite {
    /// Opens the database at `path`, which nobody else may have open, and creates it if need be.
    /// Leases of earlier servers are void: their owners are gone.
    ///
    /// # Errors
    /// When the file cannot be opened or is of a later version.
    pub fn open(path: &Path) -> Result<Sqlite, Failure> {
        let writing = schema::connect(path)?;
        schema::prepare(&writing)?;
        Ok(Sqlite {
            writer: Writer::start(writing)?,
            reader: Arc::new(Mutex::new(schema::connect(path)?)),
            opened: Instant::now(),
        })
    }

    fn now(&self) -> Now {
        let passed = self.opened.elapsed().as_millis();
        Now {
            steady_ms: i64::try_from(passed).unwrap_or(i64::MAX),
            wall: clock::now(),
        }
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

    /// Returns when what was written is durable.
    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        self.writer.run(work).await
    }
}

#[async_trait]
impl Metadata for Sqlite {
    async fn ping(&self) -> Result<(), Failure> {
        self.write(|_| Ok(())).await
    }
}

#[cfg(test)]
mod tests;
