//! The protocol between engines and the daemon `kvtide serve`: which bytes say what.
//!
//! `docs/wire.md` describes it for people. Here it is as values: what an engine may send
//! ([`ToDaemon`]), what a daemon may send ([`ToEngine`]), how frames are found in a stream
//! ([`FrameReader`]), and which version is spoken ([`Versions`]). Who sends what when, and the file
//! descriptors that come with a [`Welcome`], are matters of those who have the socket.
//!
//! What always holds: no bytes make a reader panic, or allocate more than a small multiple of
//! what has arrived; an error concerns one connection. Both sides are on one node and trust each
//! other's intentions, so a frame is checked for faults and not for malice.

mod error;
mod frame_reader;
mod header;
mod kind;
mod message;
mod payload_reader;
mod payload_writer;
mod session_token;
mod tag;
mod to_daemon;
mod to_engine;
mod version;

pub use error::WireError;
pub use frame_reader::{Frame, FrameReader};
pub use header::Header;
pub use kind::Kind;
pub use message::{
    Answer, Ask, BeginSaves, Bye, ChainSaves, ChainToSave, Clear, Cleared, Count, Counts, Damaged,
    Event, Events, Geometry, Hello, Place, RefusalCode, Refused, Role, SavesBegun, Settle, Used,
    Welcome,
};
pub use session_token::SessionToken;
pub use tag::Tag;
pub use to_daemon::ToDaemon;
pub use to_engine::ToEngine;
pub use version::{Side, VersionError, Versions};

/// The largest length of a frame: bytes behind the length itself.
///
/// A scheduler's call with 8,192 keys has 128 KiB, a million tokens' keys have 1 MiB.
pub const LONGEST_FRAME: u32 = 8 << 20;

/// What the payload of an engine's first frame begins with, in every version of the protocol.
pub const MAGIC: [u8; 8] = *b"kvtide\0\x01";

/// The begin of `text` that has at most `longest` bytes, for fields that only people read.
#[must_use]
pub fn shortened(text: &str, longest: usize) -> &str {
    let fits = |end: &usize| text.is_char_boundary(*end);
    let end = (0..=longest.min(text.len())).rev().find(fits);
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_shortened_between_characters() {
        assert_eq!(shortened("blöcke", 9), "blöcke");
        assert_eq!(shortened("blöcke", 4), "blö");
        assert_eq!(shortened("blöcke", 3), "bl");
        assert_eq!(shortened("ö", 1), "");
        assert_eq!(shortened("", 0), "");
    }
}
