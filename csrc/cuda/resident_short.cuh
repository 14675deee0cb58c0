// The backward of short sequences, of up to 64 tokens: a warp has all scores of its 16 queries in registers, so that
// what a backward needs of them (their largest score, their sum, delta) is recomputed exactly: neither o nor lse is
// read.
#pragma once

#include "resident_backward.cuh"

namespace vivit::cuda {

constexpr int kShortGroups = kShortTokens / 16;

// d [16, rows] = a b^T over channels, b all rows of a sequence; the rest of d stays 0.
template <class T, int kSteps>
VIVIT_DEVICE void across_short(Pairs<1> (&d)[kShortGroups], const char* left, const char* rows, int32_t count,
                               int32_t place) {
    const Operand<kSteps> a(left);
#pragma unroll
    for (int j = 0; j < kShortGroups; ++j) {
        if (16 * j >= count) continue;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            across_step<T>(d[j], a, rows + 16 * j * Pitch<kSteps>::kBytes, place, s);
        }
    }
}

// sums += a b, b all rows of a sequence.
template <class T, int kSteps>
VIVIT_DEVICE void along_short(RowSums<kSteps>& sums, const Pairs<1> (&a)[kShortGroups], const char* rows, int32_t count,
                              int32_t place) {
#pragma unroll
    for (int j = 0; j < kShortGroups; ++j) {
        if (16 * j >= count) continue;
        uint32_t operand[4];
        as_operand<T>(operand, a[j].of[0][0], a[j].of[0][1]);
        along_rows<T>(sums, operand, rows + 16 * j * Pitch<kSteps>::kBytes, place);
    }
}

// From products of queries and keys to probabilities. Returns, of rows g and g + 8, log2 of the sum of 2^score, +inf
// where no key may be attended.
template <bool kPlain>
VIVIT_DEVICE float2 weigh_short(Pairs<1> (&x)[kShortGroups], const Sequence& at, const Rules<kPlain>& rules) {
    float lse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float most = -kInfinity, total = 0.f;
#pragma unroll
        for (int i = 0; i < 4 * kShortGroups; ++i) {
            const int j = i / 4, n = i / 2 % 2, e = 2 * r + i % 2;
            const int32_t key = 16 * j + 8 * n + 2 * (lane_number() % 4) + i % 2;
            float& y = x[j].of[0][n][e];
            const bool may = kPlain ? key < rules.axis.N : may_be_attended(rules.p, at, rules.axis, key);
            y = may ? rules.scores.of(y) : -kInfinity;
            most = fmaxf(most, y);
        }
        most = largest_of_row(most);
        most = most == -kInfinity ? 0.f : most;
#pragma unroll
        for (int i = 0; i < 4 * kShortGroups; ++i) {
            float& y = x[i / 4].of[0][i / 2 % 2][2 * r + i % 2];
            y = exp2_fast(y - most);
            total += y;
        }
        total = sum_of_row(total);
        const float over = total > 0.f ? 1.f / total : 0.f;
#pragma unroll
        for (int i = 0; i < 4 * kShortGroups; ++i) x[i / 4].of[0][i / 2 % 2][2 * r + i % 2] *= over;
        lse[r] = total > 0.f ? most + log2_fast(total) : kInfinity;
    }
    return {lse[0], lse[1]};
}

// Of each pair of the lane what dropout multiplies its probability by.
template <bool kPlain>
VIVIT_DEVICE void multiply_dropped(Pairs<1> (&x)[kShortGroups], const Sequence& at, int32_t first_row,
                                   const Rules<kPlain>& rules) {
#pragma unroll
    for (int i = 0; i < 4 * kShortGroups; ++i) {
        const int j = i / 4, n = i / 2 % 2, r = i % 2;
        const int64_t row = query_number(rules.p, at, rules.axis, first_row + lane_number() / 4 + 8 * r);
        const float2 keep = rules.dropout.factors(row, 16 * j + 8 * n + 2 * (lane_number() % 4));
        x[j].of[0][n][2 * r] *= keep.x, x[j].of[0][n][2 * r + 1] *= keep.y;
    }
}

// o of 16 queries once more, from their probabilities.
template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void store_short_output(const Block<kSteps, true>& block, int32_t s, int32_t first_row,
                                     const Pairs<1> (&weights)[kShortGroups], const Places<kSteps>& places,
                                     const Sequence& at, const Rules<kPlain>& rules) {
    Pairs<1> kept[kShortGroups];
#pragma unroll
    for (int j = 0; j < kShortGroups; ++j) kept[j] = weights[j];
    if (rules.drops()) multiply_dropped(kept, at, first_row, rules);
    RowSums<kSteps> o;
    along_short<T>(o, kept, block.rows(2, s), block.layout.rows, places.along);
    store_rows<T>(rules.p, Rows(rules.p.o_again, at, rules.axis), first_row, rules.axis.N, o, 1.f, 1.f);
}

