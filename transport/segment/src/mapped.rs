//! Files of a pool that outlives its engines, mapped whole.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, fallocate};

use crate::error::{SegmentError, io_error};

/// A mapped file.
#[derive(Clone, Debug)]
pub struct MappedFile {
    pub(crate) map: Arc<MmapRaw>,
    path: PathBuf,
}

impl MappedFile {
    /// Maps all of `file`, whose name, for messages, is `path`.
    ///
    /// # Errors
    /// [`SegmentError::Io`] when it cannot be mapped.
    pub fn of(file: &File, path: &Path) -> Result<Self, SegmentError> {
        let length = file.metadata().map_err(io_error("stat", path))?.len();
        let length = usize::try_from(length).unwrap_or(0);
        let options = MmapOptions::new();
        let map = options
            .clone()
            .len(length)
            .map_raw(file)
            .map_err(io_error("map", path))?;
        // Transparent huge pages where the kernel grants them to shared memory; a hint only.
        let _ = map.advise(Advice::HugePage);
        Ok(Self {
            map: Arc::new(map),
            path: path.to_owned(),
        })
    }

    /// Memory that no other process sees, for a part that a process does not share.
    ///
    /// # Errors
    /// [`SegmentError::Io`] when there is none.
    pub fn private(bytes: usize) -> Result<Self, SegmentError> {
        let path = PathBuf::from("private memory");
        let map = MmapOptions::new().len(bytes).map_anon();
        let map = map.map_err(io_error("map", &path))?;
        let map = Arc::new(MmapRaw::from(map));
        Ok(Self { map, path })
    }

    /// Its name.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.map.len()
    }
}

/// Makes a file of `bytes` that read as zeros and have no memory yet; only its owner may open it.
///
/// # Errors
/// [`SegmentError::Io`], also when there is a file of that name.
pub fn create_sparse(path: &Path, bytes: usize) -> Result<File, SegmentError> {
    let mut options = File::options();
    options.read(true).write(true).create_new(true).mode(0o600);
    let file = options.open(path).map_err(io_error("create", path))?;
    let sized = file.set_len(bytes as u64);
    sized.map_err(io_error("size", path))?;
    Ok(file)
}

/// Takes memory for `bytes` of a file, so that running out is an error here and not a SIGBUS later.
///
/// # Errors
/// [`SegmentError::NoSpace`] when there is too little.
pub fn reserve(file: impl AsFd, path: &Path, bytes: Range<usize>) -> Result<(), SegmentError> {
    let file = file.as_fd();
    let length = bytes.len() as u64;
    if length == 0 {
        return Ok(());
    }
    match fallocate(file, FallocateFlags::empty(), bytes.start as u64, length) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::NOSPC | rustix::io::Errno::NOMEM) => {
            let status = rustix::fs::fstatvfs(file);
            let free_bytes = status.map_or(0, |status| status.f_bavail * status.f_frsize);
            Err(SegmentError::NoSpace {
                directory: path.parent().unwrap_or(path).display().to_string(),
                free_bytes,
                needed_bytes: bytes.len(),
            })
        }
        Err(errno) => Err(io_error("reserve memory for", path)(errno.into())),
    }
}
