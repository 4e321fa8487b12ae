//! Clears away: files that have expired or were deleted, results of batches that have ended, uploads
//! that a crash left behind. Any number of servers may sweep at once.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::blobs::Blobs;
use crate::clock::{self, Seconds};
use crate::error::Failure;
use crate::file::blob_key;
use crate::store::Metadata;

/// How often.
const EVERY: Duration = Duration::from_secs(30);
/// Things of one kind looked up at once.
const AT_ONCE: u32 = 100;
/// Bytes whose file the database does not know are litter once they are this old; before, an upload
/// may be about to enter them.
const LITTER_AGE: Duration = Duration::from_secs(24 * 3600);
/// How long a list can be continued from behind a file that was deleted.
const TRACES_KEPT_S: Seconds = 24 * 3600;
/// How often litter is looked for, which means listing everything: every that many sweeps.
const LITTER_EVERY: u64 = 120;

/// Sweeps until shut down.
pub async fn sweep_for_ever(
    metadata: Arc<dyn Metadata>,
    blobs: Arc<dyn Blobs>,
    shutdown: CancellationToken,
) {
    let mut sweeps = 0;
    loop {
        sweep(metadata.as_ref(), blobs.as_ref()).await;
        if sweeps % LITTER_EVERY == 0 {
            log(
                "litter",
                clear_litter(metadata.as_ref(), blobs.as_ref()).await,
            );
        }
        sweeps += 1;
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

/// What cannot be done now is left for the next sweep, and keeps nothing else from being done.
async fn sweep(metadata: &dyn Metadata, blobs: &dyn Blobs) {
    log("the queue", show_queue(metadata).await);
    log("files that expire", expire_files(metadata).await);
    log("unused files", remove_files(metadata, blobs).await);
    log("results", remove_all_results(metadata, blobs).await);
}

fn log(what: &str, done: Result<(), Failure>) {
    if let Err(error) = done {
        tracing::warn!(what, %error, "a sweep was not completed");
    }
}

async fn show_queue(metadata: &dyn Metadata) -> Result<(), Failure> {
    let queue = metadata.queue().await?;
    #[expect(clippy::cast_precision_loss, reason = "gauges of small counts")]
    {
        metrics::gauge!("kvtide_batch_batches_live").set(queue.live as f64);
        metrics::gauge!("kvtide_batch_batches_waiting").set(queue.waiting as f64);
        let age = queue
            .oldest_waiting_at
            .map_or(0, |at| clock::now().saturating_sub(at));
        metrics::gauge!("kvtide_batch_oldest_waiting_seconds").set(age as f64);
    }
    Ok(())
}

async fn expire_files(metadata: &dyn Metadata) -> Result<(), Failure> {
    let now = clock::now();
    let expired = metadata.expire_files(now).await?;
    if expired > 0 {
        tracing::info!(files = expired, "files have expired");
    }
    metadata
        .purge_files(now.saturating_sub(TRACES_KEPT_S))
        .await
}

/// Removes the bytes of all files that nobody can see or needs.
async fn remove_files(metadata: &dyn Metadata, blobs: &dyn Blobs) -> Result<(), Failure> {
    let mut after = String::new();
    loop {
        let unused = metadata.unused_files(&after, AT_ONCE).await?;
        for id in &unused {
            log(id, remove_file(metadata, blobs, id).await);
        }
        match unused.into_iter().next_back() {
            Some(last) => after = last,
            None => return Ok(()),
        }
    }
}

/// Removes the bytes of a file that nobody can see or needs.
pub async fn remove_file(
    metadata: &dyn Metadata,
    blobs: &dyn Blobs,
    id: &str,
) -> Result<(), Failure> {
    blobs.delete(&blob_key(id)).await?;
    metadata.forget_file(id, clock::now()).await
}

/// Removes the recorded results of all batches that have ended: their files hold them.
async fn remove_all_results(metadata: &dyn Metadata, blobs: &dyn Blobs) -> Result<(), Failure> {
    let mut after = String::new();
    loop {
        let ended = metadata.batches_with_parts_to_drop(&after, AT_ONCE).await?;
        for batch in &ended {
            log(batch, remove_results(metadata, blobs, batch).await);
        }
        match ended.into_iter().next_back() {
            Some(last) => after = last,
            None => return Ok(()),
        }
    }
}

async fn remove_results(
    metadata: &dyn Metadata,
    blobs: &dyn Blobs,
    batch: &str,
) -> Result<(), Failure> {
    blobs.delete_parts(batch).await?;
    metadata.drop_parts(batch).await
}

async fn clear_litter(metadata: &dyn Metadata, blobs: &dyn Blobs) -> Result<(), Failure> {
    for id in blobs.stored_files(LITTER_AGE).await? {
        if !metadata.knows_file(&id).await? {
            tracing::info!(file = id, "bytes that belong to no file are removed");
            log(&id, blobs.delete(&blob_key(&id)).await);
        }
    }
    for batch in blobs.batches_with_parts().await? {
        if !metadata.needs_parts(&batch).await? {
            tracing::info!(batch, "results that came too late are removed");
            log(&batch, blobs.delete_parts(&batch).await);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::blobs::{Local, Piece};
    use crate::file::{File, Purpose};
    use crate::store::{Create, Deletion, Fence, Files, Sqlite, Stream};

    struct World {
        directory: TempDir,
        metadata: Sqlite,
        blobs: Local,
    }

    fn world() -> World {
        let directory = tempfile::tempdir().unwrap();
        World {
            metadata: Sqlite::open(&directory.path().join("db")).unwrap(),
            blobs: Local::open(directory.path()).unwrap(),
            directory,
        }
    }

    impl World {
        async fn add_deleted_file(&self, id: &str) {
            let file = File {
                id: id.into(),
                tenant: "a".into(),
                purpose: Purpose::Batch,
                filename: "in.jsonl".into(),
                bytes: 1,
                created_at: 1,
                expires_at: None,
                media_type: None,
            };
            let create = Create {
                digest: id.into(),
                is_retry: false,
            };
            self.metadata.add_file(file, create, None).await.unwrap();
            let deleted = self.metadata.delete_file("a", id).await.unwrap();
            assert_eq!(deleted, Deletion::Unused);
        }
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_removed_does_not_keep_the_next_from_it() {
        let world = world();
        for id in ["file-1", "file-2"] {
            world.add_deleted_file(id).await;
        }
        // A directory in its place is what no removal of a file removes.
        std::fs::create_dir(world.directory.path().join(blob_key("file-1"))).unwrap();
        sweep(&world.metadata, &world.blobs).await;
        assert!(world.metadata.knows_file("file-1").await.unwrap());
        assert!(!world.metadata.knows_file("file-2").await.unwrap());
    }

    #[tokio::test]
    async fn more_files_than_are_looked_up_at_once_go_in_one_sweep() {
        let world = world();
        for n in 0..AT_ONCE + 7 {
            world.add_deleted_file(&format!("file-{n}")).await;
        }
        assert_eq!(world.metadata.stored_bytes("a").await.unwrap(), 107);
        sweep(&world.metadata, &world.blobs).await;
        assert_eq!(world.metadata.stored_bytes("a").await.unwrap(), 0);
    }

    #[tokio::test]
    async fn results_that_nobody_needs_are_litter() {
        let World {
            metadata, blobs, ..
        } = &world();
        let fence = Fence {
            batch: "batch_gone".into(),
            epoch: 1,
        };
        let late = Arc::new(vec![Piece::Memory("x".into())]);
        let mut parts = blobs.part_writer(&fence);
        parts.append(Stream::Output, late).await.unwrap();
        assert_eq!(blobs.batches_with_parts().await.unwrap(), ["batch_gone"]);
        clear_litter(metadata, blobs).await.unwrap();
        assert!(blobs.batches_with_parts().await.unwrap().is_empty());
    }
}
