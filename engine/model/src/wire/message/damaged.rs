//! Which rows an engine has found damaged.

use std::borrow::Cow;

use super::Message;
use crate::SlotRef;
use crate::wire::payload_reader::PayloadReader;
use crate::wire::payload_writer::PayloadWriter;
use crate::wire::{Kind, WireError};

/// Rows whose bytes did not have their checksum. The daemon drops them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Damaged<'a> {
    /// Their slots.
    pub slots: Cow<'a, [SlotRef]>,
}

impl Message for Damaged<'_> {
    const KIND: Kind = Kind::DAMAGED;

    fn write(&self, writer: &mut PayloadWriter<'_>) -> Result<(), WireError> {
        writer.slots(&self.slots)
    }

    fn read(reader: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            slots: reader.slots("slots")?.into(),
        })
    }
}
