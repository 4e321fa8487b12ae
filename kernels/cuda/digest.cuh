// The checksum of kernels/src/checksum.rs, over blocks where they lie in the paged KV cache.
#pragma once

#include "layout.cuh"

namespace kvtide {

// NH of one vector: two products of two 32-bit sums each.
__device__ inline uint64_t nh(uint4 data, uint4 key) {
    return uint64_t{data.x + key.x} * (data.y + key.y) + uint64_t{data.z + key.z} * (data.w + key.w);
}

// Mixes a chunk's sum with its place.
__device__ inline uint64_t finish_chunk(uint64_t sum, uint64_t shard_offset) {
    uint64_t x = sum ^ ((shard_offset + 1) * 0x9e3779b97f4a7c15ull);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// Sixteen bytes of a chunk, with zeros past its end.
__device__ inline uint4 read_bytes(const Plan& plan, const Chunk& chunk, uint32_t at) {
    uint32_t words[4] = {0, 0, 0, 0};
    for (uint32_t i = 0; i < kVectorBytes && at + i < chunk.bytes; ++i) {
        words[i / 4] |= uint32_t{*paged(plan, chunk, chunk.offset + at + i)} << (8 * (i % 4));
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// NH of a chunk that a warp holds, for all its lanes.
__device__ inline uint64_t sum_of(const uint4 (&held)[kLaneVectors], const uint4* keys) {
    uint64_t sum = 0;
#pragma unroll
    for (uint32_t i = 0; i < kLaneVectors; ++i) {
        sum += nh(held[i], keys[i * kWarp + lane_id()]);
    }
    for (uint32_t step = kWarp / 2; step > 0; step /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
    }
    return sum;
}

__device__ inline void read_keys(uint4* shared, const uint4* keys) {
    for (uint32_t i = threadIdx.x; i < kChunkBytes / kVectorBytes; i += blockDim.x) {
        shared[i] = keys[i];
    }
    __syncthreads();
}

__device__ inline uint64_t chunk_sum(const Plan& plan, const Chunk& chunk, const uint4* keys) {
    const Access access = access_of(plan, chunk);
    const uint8_t* const first = paged(plan, chunk, chunk.offset);
    uint4 held[kLaneVectors];
#pragma unroll
    for (uint32_t i = 0; i < kLaneVectors; ++i) {
        const uint32_t at = (i * kWarp + lane_id()) * kVectorBytes;
        if (at < chunk.bytes) {
            if (access == Access::kBytes) {
                held[i] = read_bytes(plan, chunk, at);
            } else {
                const uint8_t* block =
                    access == Access::kOneRun ? first + at : paged(plan, chunk, chunk.offset + at);
                held[i] = __ldcg(reinterpret_cast<const uint4*>(block));
            }
        } else {
            held[i] = make_uint4(0, 0, 0, 0);
        }
    }
    return sum_of(held, keys);
}

// Adds the digests of the plan's layers to digests[move]. A block of threads takes whole layers of
// moves in turn, so that most sums meet in shared memory.
__device__ inline void digest_chunks(const Plan& plan, const uint4* keys, unsigned long long* digests) {
    __shared__ uint4 shared_keys[kChunkBytes / kVectorBytes];
    read_keys(shared_keys, keys);
    const uint32_t chunks = chunks_per_layer(plan);
    const uint64_t pairs = uint64_t{plan.move_count} * plan.layer_count;
    const uint32_t warps = blockDim.x / kWarp;
    for (uint64_t pair = blockIdx.x; pair < pairs; pair += gridDim.x) {
        uint64_t total = 0;
        for (uint32_t i = threadIdx.x / kWarp; i < chunks; i += warps) {
            const Chunk chunk = chunk_at(plan, pair * chunks + i);
            total += finish_chunk(chunk_sum(plan, chunk, shared_keys), chunk.shard_offset);
        }
        if (lane_id() == 0 && total != 0) {
            atomicAdd(digests + pair / plan.layer_count, total);
        }
    }
}

}  // namespace kvtide
