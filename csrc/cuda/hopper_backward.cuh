// The resident regime's backward with Hopper's products (hopper_rows.cuh).
#pragma once

#include "hopper_rows.cuh"
#include "resident_backward.cuh"

namespace vivit::cuda {

// Rows that go by at a time: registers allow more where a block is alone on its multiprocessor and sums are not long.
template <int kSteps, bool kPlain>
constexpr int kPassing = kPlain && (kSteps == 5 || kSteps == 6) ? 64 : 32;

// ---- products ----

// x = a rows^T and y = b others^T, done.
template <class T, int kColumns, int kSteps>
VIVIT_DEVICE void group_across_both(float (&x)[kColumns / 8][4], const SlicedRows<kSteps>& a,
                                    const SlicedRows<kSteps>& rows, float (&y)[kColumns / 8][4],
                                    const SlicedRows<kSteps>& b, const SlicedRows<kSteps>& others) {
    group_begin();
    group_across<T, kColumns>(x, a, rows);
    group_across<T, kColumns>(y, b, others);
    group_commit();
    group_wait<0>();
    group_settle(x), group_settle(y);
}

// The next kColumns queries, in dk and dv of 64 keys, of which the warp has those from first_key on. floats, may: as
// differentiate_keys has them, of the first of all queries.
template <class T, int kColumns, int kSteps, bool kPlain>
VIVIT_DEVICE void hopper_keys_step(RowSums<kSteps>& dk, RowSums<kSteps>& dv, const SlicedRows<kSteps>& k,
                                   const SlicedRows<kSteps>& v, const SlicedRows<kSteps>& queries,
                                   const SlicedRows<kSteps>& d_outputs, const float* floats, int32_t rows,
                                   const bool (&may)[2], const Rules<kPlain>& rules, const Sequence& at,
                                   int32_t first_row, int32_t first_key) {
    float x[kColumns / 8][4], dp[kColumns / 8][4];
    group_across_both<T, kColumns>(x, k, queries.from(first_row), dp, v, d_outputs.from(first_row));
    differentiate_keys<true>(x, dp, floats + first_row, rows, may, rules, at, first_row, first_key);
    uint32_t weights[kColumns / 16][4], ds[kColumns / 16][4];
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
        as_operand<T>(weights[j], x[2 * j], x[2 * j + 1]);
        as_operand<T>(ds[j], dp[2 * j], dp[2 * j + 1]);
    }
    group_settle(weights), group_settle(ds), group_settle(dv.of), group_settle(dk.of);
    group_begin();
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
        group_along_rows<T>(dv, weights[j], d_outputs, first_row + 16 * j);
        group_along_rows<T>(dk, ds[j], queries, first_row + 16 * j);
    }
    group_commit();
    group_wait<0>();
    group_settle(weights), group_settle(ds), group_settle(dv.of), group_settle(dk.of);
}

// The next kColumns keys, in dq of 64 queries, of which the warp has those from first_row on.
template <class T, int kColumns, bool kWhole, int kSteps, bool kPlain>
VIVIT_DEVICE void hopper_queries_step(RowSums<kSteps>& dq, const SlicedRows<kSteps>& q, const SlicedRows<kSteps>& d_o,
                                      const SlicedRows<kSteps>& keys, const SlicedRows<kSteps>& values,
                                      const float (&lse)[2], const float (&delta)[2], const Rules<kPlain>& rules,
                                      const Sequence& at, int32_t first_row, int32_t first_key) {
    float x[kColumns / 8][4], dp[kColumns / 8][4];
    group_across_both<T, kColumns>(x, q, keys.from(first_key), dp, d_o, values.from(first_key));
    differentiate_queries<kWhole>(x, dp, lse, delta, rules, at, first_row, first_key);
    uint32_t ds[kColumns / 16][4];
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) as_operand<T>(ds[j], x[2 * j], x[2 * j + 1]);
    group_settle(ds), group_settle(dq.of);
    group_begin();
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) group_along_rows<T>(dq, ds[j], keys, first_key + 16 * j);
    group_commit();
    group_wait<0>();
    group_settle(ds), group_settle(dq.of);
}

// ---- gradients of 64 rows ----

