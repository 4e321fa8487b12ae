//! The messages, each with its fields in the order in which they are sent.

mod ask;
mod begin_saves;
mod bye;
mod clear;
mod counts;
mod damaged;
mod events;
mod hello;
mod refused;
mod saves_begun;
mod settle;
mod used;
mod welcome;

pub use ask::{Answer, Ask};
pub use begin_saves::{BeginSaves, ChainToSave};
pub use bye::Bye;
pub use clear::{Clear, Cleared};
pub use counts::{Count, Counts};
pub use damaged::Damaged;
pub use events::{Event, Events};
pub use hello::{Geometry, Hello, Role};
pub use refused::{RefusalCode, Refused};
pub use saves_begun::{ChainSaves, Place, SavesBegun};
pub use settle::Settle;
pub use used::Used;
pub use welcome::Welcome;

use super::payload_reader::PayloadReader;
use super::payload_writer::{PayloadWriter, append_frame};
use super::{Frame, Kind, Tag, WireError};

/// How a message becomes a payload and back. What a newer minor version has behind the fields
/// that are read here is left unread.
pub(crate) trait Message: Sized {
    const KIND: Kind;

    /// The number that its frame carries, if it is a question or an answer.
    fn tag(&self) -> Option<Tag> {
        None
    }

    fn write(&self, writer: &mut PayloadWriter<'_>) -> Result<(), WireError>;

    fn read(reader: &mut PayloadReader<'_>) -> Result<Self, WireError>;

    fn append_to(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        append_frame(out, Self::KIND, self.tag(), |writer| self.write(writer))
    }

    fn from_frame(frame: Frame<'_>) -> Result<Self, WireError> {
        Self::read(&mut PayloadReader::new(frame))
    }
}
