//! Blobs in an object store: S3 and what is compatible with it, or a directory that several servers
//! share. Results are one object for each append, gathered over a second: object stores cannot
//! append, and ask money for every object.
//!
//! ```text
//! files/<file id>
//! parts/<batch id>/<epoch>-<n>.<stream>
//! ```

mod transfer;

use std::env;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path as LocalPath, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use kvtide_control_base::tls::Trust;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::buffered::BufWriter;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{Certificate, ClientOptions, GetOptions};
use object_store::{ObjectStore, ObjectStoreExt, ObjectStoreScheme};
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use url::Url;

use crate::blobs::{BlobWriter, Blobs, ByteStream, Extent, PartWriter, Piece, parts_of};
use crate::error::Failure;
use crate::store::{Fence, Stream};
use transfer::Transfer;

pub use transfer::TRANSFER_BYTES;

/// Results wait at most this long for company.
const GATHER: Duration = Duration::from_secs(1);
/// Results up to this size are put at once, more in parts of it. S3 wants at least 5 MiB.
const PART_BYTES: usize = 8 << 20;
/// Memory that one stream takes: what its connection has read ahead, twice over.
const STREAM_BYTES: u64 = 1 << 20;
/// Parts of one object under way at once: with [`PART_BYTES`], 16 MiB of memory.
const PARTS_AT_ONCE: usize = 2;
const WHAT: &str = "the object store";
/// What keeps bytes, and what this program was built for.
const SCHEMES: [&str; 3] = ["s3", "s3a", "file"];

/// See the module's documentation.
#[derive(Debug)]
pub struct Objects {
    store: Arc<dyn ObjectStore>,
    root: Path,
    scratch: PathBuf,
    transfers: Arc<Semaphore>,
}

impl Objects {
    /// Opens the store at `url`, for instance `s3://bucket/prefix`; credentials, region and endpoint
    /// come from the usual environment variables, `AWS_…`. `scratch` is a local directory. Over TLS,
    /// whom `trust` has added is believed beside those whom the system trusts. So many `transfers` of
    /// whole files go on at once.
    ///
    /// # Errors
    /// When the URL names no store, or its settings are not complete.
    pub fn open(
        url: &Url,
        scratch: &LocalPath,
        trust: &Trust,
        transfers: usize,
    ) -> Result<Objects, Failure> {
        if !SCHEMES.contains(&url.scheme()) {
            return Err(Failure::internal(
                "opening the object store",
                format!("--blobs must be one of {SCHEMES:?}, not {}", url.scheme()),
            ));
        }
        const WHAT: &str = "opening the object store";
        let (_, root) = ObjectStoreScheme::parse(url).map_err(Failure::when(WHAT))?;
        let store: Arc<dyn ObjectStore> = match url.scheme() {
            // The crate's default leaves it to the system when bytes reach the disk.
            "file" => Arc::new(LocalFileSystem::new().with_fsync(true)),
            _ => Arc::new(s3(url, trust).map_err(Failure::when(WHAT))?),
        };
        std::fs::create_dir_all(scratch).map_err(Failure::when("making the scratch directory"))?;
        Ok(Objects {
            store,
            root,
            scratch: scratch.to_owned(),
            transfers: Arc::new(Semaphore::new(transfers)),
        })
    }

    fn path(&self, key: &str) -> Path {
        key.split('/')
            .fold(self.root.clone(), |path, part| path.join(part))
    }
}

/// The store in S3, or in what speaks like it, that a URL and the environment name.
fn s3(url: &Url, trust: &Trust) -> object_store::Result<AmazonS3> {
    let mut options = ClientOptions::new();
    for added in trust.added() {
        options = options.with_root_certificate(Certificate::from_der(added)?);
    }
    let builder = AmazonS3Builder::new()
        .with_client_options(options)
        .with_url(url.as_str());
    env::vars()
        .map(|(name, value)| (name.to_ascii_lowercase(), value))
        .filter(|(name, _)| name.starts_with("aws_"))
        .filter_map(|(name, value)| Some((name.parse().ok()?, value)))
        .fold(builder, |builder, (key, value)| {
            builder.with_config(key, value)
        })
        .build()
}

