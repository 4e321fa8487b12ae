//! The thread `batch-db`: group commit.

use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::thread::{self, JoinHandle};

use rusqlite::Connection;
use tokio::sync::oneshot;

use crate::error::Failure;

/// Pieces of work that may wait. Each waits for an HTTP request or a batch in progress, of which
/// there are far fewer; full, callers are told so instead of piling up.
const QUEUED_MAX: usize = 1024;
/// Pieces of work in one transaction: bounds how long the first of them waits for its answer. Some
/// tens of microseconds each, they stay well below 50 ms.
const GROUP_MAX: usize = 256;

/// Tells the caller how the transaction ended.
type Answer = Box<dyn FnOnce(Result<(), String>) + Send>;
type Work = Box<dyn FnOnce(&Connection) -> Answer + Send>;

pub(super) struct Writer {
    queue: Option<SyncSender<Work>>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub(super) fn start(db: Connection) -> Result<Writer, Failure> {
        let (queue, work) = mpsc::sync_channel(QUEUED_MAX);
        let thread = thread::Builder::new()
            .name("batch-db".to_owned())
            .spawn(move || serve(&db, &work))
            .map_err(Failure::when("starting the database thread"))?;
        Ok(Writer {
            queue: Some(queue),
            thread: Some(thread),
        })
    }

    /// Runs `work` in a transaction, and returns when that is durable. Work that fails leaves
    /// nothing behind.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        const WHAT: &str = "a database write";
        let (answer, answered) = oneshot::channel();
        let work: Work = Box::new(move |db| {
            let result = within_savepoint(db, work);
            Box::new(move |committed: Result<(), String>| {
                let result = committed.map_err(Failure::when("committing")).and(result);
                // The caller may have gone away; the write stands all the same.
                answer.send(result).ok();
            })
        });
        let queue = self
            .queue
            .as_ref()
            .ok_or_else(|| Failure::internal(WHAT, "the database is closed"))?;
        match queue.try_send(work) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => {
                return Err(Failure::internal(WHAT, "too many writes are waiting"));
            }
            Err(TrySendError::Disconnected(_)) => {
                return Err(Failure::internal(WHAT, "the database thread has ended"));
            }
        }
        answered.await.map_err(Failure::when(WHAT))?
    }
}

impl Drop for Writer {
    /// Waits for the last commit.
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the database thread has panicked");
        }
    }
}

fn serve(db: &Connection, work: &Receiver<Work>) {
    while let Ok(first) = work.recv() {
        if let Err(error) = db.execute_batch("BEGIN IMMEDIATE") {
            first(db)(Err(error.to_string()));
            continue;
        }
        let mut answers = vec![first(db)];
        while answers.len() < GROUP_MAX
            && let Ok(next) = work.try_recv()
        {
            answers.push(next(db));
        }
        let mut committed = db
            .execute_batch("COMMIT")
            .map_err(|error| error.to_string());
        if committed.is_err()
            && !db.is_autocommit()
            && let Err(error) = db.execute_batch("ROLLBACK")
        {
            committed = Err(format!(
                "the transaction can be neither ended nor undone: {error}"
            ));
        }
        for answer in answers {
            answer(committed.clone());
        }
    }
}

fn within_savepoint<T>(
    db: &Connection,
    work: impl FnOnce(&Connection) -> Result<T, Failure>,
) -> Result<T, Failure> {
    const WHAT: &str = "a savepoint";
    if db.is_autocommit() {
        // The transaction could not be begun, which the caller is told; or the disk is full and
        // SQLite has undone the whole of it.
        return Err(Failure::internal(WHAT, "there is no transaction"));
    }
    db.execute_batch("SAVEPOINT work")
        .map_err(Failure::when(WHAT))?;
    let result = work(db);
    let end = if result.is_ok() {
        "RELEASE work"
    } else {
        "ROLLBACK TO work; RELEASE work"
    };
    if !db.is_autocommit() {
        db.execute_batch(end).map_err(Failure::when(WHAT))?;
    }
    result
}
