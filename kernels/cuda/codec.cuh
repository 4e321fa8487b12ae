// Rows of e4m3 numbers for blocks of 16-bit ones.
//
// A layer of a row holds the block's numbers in the order of its runs, a byte each, and behind them
// the scales as 32-bit floats, padded with zeros to 16 bytes. A scale belongs to one place in two
// dimensions of the block (its heads, and keys or values): the largest magnitude there becomes
// kLargest. Mirrors kernels/src/encoding.rs.
//
// The checksum is of the row's bytes: of what was written at a save, of what was read at a load.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cfloat>

#include "digest.cuh"

namespace kvtide {

// The largest e4m3 number.
constexpr float kLargest = 448.0f;
// Magnitudes below this are zero: the quotient of kLargest by them would not be finite.
constexpr float kSmallest = 1e-30f;
// Scales of a block in one layer.
constexpr uint32_t kScalesMax = 256;
constexpr uint32_t kCodecWarps = 16;
constexpr uint32_t kElementBytes = 2;

__device__ inline uint32_t numbers_per_layer(const Layer& layer) {
    return layer.runs * layer.run_bytes / kElementBytes;
}

__device__ inline uint32_t scales_per_layer(const Plan& plan, const Layer& layer) {
    return (plan.layer_bytes - numbers_per_layer(layer)) / static_cast<uint32_t>(sizeof(float));
}

// Where sixteen numbers lie in the paged KV cache, and which scale is theirs.
struct Numbers {
    uint4* block;
    uint32_t scale;
};

__device__ inline Numbers numbers_at(const Plan& plan, const Chunk& chunk, uint32_t number) {
    const Layer& layer = *chunk.layer;
    const uint32_t at = number * kElementBytes;
    const uint32_t run = layer.first_offset + at / layer.run_bytes;
    const uint32_t within = at % layer.run_bytes;
    const uint32_t outer = within / layer.outer_bytes % layer.outer_count;
    const uint32_t inner = within / layer.inner_bytes % layer.inner_count;
    return Numbers{
        reinterpret_cast<uint4*>(chunk.block + plan.run_offsets[run] + within),
        plan.run_scales[run] + outer * layer.inner_count + inner,
    };
}

__device__ inline float2 unpack(uint32_t pair, Elements elements) {
    if (elements == kBfloat16AsE4m3) {
        // A bfloat16 is the upper half of a float.
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    }
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

__device__ inline uint32_t pack(float2 pair, Elements elements) {
    uint32_t bits;
    if (elements == kBfloat16AsE4m3) {
        const __nv_bfloat162 packed = __float22bfloat162_rn(pair);
        bits = *reinterpret_cast<const uint32_t*>(&packed);
    } else {
        const __half2 packed = __float22half2_rn(pair);
        bits = *reinterpret_cast<const uint32_t*>(&packed);
    }
    return bits;
}

// Zero for what is not finite, which is encoded as the largest number, or as NaN: one such number
// must not take the others their scale.
__device__ inline float finite_magnitude(float number) {
    const float magnitude = fabsf(number);
    return magnitude <= FLT_MAX ? magnitude : 0.0f;
}

__device__ inline float magnitude(uint4 eight, Elements elements) {
    float largest = 0.0f;
    const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (const uint32_t bits : pairs) {
        const float2 pair = unpack(bits, elements);
        largest = fmaxf(largest, fmaxf(finite_magnitude(pair.x), finite_magnitude(pair.y)));
    }
    return largest;
}

// Eight numbers, times `factor`, as e4m3.
__device__ inline uint2 encode(uint4 eight, float factor, Elements elements) {
    const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
        float2 pair = unpack(pairs[i], elements);
        pair.x *= factor;
        pair.y *= factor;
        const uint32_t bits = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
        words[i / 2] |= bits << (16 * (i % 2));
    }
    return make_uint2(words[0], words[1]);
}

// Eight e4m3 numbers, times `scale`.
__device__ inline uint4 decode(uint32_t low, uint32_t high, float scale, Elements elements) {
    uint32_t pairs[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t word = i < 2 ? low : high;
        const __nv_fp8x2_storage_t bits = static_cast<__nv_fp8x2_storage_t>(word >> (16 * (i % 2)));
        const __half2_raw half = __nv_cvt_fp8x2_to_halfraw2(bits, __NV_E4M3);
        float2 pair = __half22float2(__half2(half));
        pair.x *= scale;
        pair.y *= scale;
        pairs[i] = pack(pair, elements);
    }
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

__device__ inline float factor_of(float largest) { return largest < kSmallest ? 0.0f : kLargest / largest; }
__device__ inline float scale_of(float largest) { return largest < kSmallest ? 0.0f : largest / kLargest; }

// A block of threads takes a layer of a move at a time: it looks for the largest magnitudes, and
// reads the block again, from the cache, to encode it.
__device__ inline void encode_blocks(const Plan& plan, const uint4* keys, unsigned long long* digests) {
    __shared__ uint4 shared_keys[kChunkBytes / kVectorBytes];
    // Bits of floats that are not negative, which compare as they do.
    __shared__ uint32_t largest[kScalesMax];
    if (digests != nullptr) {
        read_keys(shared_keys, keys);
    }
    const uint32_t chunks = chunks_per_layer(plan);
    const uint64_t pairs = uint64_t{plan.move_count} * plan.layer_count;
    const uint32_t warps = blockDim.x / kWarp;
    for (uint64_t pair = blockIdx.x; pair < pairs; pair += gridDim.x) {
        const Chunk first = chunk_at(plan, pair * chunks);
        const uint32_t numbers = numbers_per_layer(*first.layer);
        const uint32_t scales = scales_per_layer(plan, *first.layer);
        for (uint32_t i = threadIdx.x; i < scales; i += blockDim.x) {
            largest[i] = 0;
        }
        __syncthreads();
        for (uint32_t at = threadIdx.x * kVectorBytes; at < numbers; at += blockDim.x * kVectorBytes) {
            const Numbers place = numbers_at(plan, first, at);
            const uint4 low = __ldcg(place.block);
            const uint4 high = __ldcg(place.block + 1);
            const float found = fmaxf(magnitude(low, plan.elements), magnitude(high, plan.elements));
            atomicMax(largest + place.scale, __float_as_uint(found));
        }
        __syncthreads();
        uint64_t total = 0;
        for (uint32_t i = threadIdx.x / kWarp; i < chunks; i += warps) {
            const Chunk chunk = chunk_at(plan, pair * chunks + i);
            uint4 held[kLaneVectors];
#pragma unroll
            for (uint32_t k = 0; k < kLaneVectors; ++k) {
                const uint32_t at = (k * kWarp + lane_id()) * kVectorBytes;
                const uint32_t number = chunk.offset + at;
                if (at >= chunk.bytes) {
                    held[k] = make_uint4(0, 0, 0, 0);
                    continue;
                }
                if (number < numbers) {
                    const Numbers place = numbers_at(plan, chunk, number);
                    const float factor = factor_of(__uint_as_float(largest[place.scale]));
                    const uint2 low = encode(__ldcg(place.block), factor, plan.elements);
                    const uint2 high = encode(__ldcg(place.block + 1), factor, plan.elements);
                    held[k] = make_uint4(low.x, low.y, high.x, high.y);
                } else {
                    const uint32_t* four = largest + (number - numbers) / sizeof(float);
                    const auto scale = [&](uint32_t j) {
                        return __float_as_uint(scale_of(__uint_as_float(four[j])));
                    };
                    held[k] = make_uint4(scale(0), scale(1), scale(2), scale(3));
                }
                __stcs(reinterpret_cast<uint4*>(chunk.row + at), held[k]);
            }
            if (digests != nullptr) {
                total += finish_chunk(sum_of(held, shared_keys), chunk.shard_offset);
            }
        }
        if (digests != nullptr && lane_id() == 0 && total != 0) {
            atomicAdd(digests + first.move, total);
        }
        __syncthreads();
    }
}

// A warp takes a chunk at a time.
__device__ inline void decode_chunks(const Plan& plan, const uint4* keys, unsigned long long* digests) {
    __shared__ uint4 shared_keys[kChunkBytes / kVectorBytes];
    __shared__ uint4 all_scales[kCodecWarps][kScalesMax * sizeof(float) / kVectorBytes];
    if (digests != nullptr) {
        read_keys(shared_keys, keys);
    }
    uint4* const scales = all_scales[threadIdx.x / kWarp];
    const uint64_t chunks = chunk_count(plan);
    for (uint64_t index = warp_id(); index < chunks; index += warp_count()) {
        const Chunk chunk = chunk_at(plan, index);
        const uint32_t numbers = numbers_per_layer(*chunk.layer);
        const uint4* const tail = reinterpret_cast<const uint4*>(chunk.row - chunk.offset + numbers);
        uint4 held[kLaneVectors];
#pragma unroll
        for (uint32_t k = 0; k < kLaneVectors; ++k) {
            const uint32_t at = (k * kWarp + lane_id()) * kVectorBytes;
            held[k] = at < chunk.bytes ? __ldcs(reinterpret_cast<const uint4*>(chunk.row + at)) : make_uint4(0, 0, 0, 0);
        }
        for (uint32_t i = lane_id(); i < (plan.layer_bytes - numbers) / kVectorBytes; i += kWarp) {
            scales[i] = __ldcs(tail + i);
        }
        __syncwarp();
#pragma unroll
        for (uint32_t k = 0; k < kLaneVectors; ++k) {
            const uint32_t at = (k * kWarp + lane_id()) * kVectorBytes;
            if (at < chunk.bytes && chunk.offset + at < numbers) {
                const Numbers place = numbers_at(plan, chunk, chunk.offset + at);
                const float scale = reinterpret_cast<const float*>(scales)[place.scale];
                __stcs(place.block, decode(held[k].x, held[k].y, scale, plan.elements));
                __stcs(place.block + 1, decode(held[k].z, held[k].w, scale, plan.elements));
            }
        }
        if (digests != nullptr) {
            const uint64_t sum = finish_chunk(sum_of(held, shared_keys), chunk.shard_offset);
            if (lane_id() == 0) {
                atomicAdd(digests + chunk.move, sum);
            }
        }
        __syncwarp();
    }
}

}  // namespace kvtide
