//! The seam between the daemon's shell (sockets, configuration, HTTP, commands) and its inside
//! (sessions, pools, memory).
//!
//! The shell knows nothing of rows, and the inside nothing of command lines. Calls come from threads
//! that may block, several at once. None may take longer than a person waits: what takes time is begun,
//! and the answer says what was begun.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use kvtide_model::wire::Hello;
use serde::{Deserialize, Serialize};

use crate::socket::Peer;
use crate::status::{Readiness, Status};

/// The inside of a daemon.
pub trait Node: Send + Sync + 'static {
    /// Whether engines are served. Asked often; it must not wait for a lock that a long operation
    /// holds.
    fn readiness(&self) -> Readiness;

    /// Everything that there is to say.
    fn status(&self) -> Status;

    /// Some of the blocks, for a person who looks for one.
    ///
    /// # Errors
    /// [`Refusal`] when the query means nothing here.
    fn inspect(&self, query: &Inspect) -> Result<Inspection, Refusal>;

    /// Drops blocks. Those that somebody reads or writes go as soon as nobody does any more; until
    /// then nobody finds them either.
    ///
    /// # Errors
    /// [`Refusal`] when there is nothing of that name.
    fn purge(&self, what: &Purge) -> Result<Purged, Refusal>;

    /// Keeps the blocks of a namespace, and those that come to it, from eviction for so long.
    ///
    /// # Errors
    /// [`Refusal`] when there is no such namespace, or not enough room would be left for others.
    fn pin(&self, namespace: &str, ttl: Duration) -> Result<Pinned, Refusal>;

    /// Ends [`Node::pin`].
    ///
    /// # Errors
    /// [`Refusal`] when there is no such namespace.
    fn unpin(&self, namespace: &str) -> Result<Unpinned, Refusal>;

    /// Takes over the connection of an engine's process. It returns at once.
    fn attach(&self, connection: Connection);

    /// Takes no engines and no saves any more, and waits until saves in flight have ended; returns at
    /// `deadline` at the latest, with what was cut off. Called once, at the end.
    fn close(&self, deadline: Instant) -> Closed;
}

/// A process of an engine that was let in and has said hello.
#[derive(Debug)]
pub struct Connection {
    /// Blocking, without time-outs. Nothing was read from it beyond the first frame, and nothing was
    /// written.
    pub stream: UnixStream,
    /// Who is at the other end, as the kernel knows it.
    pub peer: Peer,
    /// The first frame. Its role is not that of an operator, and its version is spoken here.
    pub hello: Hello,
}

/// Which blocks to show. Each field that is given narrows them down.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inspect {
    /// Of this namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The one with this key, in hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// At most so many.
    pub limit: u32,
}

/// Blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Inspection {
    /// Some of them, in no particular order.
    pub blocks: Vec<Block>,
    /// How many more there are.
    pub more: u64,
}

/// One block.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Block {
    /// Its key, in hexadecimal digits.
    pub key: String,
    /// Its namespace.
    pub namespace: String,
    /// Where it lies, such as `host`.
    pub tier: String,
    /// The slot that holds it.
    pub slot: u32,
    /// The slot's generation.
    pub generation: u32,
    /// Such as `held` or `saving`.
    pub state: String,
    /// How many sessions read it.
    pub pins: u32,
    /// Bytes of its row.
    pub bytes: u64,
}

/// What to drop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Purge {
    /// The blocks of a namespace.
    Namespace(String),
    /// The blocks of a tenant; those of engines that have none, if it is empty.
    Tenant(String),
    /// All blocks.
    All,
}

/// What was dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Purged {
    /// Blocks that nobody finds any more.
    pub blocks: u64,
    /// Bytes of their rows.
    pub bytes: u64,
    /// Those among them whose rows are freed later, because somebody reads or writes them.
    pub later_blocks: u64,
}

/// What is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pinned {
    /// The namespace.
    pub namespace: String,
    /// Blocks that are kept now.
    pub blocks: u64,
    /// Bytes of their rows.
    pub bytes: u64,
    /// Until when, in seconds of Unix time.
    pub until_unix_s: u64,
}

/// What is no longer kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Unpinned {
    /// The namespace.
    pub namespace: String,
    /// Whether it was pinned.
    pub was_pinned: bool,
}

/// How an end went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Closed {
    /// Blocks whose save had not ended: the next start does not have them. Loads go on without the
    /// daemon, since engines copy by themselves.
    pub cut_off_saves: u64,
}

/// Why something that an operator asked for is not done.
#[derive(Clone, Debug, Default, thiserror::Error, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[error("{problem}; {fix}")]
pub struct Refusal {
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub fix: String,
}
