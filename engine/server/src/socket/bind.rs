//! Makes the socket file. Nobody can connect before it has its mode and its owner.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, chownat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::net::{bind as bind_to, connect, listen, socket_with};

use super::{SocketError, failed, owner};
use crate::config;

/// Connections that wait to be taken: all processes of as many engines as are served may come back at
/// the same moment, when a daemon has been restarted.
const BACKLOG: i32 = 1024;

/// Removes a socket file on which nobody listens. The caller holds the lock.
pub(super) fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let Ok(found) = fs::symlink_metadata(path) else {
        return Ok(()); // Nothing there, or what `bind` explains.
    };
    if !found.file_type().is_socket() {
        let path = path.to_owned();
        return Err(SocketError::NotASocket { path });
    }
    let address = SocketAddrUnix::new(path).map_err(|e| failed("name", path)(e.into()))?;
    // Not blocking: where somebody listens and does not take connections, this would wait for ever.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|e| failed("make a socket for", path)(e.into()))?;
    match connect(&probe, &address) {
        Ok(()) | Err(Errno::AGAIN) => Err(SocketError::Foreign {
            path: path.to_owned(),
        }),
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(failed("remove", path)),
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(failed("connect to", path)(errno.into())),
    }
}

/// Listens on a socket file that does not exist yet.
pub(super) fn bind(settings: &config::Socket) -> Result<UnixListener, SocketError> {
    let path = settings.path.as_path();
    let user = settings.owner.as_deref().map(owner::user_id).transpose()?;
    let group = settings.group.as_deref().map(owner::group_id).transpose()?;
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|e| failed("make a socket for", path)(e.into()))?;
    let address = SocketAddrUnix::new(path).map_err(|e| failed("name", path)(e.into()))?;
    bind_to(&socket, &address).map_err(|e| failed("create", path)(e.into()))?;
    let finished = finish(settings, user, group)
        .and_then(|()| listen(&socket, BACKLOG).map_err(|e| failed("listen on", path)(e.into())));
    if let Err(error) = finished {
        // The error that is returned says more than a failure to clean up would.
        let _ = fs::remove_file(path);
        return Err(error);
    }
    Ok(UnixListener::from(socket))
}

/// Gives the file its mode, then its owner, who may be somebody else.
fn finish(
    settings: &config::Socket,
    user: Option<u32>,
    group: Option<u32>,
) -> Result<(), SocketError> {
    let path = settings.path.as_path();
    fs::set_permissions(path, Permissions::from_mode(settings.mode))
        .map_err(failed("set the mode of", path))?;
    if user.is_none() && group.is_none() {
        return Ok(());
    }
    let user = user.map(rustix::fs::Uid::from_raw);
    let group = group.map(rustix::fs::Gid::from_raw);
    chownat(CWD, path, user, group, AtFlags::SYMLINK_NOFOLLOW).map_err(|errno| SocketError::Io {
        action: "give to socket.owner and socket.group",
        path: path.to_owned(),
        source: errno.into(),
        fix: "only root gives files to other users; a group must be one of the daemon's own \
              (SupplementaryGroups= or supplementalGroups)",
    })
}
