//! Blobs in a local directory.
//!
//! ```text
//! files/<file id>                          whole files, moved here when complete
//! parts/<batch id>/<epoch>.<stream>        result lines, appended
//! scratch/                                 files being written; emptied at start
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use tempfile::NamedTempFile;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::task::spawn_blocking;
use tokio_util::io::ReaderStream;

use crate::blobs::{BlobWriter, Blobs, ByteStream, Extent, PartWriter, Piece, parts_of};
use crate::error::Failure;
use crate::store::{Fence, Stream};

/// Bytes read from a file at once.
const READ_BYTES: usize = 32 << 10;
/// What is read from it, the copy that is passed on, and what of it still waits to be written.
const STREAM_BYTES: u64 = 4 * READ_BYTES as u64;
/// Results wait at most this long for company before they are written and synced together.
const GATHER: Duration = Duration::from_millis(25);

/// See the module's documentation.
#[derive(Debug)]
pub struct Local {
    root: PathBuf,
}

impl Local {
    /// Opens the directory, which nobody else may use, and clears away what a crash left half
    /// written.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn open(root: &Path) -> Result<Local, Failure> {
        const WHAT: &str = "preparing the data directory";
        let scratch = root.join("scratch");
        match fs::remove_dir_all(&scratch) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Failure::internal(WHAT, error));
            }
            _ => {}
        }
        for directory in [&scratch, &root.join("files"), &root.join("parts")] {
            fs::create_dir_all(directory).map_err(Failure::when(WHAT))?;
        }
        Ok(Local {
            root: root.to_owned(),
        })
    }

    fn path(&self, key: &str) -> PathBuf {
        self.root.join(key)
    }
}

fn failed(key: &str) -> impl FnOnce(io::Error) -> Failure {
    move |error| match error.kind() {
        io::ErrorKind::NotFound => Failure::Missing {
            key: key.to_owned(),
        },
        _ => Failure::internal("reading or writing a blob", error),
    }
}

async fn blocking<T: Send + 'static>(
    key: &str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    spawn_blocking(work)
        .await
        .map_err(Failure::when("reading or writing a blob"))?
        .map_err(failed(key))
}

/// Makes the entries of a directory durable.
fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[async_trait]
impl Blobs for Local {
    async fn ping(&self) -> Result<(), Failure> {
        let root = self.root.clone();
        blocking("", move || fs::metadata(root).map(drop)).await
    }

    async fn create(&self, key: &str) -> Result<Box<dyn BlobWriter>, Failure> {
        let (scratch, target) = (self.root.join("scratch"), self.path(key));
        let (file, temporary) = blocking(key, move || {
            let temporary = NamedTempFile::new_in(scratch)?;
            Ok((temporary.as_file().try_clone()?, temporary))
        })
        .await?;
        Ok(Box::new(LocalWriter {
            file: tokio::fs::File::from_std(file),
            temporary,
            target,
        }))
    }

    fn stream_bytes(&self) -> u64 {
        STREAM_BYTES
    }

    async fn read(&self, key: &str, range: Range<u64>) -> Result<ByteStream, Failure> {
        let mut file = tokio::fs::File::open(self.path(key))
            .await
            .map_err(failed(key))?;
        file.seek(SeekFrom::Start(range.start))
            .await
            .map_err(failed(key))?;
        let limited = file.take(range.end.saturating_sub(range.start));
        let stream = ReaderStream::with_capacity(limited, READ_BYTES);
        Ok(stream.map_err(Failure::when("reading a blob")).boxed())
    }

    async fn local(&self, key: &str) -> Result<File, Failure> {
        let path = self.path(key);
        blocking(key, move || File::open(path)).await
    }

    async fn delete(&self, key: &str) -> Result<(), Failure> {
        let path = self.path(key);
        blocking(key, move || gone(fs::remove_file(path))).await
    }

    fn part_writer(&self, fence: &Fence) -> Box<dyn PartWriter> {
        let prefix = format!("{}/{}", parts_of(&fence.batch), fence.epoch);
        Box::new(LocalParts {
            root: self.root.clone(),
            prefix,
            output: None,
            error: None,
        })
    }

    async fn delete_parts(&self, batch: &str) -> Result<(), Failure> {
        let path = self.path(&parts_of(batch));
        blocking(batch, move || gone(fs::remove_dir_all(path))).await
    }

    fn gather(&self) -> Duration {
        GATHER
    }

    fn scratch(&self) -> Result<File, Failure> {
        tempfile::tempfile_in(self.root.join("scratch"))
            .map_err(Failure::when("making a scratch file"))
    }

