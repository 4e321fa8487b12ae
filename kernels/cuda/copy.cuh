// Gather and scatter by warps: 16 bytes a lane, a chunk a warp.
#pragma once

#include "layout.cuh"

namespace kvtide {

enum class Direction { kSave, kLoad };

// Copies one aligned vector; both sides are read or written once, so neither is worth caching.
template <Direction kDirection>
__device__ inline void copy_vectors(const Plan& plan, const Chunk& chunk, bool one_run) {
    const uint32_t vectors = chunk.bytes / kVectorBytes;
    uint8_t* const first = paged(plan, chunk, chunk.offset);
    uint4 held[kLaneVectors];
#pragma unroll
    for (uint32_t i = 0; i < kLaneVectors; ++i) {
        const uint32_t vector = i * kWarp + lane_id();
        if (vector < vectors) {
            const uint32_t at = vector * kVectorBytes;
            const uint8_t* block = one_run ? first + at : paged(plan, chunk, chunk.offset + at);
            const uint8_t* source = kDirection == Direction::kSave ? block : chunk.row + at;
            held[i] = __ldcs(reinterpret_cast<const uint4*>(source));
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

template <Direction kDirection>
__device__ inline void copy_chunks(const Plan& plan) {
    const uint64_t chunks = chunk_count(plan);
    for (uint64_t index = warp_id(); index < chunks; index += warp_count()) {
        const Chunk chunk = chunk_at(plan, index);
        switch (access_of(plan, chunk)) {
            case Access::kOneRun: copy_vectors<kDirection>(plan, chunk, true); break;
            case Access::kVectors: copy_vectors<kDirection>(plan, chunk, false); break;
            case Access::kBytes: copy_bytes<kDirection>(plan, chunk); break;
        }
    }
}

}  // namespace kvtide
