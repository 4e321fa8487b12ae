//! Which chain an engine has come to the end of.

use std::borrow::Cow;

use super::Message;
use crate::BlockKey;
use crate::wire::payload_reader::PayloadReader;
use crate::wire::payload_writer::PayloadWriter;
use crate::wire::{Kind, WireError};

/// Says that nothing follows a chain for now, because its request has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settle<'a> {
    /// The chain's blocks, from its head on.
    pub keys: Cow<'a, [BlockKey]>,
}

impl Message for Settle<'_> {
    const KIND: Kind = Kind::SETTLE;

    fn write(&self, writer: &mut PayloadWriter<'_>) -> Result<(), WireError> {
        writer.keys(&self.keys)
    }

    fn read(reader: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            keys: reader.keys("keys")?.into(),
        })
    }
}
