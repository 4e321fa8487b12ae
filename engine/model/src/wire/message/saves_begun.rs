//! Where blocks go that are saved.

use super::Message;
use crate::SlotRef;
use crate::wire::payload_reader::{COUNT_BYTES, PayloadReader, slot_ref};
use crate::wire::payload_writer::{PayloadWriter, slot_bytes};
use crate::wire::{Kind, Tag, WireError};

/// The answer to [`BeginSaves`](super::BeginSaves).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavesBegun {
    /// The question's number.
    pub tag: Tag,
    /// Whether the pool must evict: from now on, `earlier` is to be sent whole, so that it knows
    /// what it must keep.
    pub pressure: bool,
    /// What becomes of each chain of the question, in its order.
    pub chains: Vec<ChainSaves>,
}

/// What becomes of one chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChainSaves {
    /// Leading blocks that the pool holds or that are now being saved; the rest was not accepted.
    pub covered: u32,
    /// Those of them that this engine is to copy.
    pub places: Vec<Place>,
}

/// One block to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which of the chain's `keys` it is, counted from 0.
    pub at: u32,
    /// Where its row is.
    pub slot: SlotRef,
}

impl Place {
    fn to_bytes(self) -> [u8; 12] {
        let [a, b, c, d] = self.at.to_le_bytes();
        let [s, t, u, v, w, x, y, z] = slot_bytes(self.slot);
        [a, b, c, d, s, t, u, v, w, x, y, z]
    }

    fn from_bytes(bytes: [u8; 12]) -> Self {
        let [a, b, c, d, s, t, u, v, w, x, y, z] = bytes;
        Self {
            at: u32::from_le_bytes([a, b, c, d]),
            slot: slot_ref([s, t, u, v, w, x, y, z]),
        }
    }
}

impl Message for SavesBegun {
    const KIND: Kind = Kind::SAVES_BEGUN;

    fn tag(&self) -> Option<Tag> {
        Some(self.tag)
    }

    fn write(&self, writer: &mut PayloadWriter<'_>) -> Result<(), WireError> {
        writer.flag(self.pressure);
        writer.list(&self.chains, 4 + COUNT_BYTES, |writer, chain| {
            writer.u32(chain.covered);
            writer.elements(&chain.places, |place| place.to_bytes())
        })
    }

    fn read(reader: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            tag: reader.tag()?,
            pressure: reader.flag("pressure")?,
            chains: reader.list("chains", 4 + COUNT_BYTES, |reader| {
                let covered = reader.u32("covered")?;
                let places = reader.elements("places")?;
                let places = places.iter().map(|place| Place::from_bytes(*place));
                Ok(ChainSaves {
                    covered,
                    places: places.collect(),
                })
            })?,
        })
    }
}
