// Gather and scatter by warps: 16 bytes a lane, a chunk a warp.
#pragma once

#include "digest.cuh"
#include "layout.cuh"

namespace kvtide {

enum class Direction { kSave, kLoad };

// Copies a chunk of aligned vectors, and leaves in `held` what was copied, with zeros past its end;
// both sides are read or written once, so neither is worth caching.
template <Direction kDirection>
__device__ inline void copy_vectors(const Plan& plan, const Chunk& chunk, bool one_run, uint4 (&held)[kLaneVectors]) {
    const uint32_t vectors = chunk.bytes / kVectorBytes;
    uint8_t* const first = paged(plan, chunk, chunk.offset);
#pragma unroll
    for (uint32_t i = 0; i < kLaneVectors; ++i) {
        const uint32_t vector = i * kWarp + lane_id();
        if (vector < vectors) {
            const uint32_t at = vector * kVectorBytes;
            const uint8_t* block = one_run ? first + at : paged(plan, chunk, chunk.offset + at);
            const uint8_t* source = kDirection == Direction::kSave ? block : chunk.row + at;
            held[i] = __ldcs(reinterpret_cast<const uint4*>(source));
        } else {
            held[i] = make_uint4(0, 0, 0, 0);
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < kLaneVectors; ++i) {
        const uint32_t vector = i * kWarp + lane_id();
        if (vector < vectors) {
            const uint32_t at = vector * kVectorBytes;
            uint8_t* block = one_run ? first + at : paged(plan, chunk, chunk.offset + at);
            uint8_t* target = kDirection == Direction::kSave ? chunk.row + at : block;
            __stcs(reinterpret_cast<uint4*>(target), held[i]);
        }
    }
}

template <Direction kDirection>
__device__ inline void copy_bytes(const Plan& plan, const Chunk& chunk) {
    for (uint32_t i = lane_id(); i < chunk.bytes; i += kWarp) {
        uint8_t* block = paged(plan, chunk, chunk.offset + i);
        uint8_t* row = chunk.row + i;
        if (kDirection == Direction::kSave) {
            *row = *block;
        } else {
            *block = *row;
        }
    }
}

// Copies the plan's layers to the rows and adds the digests of what was read to digests[move]; null
// where nobody asks for them.
__device__ inline void save_chunks(const Plan& plan, const uint4* keys, unsigned long long* digests) {
    __shared__ uint4 shared_keys[kChunkBytes / kVectorBytes];
    if (digests != nullptr) {
        read_keys(shared_keys, keys);
    }
    const uint64_t chunks = chunk_count(plan);
    for (uint64_t index = warp_id(); index < chunks; index += warp_count()) {
        const Chunk chunk = chunk_at(plan, index);
        const Access access = access_of(plan, chunk);
        uint64_t sum = 0;
        if (access == Access::kBytes) {
            copy_bytes<Direction::kSave>(plan, chunk);
            if (digests != nullptr) {
                sum = chunk_sum(plan, chunk, shared_keys);
            }
        } else {
            uint4 held[kLaneVectors];
            copy_vectors<Direction::kSave>(plan, chunk, access == Access::kOneRun, held);
            if (digests != nullptr) {
                sum = sum_of(held, shared_keys);
            }
        }
        if (digests != nullptr && lane_id() == 0) {
            atomicAdd(digests + chunk.move, finish_chunk(sum, chunk.shard_offset));
        }
    }
}

__device__ inline void load_chunks(const Plan& plan) {
    const uint64_t chunks = chunk_count(plan);
    for (uint64_t index = warp_id(); index < chunks; index += warp_count()) {
        const Chunk chunk = chunk_at(plan, index);
        const Access access = access_of(plan, chunk);
        if (access == Access::kBytes) {
            copy_bytes<Direction::kLoad>(plan, chunk);
        } else {
            uint4 held[kLaneVectors];
            copy_vectors<Direction::kLoad>(plan, chunk, access == Access::kOneRun, held);
        }
    }
}

}  // namespace kvtide