    async fn stored_files(&self, age: Duration) -> Result<Vec<String>, Failure> {
        let directory = self.root.join("files");
        blocking("files", move || {
            let before = SystemTime::now().checked_sub(age);
            let mut ids = Vec::new();
            for entry in fs::read_dir(directory)? {
                let entry = entry?;
                if before.is_some_and(|before| {
                    entry
                        .metadata()
                        .is_ok_and(|m| m.modified().is_ok_and(|at| at <= before))
                }) && let Ok(name) = entry.file_name().into_string()
                {
                    ids.push(name);
                }
            }
            Ok(ids)
        })
        .await
    }

    async fn batches_with_parts(&self) -> Result<Vec<String>, Failure> {
        let directory = self.root.join("parts");
        blocking("parts", move || {
            fs::read_dir(directory)?
                .map(|entry| Ok(entry?.file_name().into_string().ok()))
                .filter_map(Result::transpose)
                .collect()
        })
        .await
    }

    async fn length(&self, key: &str) -> Result<Option<u64>, Failure> {
        let path = self.path(key);
        blocking(key, move || match fs::metadata(path) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        })
        .await
    }
}

/// Removing what is not there is no error: it was removed before.
fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

struct LocalWriter {
    file: tokio::fs::File,
    /// Removes the file when dropped.
    temporary: NamedTempFile,
    target: PathBuf,
}

#[async_trait]
impl BlobWriter for LocalWriter {
    async fn write(&mut self, bytes: Bytes) -> Result<(), Failure> {
        self.file
            .write_all(&bytes)
            .await
            .map_err(Failure::when("writing a blob"))
    }

    async fn finish(mut self: Box<Self>) -> Result<(), Failure> {
        // A full disk may show only here.
        self.file
            .flush()
            .await
            .map_err(Failure::when("writing a blob"))?;
        let LocalWriter {
            temporary, target, ..
        } = *self;
        blocking("", move || {
            temporary.as_file().sync_all()?;
            temporary.persist(&target).map_err(|failed| failed.error)?;
            target.parent().map_or(Ok(()), sync_directory)
        })
        .await
    }

    async fn abandon(self: Box<Self>) {
        // Dropping removes the file; it has no other trace.
    }
}

/// One file being appended to, and how much of it counts.
struct Tail {
    key: String,
    file: File,
    length: u64,
    /// The directories whose entries lead to the file and may not be durable yet.
    to_sync: Vec<PathBuf>,
}

impl Tail {
    fn create(root: &Path, key: String) -> io::Result<Tail> {
        let path = root.join(&key);
        let directory = path.parent().unwrap_or(root);
        fs::create_dir_all(directory)?;
        // A lease has its files to itself: what is there already would be somebody else's.
        let file = OpenOptions::new()
            .create_new(true)
            .write(true)
            .open(&path)?;
        Ok(Tail {
            to_sync: vec![root.join("parts"), directory.to_owned()],
            key,
            file,
            length: 0,
        })
    }

    fn append(&mut self, pieces: &[Piece]) -> io::Result<Extent> {
        // Here, and not where the file is made: what failed is done again, and the file is made once.
        while let Some(directory) = self.to_sync.last() {
            sync_directory(directory)?;
            self.to_sync.pop();
        }
        let offset = self.length;
        // After an append that failed half way, its bytes are written over.
        self.file.seek(SeekFrom::Start(offset))?;
        let mut bytes = 0;
        let mut gathered = Vec::new();
        for piece in pieces {
            bytes += piece.len();
            match piece {
                Piece::Memory(memory) => gathered.extend_from_slice(memory),
                Piece::Scratch(scratch, _) => {
                    let mut scratch: &File = scratch;
                    self.file.write_all(&gathered)?;
                    gathered.clear();
                    scratch.seek(SeekFrom::Start(0))?;
                    io::copy(&mut scratch, &mut self.file)?;
                }
            }
        }
        self.file.write_all(&gathered)?;
        self.file.sync_data()?;
        if self.file.stream_position()? != offset + bytes {
            return Err(io::Error::other("a result has another length than it had"));
        }
        self.length = offset + bytes;
        Ok(Extent {
            key: self.key.clone(),
            offset,
            bytes,
        })
    }
}

struct LocalParts {
    root: PathBuf,
    prefix: String,
    output: Option<Tail>,
    error: Option<Tail>,
}