// dk and dv of 64 keys.
template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void hopper_gradients_of_keys(const SlicedBlock<kSteps, true>& block, int32_t first_key,
                                           const Rules<kPlain>& rules) {
    constexpr int kColumns = kPassing<kSteps, kPlain>;
    const AttentionParams& p = rules.p;
    const Axis& axis = rules.axis;
    const int32_t rows = block.layout.rows;
    const SlicedRows<kSteps> k = block.rows(1).from(first_key), v = block.rows(2).from(first_key);
    const SlicedRows<kSteps> queries = block.rows(0), d_outputs = block.rows(3);
    const float* floats = block.floats() + 2 * (lane_number() % 4);
    const int32_t mine = first_key + rows_of_warp(), g = lane_number() / 4;
    const Sequence at(block.number, axis);
    const bool may[2] = {kPlain || may_be_attended(p, at, axis, mine + g),
                         kPlain || may_be_attended(p, at, axis, mine + g + 8)};
    RowSums<kSteps> dk, dv;
    int32_t row = 0;
#pragma unroll 1
    for (; row + kColumns <= rows; row += kColumns) {
        hopper_keys_step<T, kColumns>(dk, dv, k, v, queries, d_outputs, floats, rows, may, rules, at, row, mine);
    }
#pragma unroll 1
    for (; row < rows; row += 16) {
        hopper_keys_step<T, 16>(dk, dv, k, v, queries, d_outputs, floats, rows, may, rules, at, row, mine);
    }
    store_rows<T>(p, Rows(p.dv, at, axis), mine, axis.N, dv, 1.f, 1.f);
    store_gradient<T>(block.scratch(), rules, p.dk, at, mine, dk);
}

// dq of 64 queries.
template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void hopper_gradient_of_queries(const SlicedBlock<kSteps, true>& block, int32_t first_row,
                                             const Rules<kPlain>& rules) {
    constexpr int kColumns = kPassing<kSteps, kPlain>;
    const Axis& axis = rules.axis;
    const int32_t rows = block.layout.rows;
    const SlicedRows<kSteps> q = block.rows(0).from(first_row), d_o = block.rows(3).from(first_row);
    const SlicedRows<kSteps> keys = block.rows(1), values = block.rows(2);
    const int32_t mine = first_row + rows_of_warp(), row = mine + lane_number() / 4;
    const float* floats = block.floats();
    float lse[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const bool there = row + 8 * r < rows;
        lse[r] = there ? floats[row + 8 * r] : 0.f, delta[r] = there ? floats[rows + row + 8 * r] : 0.f;
    }
    const Sequence at(block.number, axis);
    RowSums<kSteps> dq;
    int32_t key = 0;
#pragma unroll 1
    for (; key + kColumns <= axis.N; key += kColumns) {
        hopper_queries_step<T, kColumns, true>(dq, q, d_o, keys, values, lse, delta, rules, at, mine, key);
    }
#pragma unroll 1
    for (; key < axis.N; key += 16) {
        hopper_queries_step<T, 16, false>(dq, q, d_o, keys, values, lse, delta, rules, at, mine, key);
    }
    store_gradient<T>(block.scratch(), rules, rules.p.dq, at, mine, dq);
}

// Of the rest, sixteen number `sixteen`: dk, dv and dq by a warp each, which so has the registers for it.
template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void hopper_gradients_of_rest(const Block<kSteps, true>& block, const Cut<kSteps>& cut, int32_t sixteen,
                                           const Rules<kPlain>& rules) {
    if (sixteen >= cut.rest) return;
    const int32_t first = cut.rest_from + 16 * sixteen, which = same_in_warp(rows_of_warp()) / 16;
    if (which == 0) gradients_of_keys<T, kSteps, kPlain, true, false>(block, 0, first, rules);
    if (which == 1) gradients_of_keys<T, kSteps, kPlain, false, true>(block, 0, first, rules);
    if (which == 2) gradient_of_queries<T, kSteps, kPlain>(block, 0, first, rules);
}

// ---- statistics ----

// o of some rows on its way to delta: the loads are under way while the other tensors are copied. Eight lanes share a
// row: of row thread / 8, + 32, ... a thread has chunks thread % 8, + 8, ....
template <class T, int kSteps>
struct Outputs {
    static constexpr int kChunks = (2 * kSteps + 7) / 8, kRows = 8 / kChunks;  // of a thread
    static constexpr int32_t kStep = kHopperThreads / 8;
    int32_t row, first_chunk;
    uint4 chunk[kRows][kChunks];

