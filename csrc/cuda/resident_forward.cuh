// The resident regime's forward: exact softmax over keys that go by in steps of 32, at the end of 16.
#pragma once

#include "resident.cuh"

namespace vivit::cuda {

// 16 queries on their way over the keys, with their weighted sum of v.
template <int kSteps>
struct Attended : Softmax {
    RowSums<kSteps> o;
};

// Products of 16 queries and 8 kBlocks keys become the weights of these keys; the sums are rescaled once. bias: of the
// first of the keys, where the call is not plain. kWhole: all of them may be attended.
template <int kSteps, int kBlocks, bool kPlain, bool kWhole>
VIVIT_DEVICE void weigh_keys(float (&x)[kBlocks][4], Attended<kSteps>& sums, const float* bias,
                             const Rules<kPlain>& rules, int64_t sequence, int32_t first_row, int32_t first_key) {
    // a plain score is the product times a positive number, so that the largest is found before it is scaled
    const float unit = kPlain ? rules.scores.unit : 1.f;
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) {
        float& y = product(x, i);
        if (!kPlain) y = rules.scores.of(y);
        if (!kPlain && !kWhole) y += bias[column_of(i)];
        if (kPlain && !kWhole && first_key + column_of(i) >= rules.axis.N) y = -kInfinity;
    }
    shrink_rows(sums.o, weigh(sums, x, unit));
    if (!rules.drops()) return;
    const Sequence at(sequence, rules.axis);
    multiply_dropped(x, rules.dropout, first_key, [&](int r) {
        return query_number(rules.p, at, rules.axis, first_row + lane_number() / 4 + 8 * r);
    });
}

// The next 16 kGroups keys of 16 queries.
template <class T, int kSteps, int kGroups, bool kPlain, bool kWhole>
VIVIT_DEVICE void attend_step(Attended<kSteps>& sums, const Operand<kSteps>& q, const char* keys, const char* values,
                              const float* bias, const Places<kSteps>& places, const Rules<kPlain>& rules,
                              int64_t sequence, int32_t first_row, int32_t first_key) {
    Pairs<kGroups> x;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) across_step<T>(x, q, keys, places.across, s);
    weigh_keys<kSteps, 2 * kGroups, kPlain, kWhole>(x.blocks(), sums, bias, rules, sequence, first_row, first_key);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
        uint32_t weights[4];
        as_operand<T>(weights, x.of[j][0], x.of[j][1]);
        along_rows<T>(sums.o, weights, values + 16 * j * Pitch<kSteps>::kBytes, places.along);
    }
}

// o of the rows of a warp from first_row on, and their lse where it is wanted.
template <class T, int kSteps>
VIVIT_DEVICE void store_attended(const AttentionParams& p, const Axis& axis, const Sequence& at, int32_t first_row,
                                 const Attended<kSteps>& sums) {
    store_attended<T>(p, Rows(p.o, at, axis), first_row, axis.N, sums.o, sums,
                      [&](int32_t row) { return query_number(p, at, axis, row); });
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

// What is added to the scores of each key, of some sequences of an axis from `first` on, padded to `rows` rows.
VIVIT_DEVICE void write_bias(const AttentionParams& p, const Axis& axis, int64_t first, int32_t sequences, int32_t rows,
                             float* bias, int32_t threads) {
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < sequences * rows; i += threads) {
        const bool may = may_be_attended(p, Sequence(first + i / rows, axis), axis, i % rows);
        bias[i] = may ? 0.f : -kInfinity;
    }
}

template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void resident_forward(const AttentionParams& p, const Axis& axis, const Walk& walk) {
    const auto copy = [&](const Block<kSteps, false>& block) {
        for (int32_t s = 0; s < block.sequences; ++s) {
            block.copy(0, s, p.q, axis, p.D), block.copy(1, s, p.k, axis, p.D), block.copy(2, s, p.v, axis, p.D);
        }
        if (!kPlain) {
            write_bias(p, axis, block.first, block.sequences, block.layout.rows, block.floats(0), block.threads());
        }
    };
    const auto work = [&](const Block<kSteps, false>& block) {
        if (!kPlain && p.cos != nullptr) block.template turn<T>(p, axis);
        const Rules<kPlain> rules(p, axis);
        const int32_t tiles = block.layout.rows / 16;
        for (int32_t i = block.thread() / 32; i < block.sequences * tiles; i += block.threads() / 32) {
            attend<T>(block, i / tiles, i % tiles * 16, rules);
        }
    };
    in_stages<kSteps, false, !kStaged<kSteps, kPlain, false>>(p, axis, walk, copy, work);
}

}  // namespace vivit::cuda
