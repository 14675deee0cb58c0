// From products q . k to probabilities and back: scale, soft-cap, dropout.
#pragma once

#include "on_grid.cuh"

namespace vivit::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = __builtin_huge_valf();

// A score x is a logarithm to base 2, so that a probability is 2^(x - max) / sum. kPlain: no option of the call but a
// positive scale; what the others need is then not compiled in.
template <bool kPlain>
struct Scores {
    float unit, cap, over_cap;

    VIVIT_DEVICE explicit Scores(const AttentionOptions& p)
        : unit(p.scale * kLog2E), cap(p.softcap), over_cap(p.softcap > 0 ? p.scale / p.softcap : 0.f) {}

    VIVIT_DEVICE float of(float product) const {
        if (kPlain || cap == 0.f) return product * unit;
        return cap * kLog2E * tanh_of(product * over_cap);
    }

    // d score / d product, over the scale, which a gradient is multiplied by at its end, and over log2(e), which the
    // derivative of a probability takes back.
    VIVIT_DEVICE float slope(float product) const {
        if (kPlain || cap == 0.f) return 1.f;
        const float y = tanh_of(product * over_cap);
        return 1.f - y * y;
    }

    // The same of a pair whose probability is known, 2^(score - lse): no register has to keep its product.
    VIVIT_DEVICE float slope_of(float weight, float lse) const {
        if (kPlain || cap == 0.f || weight == 0.f) return 1.f;
        const float y = (lse + log2_fast(weight)) / (cap * kLog2E);
        return 1.f - y * y;
    }

    // Within 4e-7: near 0 by the series, as the difference of exponentials cancels there.
    static VIVIT_DEVICE float tanh_of(float x) {
        const float size = fabsf(x);
        if (size < 0.125f) {
            const float y = x * x;
            return x * (1.f + y * (-1.f / 3 + y * (2.f / 15 + y * (-17.f / 315 + y * (62.f / 2835)))));
        }
        const float e = exp2_fast(-2.f * kLog2E * size);
        const float y = (1.f - e) / (1.f + e);
        return x < 0.f ? -y : y;
    }
};

// Which pairs dropout keeps: Philox-4x32-10 (Salmon et al. 2011), counted as kernels/vivit_kernels/_philox.py says.
struct Dropout {
    bool on;
    uint32_t key0, key1, offset, keep_from;
    float keep_scale;

    VIVIT_DEVICE explicit Dropout(const AttentionOptions& p)
        : on(p.seed != nullptr), key0(0), key1(0), offset(0), keep_from(p.keep_from), keep_scale(p.keep_scale) {
        if (on) {
            const uint64_t seed = static_cast<uint64_t>(load_one(p.seed));
            key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
            offset = static_cast<uint32_t>(load_one(p.seed + 1));
        }
    }

    // The words of query number `row` for the keys 4 group, ..., 4 group + 3.
    VIVIT_DEVICE uint4 words(int64_t row, uint32_t group) const {
        uint32_t c0 = group, c1 = offset, c2 = static_cast<uint32_t>(row),
                 c3 = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), k0 = key0, k1 = key1;
#pragma unroll
        for (int round = 0; round < 10; ++round) {
            const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
            const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
            c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        return {c0, c1, c2, c3};
    }

    VIVIT_DEVICE float factor(uint32_t word) const { return word >= keep_from ? keep_scale : 0.f; }

    // What the probability of a pair is multiplied by.
    VIVIT_DEVICE float factor(int64_t row, int32_t key) const {
        const uint4 found = words(row, static_cast<uint32_t>(key) / 4);
        const uint32_t low = key & 1 ? found.y : found.x, high = key & 1 ? found.w : found.z;
        return factor(key & 2 ? high : low);
    }

    // The same of the keys `even` and even + 1.
    VIVIT_DEVICE float2 factors(int64_t row, int32_t even) const {
        const uint4 found = words(row, static_cast<uint32_t>(even) / 4);
        return {factor(even & 2 ? found.z : found.x), factor(even & 2 ? found.w : found.y)};
    }
};

VIVIT_DEVICE int32_t lane_number() { return static_cast<int32_t>(threadIdx.x) % 32; }

// Sixteen columns of sums, as two blocks of eight, as the left operand of a product.
template <class T>
VIVIT_DEVICE void as_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = packed<T>(left[0], left[1]), a[1] = packed<T>(left[2], left[3]);
    a[2] = packed<T>(right[0], right[1]), a[3] = packed<T>(right[2], right[3]);
}

// The largest, or the sum, of what the four lanes have that share a row.
VIVIT_DEVICE float largest_of_row(float x) {
    x = fmaxf(x, from_lane_xor(x, 1));
    return fmaxf(x, from_lane_xor(x, 2));
}
VIVIT_DEVICE float sum_of_row(float x) {
    x += from_lane_xor(x, 1);
    return x + from_lane_xor(x, 2);
}

}  // namespace vivit::cuda
