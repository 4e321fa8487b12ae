//! Incremental hashing of a token sequence into block keys.

use crate::{BlockKey, ChainRoot, encode};

/// An image, audio clip or other item whose embedding stands in for placeholder tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MediaItem {
    /// What identifies the item's content: a hash made by the server.
    pub identifier: String,
    /// Position of its first placeholder token in the sequence.
    pub offset_tokens: usize,
    /// How many placeholder tokens it covers.
    pub length_tokens: usize,
}

/// Hashes a growing token sequence, one key for each full block, in time linear in its length.
///
/// Block *i* is `BLAKE3(key = state of block i−1, message = its tokens as little-endian u32)`; the
/// whole 256-bit output is the next state and its first 128 bits are the block's key. Keying with
/// the parent rather than prefixing it lets a block of 16 tokens cost one BLAKE3 compression. A
/// block that overlaps media items has their encoding behind its tokens; the tokens' length is
/// fixed, so the two kinds of message cannot be confused.
#[derive(Clone, Debug)]
pub struct ChainHasher {
    block_tokens: usize,
    state: [u8; 32],
    tail: Vec<u8>,
    keys: Vec<BlockKey>,
    media: Vec<MediaItem>,
}

impl ChainHasher {
    /// An empty sequence. `block_tokens` is at least 1; `media` may lie anywhere in what follows.
    #[must_use]
    pub fn new(root: ChainRoot, block_tokens: u32, mut media: Vec<MediaItem>) -> Self {
        media.sort_by_key(|item| item.offset_tokens);
        let block_tokens = block_tokens.max(1) as usize;
        Self {
            block_tokens,
            state: root.0,
            tail: Vec::with_capacity(block_tokens * 4),
            keys: Vec::new(),
            media,
        }
    }

    /// Appends tokens.
    pub fn extend(&mut self, tokens: &[u32]) {
        let block_bytes = self.block_tokens * 4;
        self.keys
            .reserve((self.tail.len() / 4 + tokens.len()) / self.block_tokens);
        let mut rest = tokens;
        while !rest.is_empty() {
            let missing = self.block_tokens - self.tail.len() / 4;
            let (now, later) = rest.split_at(missing.min(rest.len()));
            let start = self.tail.len();
            self.tail.resize(start + now.len() * 4, 0);
            let (bytes, _) = self.tail[start..].as_chunks_mut::<4>();
            for (bytes, token) in bytes.iter_mut().zip(now) {
                *bytes = token.to_le_bytes();
            }
            rest = later;
            if self.tail.len() == block_bytes {
                self.close_block();
            }
        }
    }

    /// Keys of all full blocks so far, in order.
    #[must_use]
    pub fn keys(&self) -> &[BlockKey] {
        &self.keys
    }

    /// Tokens appended so far.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.keys.len() * self.block_tokens + self.tail.len() / 4
    }

    fn close_block(&mut self) {
        let start = self.keys.len() * self.block_tokens;
        let end = start + self.block_tokens;
        for item in &self.media {
            if item.offset_tokens < end && item.offset_tokens + item.length_tokens > start {
                encode::field(&mut self.tail, "media", item.identifier.as_bytes());
                encode::field(
                    &mut self.tail,
                    "offset",
                    &(item.offset_tokens as u64).to_le_bytes(),
                );
            }
        }
        let hash = blake3::keyed_hash(&self.state, &self.tail);
        self.state = *hash.as_bytes();
        self.tail.clear();
        let mut key = [0; 16];
        key.copy_from_slice(&self.state[..16]);
        self.keys.push(BlockKey::from_bytes(key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Namespace, Scope};
    use proptest::prelude::*;

    fn root(salt: &str) -> ChainRoot {
        let scope = Scope {
            cache_salt: Some(salt.into()),
            ..Scope::default()
        };
        Namespace {
            model: "m".into(),
            ..Namespace::default()
        }
        .root(&scope)
    }

    fn keys(root: ChainRoot, tokens: &[u32], media: Vec<MediaItem>) -> Vec<BlockKey> {
        let mut chain = ChainHasher::new(root, 4, media);
        chain.extend(tokens);
        chain.keys().to_vec()
    }

    #[test]
    fn keys_are_stable_across_releases() {
        // A change here orphans every stored block: it must come with a new format number.
        let keys = keys(root("s"), &[1, 2, 3, 4, 5, 6, 7, 8, 9], vec![]);
        let text: Vec<String> = keys.iter().map(ToString::to_string).collect();
        assert_eq!(text, KNOWN);
    }

    const KNOWN: [&str; 2] = [
        "a392842e7784d0c58454bddd22c69b2b",
        "e5a68e02b58e0cd259d0a28553ac7b13",
    ];

    #[test]
    fn a_media_item_changes_only_the_blocks_from_its_first_on() {
        let tokens: Vec<u32> = vec![7; 16];
        let item = |id: &str| MediaItem {
            identifier: id.into(),
            offset_tokens: 6,
            length_tokens: 3,
        };
        let (cat, dog) = (
            keys(root("s"), &tokens, vec![item("cat")]),
            keys(root("s"), &tokens, vec![item("dog")]),
        );
        assert_eq!(cat[0], dog[0]);
        assert!((1..4).all(|i| cat[i] != dog[i]));
    }

    proptest! {
        #[test]
        fn pieces_hash_like_the_whole(
            tokens in prop::collection::vec(any::<u32>(), 0..200),
            cuts in prop::collection::vec(0usize..200, 0..8),
        ) {
            let mut chain = ChainHasher::new(root("s"), 4, vec![]);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(tokens.len())).collect();
            cuts.push(tokens.len());
            cuts.sort_unstable();
            let mut from = 0;
            for cut in cuts {
                chain.extend(&tokens[from..cut]);
                from = cut;
            }
            prop_assert_eq!(chain.tokens(), tokens.len());
            prop_assert_eq!(chain.keys(), &keys(root("s"), &tokens, vec![])[..]);
        }

        #[test]
        fn a_changed_token_changes_its_block_and_all_after(
            tokens in prop::collection::vec(any::<u32>(), 4..100), at in any::<prop::sample::Index>(),
        ) {
            let at = at.index(tokens.len());
            let mut other = tokens.clone();
            other[at] ^= 1;
            let (a, b) = (keys(root("s"), &tokens, vec![]), keys(root("s"), &other, vec![]));
            for i in 0..a.len() {
                prop_assert_eq!(a[i] == b[i], i < at / 4);
            }
        }

        #[test]
        fn different_salts_never_share_a_key(
            tokens in prop::collection::vec(any::<u32>(), 4..100), a in ".{0,8}", b in ".{0,8}",
        ) {
            prop_assume!(a != b);
            let mut all = keys(root(&a), &tokens, vec![]);
            all.extend(keys(root(&b), &tokens, vec![]));
            let count = all.len();
            all.sort_unstable();
            all.dedup();
            prop_assert_eq!(all.len(), count);
        }
    }
}
