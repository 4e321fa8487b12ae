//! Dropping all blocks of a namespace.

use super::Message;
use crate::wire::payload_reader::PayloadReader;
use crate::wire::payload_writer::PayloadWriter;
use crate::wire::{Kind, Tag, WireError};

/// Asks that every block of the session's namespace be dropped. Answered by [`Cleared`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clear {
    /// The question's number.
    pub tag: Tag,
}

/// The answer to [`Clear`]: no lookup finds those blocks any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cleared {
    /// The question's number.
    pub tag: Tag,
}

impl Message for Clear {
    const KIND: Kind = Kind::CLEAR;

    fn tag(&self) -> Option<Tag> {
        Some(self.tag)
    }

    fn write(&self, _: &mut PayloadWriter<'_>) -> Result<(), WireError> {
        Ok(())
    }

    fn read(reader: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        reader.tag().map(|tag| Self { tag })
    }
}

impl Message for Cleared {
    const KIND: Kind = Kind::CLEARED;

    fn tag(&self) -> Option<Tag> {
        Some(self.tag)
    }

    fn write(&self, _: &mut PayloadWriter<'_>) -> Result<(), WireError> {
        Ok(())
    }

    fn read(reader: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        reader.tag().map(|tag| Self { tag })
    }
}