// dq of 16 queries, and for the gradients of keys their lse and delta, which go to shared memory.
template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void short_gradient_of_queries(const Block<kSteps, true>& block, int32_t s, int32_t first_row,
                                            const Rules<kPlain>& rules) {
    constexpr int32_t kBytes = Pitch<kSteps>::kBytes;
    const AttentionParams& p = rules.p;
    const Sequence at(block.first + s, rules.axis);
    const int32_t rows = block.layout.rows;
    const char *keys = block.rows(1, s), *values = block.rows(2, s);
    const Places<kSteps> places;
    Pairs<1> x[kShortGroups], dp[kShortGroups];
    across_short<T, kSteps>(x, block.rows(0, s) + first_row * kBytes, keys, rows, places.across);
    const float2 both = weigh_short(x, at, rules);
    if (p.o_again.data != nullptr) store_short_output<T>(block, s, first_row, x, places, at, rules);
    across_short<T, kSteps>(dp, block.rows(3, s) + first_row * kBytes, values, rows, places.across);
    if (rules.drops()) multiply_dropped(dp, at, first_row, rules);
    const float lse[2] = {both.x, both.y};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float delta = 0.f;
#pragma unroll
        for (int i = 0; i < 4 * kShortGroups; ++i) {
            const int j = i / 4, n = i / 2 % 2, e = 2 * r + i % 2;
            delta += x[j].of[0][n][e] * dp[j].of[0][n][e];
        }
        delta = sum_of_row(delta);
#pragma unroll
        for (int i = 0; i < 4 * kShortGroups; ++i) {
            const int j = i / 4, n = i / 2 % 2, e = 2 * r + i % 2;
            const float weight = x[j].of[0][n][e];
            x[j].of[0][n][e] = weight * (dp[j].of[0][n][e] - delta) * rules.scores.slope_of(weight, lse[r]);
        }
        float* floats = block.floats(s) + first_row + lane_number() / 4 + 8 * r;
        if (lane_number() % 4 == 0) floats[0] = lse[r], floats[rows] = delta;
    }
    RowSums<kSteps> dq;
    along_short<T>(dq, x, keys, rows, places.along);
    store_gradient<T>(block.scratch(), rules, p.dq, at, first_row, dq);
}

template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void work_backward(const AttentionParams& p, const Axis& axis, const Block<kSteps, true>& block) {
    const bool is_short = axis.N <= kShortTokens;
    if (!is_short) {
        load_statistics<T>(p, axis, block);
        block_barrier();
    }
    if (!kPlain && p.cos != nullptr) block.template turn<T>(p, axis);
    const Rules<kPlain> rules(p, axis);
    const int32_t tiles = block.layout.rows / 16, all = block.sequences * tiles;
    const int32_t warp = block.thread() / 32, warps = block.threads() / 32;
    if (is_short) {
        for (int32_t i = warp; i < all; i += warps) {
            short_gradient_of_queries<T>(block, i / tiles, i % tiles * 16, rules);
        }
        block_barrier();
    }
    for (int32_t i = warp; i < (is_short ? all : 2 * all); i += warps) {  // the longer ones first
        const int32_t s = i % all / tiles, first = i % tiles * 16;
        if (i < all) {
            // sums of both do not fit in registers where rows are long or options are many; then scores are made twice
            constexpr bool kBoth = kPlain ? kSteps <= 6 : kSteps <= 2;
            gradients_of_keys<T, kSteps, kPlain, kBoth, true>(block, s, first, rules);
            if (!kBoth) gradients_of_keys<T, kSteps, kPlain, true, false>(block, s, first, rules);
        } else {
            gradient_of_queries<T>(block, s, first, rules);
        }
    }
}

template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void resident_backward(const AttentionParams& p, const Axis& axis, const Walk& walk) {
    const auto copy = [&](const Block<kSteps, true>& block) {
        for (int32_t s = 0; s < block.sequences; ++s) {
            block.copy(3, s, p.d_o, axis, p.D), block.copy(0, s, p.q, axis, p.D);
            block.copy(1, s, p.k, axis, p.D), block.copy(2, s, p.v, axis, p.D);
        }
    };
    in_stages<kSteps, true, !kStaged<kSteps, kPlain, true>>(p, axis, walk, copy, [&](const Block<kSteps, true>& block) {
        work_backward<T, kSteps, kPlain>(p, axis, block);
    });
}

}  // namespace vivit::cuda