#[async_trait]
impl PartWriter for LocalParts {
    async fn append(&mut self, stream: Stream, pieces: Arc<Vec<Piece>>) -> Result<Extent, Failure> {
        let slot = match stream {
            Stream::Output => &mut self.output,
            Stream::Error => &mut self.error,
        };
        let tail = slot.take();
        let root = self.root.clone();
        let key = format!("{}.{}", self.prefix, stream.as_str());
        let (tail, extent) = blocking(&key.clone(), move || {
            let mut tail = match tail {
                Some(tail) => tail,
                None => Tail::create(&root, key)?,
            };
            let extent = tail.append(&pieces);
            Ok((tail, extent))
        })
        .await?;
        *slot = Some(tail);
        extent.map_err(Failure::when("writing results"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(text: &str) -> Piece {
        Piece::Memory(Bytes::from(text.to_owned()))
    }

    async fn read(blobs: &Local, extent: &Extent) -> Vec<u8> {
        let range = extent.offset..extent.offset + extent.bytes;
        let pieces: Vec<Bytes> = blobs
            .read(&extent.key, range)
            .await
            .unwrap()
            .try_collect()
            .await
            .unwrap();
        pieces.concat()
    }

    #[tokio::test]
    async fn results_are_read_back_from_where_they_were_appended() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Local::open(directory.path()).unwrap();
        let fence = Fence {
            batch: "batch_1".into(),
            epoch: 3,
        };
        let mut parts = blobs.part_writer(&fence);
        let mut scratch = blobs.scratch().unwrap();
        scratch.write_all(b"large\n").unwrap();
        let first = parts
            .append(
                Stream::Output,
                Arc::new(vec![
                    memory("a\n"),
                    Piece::Scratch(scratch, 6),
                    memory("b\n"),
                ]),
            )
            .await
            .unwrap();
        let second = parts
            .append(Stream::Output, Arc::new(vec![memory("c\n")]))
            .await
            .unwrap();
        let other = parts
            .append(Stream::Error, Arc::new(vec![memory("e\n")]))
            .await
            .unwrap();
        assert_eq!(read(&blobs, &first).await, b"a\nlarge\nb\n");
        assert_eq!(read(&blobs, &second).await, b"c\n");
        assert_eq!((first.offset, second.offset, other.offset), (0, 10, 0));
        blobs.delete_parts("batch_1").await.unwrap();
        blobs.delete_parts("batch_1").await.unwrap();
        assert!(matches!(
            blobs.local(&first.key).await,
            Err(Failure::Missing { .. })
        ));
    }

    #[tokio::test]
    async fn a_failed_append_is_written_over_by_the_next() {
        let directory = tempfile::tempdir().unwrap();
        let mut tail = {
            fs::create_dir_all(directory.path().join("parts")).unwrap();
            Tail::create(directory.path(), "parts/1.output".into()).unwrap()
        };
        tail.append(&[memory("kept\n")]).unwrap();
        let scratch = tempfile::tempfile().unwrap();
        // A piece that turns out shorter than it was said to be, after other bytes were written.
        let broken = [
            memory("torn, and rather long\n"),
            Piece::Scratch(scratch, 7),
        ];
        tail.append(&broken).unwrap_err();
        let extent = tail.append(&[memory("next\n")]).unwrap();
        assert_eq!((extent.offset, extent.bytes), (5, 5));
        let written = fs::read(directory.path().join("parts/1.output")).unwrap();
        assert!(written.starts_with(b"kept\nnext\n"));
    }

    #[test]
    fn a_directory_that_could_not_be_synced_is_no_obstacle_later() {
        let directory = tempfile::tempdir().unwrap();
        let mut tail = Tail::create(directory.path(), "batch/1.output".into()).unwrap();
        tail.append(&[memory("a\n")]).unwrap_err();
        fs::create_dir(directory.path().join("parts")).unwrap();
        tail.append(&[memory("a\n")]).unwrap();
        assert_eq!(
            fs::read(directory.path().join("batch/1.output")).unwrap(),
            b"a\n"
        );
    }

    #[tokio::test]
    async fn a_blob_is_seen_only_when_finished() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Local::open(directory.path()).unwrap();
        let mut writer = blobs.create("files/file-1").await.unwrap();
        writer.write(Bytes::from_static(b"x")).await.unwrap();
        assert!(blobs.local("files/file-1").await.is_err());
        writer.finish().await.unwrap();
        assert!(blobs.local("files/file-1").await.is_ok());
        let mut writer = blobs.create("files/file-2").await.unwrap();
        writer.write(Bytes::from_static(b"x")).await.unwrap();
        writer.abandon().await;
        assert_eq!(
            blobs.stored_files(Duration::ZERO).await.unwrap(),
            ["file-1"]
        );
        let scratch = fs::read_dir(directory.path().join("scratch")).unwrap();
        assert_eq!(scratch.count(), 0);
    }
}