fn failed(key: &str) -> impl FnOnce(object_store::Error) -> Failure {
    move |error| match error {
        object_store::Error::NotFound { .. } => Failure::Missing {
            key: key.to_owned(),
        },
        error => Failure::internal(WHAT, error),
    }
}

#[async_trait]
impl Blobs for Objects {
    async fn ping(&self) -> Result<(), Failure> {
        match self.store.head(&self.path("ready")).await {
            Ok(_) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(Failure::internal(WHAT, error)),
        }
    }

    async fn create(&self, key: &str) -> Result<Box<dyn BlobWriter>, Failure> {
        Ok(Box::new(Transfer {
            file: tokio::fs::File::from_std(self.scratch()?),
            bytes: 0,
            store: Arc::clone(&self.store),
            target: self.path(key),
            places: Arc::clone(&self.transfers),
        }))
    }

    fn stream_bytes(&self) -> u64 {
        STREAM_BYTES
    }

    async fn read(&self, key: &str, range: Range<u64>) -> Result<ByteStream, Failure> {
        if range.is_empty() {
            return Ok(futures_util::stream::empty().boxed());
        }
        let options = GetOptions {
            range: Some(range.into()),
            ..GetOptions::default()
        };
        let found = self
            .store
            .get_opts(&self.path(key), options)
            .await
            .map_err(failed(key))?;
        Ok(found.into_stream().map_err(Failure::when(WHAT)).boxed())
    }

    async fn local(&self, key: &str) -> Result<File, Failure> {
        let mut found = self
            .store
            .get(&self.path(key))
            .await
            .map_err(failed(key))?
            .into_stream();
        let copy = tokio::fs::File::from_std(self.scratch()?);
        let mut copy = tokio::io::BufWriter::with_capacity(PART_BYTES / 8, copy);
        while let Some(bytes) = found.try_next().await.map_err(Failure::when(WHAT))? {
            copy.write_all(&bytes)
                .await
                .map_err(Failure::when("copying a blob to this machine"))?;
        }
        copy.flush()
            .await
            .map_err(Failure::when("copying a blob to this machine"))?;
        let mut file = copy.into_inner().into_std().await;
        file.seek(SeekFrom::Start(0))
            .map_err(Failure::when("copying a blob to this machine"))?;
        Ok(file)
    }

    async fn delete(&self, key: &str) -> Result<(), Failure> {
        match self.store.delete(&self.path(key)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(Failure::internal(WHAT, error)),
        }
    }

    fn part_writer(&self, fence: &Fence) -> Box<dyn PartWriter> {
        Box::new(ObjectParts {
            store: Arc::clone(&self.store),
            root: self.path(&parts_of(&fence.batch)),
            prefix: format!("{}/{}", parts_of(&fence.batch), fence.epoch),
            written: 0,
        })
    }

    async fn delete_parts(&self, batch: &str) -> Result<(), Failure> {
        let prefix = self.path(&parts_of(batch));
        let found = self
            .store
            .list(Some(&prefix))
            .map_ok(|object| object.location)
            .boxed();
        self.store
            .delete_stream(found)
            .try_for_each(|_| async { Ok(()) })
            .await
            .map_err(Failure::when(WHAT))
    }

    fn gather(&self) -> Duration {
        GATHER
    }

    fn scratch(&self) -> Result<File, Failure> {
        tempfile::tempfile_in(&self.scratch).map_err(Failure::when("making a scratch file"))
    }

    async fn stored_files(&self, age: Duration) -> Result<Vec<String>, Failure> {
        let before = SystemTime::now().checked_sub(age);
        self.store
            .list(Some(&self.path("files")))
            .try_filter_map(|object| {
                let old =
                    before.is_some_and(|before| SystemTime::from(object.last_modified) <= before);
                let name = object.location.filename().map(str::to_owned);
                async move { Ok(name.filter(|_| old)) }
            })
            .try_collect()
            .await
            .map_err(Failure::when(WHAT))
    }

