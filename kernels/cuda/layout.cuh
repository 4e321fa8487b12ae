// Where blocks and rows lie, as the kernels see it. Mirrors kernels/src/copy/cuda/tables.rs.
#pragma once

#include <cstdint>

namespace kvtide {

// Unit of work of one warp, and of the checksum (kernels/src/checksum.rs).
constexpr uint32_t kChunkBytes = 4096;
constexpr uint32_t kWarp = 32;
constexpr uint32_t kVectorBytes = 16;
// Vectors of a full chunk that each lane handles.
constexpr uint32_t kLaneVectors = kChunkBytes / kVectorBytes / kWarp;

// One layer of the paged KV cache: run r of block b begins at base + b * block_stride + offsets[r].
struct Layer {
    uint64_t base;
    uint64_t block_stride;
    // Index of the first of `runs` entries in the table of run offsets.
    uint32_t first_offset;
    uint32_t runs;
    uint32_t run_bytes;
    // Inside a run, the two dimensions whose elements have scales of their own (codec.cuh).
    uint32_t outer_count;
    uint32_t outer_bytes;
    uint32_t inner_count;
    uint32_t inner_bytes;
    uint32_t reserved;
};

// What rows hold of a block.
enum Elements : uint32_t { kBytes = 0, kBfloat16AsE4m3 = 1, kFloat16AsE4m3 = 2 };

// A row and a block; `row` counts in steps of the plan's row stride.
struct Move {
    uint32_t row;
    uint32_t block;
};

// Some layers of some moves. Rows hold a layer's bytes of one block contiguously, layer after layer;
// `layer_bytes` are those in a row.
struct Plan {
    const Layer* layers;
    const uint64_t* run_offsets;
    // Scale of the first element of every run; with `run_offsets`.
    const uint32_t* run_scales;
    const Move* moves;
    uint64_t rows;
    uint64_t row_stride;
    uint32_t move_count;
    uint32_t first_layer;
    uint32_t layer_count;
    uint32_t layer_bytes;
    // Rows lie in the order of the moves, whatever the moves say: a staging ring.
    uint32_t rows_in_order;
    Elements elements;
};

// One chunk of one layer of one move.
struct Chunk {
    uint32_t move;
    // Place of its first byte in the layer.
    uint32_t offset;
    uint32_t bytes;
    // Place of its first byte in the shard; what seeds its digest.
    uint64_t shard_offset;
    const Layer* layer;
    uint64_t block;
    uint8_t* row;
};

__device__ inline uint32_t chunks_per_layer(const Plan& plan) {
    return (plan.layer_bytes + kChunkBytes - 1) / kChunkBytes;
}

__device__ inline uint64_t chunk_count(const Plan& plan) {
    return uint64_t{plan.move_count} * plan.layer_count * chunks_per_layer(plan);
}

__device__ inline uint8_t* row_of(const Plan& plan, uint32_t move) {
    const uint64_t row = plan.rows_in_order ? move : plan.moves[move].row;
    return reinterpret_cast<uint8_t*>(plan.rows + row * plan.row_stride);
}

__device__ inline Chunk chunk_at(const Plan& plan, uint64_t index) {
    const uint32_t chunks = chunks_per_layer(plan);
    const uint32_t offset = static_cast<uint32_t>(index % chunks) * kChunkBytes;
    const uint64_t pair = index / chunks;
    const uint32_t layer = plan.first_layer + static_cast<uint32_t>(pair % plan.layer_count);
    const uint32_t move = static_cast<uint32_t>(pair / plan.layer_count);
    const uint64_t shard_offset = uint64_t{layer} * plan.layer_bytes + offset;
    const Layer* entry = plan.layers + layer;
    return Chunk{
        move,
        offset,
        min(kChunkBytes, plan.layer_bytes - offset),
        shard_offset,
        entry,
        entry->base + plan.moves[move].block * entry->block_stride,
        row_of(plan, move) + shard_offset,
    };
}

// Address of byte `at` of a layer in the paged KV cache.
__device__ inline uint8_t* paged(const Plan& plan, const Chunk& chunk, uint32_t at) {
    const uint32_t run = at / chunk.layer->run_bytes;
    const uint64_t offset = plan.run_offsets[chunk.layer->first_offset + run];
    return reinterpret_cast<uint8_t*>(chunk.block + offset + at % chunk.layer->run_bytes);
}

// How a chunk's bytes can be reached in the paged KV cache.
enum class Access { kOneRun, kVectors, kBytes };

__device__ inline Access access_of(const Plan& plan, const Chunk& chunk) {
    const Layer& layer = *chunk.layer;
    const uint32_t first_run = chunk.offset / layer.run_bytes;
    const uint32_t last_run = (chunk.offset + chunk.bytes - 1) / layer.run_bytes;
    const uint64_t start = reinterpret_cast<uint64_t>(paged(plan, chunk, chunk.offset));
    const uint64_t row = reinterpret_cast<uint64_t>(chunk.row);
    bool aligned = (start | row | chunk.bytes) % kVectorBytes == 0;
    if (first_run == last_run) {
        return aligned ? Access::kOneRun : Access::kBytes;
    }
    aligned = aligned && layer.run_bytes % kVectorBytes == 0;
    for (uint32_t run = first_run; run <= last_run; ++run) {
        const uint64_t address = chunk.block + plan.run_offsets[layer.first_offset + run];
        aligned = aligned && address % kVectorBytes == 0;
    }
    return aligned ? Access::kVectors : Access::kBytes;
}

__device__ inline uint32_t lane_id() { return threadIdx.x % kWarp; }
__device__ inline uint64_t warp_id() {
    return (uint64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp;
}
__device__ inline uint64_t warp_count() { return uint64_t{gridDim.x} * blockDim.x / kWarp; }

}  // namespace kvtide
