// The resident regime's backward. It reads o and the forward's lse, and goes over each sequence twice in one launch: by
// keys for dk and dv (4 products), by queries for dq (3). Recomputing costs two products more than keeping dS would,
// but every gradient is summed in registers and written once, without atomics.
#pragma once

#include "resident.cuh"

namespace vivit::cuda {

// delta = sum(do * o) of each row, four lanes to a row, and lse, into shared memory. do is there already.
template <class T, int kSteps>
VIVIT_DEVICE void load_statistics(const AttentionParams& p, const Axis& axis, const Block<kSteps, true>& block) {
    const int32_t rows = block.layout.rows, t = block.thread() % 4;
    for (int32_t i = block.thread() / 4; i < block.sequences * rows; i += block.threads() / 4) {
        const int32_t s = i / rows, row = i % rows;
        const Sequence at(block.first + s, axis);
        const char* o = Rows(p.o, at, axis).row(row);
        const float delta = delta_of_row<T, kSteps>(o, row < axis.N, block.rows(3, s), row, p.D);
        if (t == 0) {
            const bool there = row < axis.N;
            block.floats(s)[row] = there ? load_one(p.lse + query_number(p, at, axis, row)) : kInfinity;
            block.floats(s)[rows + row] = delta;
        }
    }
}

// Products of a pair of operands with the rows of a pair of tensors, over channels: x = a rows^T, y = b others^T.
template <class T, int kSteps>
VIVIT_DEVICE void across_both(Pairs<1>& x, const Operand<kSteps>& a, const char* rows, Pairs<1>& y,
                              const Operand<kSteps>& b, const char* others, int32_t place) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        across_step<T>(x, a, rows, place, s);
        across_step<T>(y, b, others, place, s);
    }
}

// The gradient of 16 rows of q or k, that of the rows as they were before they were turned.
// scratch: the warp's.
template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void store_gradient(float* scratch, const Rules<kPlain>& rules, const Grid& x, const Sequence& at,
                                 int32_t first, const RowSums<kSteps>& sums) {
    const AttentionParams& p = rules.p;
    const Rows to(x, at, rules.axis);
    if (!kPlain && p.cos != nullptr) {
        store_turned_rows<T>(p, to, first, rules.axis.N, sums, scratch,
                             [&](int32_t row) { return at.token(row, rules.axis, p.S); });
    } else {
        store_rows<T>(p, to, first, rules.axis.N, sums, p.scale, p.scale);
    }
}

// Of 16 queries and 8 kBlocks keys: products q k become dS, products do v are used up. kWhole: no key is padding.
template <bool kWhole, int kBlocks, bool kPlain>
VIVIT_DEVICE void differentiate_queries(float (&x)[kBlocks][4], float (&dp)[kBlocks][4], const float (&lse)[2],
                                        const float (&delta)[2], const Rules<kPlain>& rules, const Sequence& at,
                                        int32_t first_row, int32_t first_key) {
    if (rules.drops()) {
        multiply_dropped(dp, rules.dropout, first_key, [&](int r) {
            return query_number(rules.p, at, rules.axis, first_row + lane_number() / 4 + 8 * r);
        });
    }
    score_gradients(x, dp, rules.scores, lse, delta, [&](int32_t column) {
        const int32_t key = first_key + column;
        return kPlain ? kWhole || key < rules.axis.N : may_be_attended(rules.p, at, rules.axis, key);
    });
}

// The share of 16 keys in dq of 16 queries.
template <class T, int kSteps, bool kPlain, bool kWhole>
VIVIT_DEVICE void queries_step(RowSums<kSteps>& dq, const Operand<kSteps>& q, const char* d_outputs, const char* keys,
                               const char* values, const Places<kSteps>& places, const float (&lse)[2],
                               const float (&delta)[2], const Rules<kPlain>& rules, const Sequence& at,
                               int32_t first_row, int32_t first_key) {
    Pairs<1> x, dp;
    const Operand<kSteps> d_o(d_outputs);  // read once more in each step, as v by keys_step
    across_both<T>(x, q, keys, dp, d_o, values, places.across);
    differentiate_queries<kWhole>(x.blocks(), dp.blocks(), lse, delta, rules, at, first_row, first_key);
    uint32_t a[4];
    as_operand<T>(a, x.of[0][0], x.of[0][1]);
    along_rows<T>(dq, a, keys, places.along);
}

