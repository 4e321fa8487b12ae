//! A whole file on its way to the object store. It is gathered in a scratch file first: whoever sends it
//! may be slow, and would else hold megabytes of memory meanwhile, as much as the store wants at once.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt};
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use super::WHAT;
use crate::blobs::BlobWriter;
use crate::error::Failure;

/// Bytes put at once: the least that S3 takes as a part.
const PART_BYTES: u64 = 5 << 20;
/// Parts that an object may have.
const PARTS_MAX: u64 = 10_000;
/// Memory of one transfer, unless its file is so large that it needs larger parts (50 GiB).
pub const TRANSFER_BYTES: u64 = PART_BYTES;

/// See the module's documentation.
pub(super) struct Transfer {
    pub(super) file: tokio::fs::File,
    pub(super) bytes: u64,
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) target: Path,
    /// For transfers at once.
    pub(super) places: Arc<Semaphore>,
}

#[async_trait]
impl BlobWriter for Transfer {
    async fn write(&mut self, bytes: Bytes) -> Result<(), Failure> {
        self.bytes += bytes.len() as u64;
        self.file
            .write_all(&bytes)
            .await
            .map_err(Failure::when("writing a scratch file"))
    }

    async fn finish(mut self: Box<Self>) -> Result<(), Failure> {
        // A full disk may show only here.
        self.file
            .flush()
            .await
            .map_err(Failure::when("writing a scratch file"))?;
        let _place = self.places.acquire().await.map_err(Failure::when(WHAT))?;
        let mut parts = Parts::of(self.file.into_std().await, self.bytes);
        if self.bytes <= PART_BYTES {
            let whole = parts.next().await?;
            let put = self.store.put(&self.target, whole.into()).await;
            return put.map(drop).map_err(Failure::when(WHAT));
        }
        let upload = self.store.put_multipart(&self.target).await;
        let mut upload = upload.map_err(Failure::when(WHAT))?;
        let sent = send(&mut parts, upload.as_mut()).await;
        if sent.is_err()
            && let Err(error) = upload.abort().await
        {
            // What is left of an upload in parts is removed by the store's own rule for these.
            tracing::debug!(%error, "an unfinished upload was left to the object store");
        }
        sent
    }

    async fn abandon(self: Box<Self>) {
        // The scratch file has no name: it is gone.
    }
}

async fn send(parts: &mut Parts, upload: &mut dyn MultipartUpload) -> Result<(), Failure> {
    while parts.left > 0 {
        let part = parts.next().await?;
        let put = upload.put_part(part.into()).await;
        put.map_err(Failure::when(WHAT))?;
    }
    let put = upload.complete().await;
    put.map(drop).map_err(Failure::when(WHAT))
}

/// What is still to be read of a scratch file.
struct Parts {
    file: Arc<File>,
    at: u64,
    left: u64,
    part_bytes: u64,
}

impl Parts {
    fn of(file: File, bytes: u64) -> Parts {
        Parts {
            file: Arc::new(file),
            at: 0,
            left: bytes,
            part_bytes: PART_BYTES.max(bytes.div_ceil(PARTS_MAX)),
        }
    }

    async fn next(&mut self) -> Result<Vec<u8>, Failure> {
        const WHAT: &str = "reading a scratch file";
        let (file, at, bytes) = (
            Arc::clone(&self.file),
            self.at,
            self.left.min(self.part_bytes),
        );
        let read = spawn_blocking(move || -> io::Result<Vec<u8>> {
            let mut file = file.as_ref();
            let mut part = Vec::with_capacity(usize::try_from(bytes).map_err(io::Error::other)?);
            file.seek(SeekFrom::Start(at))?;
            file.take(bytes).read_to_end(&mut part)?;
            if part.len() as u64 != bytes {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok(part)
        });
        let part = read.await.map_err(Failure::when(WHAT))?;
        let part = part.map_err(Failure::when(WHAT))?;
        self.at += bytes;
        self.left -= bytes;
        Ok(part)
    }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;

    async fn there_and_back(bytes: usize) {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let content: Vec<u8> = (0..251u8).cycle().take(bytes).collect();
        let target = Path::from("files/file-1");
        let mut writer = Box::new(Transfer {
            file: tokio::fs::File::from_std(tempfile::tempfile().unwrap()),
            bytes: 0,
            store: Arc::clone(&store),
            target: target.clone(),
            places: Arc::new(Semaphore::new(1)),
        });
        for chunk in content.chunks(100_000) {
            writer.write(Bytes::copy_from_slice(chunk)).await.unwrap();
        }
        assert!(store.get(&target).await.is_err(), "nothing is there yet");
        writer.finish().await.unwrap();
        let found = store.get(&target).await.unwrap().bytes().await.unwrap();
        assert!(found == content, "{bytes}");
    }

    #[tokio::test]
    async fn a_file_arrives_as_it_was_whether_in_one_part_or_several() {
        let part = usize::try_from(PART_BYTES).unwrap();
        for bytes in [0, 1, part, part + 1, 2 * part, 2 * part + 77] {
            there_and_back(bytes).await;
        }
    }

    #[test]
    fn no_file_has_more_parts_than_an_object_may_have() {
        let of = |bytes| Parts::of(tempfile::tempfile().unwrap(), bytes).part_bytes;
        assert_eq!(of(1 << 30), PART_BYTES);
        for bytes in [50u64 << 30, (50 << 30) + 1, 1 << 40] {
            assert!(bytes.div_ceil(of(bytes)) <= PARTS_MAX, "{bytes}");
        }
    }
}
