//! Why bytes are no frame, or a message cannot be one.

use super::message::RefusalCode;
use super::{Kind, LONGEST_FRAME, MAGIC, Side, VersionError};

/// What is wrong with a frame, and where. `at` is a place in its payload.
///
/// An error ends the connection, and nothing else.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// A frame's length does not even cover its header.
    #[error("a frame announces {length} bytes, fewer than its header has")]
    FrameTooShort {
        /// Bytes it announces.
        length: u32,
    },
    /// A frame is longer than the reader takes. What is sent may be no frames at all.
    #[error("a frame announces {length} bytes, at most {longest} are allowed")]
    FrameTooLong {
        /// Bytes it announces.
        length: u32,
        /// The longest that is taken.
        longest: u32,
    },
    /// A kind that is unknown and not optional, or that goes the other way.
    #[error("{receiver} takes no frame of {kind}")]
    UnknownKind {
        /// Who got it.
        receiver: Side,
        /// Its kind.
        kind: Kind,
    },
    /// A question or an answer without its number.
    #[error("{kind}: the tag is 0, which pairs no answer with a question")]
    NoTag {
        /// The frame's kind.
        kind: Kind,
    },
    /// The payload ends within a field.
    #[error("{kind}, byte {at}: {field} needs {needed} bytes, {left} are left")]
    Short {
        /// The frame's kind.
        kind: Kind,
        /// Where the field begins.
        at: usize,
        /// The field.
        field: &'static str,
        /// Bytes it has.
        needed: usize,
        /// Bytes there are.
        left: usize,
    },
    /// A list has more elements than the payload has bytes for.
    #[error(
        "{kind}, byte {at}: {field} has {count} elements of at least {least_bytes} bytes, \
         {left} bytes are left"
    )]
    Count {
        /// The frame's kind.
        kind: Kind,
        /// Where the list begins.
        at: usize,
        /// The list.
        field: &'static str,
        /// Elements that it says it has.
        count: u32,
        /// Bytes that an element has at least.
        least_bytes: usize,
        /// Bytes there are.
        left: usize,
    },
    /// A text is longer than its field may be.
    #[error("{kind}, byte {at}: {field} has {bytes} bytes, at most {longest} are allowed")]
    TextTooLong {
        /// The frame's kind.
        kind: Kind,
        /// Where the field begins.
        at: usize,
        /// The field.
        field: &'static str,
        /// Bytes of the text.
        bytes: usize,
        /// Bytes that it may have.
        longest: usize,
    },
    /// A text is not UTF-8.
    #[error("{kind}, byte {at}: {field} is not UTF-8 from its byte {valid} on")]
    NotUtf8 {
        /// The frame's kind.
        kind: Kind,
        /// Where the text begins.
        at: usize,
        /// The field.
        field: &'static str,
        /// Leading bytes that are UTF-8.
        valid: usize,
    },
    /// A number is none that the field may be.
    #[error("{kind}, byte {at}: {field} is {value}, not {expected}")]
    Value {
        /// The frame's kind.
        kind: Kind,
        /// Where the field begins.
        at: usize,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it may be.
        expected: &'static str,
    },
    /// The first frame is not an engine's.
    #[error(
        "Hello begins with \"{}\" and not with \"{}\": its sender is no engine with kvtide",
        found.escape_ascii(),
        MAGIC.escape_ascii()
    )]
    Magic {
        /// What it begins with.
        found: [u8; 8],
    },
    /// The other side speaks no version of the protocol that we speak.
    #[error(transparent)]
    Version(#[from] VersionError),
    /// A message that is to be sent has too much in it; its sender divides it.
    #[error("{kind} does not fit into a frame, which has at most {LONGEST_FRAME} bytes")]
    MessageTooLong {
        /// The message's kind.
        kind: Kind,
    },
}

impl WireError {
    /// The code with which a daemon refuses an engine whose frame has this error.
    #[must_use]
    pub const fn code(&self) -> RefusalCode {
        match self {
            Self::Version(_) => RefusalCode::VERSION,
            _ => RefusalCode::MALFORMED,
        }
    }
}
