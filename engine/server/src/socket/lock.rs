//! The lock beside the socket, and who holds it.

use std::fs::{File, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::{SocketError, failed};

/// Held until dropped.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

fn lock_path(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    path.into()
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    // Nobody else may hold it: whoever can open the file could keep the daemon from starting.
    options.mode(0o600);
    options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed());
    options.open(path)
}

impl Lock {
    /// Locks `socket` for this process, which the file then names.
    pub(super) fn acquire(socket: &Path) -> Result<Self, SocketError> {
        let directory = socket.parent().unwrap_or(Path::new("/"));
        if !directory.is_dir() {
            let directory = directory.to_owned();
            return Err(SocketError::NoDirectory { directory });
        }
        let path = lock_path(socket);
        let mut file = open(&path).map_err(failed("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(SocketError::InUse {
                    path: socket.to_owned(),
                    pid: read_pid(&mut file).unwrap_or_default(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(failed("lock", &path)(source)),
        }
        let written = file
            .set_len(0)
            .and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes()));
        written.map_err(failed("write", &path))?;
        Ok(Self { _file: file })
    }
}

/// The process that serves `socket` now, if one does.
#[must_use]
pub fn holder(socket: &Path) -> Option<u32> {
    let mut file = File::open(lock_path(socket)).ok()?;
    match file.try_lock_shared() {
        // Nobody holds it; the lock goes with the file.
        Ok(()) => None,
        Err(_) => read_pid(&mut file),
    }
}

/// The process that a lock file names; none while it is being written.
fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}
