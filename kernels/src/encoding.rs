//! Rows that hold 16-bit numbers in eight bits.
//!
//! A layer of an encoded row is the block's numbers in the order of its runs, as e4m3 (OCP 8-bit
//! floating point, sign, 4 bits of exponent, 3 of mantissa), and behind them one 32-bit scale for
//! each head, for keys and values apart, padded with zeros to 16 bytes. The largest magnitude of a
//! head in a block becomes 448, the largest e4m3 number. `kernels/cuda/codec.cuh` is the other half.

use crate::kv_layout::LayerPlace;

/// Bytes of a number in the paged KV cache.
const NUMBER_BYTES: usize = 2;
/// Kernels read and write sixteen numbers at a time, which lie side by side and share a scale.
const VECTOR_NUMBERS: usize = 16;
const SCALE_BYTES: usize = 4;
const ALIGN_BYTES: usize = 16;
/// Scales of a block in one layer: `kScalesMax` in `kernels/cuda/codec.cuh`.
const SCALES_MAX: usize = 256;

/// What rows hold of blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Codec {
    /// Their bytes.
    #[default]
    None,
    /// Their numbers as e4m3, with a scale for each head of a block in a layer. Lossy.
    Fp8,
}

impl Codec {
    /// Bytes of a block in one layer of a row, where it has `layer_bytes` in the paged KV cache and
    /// `scales` heads, keys and values counted apart.
    #[must_use]
    pub fn row_layer_bytes(self, layer_bytes: usize, scales: usize) -> usize {
        match self {
            Self::None => layer_bytes,
            Self::Fp8 => {
                let tail = (scales * SCALE_BYTES).next_multiple_of(ALIGN_BYTES);
                layer_bytes / NUMBER_BYTES + tail
            }
        }
    }
}

/// Numbers of the paged KV cache that can be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float {
    /// 8 bits of exponent.
    Bfloat16,
    /// 5 bits of exponent.
    Float16,
}

/// A dimension of a layer's tensor whose places have a scale each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScaledDimension {
    /// Places.
    pub length: usize,
    /// Bytes from one to the next.
    pub stride_bytes: usize,
}

impl ScaledDimension {
    const ONE: Self = Self {
        length: 1,
        stride_bytes: usize::MAX,
    };

    fn place(self, offset: usize) -> usize {
        offset / self.stride_bytes.max(1) % self.length.max(1)
    }
}

/// Which number of a layer has which scale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scales {
    pub(crate) outer: ScaledDimension,
    pub(crate) inner: ScaledDimension,
    /// Scale of the first number of every run.
    pub(crate) of_runs: Vec<u32>,
}

impl Scales {
    /// The scales of a layer of which `dimensions` have them: at most two, the outer one first.
    ///
    /// # Errors
    /// Why the layer cannot be encoded.
    pub(crate) fn new(
        layer: &LayerPlace<'_>,
        dimensions: &[ScaledDimension],
    ) -> Result<Self, &'static str> {
        let (outer, inner) = match *dimensions {
            [] => (ScaledDimension::ONE, ScaledDimension::ONE),
            [one] => (ScaledDimension::ONE, one),
            [outer, inner] => (outer, inner),
            _ => return Err("more than two dimensions have scales"),
        };
        let count = outer.length.saturating_mul(inner.length);
        if count == 0
            || (count * SCALE_BYTES).next_multiple_of(ALIGN_BYTES) > SCALES_MAX * SCALE_BYTES
        {
            return Err("it has more than 256 heads, keys and values counted apart");
        }
        let vector_bytes = VECTOR_NUMBERS * NUMBER_BYTES;
        let aligned = [layer.base, layer.block_stride]
            .iter()
            .chain(layer.run_offsets)
            .all(|number| number % ALIGN_BYTES == 0);
        if !aligned || !layer.run_bytes.is_multiple_of(vector_bytes) {
            return Err("its blocks are not aligned, or end within sixteen numbers");
        }
        let scale_at = |offset| outer.place(offset) * inner.length + inner.place(offset);
        let mut numbers = vec![0; count];
        for &run in layer.run_offsets {
            for at in (0..layer.run_bytes).step_by(vector_bytes) {
                let scale = scale_at(run + at);
                if scale_at(run + at + vector_bytes - 1) != scale
                    || scale_at(run) + scale_at(at) != scale
                {
                    return Err("its heads are not side by side");
                }
                numbers[scale] += VECTOR_NUMBERS;
            }
        }
        if numbers.iter().any(|&n| n != numbers[0]) {
            return Err("its heads differ in size");
        }
        let first = |&run: &usize| u32::try_from(scale_at(run)).unwrap_or(0);
        Ok(Self {
            outer,
            inner,
            of_runs: layer.run_offsets.iter().map(first).collect(),
        })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.outer.length * self.inner.length
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS_AND_VALUES: usize = 2;
    const HEADS: usize = 4;
    const TOKENS: usize = 16;
    const SIZE_BYTES: usize = 64;

    fn dimension(length: usize, stride_bytes: usize) -> ScaledDimension {
        ScaledDimension {
            length,
            stride_bytes,
        }
    }

    fn place<'a>(run_offsets: &'a [usize], run_bytes: usize) -> LayerPlace<'a> {
        LayerPlace {
            base: 4096,
            block_stride: 1 << 20,
            run_offsets,
            run_bytes,
        }
    }

    #[test]
    fn a_row_has_a_byte_a_number_and_a_scale_a_head() {
        assert_eq!(Codec::Fp8.row_layer_bytes(65536, 16), 32768 + 64);
        assert_eq!(Codec::Fp8.row_layer_bytes(18432, 1), 9216 + 16);
        assert_eq!(Codec::None.row_layer_bytes(65536, 16), 65536);
    }

    #[test]
    fn heads_behind_tokens_have_a_scale_for_keys_and_one_for_values() {
        let token = HEADS * KEYS_AND_VALUES * SIZE_BYTES;
        let heads = dimension(HEADS, KEYS_AND_VALUES * SIZE_BYTES);
        let halves = dimension(KEYS_AND_VALUES, SIZE_BYTES);
        let scales = Scales::new(&place(&[0], TOKENS * token), &[heads, halves]).unwrap();
        assert_eq!(scales.count(), HEADS * KEYS_AND_VALUES);
        assert_eq!(scales.of_runs, [0]);
    }

    #[test]
    fn runs_of_heads_and_of_keys_and_values_know_their_scales() {
        let head = TOKENS * SIZE_BYTES;
        let far = 1 << 19;
        let offsets: Vec<usize> = (0..KEYS_AND_VALUES * HEADS)
            .map(|i| i / HEADS * far + i % HEADS * 2 * head)
            .collect();
        let dims = [dimension(KEYS_AND_VALUES, far), dimension(HEADS, 2 * head)];
        let scales = Scales::new(&place(&offsets, head), &dims).unwrap();
        assert_eq!(scales.of_runs, [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn what_cannot_be_encoded_says_why() {
        let refuse = |offsets: &[usize], bytes, dims: &[ScaledDimension]| {
            Scales::new(&place(offsets, bytes), dims).unwrap_err()
        };
        assert!(refuse(&[8], 64, &[]).contains("aligned"));
        assert!(refuse(&[0], 48, &[]).contains("aligned"));
        assert!(refuse(&[0], 1024, &[dimension(300, 32)]).contains("256"));
        assert!(refuse(&[0], 1024, &[dimension(2, 48)]).contains("side by side"));
        assert!(refuse(&[0], 96, &[dimension(2, 32)]).contains("size"));
    }
}