    VIVIT_DEVICE Outputs()
        : row(static_cast<int32_t>(threadIdx.x) / 8), first_chunk(static_cast<int32_t>(threadIdx.x) % 8) {}

    VIVIT_DEVICE void load(const Rows& o, int32_t first, int32_t N, int32_t D) {
#pragma unroll
        for (int i = 0; i < kRows * kChunks; ++i) {
            const int32_t from = first + row + i / kChunks * kStep, c = first_chunk + i % kChunks * 8;
            chunk[i / kChunks][i % kChunks] = load_16(o.row(from) + 16 * c, from < N && c < D / 8);
        }
    }
    // delta = sum(do * o) of each row.
    VIVIT_DEVICE void store_delta(const SlicedBlock<kSteps, true>& block, int32_t first, float* delta) const {
        const int32_t rows = block.layout.rows;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int32_t at = first + row + i * kStep;
            if (at - row >= rows) break;  // of all lanes of a warp alike: rows are a multiple of 16
            float sum = 0.f;
#pragma unroll
            for (int j = 0; j < kChunks; ++j) {
                const int32_t c = first_chunk + 8 * j;
                if (at < rows && c < 2 * kSteps) sum += product_of(chunk[i][j], block.place(3, at, c));
            }
            sum = sum_of_row(sum);
            sum += from_lane_xor(sum, 4);
            if (at < rows && first_chunk == 0) delta[at] = sum;
        }
    }

  private:
    static VIVIT_DEVICE float product_of(const uint4& x, const char* d_output) {
        const uint4 y = *reinterpret_cast<const uint4*>(d_output);
        const uint32_t ours[4] = {x.x, x.y, x.z, x.w}, theirs[4] = {y.x, y.y, y.z, y.w};
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const float2 a = unpacked<T>(ours[w]), b = unpacked<T>(theirs[w]);
            sum += a.x * b.x + a.y * b.y;
        }
        return sum;
    }
};

// lse of each row and delta = sum(do * o), where do is on its way.
template <class T, int kSteps>
VIVIT_DEVICE void load_statistics(const AttentionParams& p, const Axis& axis, const SlicedBlock<kSteps, true>& block,
                                  const Arriving<kSteps, true>& arriving) {
    const Sequence at(block.number, axis);
    const int32_t rows = block.layout.rows;
    float *lse = block.floats(), *delta = lse + rows;
    Outputs<T, kSteps> outputs;
    outputs.load(Rows(p.o, at, axis), 0, axis.N, p.D);
    for (int32_t row = block.thread(); row < rows; row += kHopperThreads) {
        lse[row] = row < axis.N ? load_one(p.lse + query_number(p, at, axis, row)) : kInfinity;
    }
    arriving.wait();
    outputs.store_delta(block, 0, delta);
    constexpr int32_t kPart = outputs.kRows * outputs.kStep;
    for (int32_t first = kPart; first < rows; first += kPart) {
        outputs.load(Rows(p.o, at, axis), first, axis.N, p.D);
        outputs.store_delta(block, first, delta);
    }
}

template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void hopper_backward(const AttentionParams& p, const RowMaps<kSteps>& maps, const Axis& axis,
                                  int64_t number) {
    const SlicedBlock<kSteps, true> block(axis, number);
    load_statistics<T>(p, axis, block, Arriving<kSteps, true>(block, maps, axis));
    block_barrier();
    if (!kPlain && p.cos != nullptr) block.template turn<T>(p, axis);
    const int32_t group = same_in_warp(block.thread() / 128), groups = kHopperThreads / 128;
    const Cut<kSteps> cut(block.layout.rows);
    const Rules<kPlain> rules(p, axis);
    if constexpr (Cut<kSteps>::kRests) {
        // before the tiles: what it needs would else lie in local memory while they are done
        hopper_gradients_of_rest<T>(block.of_warps(axis, p.B), cut, groups - 1 - group, rules);
    }
#pragma unroll 1
    for (int32_t i = group; i < 2 * cut.tiles; i += groups) {  // the longer ones first
        if (i < cut.tiles) {
            hopper_gradients_of_keys<T>(block, i * kGroupRows, rules);
        } else {
            hopper_gradient_of_queries<T>(block, (i - cut.tiles) * kGroupRows, rules);
        }
    }
}

}  // namespace vivit::cuda