// dq of 16 queries.
template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void gradient_of_queries(const Block<kSteps, true>& block, int32_t s, int32_t first_row,
                                      const Rules<kPlain>& rules) {
    constexpr int32_t kBytes = Pitch<kSteps>::kBytes;
    const AttentionParams& p = rules.p;
    const Sequence at(block.first + s, rules.axis);
    const char *keys = block.rows(1, s), *values = block.rows(2, s);
    const Operand<kSteps> q(block.rows(0, s) + first_row * kBytes);
    const char* d_outputs = block.rows(3, s) + first_row * kBytes;
    const float* floats = block.floats(s) + first_row + lane_number() / 4;
    const float lse[2] = {floats[0], floats[8]}, delta[2] = {floats[block.layout.rows], floats[block.layout.rows + 8]};
    const Places<kSteps> places;
    RowSums<kSteps> dq;
    int32_t key = 0;
#pragma unroll 1
    for (; key + 16 <= rules.axis.N; key += 16) {
        queries_step<T, kSteps, kPlain, true>(dq, q, d_outputs, keys + key * kBytes, values + key * kBytes, places, lse,
                                              delta, rules, at, first_row, key);
    }
    if (key < rules.axis.N) {
        queries_step<T, kSteps, kPlain, false>(dq, q, d_outputs, keys + key * kBytes, values + key * kBytes, places,
                                               lse, delta, rules, at, first_row, key);
    }
    store_gradient<T>(block.scratch(), rules, p.dq, at, first_row, dq);
}

// Of 16 keys and 8 kBlocks queries: products k q become the weights that dv sums, products v do, if kDk, dS. floats:
// lse of the first query that the lane has, delta after `rows` more; may: whether keys g and g + 8 may be attended.
template <bool kDk, int kBlocks, bool kPlain>
VIVIT_DEVICE void differentiate_keys(float (&x)[kBlocks][4], float (&dp)[kBlocks][4], const float* floats, int32_t rows,
                                     const bool (&may)[2], const Rules<kPlain>& rules, const Sequence& at,
                                     int32_t first_row, int32_t first_key) {
    weigh_keys_first<kDk>(x, dp, rules.scores, floats, floats + rows, may, [&](int32_t column, int r) {
        if (!rules.drops()) return 1.f;
        const int64_t number = query_number(rules.p, at, rules.axis, first_row + column);
        return rules.dropout.factor(number, first_key + lane_number() / 4 + 8 * r);
    });
}

// The share of 16 queries in dk and dv of 16 keys, those of them that are asked for.
template <class T, int kSteps, bool kPlain, bool kDk, bool kDv>
VIVIT_DEVICE void keys_step(RowSums<kSteps>& dk, RowSums<kSteps>& dv, const Operand<kSteps>& k, const char* values,
                            const char* queries, const char* d_outputs, const float* floats, int32_t rows,
                            const Places<kSteps>& places, const bool (&may)[2], const Rules<kPlain>& rules,
                            const Sequence& at, int32_t first_row, int32_t first_key) {
    Pairs<1> x, dp;
    if constexpr (kDk) {
        // v is read once more in each step: its registers are needed
        const Operand<kSteps> v(values);
        across_both<T>(x, k, queries, dp, v, d_outputs, places.across);
    } else {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) across_step<T>(x, k, queries, places.across, s);
    }
    differentiate_keys<kDk>(x.blocks(), dp.blocks(), floats, rows, may, rules, at, first_row, first_key);
    uint32_t a[4];
    if (kDv) {
        as_operand<T>(a, x.of[0][0], x.of[0][1]);
        along_rows<T>(dv, a, d_outputs, places.along);
    }
    if (kDk) {
        as_operand<T>(a, dp.of[0][0], dp.of[0][1]);
        along_rows<T>(dk, a, queries, places.along);
    }
}

// dk or dv of 16 keys, or both. Scores lie keys first, so that no product has to transpose them.
template <class T, int kSteps, bool kPlain, bool kDk, bool kDv>
VIVIT_DEVICE void gradients_of_keys(const Block<kSteps, true>& block, int32_t s, int32_t first_key,
                                    const Rules<kPlain>& rules) {
    constexpr int32_t kBytes = Pitch<kSteps>::kBytes;
    const AttentionParams& p = rules.p;
    const Sequence at(block.first + s, rules.axis);
    const int32_t g = lane_number() / 4, rows = block.layout.rows;
    const Operand<kSteps> k(block.rows(1, s) + first_key * kBytes);
    const char *values = block.rows(2, s) + first_key * kBytes, *queries = block.rows(0, s);
    const char* d_outputs = block.rows(3, s);
    const float* floats = block.floats(s) + 2 * (lane_number() % 4);
    const bool may[2] = {kPlain || may_be_attended(p, at, rules.axis, first_key + g),
                         kPlain || may_be_attended(p, at, rules.axis, first_key + g + 8)};
    const Places<kSteps> places;
    RowSums<kSteps> dk, dv;
#pragma unroll 1
    for (int32_t row = 0; row < rows; row += 16) {
        keys_step<T, kSteps, kPlain, kDk, kDv>(dk, dv, k, values, queries + row * kBytes, d_outputs + row * kBytes,
                                               floats + row, rows, places, may, rules, at, row, first_key);
    }
    if (kDv) store_rows<T>(p, Rows(p.dv, at, rules.axis), first_key, rules.axis.N, dv, 1.f, 1.f);
    if (kDk) store_gradient<T>(block.scratch(), rules, p.dk, at, first_key, dk);
}

}  // namespace vivit::cuda
