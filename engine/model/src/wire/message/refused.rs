//! The daemon does not want an engine, or no longer.

use std::fmt;

use super::Message;
use crate::wire::payload_reader::PayloadReader;
use crate::wire::payload_writer::PayloadWriter;
use crate::wire::{Kind, WireError, shortened};

/// The last frame of a connection that the daemon ends.
///
/// It is the same in every version of the protocol, since it may be said to an engine of another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Why, for the engine.
    pub code: RefusalCode,
    /// Why, for people: names the field and what to do.
    pub message: String,
}

/// Why a connection ends. A newer daemon may have reasons that this version does not know.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct RefusalCode(u16);

impl Refused {
    /// Longest [`Refused::message`], in bytes.
    pub const LONGEST_MESSAGE: usize = 1024;

    /// A refusal whose message is cut where it would be too long: it must not be lost for that.
    #[must_use]
    pub fn new(code: RefusalCode, message: &str) -> Self {
        Self {
            code,
            message: shortened(message, Self::LONGEST_MESSAGE).to_owned(),
        }
    }
}

impl RefusalCode {
    /// The engine sent what is no frame, or no message.
    pub const MALFORMED: Self = Self(1);
    /// The two sides have no version of the protocol in common.
    pub const VERSION: Self = Self(2);
    /// Whoever connects may not do that.
    pub const NOT_ALLOWED: Self = Self(3);
    /// The daemon has as many sessions as it can.
    pub const FULL: Self = Self(4);
    /// The engine's blocks do not fit into the daemon's rows.
    pub const GEOMETRY: Self = Self(5);
    /// Another process has this place.
    pub const TAKEN: Self = Self(6);
    /// There is not enough memory.
    pub const NO_MEMORY: Self = Self(7);
    /// The daemon ends.
    pub const CLOSING: Self = Self(8);

    /// The codes of this version, each with its name.
    pub const ALL: [(Self, &'static str); 8] = [
        (Self::MALFORMED, "Malformed"),
        (Self::VERSION, "Version"),
        (Self::NOT_ALLOWED, "NotAllowed"),
        (Self::FULL, "Full"),
        (Self::GEOMETRY, "Geometry"),
        (Self::TAKEN, "Taken"),
        (Self::NO_MEMORY, "NoMemory"),
        (Self::CLOSING, "Closing"),
    ];

    /// The code of this number, which need not be one that we know.
    #[must_use]
    pub const fn from_number(number: u16) -> Self {
        Self(number)
    }

    /// Its number.
    #[must_use]
    pub const fn number(self) -> u16 {
        self.0
    }
}

impl fmt::Display for RefusalCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Self::ALL.iter().find(|(code, _)| code == self) {
            Some((_, name)) => f.write_str(name),
            None => write!(f, "code {}", self.0),
        }
    }
}

impl fmt::Debug for RefusalCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RefusalCode({self})")
    }
}

impl Message for Refused {
    const KIND: Kind = Kind::REFUSED;

    fn write(&self, writer: &mut PayloadWriter<'_>) -> Result<(), WireError> {
        writer.u16(self.code.number());
        writer.text("message", Self::LONGEST_MESSAGE, &self.message)
    }

    fn read(reader: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            code: RefusalCode::from_number(reader.u16("code")?),
            message: reader.text("message", Self::LONGEST_MESSAGE)?,
        })
    }
}
