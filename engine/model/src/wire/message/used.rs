//! Which blocks an engine has loaded.

use std::borrow::Cow;

use super::Message;
use crate::SlotRef;
use crate::wire::payload_reader::PayloadReader;
use crate::wire::payload_writer::PayloadWriter;
use crate::wire::{Kind, WireError};

/// Tells the eviction policy what was loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Used<'a> {
    /// The slots, the tail of a chain before its head: a tail is of no use without its head, so the
    /// head is to be the one used last.
    pub slots: Cow<'a, [SlotRef]>,
}

impl Message for Used<'_> {
    const KIND: Kind = Kind::USED;

    fn write(&self, writer: &mut PayloadWriter<'_>) -> Result<(), WireError> {
        writer.slots(&self.slots)
    }

    fn read(reader: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            slots: reader.slots("slots")?.into(),
        })
    }
}
