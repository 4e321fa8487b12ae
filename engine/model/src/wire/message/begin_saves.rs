//! Which blocks an engine wants to save.

use std::borrow::Cow;

use super::Message;
use crate::BlockKey;
use crate::wire::payload_reader::{COUNT_BYTES, PayloadReader};
use crate::wire::payload_writer::PayloadWriter;
use crate::wire::{Kind, Tag, WireError};

/// Asks for places for the blocks of a step's chains. Answered by
/// [`SavesBegun`](super::SavesBegun).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BeginSaves<'a> {
    /// The question's number.
    pub tag: Tag,
    /// The chains, in the order in which the answer speaks of them.
    pub chains: Vec<ChainToSave<'a>>,
}

/// Consecutive blocks of one chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChainToSave<'a> {
    /// What precedes `keys` in the chain; may be only its end, unless the daemon has said that the
    /// pool must evict.
    pub earlier: Cow<'a, [BlockKey]>,
    /// The blocks to save.
    pub keys: Cow<'a, [BlockKey]>,
}

impl Message for BeginSaves<'_> {
    const KIND: Kind = Kind::BEGIN_SAVES;

    fn tag(&self) -> Option<Tag> {
        Some(self.tag)
    }

    fn write(&self, writer: &mut PayloadWriter<'_>) -> Result<(), WireError> {
        writer.list(&self.chains, 2 * COUNT_BYTES, |writer, chain| {
            writer.keys(&chain.earlier)?;
            writer.keys(&chain.keys)
        })
    }

    fn read(reader: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            tag: reader.tag()?,
            chains: reader.list("chains", 2 * COUNT_BYTES, |reader| {
                Ok(ChainToSave {
                    earlier: reader.keys("earlier")?.into(),
                    keys: reader.keys("keys")?.into(),
                })
            })?,
        })
    }
}
