//! Checksums of row shards.
//!
//! A shard's checksum is the wrapping sum of the digests of its chunks, so that chunks can be
//! digested in any order, on any processor. A layer is cut into chunks of [`CHUNK_BYTES`], the last
//! of them filled up with zeros. A chunk's sum is NH of RFC 4418 (UMAC), section 5.2.2, with
//! neighbouring words as pairs: over its 64-bit words, the wrapping sum of
//! `(low half + key) × (high half + key)`. Two chunks that differ have the same sum for one in 2³²
//! keys. It is mixed with the chunk's place in the shard by the finalizer of SplitMix64, which
//! makes a swapped chunk visible. `kernels/cuda/digest.cuh` computes the same on a GPU.

/// Bytes of a chunk.
const CHUNK_BYTES: usize = 4096;

/// Keys of a chunk's 32-bit words: SplitMix64 from seed 0, low half first.
pub const CHECKSUM_KEYS: [u32; CHUNK_BYTES / 4] = keys();

#[expect(
    clippy::cast_possible_truncation,
    reason = "the halves of a number are what is wanted"
)]
const fn keys() -> [u32; CHUNK_BYTES / 4] {
    let mut keys = [0; CHUNK_BYTES / 4];
    let mut i = 0;
    while i < keys.len() {
        let number = mix((i as u64 / 2 + 1).wrapping_mul(GOLDEN));
        keys[i] = number as u32;
        keys[i + 1] = (number >> 32) as u32;
        i += 2;
    }
    keys
}

/// 2⁶⁴ divided by the golden ratio: the step of SplitMix64.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finalizer of SplitMix64.
const fn mix(number: u64) -> u64 {
    let x = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Digest of a piece of a layer that starts on a chunk's boundary; `offset_bytes` is the piece's
/// place in the shard.
#[must_use]
pub fn digest_piece(piece: &[u8], offset_bytes: usize) -> u64 {
    piece
        .chunks(CHUNK_BYTES)
        .enumerate()
        .fold(0, |sum: u64, (i, chunk)| {
            let place = (offset_bytes + i * CHUNK_BYTES) as u64;
            let digest = mix(nh(chunk) ^ (place.wrapping_add(1)).wrapping_mul(GOLDEN));
            sum.wrapping_add(digest)
        })
}

/// NH of at most [`CHUNK_BYTES`], as if filled up with zeros.
fn nh(chunk: &[u8]) -> u64 {
    let (words, rest) = chunk.as_chunks::<8>();
    let (pairs, _) = CHECKSUM_KEYS.as_chunks::<2>();
    let whole = sum_of_products(words, pairs);
    let mut tail = [0; 8];
    tail[..rest.len()].copy_from_slice(rest);
    let first_tail = words.len();
    let tail = std::iter::once(tail).chain(std::iter::repeat([0; 8]));
    let tail = tail.zip(&pairs[first_tail..]);
    tail.fold(whole, |sum, (word, keys)| {
        sum.wrapping_add(sum_of_products(&[word], &[*keys]))
    })
}

fn sum_of_products(words: &[[u8; 8]], keys: &[[u32; 2]]) -> u64 {
    words
        .iter()
        .zip(keys)
        .fold(0, |sum: u64, (word, [low_key, high_key])| {
            let [a, b, c, d, e, f, g, h] = *word;
            let low = u32::from_le_bytes([a, b, c, d]).wrapping_add(*low_key);
            let high = u32::from_le_bytes([e, f, g, h]).wrapping_add(*high_key);
            sum.wrapping_add(u64::from(low).wrapping_mul(u64::from(high)))
        })
}

/// Checksum of a whole shard whose layers are `layer_bytes` long each.
#[must_use]
pub fn shard_checksum(shard: &[u8], layer_bytes: usize) -> u64 {
    shard
        .chunks(layer_bytes.max(1))
        .enumerate()
        .fold(0, |sum: u64, (i, layer)| {
            sum.wrapping_add(digest_piece(layer, i * layer_bytes))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_flipped_bit_anywhere_changes_the_checksum() {
        let shard: Vec<u8> = (0..200_000u32).map(|i| (i % 251) as u8).collect();
        let sum = shard_checksum(&shard, 50_000);
        for at in [0, 1, 4095, 4096, 32_767, 32_768, 49_999, 50_000, 199_999] {
            let mut bad = shard.clone();
            bad[at] ^= 0x10;
            assert_ne!(shard_checksum(&bad, 50_000), sum, "byte {at}");
        }
    }

    #[test]
    fn swapped_words_chunks_and_layers_change_the_checksum() {
        let shard: Vec<u8> = (0..16_384u32)
            .map(|i| i.wrapping_mul(2_654_435_761).to_be_bytes()[0])
            .collect();
        let sum = shard_checksum(&shard, 8192);
        for (bytes, a, b) in [(8, 0, 8), (16, 0, 32), (4096, 0, 4096), (8192, 0, 8192)] {
            let mut swapped = shard.clone();
            let first = shard[a..a + bytes].to_vec();
            swapped.copy_within(b..b + bytes, a);
            swapped[b..b + bytes].copy_from_slice(&first);
            assert_ne!(
                shard_checksum(&swapped, 8192),
                sum,
                "{bytes} bytes, {a} and {b}"
            );
        }
    }

    #[test]
    fn a_layer_digested_in_pieces_has_the_digest_of_the_whole() {
        let layer: Vec<u8> = (0..40_001u32).map(|i| (i % 241) as u8).collect();
        let pieces = layer.chunks(32 << 10).enumerate();
        let sum = pieces.fold(0, |sum: u64, (i, piece)| {
            sum.wrapping_add(digest_piece(piece, 777 + i * (32 << 10)))
        });
        assert_eq!(sum, digest_piece(&layer, 777));
    }

    #[test]
    fn a_short_chunk_is_digested_as_if_filled_up_with_zeros() {
        let mut chunk = vec![0; CHUNK_BYTES];
        chunk[..5].copy_from_slice(&[1, 2, 3, 4, 5]);
        assert_eq!(nh(&chunk), nh(&[1, 2, 3, 4, 5]));
    }

    #[test]
    fn a_zeroed_shard_does_not_match_an_unset_checksum() {
        assert_ne!(shard_checksum(&vec![0; 1 << 16], 1 << 15), 0);
    }

    /// Rows outlive the process that wrote them once they are kept on disk, and a GPU computes the
    /// same function: it must not change unseen.
    #[test]
    fn the_checksum_of_known_bytes_is_known() {
        let shard: Vec<u8> = (0..10_000u32).map(|i| (i * 7).to_le_bytes()[0]).collect();
        assert_eq!(
            CHECKSUM_KEYS[..4],
            [0x7b1d_cdaf, 0xe220_a839, 0xa1b9_65f4, 0x6e78_9e6a]
        );
        assert_eq!(shard_checksum(&shard, 5000), 0xb2a6_a401_98b3_4516);
    }
}
