//! A socket that systemd opened before it started this process (LISTEN_FDS).

use std::path::Path;

use listenfd::ListenFd;

use super::lock::Lock;
use super::{Listening, SocketError};

/// The first Unix socket that the service manager passed, if any. To be called before other threads
/// run, since it takes variables out of the environment.
///
/// # Errors
/// [`SocketError`] when another daemon serves the same path.
pub fn from_service_manager(configured: &Path) -> Result<Option<Listening>, SocketError> {
    let mut passed = ListenFd::from_env();
    // What is no listening Unix socket is for somebody else, such as memory in systemd's store.
    let sockets = (0..passed.len()).find_map(|place| passed.take_unix_listener(place).ok()?);
    let Some(listener) = sockets else {
        return Ok(None);
    };
    let address = listener.local_addr().ok();
    let path = address.as_ref().and_then(|address| address.as_pathname());
    let path = path.unwrap_or(configured).to_owned();
    // systemd gives the socket to one process alone. The lock is for one that somebody starts by hand,
    // and where it cannot be had, that one fails because somebody listens.
    let lock = match Lock::acquire(&path) {
        Ok(lock) => Some(lock),
        Err(error @ SocketError::InUse { .. }) => return Err(error),
        Err(_) => None,
    };
    Ok(Some(Listening {
        listener,
        path,
        is_own: false,
        _lock: lock,
    }))
}
