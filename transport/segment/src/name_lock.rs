//! The lock under which a segment is made and found.
//!
//! Each name has a lock of its own, a file beside the segment that only its owner may open. So
//! engines that start together do not wait for each other, and another user can neither lock it nor
//! hold anybody up: a lock on the directory could be taken by whoever may read it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::directory::{is_at, is_unused, open_existing};
use crate::error::{SegmentError, io_error};

/// Whoever holds the lock reserves the pool's memory: a kernel that clears 2 GiB a second needs this
/// long for 1.2 TiB.
pub(crate) const PATIENCE: Duration = Duration::from_secs(600);
const POLL: Duration = Duration::from_millis(20);
/// Between two notices that this process waits.
const NOTICE_PERIOD: Duration = Duration::from_secs(5);

/// Held until dropped. The file exists only meanwhile.
#[derive(Debug)]
pub(crate) struct NameLock {
    path: PathBuf,
    _file: File,
}

impl NameLock {
    /// Locks `name` in `directory`, waiting at most for `patience`; `on_wait` hears of the file, and
    /// of the time waited so far, now and then.
    pub(crate) fn acquire(
        directory: &Path,
        name: &str,
        patience: Duration,
        on_wait: &dyn Fn(&Path, Duration),
    ) -> Result<Self, SegmentError> {
        // No segment's name has an "@".
        let path = directory.join(format!("{name}@lock"));
        let begun = Instant::now();
        let mut next_notice = NOTICE_PERIOD;
        loop {
            if let Some(file) = open(&path)?
                && is_unused(&file)
                // Whoever held it before has removed the file that it held.
                && is_at(&file, &path)
            {
                return Ok(Self { path, _file: file });
            }
            let waited = begun.elapsed();
            if waited >= patience {
                let path = path.display().to_string();
                return Err(SegmentError::Locked { path, waited });
            }
            if waited >= next_notice {
                on_wait(&path, waited);
                next_notice = waited + NOTICE_PERIOD;
            }
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for NameLock {
    fn drop(&mut self) {
        // Where this fails, the next engine in this directory removes the file.
        let _ = fs::remove_file(&self.path);
    }
}

/// The lock's file; `None` if it vanished meanwhile.
fn open(path: &Path) -> Result<Option<File>, SegmentError> {
    let mut options = File::options();
    options.read(true).write(true).create_new(true).mode(0o600);
    match options.open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => open_existing(path),
        Err(error) => Err(io_error("create", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const SHORT: Duration = Duration::from_millis(100);

    fn acquire(directory: &Path, name: &str) -> Result<NameLock, SegmentError> {
        NameLock::acquire(directory, name, SHORT, &|_, _| {})
    }

    #[test]
    fn who_waits_too_long_is_told_for_what() {
        let directory = tempfile::tempdir().unwrap();
        let held = acquire(directory.path(), "kvtide-a").unwrap();
        let error = acquire(directory.path(), "kvtide-a").unwrap_err();
        assert!(matches!(error, SegmentError::Locked { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.starts_with("engine_id: ") && text.contains("kvtide-a@lock"),
            "{text}"
        );
        drop(held);
        drop(acquire(directory.path(), "kvtide-a").unwrap());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_name_is_not_held_up_by_another() {
        let directory = tempfile::tempdir().unwrap();
        let _held = acquire(directory.path(), "kvtide-a").unwrap();
        assert!(acquire(directory.path(), "kvtide-b").is_ok());
    }

    #[test]
    fn a_lock_that_a_crash_left_behind_is_free() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("kvtide-a@lock"), b"").unwrap();
        assert!(acquire(directory.path(), "kvtide-a").is_ok());
    }

    #[test]
    fn one_at_a_time_has_it() {
        let directory = tempfile::tempdir().unwrap();
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10 {
                        let patience = Duration::from_secs(60);
                        let name = "kvtide-a";
                        let held = NameLock::acquire(directory.path(), name, patience, &|_, _| {});
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(held.unwrap());
                    }
                });
            }
        });
    }
}
