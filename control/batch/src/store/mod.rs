//! Metadata: files, batches, leases, and which results are recorded where. The only truth there is;
//! servers keep nothing that they could not read again from here.
//!
//! [`Metadata`] is implemented on SQLite, for one server, and on PostgreSQL, for several; each has a
//! module for each of the traits that it consists of.

#[macro_use]
mod statements;

mod batches;
mod create;
mod files;
mod leases;
mod page;
mod postgres;
mod results;
mod sqlite;
mod users;
mod values;

use async_trait::async_trait;

use crate::error::Failure;

pub use batches::{Batches, Places, Queue};
pub use create::{Create, RETRY_WINDOW_S};
pub use files::{Deletion, Files};
pub use leases::{Fence, Leases, Share, Stage};
pub use page::{Listed, Page};
pub use postgres::Postgres;
pub use results::{Part, Results, Stream};
pub use sqlite::Sqlite;
pub use users::{User, Users};

/// See the module's documentation. All methods are atomic; what has returned survives a crash.
#[async_trait]
pub trait Metadata: Files + Batches + Leases + Results + Users {
    /// Whether the database answers.
    async fn ping(&self) -> Result<(), Failure>;
}
