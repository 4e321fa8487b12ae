//! The daemon's end of a connection with an engine's scheduler.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use kvtide_model::wire::ToEngine;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, send, sendmsg};

use crate::sync::{Mutex, lock};

/// What may wait for an engine that does not read: some answers, and the events that were under way. An
/// engine without requests reads nothing, and is sent nothing more until it does.
const PENDING_MAX: usize = 4 << 20;

/// Sends to one engine, and never waits for it.
#[derive(Debug)]
pub(super) struct Link {
    stream: UnixStream,
    pending: Mutex<Vec<u8>>,
}

impl Link {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            pending: Mutex::new(Vec::new()),
        }
    }

    /// The first message, and the descriptors that come with it. The engine waits for it.
    pub(super) fn welcome(
        &self,
        message: &ToEngine<'_>,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut frame = Vec::new();
        message.encode(&mut frame).map_err(io::Error::other)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::Error::other("too many descriptors"));
        }
        let parts = [IoSlice::new(&frame)];
        let flags = SendFlags::NOSIGNAL;
        let sent = sendmsg(self.stream.as_fd(), &parts, &mut ancillary, flags)?;
        self.send_bytes(&frame[sent..])
    }

    /// Sends a message, now or when the engine reads again.
    pub(super) fn send(&self, message: &ToEngine<'_>) -> io::Result<()> {
        let mut frame = Vec::new();
        message.encode(&mut frame).map_err(io::Error::other)?;
        self.send_bytes(&frame)
    }

    /// Sends what waits, as far as the engine takes it.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.send_bytes(&[])
    }

    fn send_bytes(&self, frame: &[u8]) -> io::Result<()> {
        let mut pending = lock(&self.pending);
        if pending.len() + frame.len() > PENDING_MAX {
            self.close();
            return Err(io::ErrorKind::TimedOut.into());
        }
        pending.extend_from_slice(frame);
        while !pending.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(&self.stream, &pending, flags) {
                Ok(sent) => drop(pending.drain(..sent)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(()),
                Err(errno) => {
                    self.close();
                    return Err(errno.into());
                }
            }
        }
        Ok(())
    }

    /// Whether the engine has taken everything.
    pub(super) fn is_idle(&self) -> bool {
        lock(&self.pending).is_empty()
    }

    /// Ends the connection: whoever reads from it sees its end.
    pub(super) fn close(&self) {
        // It may be gone already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}
