//! Who is at the other end of a connection, and whether it is let in.
//!
//! The kernel tells (SO_PEERCRED): what the process was when it connected. A process counts with its
//! primary group; its other groups count for the file's mode alone.

use std::io;

use tokio::net::UnixStream;

use crate::config;

/// A process that has connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// As this machine counts it; 0 where it lives in a PID namespace that this process cannot see
    /// into.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Its primary group.
    pub gid: u32,
}

impl Peer {
    /// Who is at the other end of `stream`.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn of(stream: &UnixStream) -> io::Result<Self> {
        // Not rustix's: its type of process ids cannot be 0, which is what comes for a process of
        // another container.
        let credentials = stream.peer_cred()?;
        Ok(Self {
            pid: credentials.pid().unwrap_or_default().unsigned_abs(),
            uid: credentials.uid(),
            gid: credentials.gid(),
        })
    }
}

/// Who is let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// The user that the daemon runs as, whose operator has to be able to look.
    pub own_uid: u32,
    /// Users.
    pub uids: Vec<u32>,
    /// Groups.
    pub gids: Vec<u32>,
}

/// Who is not.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "user {uid} with group {gid} is not let in; add one of them to socket.allow_uids or \
     socket.allow_gids"
)]
pub struct NotAllowed {
    uid: u32,
    gid: u32,
}

impl Allowed {
    /// As the configuration says, for this process.
    #[must_use]
    pub fn new(settings: &config::Socket) -> Self {
        Self {
            own_uid: rustix::process::geteuid().as_raw(),
            uids: settings.allow_uids.clone(),
            gids: settings.allow_gids.clone(),
        }
    }

    /// Whether `peer` is let in. Where nobody is named, the file's mode alone decides; root is let in
    /// only if it is named, since a container's root may be that of the machine.
    ///
    /// # Errors
    /// [`NotAllowed`] when it is not.
    pub fn check(&self, peer: &Peer) -> Result<(), NotAllowed> {
        let nobody_is_named = self.uids.is_empty() && self.gids.is_empty();
        let Peer { uid, gid, .. } = *peer;
        let is_in = nobody_is_named
            || uid == self.own_uid
            || self.uids.contains(&uid)
            || self.gids.contains(&gid);
        is_in.then_some(()).ok_or(NotAllowed { uid, gid })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: u32 = 500;

    fn is_allowed(uids: &[u32], gids: &[u32], uid: u32, gid: u32) -> bool {
        let allowed = Allowed {
            own_uid: OWN,
            uids: uids.to_vec(),
            gids: gids.to_vec(),
        };
        allowed.check(&Peer { pid: 7, uid, gid }).is_ok()
    }

    #[test]
    fn with_nobody_named_all_are_let_in() {
        assert!(is_allowed(&[], &[], 1000, 1000));
    }

    #[test]
    fn with_somebody_named_only_they_and_the_daemons_own_user_are_let_in() {
        assert!(is_allowed(&[1000], &[], 1000, 9));
        assert!(is_allowed(&[1000], &[20], 9, 20));
        assert!(is_allowed(&[1000], &[], OWN, 9));
        assert!(!is_allowed(&[1000], &[20], 1001, 21));
        assert!(!is_allowed(&[], &[20], 20, 9));
        assert!(!is_allowed(&[1000], &[], 0, 0), "not even root");
    }

    #[tokio::test]
    async fn the_kernel_tells_who_is_at_the_other_end() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = Peer::of(&one).unwrap();
        assert_eq!(peer.pid, std::process::id());
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
    }
}
