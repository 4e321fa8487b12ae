//! Checksums of row shards.
//!
//! A shard's checksum is the wrapping sum of the XXH3-64 digests of its chunks, each seeded with
//! the chunk's offset in the shard. Seeding by offset makes a swapped chunk visible; summing makes
//! the result independent of the order in which layers are copied.

use twox_hash::XxHash3_64;

/// A chunk is hashed while it is still in the core's own cache after being copied.
pub(crate) const CHUNK_BYTES: usize = 32 << 10;

/// Digest of the bytes of one layer of a shard; `offset_bytes` is the layer's place in the shard.
pub(crate) fn layer_digest(layer: &[u8], offset_bytes: usize) -> u64 {
    layer
        .chunks(CHUNK_BYTES)
        .enumerate()
        .fold(0, |sum: u64, (i, chunk)| {
            sum.wrapping_add(chunk_digest(chunk, offset_bytes + i * CHUNK_BYTES))
        })
}

/// Digest of one chunk that starts `offset_bytes` into its shard.
pub(crate) fn chunk_digest(chunk: &[u8], offset_bytes: usize) -> u64 {
    XxHash3_64::oneshot_with_seed(offset_bytes as u64, chunk)
}

/// Checksum of a whole shard whose layers are `layer_bytes` long each.
#[must_use]
pub fn shard_checksum(shard: &[u8], layer_bytes: usize) -> u64 {
    shard
        .chunks(layer_bytes.max(1))
        .enumerate()
        .fold(0, |sum: u64, (i, layer)| {
            sum.wrapping_add(layer_digest(layer, i * layer_bytes))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_flipped_bit_anywhere_changes_the_checksum() {
        let shard: Vec<u8> = (0..200_000u32).map(|i| (i % 251) as u8).collect();
        let sum = shard_checksum(&shard, 50_000);
        for at in [0, 1, 32_767, 32_768, 49_999, 50_000, 199_999] {
            let mut bad = shard.clone();
            bad[at] ^= 0x10;
            assert_ne!(shard_checksum(&bad, 50_000), sum, "byte {at}");
        }
    }

    #[test]
    fn swapped_layers_change_the_checksum() {
        let layer = |value: u8| vec![value; 4096];
        let forward = [layer(1), layer(2)].concat();
        let swapped = [layer(2), layer(1)].concat();
        assert_ne!(
            shard_checksum(&forward, 4096),
            shard_checksum(&swapped, 4096)
        );
    }

    #[test]
    fn a_zeroed_shard_does_not_match_an_unset_checksum() {
        assert_ne!(shard_checksum(&vec![0; 1 << 16], 1 << 15), 0);
    }
}
