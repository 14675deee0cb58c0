// The verbs of csrc/cuda/tubelet_verbs.cuh on a CPU.
#pragma once

#include "verbs.h"

namespace vivit::cuda {

inline uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t which, VIVIT_SIM_CALLER) {
    const uint64_t all = low | static_cast<uint64_t>(high) << 32;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t digit = which >> (4 * i) & 15u;
        if (digit > 7) sim::fail({"select_bytes", file, line}, "a digit above 7 spreads a sign");
        result |= static_cast<uint32_t>(all >> (8 * digit) & 255u) << (8 * i);
    }
    return result;
}

template <class T>
uint32_t multiply_add_pairs(uint32_t x, uint32_t y, uint32_t z) {
    const float2 a = unpacked<T>(x), b = unpacked<T>(y), c = unpacked<T>(z);
    return packed<T>(std::fma(a.x, b.x, c.x), std::fma(a.y, b.y, c.y));
}

inline int32_t computed_anew(int32_t x) { return x; }

inline void write_offsets(int64_t* to, int64_t first, int64_t second, VIVIT_SIM_CALLER) {
    sim::write_shared({"write_offsets", file, line}, to);
    to[0] = first, to[1] = second;
}
inline int64_t read_offset(const int64_t* from, VIVIT_SIM_CALLER) {
    const uintptr_t pair = reinterpret_cast<uintptr_t>(from) / 16 * 16;
    sim::read_shared({"read_offset", file, line}, reinterpret_cast<const void*>(pair), 1);
    return *from;
}

inline void store_4(void* to, uint32_t x, VIVIT_SIM_CALLER) {
    sim::check_global({"store_4", file, line}, to, 4, true);
    std::memcpy(to, &x, 4);
}
inline void store_2(void* to, uint16_t x, VIVIT_SIM_CALLER) {
    sim::check_global({"store_2", file, line}, to, 2, true);
    std::memcpy(to, &x, 2);
}

}  // namespace vivit::cuda
