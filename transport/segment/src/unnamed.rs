//! Files that get their name when they are whole: until then they go with their process, however it
//! ends.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open};

use crate::error::{SegmentError, io_error};

/// Makes a file of `bytes` in `directory` that read as zeros and have no memory yet; only its owner
/// may open it.
///
/// # Errors
/// [`SegmentError::Io`] when the operating system refuses.
pub fn create_unnamed(directory: &Path, bytes: usize) -> Result<File, SegmentError> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let opened = open(directory, flags, Mode::RUSR | Mode::WUSR);
    let file = File::from(opened.map_err(|errno| io_error("create", directory)(errno.into()))?);
    let sized = file.set_len(bytes as u64);
    sized.map_err(io_error("size", directory))?;
    Ok(file)
}

/// Gives a file of [`create_unnamed`] its name, which no other file has.
///
/// # Errors
/// [`SegmentError::Io`], also when there is a file of that name.
pub fn give_name(file: &File, path: &Path) -> Result<(), SegmentError> {
    // Without privileges, a descriptor is linked by way of its name under /proc.
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    let linked = linkat(CWD, own, CWD, path, AtFlags::SYMLINK_FOLLOW);
    linked.map_err(|errno| io_error("name", path)(errno.into()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_file_has_no_name_before_it_gets_one_and_takes_nobody_elses() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path().join("memory");
        let file = create_unnamed(directory.path(), 4096).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        give_name(&file, &path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), [0; 4096]);
        let other = create_unnamed(directory.path(), 1).unwrap();
        assert!(give_name(&other, &path).is_err());
    }
}
