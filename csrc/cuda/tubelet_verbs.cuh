// Instructions by name that only tubelets need; as verbs.cuh, with twins in tests/cuda_sim/tubelet_verbs.h.
#pragma once

#include "verbs.cuh"

#if defined(VIVIT_SIM)
#include "cuda_sim/tubelet_verbs.h"
#else

namespace vivit::cuda {

// Four bytes, each the one of low (0 to 3) and high (4 to 7) that a digit of `which` names, the lowest first.
VIVIT_DEVICE uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t which) {
    return __byte_perm(low, high, which);
}

// Pairs of 16 bits: x y + z, rounded once. Numbers below the normal range count as what they are.
template <class T>
VIVIT_DEVICE uint32_t multiply_add_pairs(uint32_t x, uint32_t y, uint32_t z);
template <>
VIVIT_DEVICE uint32_t multiply_add_pairs<BFloat16>(uint32_t x, uint32_t y, uint32_t z) {
    uint32_t result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "r"(z));
    return result;
}
template <>
VIVIT_DEVICE uint32_t multiply_add_pairs<Float16>(uint32_t x, uint32_t y, uint32_t z) {
    uint32_t result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "r"(z));
    return result;
}

// x, of which the compiler no longer knows where it comes from: what depends on it is computed here, not kept in
// registers from before a loop.
VIVIT_DEVICE int32_t computed_anew(int32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Offsets in shared memory, written two at a time.
VIVIT_DEVICE void write_offsets(int64_t* to, int64_t first, int64_t second) {
    *reinterpret_cast<longlong2*>(to) = {first, second};
}
VIVIT_DEVICE int64_t read_offset(const int64_t* from) { return *from; }

VIVIT_DEVICE void store_4(void* to, uint32_t x) { *static_cast<uint32_t*>(to) = x; }
VIVIT_DEVICE void store_2(void* to, uint16_t x) { *static_cast<uint16_t*>(to) = x; }

}  // namespace vivit::cuda

#endif  // VIVIT_SIM
