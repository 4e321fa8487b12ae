//! Puts the recorded parts of a batch together into its output file and its error file.

use futures_util::TryStreamExt;

use crate::batch::blobs::{Blobs, Extent};
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
    let extents = joined(parts, stream);
    if extents.is_empty() {
        return Ok(None);
    }
    let id = id::fresh("file-")?;
    let mut writer = blobs.create(&blob_key(&id)).await?;
    let mut bytes = 0;
    for Extent {
        key,
        offset,
        bytes: expected,
    } in extents
    {
        lease.check()?;
        let mut stream = match blobs.read(&key, offset..offset + expected).await {
            Err(Failure::Missing { key }) if lost == Lost::LeftOut => {
                tracing::error!(batch = batch.id, key, bytes = expected, "results are lost");
                continue;
            }
            found => found?,
        };
        let mut read = 0;
        while let Some(piece) = stream.try_next().await? {
            read += piece.len() as u64;
            writer.write(piece).await?;
        }
        if read != expected {
            return Err(Failure::internal(
                "assembling a batch's files",
                format!("{key} has {read} bytes where {expected} were recorded"),
            ));
        }
        bytes += read;
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
    }))
}

/// Where the lines of one stream are. What was appended piece by piece is read in one go.
fn joined(parts: &[Part], stream: Stream) -> Vec<Extent> {
    let mut joined: Vec<Extent> = Vec::new();
    for part in parts.iter().filter(|part| part.stream == stream) {
        match joined.last_mut() {
            Some(last) if last.key == part.key && last.offset + last.bytes == part.offset => {
                last.bytes += part.bytes;
            }
            _ => joined.push(Extent {
                key: part.key.clone(),
                offset: part.offset,
                bytes: part.bytes,
            }),
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
