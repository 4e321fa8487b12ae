//! Puts the recorded parts of a batch together into its output file and its error file.

use futures_util::TryStreamExt;

use crate::batch::blobs::{BlobWriter, Blobs, Extent};
use crate::batch::clock::{self, Seconds};
use crate::batch::error::Failure;
use crate::batch::file::{BATCH_FILE_KEPT_S, File, Purpose, blob_key};
use crate::batch::id;
use crate::batch::run::lease::Lease;
use crate::batch::state::Batch;
use crate::batch::store::{Part, Stream};

/// What is done where recorded results are not there any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// It is a failure, [`Failure::Missing`].
    Refused,
    /// They are left out.
    LeftOut,
}

/// Writes the file for one stream; none where the stream has no lines.
pub(super) async fn assemble(
    blobs: &dyn Blobs,
    lease: &Lease,
    batch: &Batch,
    parts: &[Part],
    stream: Stream,
    lost: Lost,
) -> Result<Option<File>, Failure> {
    // Where some may be lost, each is looked at for itself.
    let extents = match lost {
        Lost::Refused => joined(parts, stream),
        Lost::LeftOut => there(blobs, batch, parts, stream).await?,
    };
    if extents.is_empty() {
        return Ok(None);
    }
    let id = id::fresh("file-")?;
    let mut writer = blobs.create(&blob_key(&id)).await?;
    let mut bytes = 0;
    for extent in extents {
        lease.check()?;
        if let Err(failure) = copy(blobs, &extent, writer.as_mut()).await {
            // What is too short is as good as not there, and stays so however often it is read.
            return Err(if is_there(blobs, &extent).await? {
                failure
            } else {
                Failure::Missing { key: extent.key }
            });
        }
        bytes += extent.bytes;
    }
    if bytes == 0 {
        writer.abandon().await;
        return Ok(None);
    }
    lease.check()?;
    writer.finish().await?;
    let now = clock::now();
    Ok(Some(File {
        filename: format!("{}_{}.jsonl", batch.id, stream.as_str()),
        id,
        tenant: batch.tenant.clone(),
        purpose: Purpose::BatchOutput,
        bytes,
        created_at: now,
        expires_at: Some(now.saturating_add(kept_s(batch))),
        media_type: None,
    }))
}

async fn copy(
    blobs: &dyn Blobs,
    extent: &Extent,
    writer: &mut dyn BlobWriter,
) -> Result<(), Failure> {
    let range = extent.offset..extent.offset + extent.bytes;
    let mut stream = blobs.read(&extent.key, range).await?;
    let mut read = 0;
    while let Some(piece) = stream.try_next().await? {
        read += piece.len() as u64;
        writer.write(piece).await?;
    }
    if read == extent.bytes {
        return Ok(());
    }
    Err(Failure::internal(
        "assembling a batch's files",
        format!(
            "{} has {read} bytes where {} were recorded",
            extent.key, extent.bytes
        ),
    ))
}

async fn is_there(blobs: &dyn Blobs, extent: &Extent) -> Result<bool, Failure> {
    let length = blobs.length(&extent.key).await?;
    Ok(length.is_some_and(|length| extent.offset + extent.bytes <= length))
}

/// Where those lines of one stream are that are not lost.
async fn there(
    blobs: &dyn Blobs,
    batch: &Batch,
    parts: &[Part],
    stream: Stream,
) -> Result<Vec<Extent>, Failure> {
    let mut there = Vec::new();
    for part in parts.iter().filter(|part| part.stream == stream) {
        let extent = extent(part);
        if is_there(blobs, &extent).await? {
            there.push(extent);
        } else {
            let Extent { key, bytes, .. } = extent;
            tracing::error!(batch = batch.id, key, bytes, "results are lost");
        }
    }
    Ok(there)
}

fn extent(part: &Part) -> Extent {
    Extent {
        key: part.key.clone(),
        offset: part.offset,
        bytes: part.bytes,
    }
}

/// Where the lines of one stream are. What was appended piece by piece is read in one go.
fn joined(parts: &[Part], stream: Stream) -> Vec<Extent> {
    let mut joined: Vec<Extent> = Vec::new();
    for part in parts.iter().filter(|part| part.stream == stream) {
        match joined.last_mut() {
            Some(last) if last.key == part.key && last.offset + last.bytes == part.offset => {
                last.bytes += part.bytes;
            }
            _ => joined.push(extent(part)),
        }
    }
    joined
}

fn kept_s(batch: &Batch) -> Seconds {
    batch
        .order
        .output_expires_after_s
        .unwrap_or(BATCH_FILE_KEPT_S)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(stream: Stream, key: &str, offset: u64, bytes: u64) -> Part {
        Part {
            stream,
            key: key.to_owned(),
            offset,
            bytes,
            lines: Vec::new(),
        }
    }

    #[test]
    fn neighbours_are_joined_and_gaps_and_other_streams_are_not() {
        let parts = [
            part(Stream::Output, "a", 0, 5),
            part(Stream::Error, "e", 0, 9),
            part(Stream::Output, "a", 5, 2),
            // What lies between was written under a lease that recorded it no more.
            part(Stream::Output, "a", 9, 1),
            part(Stream::Output, "b", 10, 1),
        ];
        let joined: Vec<(String, u64, u64)> = joined(&parts, Stream::Output)
            .into_iter()
            .map(|extent| (extent.key, extent.offset, extent.bytes))
            .collect();
        let expected = [("a", 0, 7), ("a", 9, 1), ("b", 10, 1)];
        assert_eq!(joined, expected.map(|(key, o, b)| (key.to_owned(), o, b)));
    }
}
