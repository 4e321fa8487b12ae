//! The socket on which engines and operators connect.
//!
//! One daemon has it at a time: whoever holds the lock of `<path>.lock`. Only the holder removes a
//! socket file that a daemon left behind, and only when nobody listens on it. The kernel drops the lock
//! with the process, however it ends. The lock file stays: removed, it could be locked by one daemon
//! under its old name and by another under its new one.

mod activation;
mod bind;
mod lock;
mod owner;
mod peer;

use std::fs;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

pub use activation::from_service_manager;
pub use owner::{NoSuchPrincipal, group_id, user_id};
pub use peer::{Allowed, NotAllowed, Peer};

use crate::config;
use lock::Lock;

pub use lock::holder;

/// Why a daemon cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another daemon does.
    #[error(
        "{path}: process {pid} serves this socket already; stop it, or set socket.path to another path"
    )]
    InUse {
        /// The socket.
        path: PathBuf,
        /// Which; 0 while it is just starting.
        pid: u32,
    },
    /// Something that holds no lock does.
    #[error(
        "{path}: something listens there that is no kvtide serve, such as systemd for kvtide.socket; \
         start the daemon with systemctl start kvtide, stop the unit, or set socket.path to another path"
    )]
    Foreign {
        /// The socket.
        path: PathBuf,
    },
    /// Something else is in the way.
    #[error("{path}: it exists and is no socket; remove it, or set socket.path to another path")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// There is no place for it.
    #[error(
        "{directory}: there is no such directory; create it, let systemd do so with \
         RuntimeDirectory=, or set socket.path to another path"
    )]
    NoDirectory {
        /// The directory.
        directory: PathBuf,
    },
    /// The owner or the group is unknown.
    #[error(transparent)]
    NoSuchPrincipal(#[from] NoSuchPrincipal),
    /// The system refuses.
    #[error("cannot {action} {path}: {source}; {fix}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
        /// What to do.
        fix: &'static str,
    },
}

/// A fix that fits to most failures of file operations.
const RIGHTS: &str = "check the rights of the directory and of the daemon's user";

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SocketError {
    move |source| SocketError::Io {
        action,
        path: path.to_owned(),
        source,
        fix: RIGHTS,
    }
}

/// A socket that is listened on, until dropped.
#[derive(Debug)]
pub struct Listening {
    /// Takes connections.
    pub listener: UnixListener,
    path: PathBuf,
    /// Whether the file is ours to remove.
    is_own: bool,
    /// Released last.
    _lock: Option<Lock>,
}

impl Listening {
    /// Listens as `settings` say.
    ///
    /// # Errors
    /// [`SocketError`] when somebody else does, or the system refuses.
    pub fn open(settings: &config::Socket) -> Result<Self, SocketError> {
        let path = &settings.path;
        let lock = Lock::acquire(path)?;
        bind::remove_stale(path)?;
        Ok(Self {
            listener: bind::bind(settings)?,
            path: path.clone(),
            is_own: true,
            _lock: Some(lock),
        })
    }

    /// The socket's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if self.is_own
            && let Err(error) = fs::remove_file(&self.path)
        {
            // The next daemon removes it.
            tracing::debug!(%error, path = %self.path.display(), "the socket file stays");
        }
    }
}
