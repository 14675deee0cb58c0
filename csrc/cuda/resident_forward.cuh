// The resident regime's forward: exact softmax over keys that go by in steps of 32, at the end of 16.
#pragma once

#include "resident.cuh"

namespace vivit::cuda {

// 16 queries on their way over the keys: their weighted sum of v, and of rows g and g + 8 the largest score so far and
// the lane's share of the sum of 2^(score - largest).
template <int kSteps>
struct Attended {
    RowSums<kSteps> o;
    float most[2] = {-kInfinity, -kInfinity}, total[2] = {0.f, 0.f};
};

// The next 16 kGroups keys: the sums are rescaled once. bias: of the first of them; kWhole: it is 0 for all of them.
template <class T, int kSteps, int kGroups, bool kPlain, bool kWhole>
VIVIT_DEVICE void attend_step(Attended<kSteps>& sums, const Operand<kSteps>& q, const char* keys, const char* values,
                              const float* bias, const Places<kSteps>& places, const Rules<kPlain>& rules,
                              int64_t sequence, int32_t first_row, int32_t first_key) {
    const int32_t g = lane_number() / 4, t = lane_number() % 4;
    Pairs<kGroups> x;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) across_step<T>(x, q, keys, places.across, s);
    // a plain score is the product times a positive number, so that the largest is found before it is scaled
    const float unit = kPlain ? rules.scores.unit : 1.f;
    float highest[2] = {-kInfinity, -kInfinity}, base[2];
#pragma unroll
    for (int i = 0; i < 8 * kGroups; ++i) {
        float& y = x.of[i / 8][i / 4 % 2][i % 4];
        if (!kPlain) y = rules.scores.of(y);
        if (!kWhole) y += bias[8 * (i / 4) + 2 * t + i % 2];
        highest[i % 4 / 2] = fmaxf(highest[i % 4 / 2], y);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        highest[r] = fmaxf(sums.most[r], largest_of_row(highest[r]) * unit);
        base[r] = highest[r] == -kInfinity ? 0.f : highest[r];
        const float shrink = exp2_fast(sums.most[r] - base[r]);
        sums.most[r] = highest[r], sums.total[r] *= shrink;
#pragma unroll
        for (int i = 0; i < 4 * kSteps; ++i) sums.o.of[i / 2][2 * r + i % 2] *= shrink;
    }
#pragma unroll
    for (int i = 0; i < 8 * kGroups; ++i) {
        float& y = x.of[i / 8][i / 4 % 2][i % 4];
        y = exp2_fast(y * unit - base[i % 4 / 2]);
        sums.total[i % 4 / 2] += y;
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
        if (rules.drops()) {
            const Sequence at(sequence, rules.axis);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int n = i / 2, r = i % 2;
                const int64_t row = query_number(rules.p, at, rules.axis, first_row + g + 8 * r);
                const float2 keep = rules.dropout.factors(row, first_key + 16 * j + 8 * n + 2 * t);
                x.of[j][n][2 * r] *= keep.x, x.of[j][n][2 * r + 1] *= keep.y;
            }
        }
        uint32_t weights[4];
        as_operand<T>(weights, x.of[j][0], x.of[j][1]);
        along_rows<T>(sums.o, weights, values + 16 * j * Pitch<kSteps>::kBytes, places.along);
    }
}

// o of the rows of a warp from first_row on, and their lse where it is wanted.
template <class T, int kSteps>
VIVIT_DEVICE void store_attended(const AttentionParams& p, const Axis& axis, const Sequence& at, int32_t first_row,
                                 const Attended<kSteps>& sums) {
    float over[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int32_t row = first_row + lane_number() / 4 + 8 * r;
        const float total = sum_of_row(sums.total[r]);
        over[r] = total > 0.f ? 1.f / total : 0.f;
        if (p.lse != nullptr && lane_number() % 4 == 0 && row < axis.N) {
            const float lse = total > 0.f ? sums.most[r] + log2_fast(total) : kInfinity;
            store_one(p.lse + query_number(p, at, axis, row), lse);
        }
    }
    store_rows<T>(p, Rows(p.o, at, axis), first_row, axis.N, sums.o, over[0], over[1]);
}

// o of 16 queries, and their lse where it is wanted.
template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void attend(const Block<kSteps, false>& block, int32_t s, int32_t first_row, const Rules<kPlain>& rules) {
    constexpr int kGroups = 2;
    const char *keys = block.rows(1, s), *values = block.rows(2, s);
    const float* bias = block.floats(s);
    const Operand<kSteps> q(block.rows(0, s) + first_row * Pitch<kSteps>::kBytes);
    const Places<kSteps> places;
    Attended<kSteps> sums;
    constexpr int32_t kBytes = Pitch<kSteps>::kBytes;
    const int32_t in_steps = kPlain ? rules.axis.N : block.layout.rows;
    int32_t key = 0;
#pragma unroll 1
    for (; key + 16 * kGroups <= in_steps; key += 16 * kGroups) {
        attend_step<T, kSteps, kGroups, kPlain, kPlain>(sums, q, keys + key * kBytes, values + key * kBytes, bias + key,
                                                        places, rules, block.first + s, first_row, key);
    }
#pragma unroll 1
    for (; key < block.layout.rows; key += 16) {
        attend_step<T, kSteps, 1, kPlain, false>(sums, q, keys + key * kBytes, values + key * kBytes, bias + key,
                                                 places, rules, block.first + s, first_row, key);
    }
    store_attended<T>(rules.p, rules.axis, Sequence(block.first + s, rules.axis), first_row, sums);
}

template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void resident_forward(const AttentionParams& p, const Axis& axis, int64_t number) {
    const Block<kSteps, false> block(axis, p.B, number);
    const int32_t sequences = block.sequences, rows = block.layout.rows;
    for (int32_t s = 0; s < sequences; ++s) {
        block.copy(0, s, p.q, axis, p.D), block.copy(1, s, p.k, axis, p.D), block.copy(2, s, p.v, axis, p.D);
    }
    copies_commit();
    for (int32_t i = block.thread(); i < sequences * rows; i += block.threads()) {
        const int32_t s = i / rows, key = i % rows;
        const bool may = kPlain ? key < axis.N : may_be_attended(p, Sequence(block.first + s, axis), axis, key);
        block.floats(s)[key] = may ? 0.f : -kInfinity;
    }
    copies_wait<0>();
    block_barrier();
    if (!kPlain && p.cos != nullptr) block.template turn<T>(p, axis);
    const Rules<kPlain> rules(p, axis);
    const int32_t tiles = rows / 16;
    for (int32_t i = block.thread() / 32; i < sequences * tiles; i += block.threads() / 32) {
        attend<T>(block, i / tiles, i % tiles * 16, rules);
    }
}

}  // namespace vivit::cuda
