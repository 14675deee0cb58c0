// Scores: in a thread's registers, from products to probabilities and to gradients of scores. Options alone; of plain
// calls it is a line each in joint_hopper_backward.cuh.
#pragma once

#include "joint_hopper_backward_multiply.cuh"
#include "joint_hopper_pairs.cuh"

namespace vivit::cuda {

// A product becomes a probability; what comes back is that times the slope of its soft-cap (Scores::slope).
template <bool kCapped>
VIVIT_DEVICE float sloped(float& x, const Scores<false>& scores, float lse) {
    if (!kCapped) return x = exp2_fast(x * scores.unit - lse);
    const float y = scores.tanh_of(x * scores.over_cap);
    x = exp2_fast(scores.cap * kLog2E * y - lse);
    return x * (1.f - y * y);
}

// Queries first: products become probabilities times slopes, of which gradients of scores are made.
template <bool kCapped, int kBlocks>
VIVIT_DEVICE void slope_queries_first(float (&x)[kBlocks][4], const Scores<false>& scores, const float (&lse)[2]) {
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) product(x, i) = sloped<kCapped>(product(x, i), scores, lse[i % 4 / 2]);
}

// Keys first: the same, and probabilities, rounded, those that dropout drops as 0. two: lse (and delta) of the lane's
// first two columns; kept: of kept_keys_first.
template <class T, bool kCapped, int kBlocks>
VIVIT_DEVICE void slope_keys_first(uint32_t (&weights)[kBlocks / 2][4], float (&x)[kBlocks][4],
                                   const Scores<false>& scores, const Statistic* two, uint32_t kept) {
#pragma unroll
    for (int j = 0; j < kBlocks / 2; ++j) {
        float weight[2][4];
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            const int n = 2 * j + b;
            float of[4];
            read_four(of, &two[8 * n].lse);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                weight[b][i] = x[n][i];
                x[n][i] = sloped<kCapped>(weight[b][i], scores, of[i % 2 * 2]);
                if ((kept >> kept_place(4 * n + i) & 1u) == 0) weight[b][i] = 0.f;
            }
        }
        as_operand<T>(weights[j], weight[0], weight[1]);
    }
}

// Gradients of weights that dropout has been at become those of the probabilities before. place(i): the bit of number
// i of the products.
template <int kBlocks, class Place>
VIVIT_DEVICE void drop_gradients(float (&dp)[kBlocks][4], const Dropout& dropout, uint32_t kept, const Place& place) {
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) {
        float& y = product(dp, i);
        y = (kept >> place(i) & 1u) != 0 ? y * dropout.keep_scale : 0.f;
    }
}

}  // namespace vivit::cuda
