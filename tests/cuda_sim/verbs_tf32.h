// The verbs of csrc/cuda/verbs_tf32.cuh on a CPU. Fragment layouts: PTX manual 9.7.14, m16n8k8 of tf32.
#pragma once

#include "verbs.h"

namespace vivit::cuda {

namespace sim {

constexpr uint32_t kCutBits = 0x1fffu;  // that tf32 has not of a float32

struct MultiplyAddTf32 {
    float* d;
    const uint32_t* a;
    uint32_t b0, b1;

    static float operand(const Site& site, uint32_t bits) {
        const float x = __uint_as_float(bits);
        if ((bits & kCutBits) != 0 && !std::isnan(x)) fail(site, "an operand that as_tf32 has not rounded");
        return x;
    }
    static void work(const Site& site, void* const* lanes) {
        float a[16][8], b[8][8];
        for (int lane = 0; lane < kLanes; ++lane) {
            const auto& mine = *static_cast<const MultiplyAddTf32*>(lanes[lane]);
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = operand(site, mine.a[i]);
            b[t][g] = operand(site, mine.b0), b[t + 4][g] = operand(site, mine.b1);
        }
        // Products of eleven bits are exact in float32. The manual leaves the order of the sum open: here k rises.
        for (int lane = 0; lane < kLanes; ++lane) {
            float* d = static_cast<const MultiplyAddTf32*>(lanes[lane])->d;
            for (int i = 0; i < 4; ++i) {
                const int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
                for (int k = 0; k < 8; ++k) d[i] += a[m][k] * b[k][n];
            }
        }
    }
};

}  // namespace sim

inline uint32_t as_tf32(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) >= 0x7f800000u) return bits & ~sim::kCutBits;  // infinite, or a quiet NaN
    return (bits + (sim::kCutBits + 1) / 2) & ~sim::kCutBits;
}

inline void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, VIVIT_SIM_CALLER) {
    sim::MultiplyAddTf32 mine{d, a, b0, b1};
    sim::together({"multiply_add_tf32", file, line}, &mine, sim::MultiplyAddTf32::work);
}

}  // namespace vivit::cuda
