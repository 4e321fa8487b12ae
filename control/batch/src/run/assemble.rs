//! Puts the recorded parts of a batch together into its output file and its error file.

use futures_util::TryStreamExt;

use crate::blobs::{BlobWriter, Blobs, Extent};
use crate::clock::{self, Seconds};
use crate::error::Failure;
use crate::file::{BATCH_FILE_KEPT_S, File, Purpose, blob_key};
use crate::id;
use crate::run::lease::Lease;
use crate::run::sorter::Sorter;
use crate::state::Batch;
use crate::store::{Part, Stream};

/// What is done where recorded results are not there any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// It is a failure, [`Failure::Missing`].
    Refused,
    /// They are left out.
    LeftOut,
}

/// In which order the lines of a batch's files stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineOrder {
    /// That in which the answers came.
    Answers,
    /// That of the input. All lines go through a scratch file first.
    Input,
}

/// Writes the file for one stream; none where the stream has no lines.
pub(super) async fn assemble(
    blobs: &dyn Blobs,
    lease: &Lease,
    batch: &Batch,
    of_stream: (&[Part], Stream),
    lost: Lost,
    order: LineOrder,
) -> Result<Option<File>, Failure> {
    let (parts, stream) = of_stream;
    let parts = parts.iter().filter(|part| part.stream == stream);
    let parts = match lost {
        Lost::Refused => parts.collect(),
        // Where some may be lost, each is looked at for itself.
        Lost::LeftOut => there(blobs, batch, parts).await?,
    };
    let bytes = parts.iter().map(|part| part.bytes).sum();
    if bytes == 0 {
        return Ok(None);
    }
    let id = id::fresh("file-")?;
    let mut writer = blobs.create(&blob_key(&id)).await?;
    match order {
        LineOrder::Answers => {
            for extent in joined(&parts) {
                lease.check()?;
                copy(blobs, extent, &mut Target::File(writer.as_mut())).await?;
            }
        }
        LineOrder::Input => {
            let mut sorter = Sorter::new(blobs.scratch()?);
            for part in parts {
                lease.check()?;
                sorter.announce(&part.lines);
                copy(blobs, extent(part), &mut Target::Sorter(&mut sorter)).await?;
            }
            sorter.finish(lease, writer.as_mut()).await?;
        }
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

/// Where results are copied to.
enum Target<'a> {
    File(&'a mut dyn BlobWriter),
    Sorter(&'a mut Sorter),
}

async fn copy(blobs: &dyn Blobs, extent: Extent, target: &mut Target<'_>) -> Result<(), Failure> {
    let Err(failure) = copy_all(blobs, &extent, target).await else {
        return Ok(());
    };
    // What is too short is as good as not there, and stays so however often it is read.
    Err(if is_there(blobs, &extent).await? {
        failure
    } else {
        Failure::Missing { key: extent.key }
    })
}

async fn copy_all(
    blobs: &dyn Blobs,
    extent: &Extent,
    target: &mut Target<'_>,
) -> Result<(), Failure> {
    let range = extent.offset..extent.offset + extent.bytes;
    let mut stream = blobs.read(&extent.key, range).await?;
    let mut read = 0;
    while let Some(piece) = stream.try_next().await? {
        read += piece.len() as u64;
        match target {
            Target::File(writer) => writer.write(piece).await?,
            Target::Sorter(sorter) => sorter.write(piece).await?,
        }
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

/// Those that are not lost.
async fn there<'a>(
    blobs: &dyn Blobs,
    batch: &Batch,
    parts: impl Iterator<Item = &'a Part>,
) -> Result<Vec<&'a Part>, Failure> {
    let mut there = Vec::new();
    for part in parts {
        let extent = extent(part);
        if is_there(blobs, &extent).await? {
            there.push(part);
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

/// Where the parts are. What was appended piece by piece is read in one go.
fn joined(parts: &[&Part]) -> Vec<Extent> {
    let mut joined: Vec<Extent> = Vec::new();
    for part in parts {
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

    fn part(key: &str, offset: u64, bytes: u64) -> Part {
        Part {
            stream: Stream::Output,
            key: key.to_owned(),
            offset,
            bytes,
            lines: Vec::new(),
        }
    }

    #[test]
    fn neighbours_are_joined_and_gaps_are_not() {
        let parts = [
            part("a", 0, 5),
            part("a", 5, 2),
            // What lies between was written under a lease that recorded it no more.
            part("a", 9, 1),
            part("b", 10, 1),
        ];
        let parts: Vec<&Part> = parts.iter().collect();
        let joined: Vec<(String, u64, u64)> = joined(&parts)
            .into_iter()
            .map(|extent| (extent.key, extent.offset, extent.bytes))
            .collect();
        let expected = [("a", 0, 7), ("a", 9, 1), ("b", 10, 1)];
        assert_eq!(joined, expected.map(|(key, o, b)| (key.to_owned(), o, b)));
    }
}