    async fn batches_with_parts(&self) -> Result<Vec<String>, Failure> {
        let parts = self.path("parts");
        let found = self.store.list_with_delimiter(Some(&parts)).await;
        let found = found.map_err(Failure::when(WHAT))?;
        Ok(found
            .common_prefixes
            .iter()
            .filter_map(|prefix| prefix.filename().map(str::to_owned))
            .collect())
    }

    async fn length(&self, key: &str) -> Result<Option<u64>, Failure> {
        match self.store.head(&self.path(key)).await {
            Ok(object) => Ok(Some(object.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(Failure::internal(WHAT, error)),
        }
    }
}

struct ObjectParts {
    store: Arc<dyn ObjectStore>,
    root: Path,
    prefix: String,
    written: u64,
}

#[async_trait]
impl PartWriter for ObjectParts {
    async fn append(&mut self, stream: Stream, pieces: Arc<Vec<Piece>>) -> Result<Extent, Failure> {
        // A new name after a failure too: whether the object is there cannot be known.
        self.written += 1;
        let name = format!("{}.{}", self.written, stream.as_str());
        let key = format!("{}-{name}", self.prefix);
        let file_name = key.rsplit('/').next().unwrap_or(&key).to_owned();
        let mut writer = BufWriter::with_capacity(
            Arc::clone(&self.store),
            self.root.clone().join(file_name),
            PART_BYTES,
        )
        .with_max_concurrency(PARTS_AT_ONCE);
        let bytes = pieces.iter().map(Piece::len).sum();
        for piece in pieces.iter() {
            match piece {
                Piece::Memory(memory) => {
                    writer
                        .put(memory.clone())
                        .await
                        .map_err(Failure::when(WHAT))?;
                }
                Piece::Scratch(file, length) => {
                    let file = file
                        .try_clone()
                        .map_err(Failure::when("reading a scratch file"))?;
                    copy_scratch(file, *length, &mut writer).await?;
                }
            }
        }
        writer.shutdown().await.map_err(Failure::when(WHAT))?;
        Ok(Extent {
            key,
            offset: 0,
            bytes,
        })
    }
}

async fn copy_scratch(mut file: File, length: u64, writer: &mut BufWriter) -> Result<(), Failure> {
    const CHUNK_BYTES: u64 = 1 << 20;
    let mut rest = length;
    file.seek(SeekFrom::Start(0))
        .map_err(Failure::when("reading a scratch file"))?;
    while rest > 0 {
        let (back, chunk) = spawn_blocking(move || -> io::Result<(File, Vec<u8>)> {
            let mut chunk = Vec::new();
            (&mut file)
                .take(rest.min(CHUNK_BYTES))
                .read_to_end(&mut chunk)?;
            if chunk.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok((file, chunk))
        })
        .await
        .map_err(Failure::when("reading a scratch file"))?
        .map_err(Failure::when("reading a scratch file"))?;
        file = back;
        rest -= chunk.len() as u64;
        writer
            .put(Bytes::from(chunk))
            .await
            .map_err(Failure::when(WHAT))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_directory_that_servers_share_keeps_what_was_written_on_its_disk() {
        let directory = tempfile::tempdir().unwrap();
        let shared = directory.path().join("shared");
        std::fs::create_dir(&shared).unwrap();
        let url = Url::from_directory_path(&shared).unwrap();
        let trust = Trust::open(None).unwrap();
        let blobs = Objects::open(&url, &directory.path().join("scratch"), &trust, 1).unwrap();
        // Only how the store shows itself tells.
        assert!(format!("{:?}", blobs.store).contains("fsync: true"));
        let mut writer = blobs.create("files/file-1").await.unwrap();
        writer.write(Bytes::from_static(b"bytes")).await.unwrap();
        writer.finish().await.unwrap();
        let read = std::fs::read(shared.join("files/file-1")).unwrap();
        assert_eq!(read, b"bytes");
    }
}
