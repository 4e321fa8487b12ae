// What the crate launches; kernels/src/copy/cuda/module.rs knows these by name.

#include "codec.cuh"
#include "copy.cuh"
#include "digest.cuh"

using namespace kvtide;

extern "C" __global__ void __launch_bounds__(512)
    kvtide_save(const Plan plan, const uint4* keys, unsigned long long* digests) {
    save_chunks(plan, keys, digests);
}

// Computes no digests: those of a load are of what lies in the blocks afterwards.
extern "C" __global__ void __launch_bounds__(512) kvtide_load(const Plan plan, const uint4*, unsigned long long*) {
    load_chunks(plan);
}

extern "C" __global__ void __launch_bounds__(256)
    kvtide_digest(const Plan plan, const uint4* keys, unsigned long long* digests) {
    digest_chunks(plan, keys, digests);
}

extern "C" __global__ void __launch_bounds__(512)
    kvtide_encode(const Plan plan, const uint4* keys, unsigned long long* digests) {
    encode_blocks(plan, keys, digests);
}

extern "C" __global__ void __launch_bounds__(512)
    kvtide_decode(const Plan plan, const uint4* keys, unsigned long long* digests) {
    decode_chunks(plan, keys, digests);
}
