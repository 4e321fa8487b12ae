//! What becomes of the blocks of a namespace.

use std::borrow::Cow;

use super::Message;
use crate::BlockKey;
use crate::wire::payload_reader::PayloadReader;
use crate::wire::payload_writer::PayloadWriter;
use crate::wire::{Kind, WireError};

/// Events of the session's namespace since the last such message, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Events<'a> {
    /// The events.
    pub events: Cow<'a, [Event]>,
}

/// One event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The block is held and complete.
    Stored(BlockKey),
    /// The block is no longer held.
    Removed(BlockKey),
    /// No block of the namespace is held any more. Sent with a key too, which says nothing.
    Cleared,
}

impl Event {
    const BYTES: usize = 17;

    fn write(&self, writer: &mut PayloadWriter<'_>) {
        let (kind, key) = match self {
            Self::Stored(key) => (1, *key.as_bytes()),
            Self::Removed(key) => (2, *key.as_bytes()),
            Self::Cleared => (3, [0; 16]),
        };
        writer.u8(kind);
        writer.bytes(&key);
    }

    fn read(reader: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        let expected = "1 (stored), 2 (removed) or 3 (cleared)";
        let event = reader.checked("event", expected, PayloadReader::u8, |event| {
            (1..=3).contains(&event).then_some(event)
        })?;
        let key = BlockKey::from_bytes(reader.array("key")?);
        Ok(match event {
            1 => Self::Stored(key),
            2 => Self::Removed(key),
            _ => Self::Cleared,
        })
    }
}

impl Message for Events<'_> {
    const KIND: Kind = Kind::EVENTS;

    fn write(&self, writer: &mut PayloadWriter<'_>) -> Result<(), WireError> {
        writer.list(&self.events, Event::BYTES, |writer, event| {
            event.write(writer);
            Ok(())
        })
    }

    fn read(reader: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            events: reader.list("events", Event::BYTES, Event::read)?.into(),
        })
    }
}
