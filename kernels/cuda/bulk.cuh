// Gather and scatter by the bulk copy engine of sm_90 and later: one thread of a block keeps many
// pieces in flight through shared memory, so few multiprocessors fill the link.
#pragma once

#include "copy.cuh"

namespace kvtide {

constexpr uint32_t kBulkPieceBytes = 8192;
constexpr uint32_t kBulkStages = 24;
// Stores whose shared memory is not yet reused.
constexpr uint32_t kBulkStores = 4;
constexpr uint32_t kBulkSharedBytes = kBulkStages * kBulkPieceBytes + kBulkStages * 8;

#if __CUDA_ARCH__ >= 900

// Contiguous on both sides, and a multiple of 16 bytes.
struct Piece {
    uint8_t* block;
    uint8_t* row;
    uint32_t bytes;
};

__device__ inline uint32_t pieces_per_run(const Layer& layer) {
    return (layer.run_bytes + kBulkPieceBytes - 1) / kBulkPieceBytes;
}

// All layers have the runs of the first; the host checks that.
__device__ inline Piece piece_at(const Plan& plan, uint64_t index) {
    const Layer& shape = plan.layers[plan.first_layer];
    const uint32_t pieces = pieces_per_run(shape);
    const uint32_t within = static_cast<uint32_t>(index % pieces) * kBulkPieceBytes;
    index /= pieces;
    const uint32_t run = static_cast<uint32_t>(index % shape.runs);
    index /= shape.runs;
    const uint32_t layer = plan.first_layer + static_cast<uint32_t>(index % plan.layer_count);
    const uint32_t move = static_cast<uint32_t>(index / plan.layer_count);
    const Layer& entry = plan.layers[layer];
    const uint64_t block = entry.base + plan.moves[move].block * entry.block_stride +
                           plan.run_offsets[entry.first_offset + run] + within;
    uint8_t* row =
        row_of(plan, move) + uint64_t{layer} * plan.layer_bytes + run * shape.run_bytes + within;
    return Piece{reinterpret_cast<uint8_t*>(block), row, min(kBulkPieceBytes, shape.run_bytes - within)};
}

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void expect_and_load(uint32_t barrier, uint32_t target, const void* source, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
        "l"(source), "r"(bytes), "r"(barrier)
        : "memory");
}

__device__ inline void await_phase(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

__device__ inline void store_and_commit(void* target, uint32_t source, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target), "r"(source), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

template <Direction kDirection>
__device__ inline void copy_pieces(const Plan& plan) {
    extern __shared__ __align__(128) uint8_t stages[];
    uint64_t* const barriers = reinterpret_cast<uint64_t*>(stages + kBulkStages * kBulkPieceBytes);
    if (threadIdx.x != 0) {
        return;
    }
    for (uint32_t stage = 0; stage < kBulkStages; ++stage) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barriers + stage)) : "memory");
    }
    // The copy engine sees the barriers only behind this.
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");

    const Layer& shape = plan.layers[plan.first_layer];
    const uint64_t total =
        uint64_t{plan.move_count} * plan.layer_count * shape.runs * pieces_per_run(shape);
    // Piece k of this block of threads, and the stage that it passes through.
    const auto global = [](uint64_t k) { return blockIdx.x + k * gridDim.x; };
    const uint64_t mine = total > blockIdx.x ? (total - blockIdx.x + gridDim.x - 1) / gridDim.x : 0;
    const auto load = [&](uint64_t k) {
        const Piece piece = piece_at(plan, global(k));
        const uint32_t stage = static_cast<uint32_t>(k % kBulkStages);
        const void* source = kDirection == Direction::kSave ? piece.block : piece.row;
        expect_and_load(shared_address(barriers + stage), shared_address(stages + stage * kBulkPieceBytes), source,
                        piece.bytes);
    };
    for (uint64_t k = 0; k < min(mine, uint64_t{kBulkStages}); ++k) {
        load(k);
    }
    for (uint64_t k = 0; k < mine; ++k) {
        const Piece piece = piece_at(plan, global(k));
        const uint32_t stage = static_cast<uint32_t>(k % kBulkStages);
        await_phase(shared_address(barriers + stage), static_cast<uint32_t>(k / kBulkStages) & 1);
        store_and_commit(kDirection == Direction::kSave ? piece.row : piece.block,
                         shared_address(stages + stage * kBulkPieceBytes), piece.bytes);
        if (k >= kBulkStores) {
            // The store of piece k - kBulkStores has read its stage, which can be filled again.
            asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kBulkStores) : "memory");
            const uint64_t refill = k - kBulkStores + kBulkStages;
            if (refill < mine) {
                load(refill);
            }
        }
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

#endif

}  // namespace kvtide
