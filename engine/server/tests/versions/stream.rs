//! Frames over a socket, with the descriptors that come with some.

use std::io::{IoSlice, IoSliceMut, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use kvtide_model::wire::{Header, LONGEST_FRAME};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The next whole frame and its descriptors; `None` at the end of the stream.
pub(crate) fn receive(mut stream: &UnixStream) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut head = [0; Header::BYTES];
    let mut files = Vec::new();
    // Descriptors come with the first byte.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut head)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(stream.as_fd(), &mut parts, &mut ancillary, flags).ok()?;
    if received.bytes == 0 {
        return None;
    }
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            files.extend(descriptors);
        }
    }
    stream.read_exact(&mut head[received.bytes..]).ok()?;
    let header = Header::decode(head, LONGEST_FRAME).unwrap();
    let mut frame = head.to_vec();
    frame.resize(Header::BYTES + header.payload_bytes as usize, 0);
    stream.read_exact(&mut frame[Header::BYTES..]).ok()?;
    Some((frame, files))
}

/// Sends all of `bytes`, which are few, with descriptors. Whoever has gone is not told.
pub(crate) fn send(stream: &UnixStream, bytes: &[u8], files: &[OwnedFd]) {
    let files: Vec<BorrowedFd<'_>> = files.iter().map(|file| file.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
    }
    let parts = [IoSlice::new(bytes)];
    let sent = sendmsg(stream.as_fd(), &parts, &mut ancillary, SendFlags::NOSIGNAL);
    assert!(sent.is_err() || sent == Ok(bytes.len()), "{sent:?}");
}
