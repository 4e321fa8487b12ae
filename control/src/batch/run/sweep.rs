//! Clears away: files that have expired or were deleted, results of batches that have ended, uploads
//! that a crash left behind. Any number of servers may sweep at once.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::batch::blobs::Blobs;
use crate::batch::clock;
use crate::batch::error::Failure;
use crate::batch::file::blob_key;
use crate::batch::store::Metadata;

/// How often.
const EVERY: Duration = Duration::from_secs(30);
/// Things of one kind cleared away in one go.
const AT_ONCE: u32 = 100;
/// Bytes whose file the database does not know are litter once they are this old; before, an upload
/// may be about to enter them.
const LITTER_AGE: Duration = Duration::from_secs(24 * 3600);
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
        if let Err(error) = sweep(metadata.as_ref(), blobs.as_ref()).await {
            tracing::warn!(%error, "a sweep was not completed");
        }
        if sweeps % LITTER_EVERY == 0
            && let Err(error) = clear_litter(metadata.as_ref(), blobs.as_ref()).await
        {
            tracing::warn!(%error, "litter was not cleared away");
        }
        sweeps += 1;
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

async fn sweep(metadata: &dyn Metadata, blobs: &dyn Blobs) -> Result<(), Failure> {
    let expired = metadata.expire_files(clock::now()).await?;
    if expired > 0 {
        tracing::info!(files = expired, "files have expired");
    }
    for id in metadata.unused_files(AT_ONCE).await? {
        blobs.delete(&blob_key(&id)).await?;
        metadata.forget_file(&id).await?;
    }
    for batch in metadata.batches_with_parts_to_drop(AT_ONCE).await? {
        blobs.delete_parts(&batch).await?;
        metadata.drop_parts(&batch).await?;
    }
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

async fn clear_litter(metadata: &dyn Metadata, blobs: &dyn Blobs) -> Result<(), Failure> {
    for id in blobs.stored_files(LITTER_AGE).await? {
        if !metadata.knows_file(&id).await? {
            tracing::info!(file = id, "bytes that belong to no file are removed");
            blobs.delete(&blob_key(&id)).await?;
        }
    }
    Ok(())
}
