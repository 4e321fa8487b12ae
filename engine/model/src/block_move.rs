//! One element of a transfer plan, and the form in which plans travel in vLLM's metadata.

/// A slot of the pool at one moment of its life.
///
/// A slot's generation grows whenever it is filled anew, so a reference that outlived its block is
/// recognised rather than served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SlotRef {
    /// Index of the slot, which is also the index of its row in the shared segment.
    pub slot: u32,
    /// Generation of the slot that is meant.
    pub generation: u32,
}

/// One block to copy between a slot's row and a block of the engine's paged KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockMove {
    /// The pool's side.
    pub slot: SlotRef,
    /// The engine's side: a vLLM block id.
    pub block: u32,
}

impl BlockMove {
    /// Bytes of one encoded move.
    pub const ENCODED_BYTES: usize = 12;

    /// Encodes moves as little-endian triples (slot, generation, block).
    #[must_use]
    pub fn encode_all(moves: &[Self]) -> Vec<u8> {
        let words = |m: &Self| [m.slot.slot, m.slot.generation, m.block];
        moves
            .iter()
            .flat_map(words)
            .flat_map(u32::to_le_bytes)
            .collect()
    }

    /// Decodes what [`BlockMove::encode_all`] wrote; `None` if the length is not a whole number of
    /// moves.
    #[must_use]
    pub fn decode_all(bytes: &[u8]) -> Option<Vec<Self>> {
        let (words, rest) = bytes.as_chunks::<4>();
        let (triples, odd) = words.as_chunks::<3>();
        (rest.is_empty() && odd.is_empty()).then(|| {
            triples
                .iter()
                .map(|triple| {
                    let [slot, generation, block] = triple.map(u32::from_le_bytes);
                    Self {
                        slot: SlotRef { slot, generation },
                        block,
                    }
                })
                .collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn moves_survive_encoding(words in prop::collection::vec(any::<[u32; 3]>(), 0..50)) {
            let moves: Vec<BlockMove> = words
                .iter()
                .map(|&[slot, generation, block]| BlockMove { slot: SlotRef { slot, generation }, block })
                .collect();
            prop_assert_eq!(BlockMove::decode_all(&BlockMove::encode_all(&moves)), Some(moves));
        }

        #[test]
        fn a_torn_encoding_is_refused(cut in 1usize..12) {
            let one = BlockMove { slot: SlotRef { slot: 1, generation: 2 }, block: 3 };
            prop_assert_eq!(BlockMove::decode_all(&BlockMove::encode_all(&[one])[..cut]), None);
        }
    }
}
