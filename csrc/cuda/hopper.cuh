// The resident regime with Hopper's products: heads of 64 channels, plain scores, sequences of more than 64 tokens. A
// block of two warpgroups takes one sequence, a warpgroup 64 rows at a time; the other rows go by in steps of 64 or 32,
// at the end of 16. As in resident.cuh the backward goes over each sequence twice, by keys and by queries.
//
// Rows of the last 64 that are beyond a tensor's lie in what follows it in shared memory: what comes of them belongs to
// rows that are not stored.
#pragma once

#include "resident_forward.cuh"
#include "resident_short.cuh"

namespace vivit::cuda {

constexpr int kGroupRows = 64, kHopperThreads = 256;

// What 64 rows may reach beyond the last tensor.
VIVIT_BOTH int32_t hopper_bytes(int32_t N, bool backward) {
    const int32_t bytes = backward ? Layout<4, true>(N).before_scratch() : Layout<4, false>(N).before_scratch();
    return bytes + (kGroupRows - 16) * Pitch<4>::kBytes;
}

// The first of a warp's rows among those of its warpgroup.
VIVIT_DEVICE int32_t rows_of_warp() { return static_cast<int32_t>(threadIdx.x) / 32 % 4 * 16; }

// A thread's part of copies to and from shared memory: chunk thread % 8 of rows thread / 8, + 32, ...
struct Chunks {
    static constexpr int32_t kRows = kHopperThreads / 8;
    int32_t row, chunk;

    VIVIT_DEVICE Chunks() : row(static_cast<int32_t>(threadIdx.x) / 8), chunk(static_cast<int32_t>(threadIdx.x) % 8) {}

    // `padded` rows of a tensor, as copy_rows; the swizzle is the same in all rows of a thread.
    VIVIT_DEVICE void copy(char* to, const Rows& from, int32_t N, int32_t padded) const {
        const char* source = from.row(row) + 16 * chunk;
        char* target = to + Pitch<4>::place(row, chunk);
#pragma unroll 2
        for (int32_t i = row; i < padded; i += kRows) {
            copy_16(target, i < N ? source : from.first, i < N);
            source += kRows * from.step, target += kRows * Pitch<4>::kBytes;
        }
    }
};

// A step of 16 channels further in a descriptor.
constexpr uint64_t kNextChannels = 32 >> 4;
// 16 rows further.
constexpr uint64_t kNextRows = 16 * Pitch<4>::kBytes >> 4;

// x [64, columns] = a b^T.
template <class T, int kColumns>
VIVIT_DEVICE void group_across(float (&x)[kColumns / 8][4], uint64_t a, uint64_t b) {
#pragma unroll
    for (int s = 0; s < 4; ++s) group_across_step<T, kColumns>(x, a + s * kNextChannels, b + s * kNextChannels, s > 0);
}

// ---- forward ----

// The next kColumns keys of 64 queries. kWhole: none of them is padding; else first_key and N say which are.
template <class T, int kColumns, bool kWhole>
VIVIT_DEVICE void hopper_attend_step(Attended<4>& sums, uint64_t q, uint64_t keys, uint64_t values, float unit,
                                     int32_t first_key, int32_t N) {
    float x[kColumns / 8][4];
    group_begin();
    group_across<T, kColumns>(x, q, keys);
    group_commit();
    group_wait<0>();
    group_settle(x);
    float highest[2] = {-kInfinity, -kInfinity};
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
        float& y = x[i / 4][i % 4];
        if (!kWhole && first_key + 8 * (i / 4) + 2 * (lane_number() % 4) + i % 2 >= N) y = -kInfinity;
        highest[i % 4 / 2] = fmaxf(highest[i % 4 / 2], y);
    }
    float base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        base[r] = fmaxf(sums.most[r], largest_of_row(highest[r]) * unit);
        const float shrink = exp2_fast(sums.most[r] - base[r]);
        sums.most[r] = base[r], sums.total[r] *= shrink;
#pragma unroll
        for (int i = 0; i < 16; ++i) sums.o.of[i / 2][2 * r + i % 2] *= shrink;
    }
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
        float& y = x[i / 4][i % 4];
        y = exp2_fast(y * unit - base[i % 4 / 2]);
        sums.total[i % 4 / 2] += y;
    }
    uint32_t weights[kColumns / 16][4];
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) as_operand<T>(weights[j], x[2 * j], x[2 * j + 1]);
    group_settle(weights), group_settle(sums.o.of);
    group_begin();
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) group_along<T>(sums.o.of, weights[j], values + j * kNextRows);
    group_commit();
    group_wait<0>();
    group_settle(weights), group_settle(sums.o.of);
}

// o and lse of 64 queries from first_row on, of one sequence.
template <class T>
VIVIT_DEVICE void hopper_attend(const Block<4, false>& block, int32_t first_row, const AttentionParams& p,
                                const Axis& axis) {
    const float unit = p.scale * kLog2E;
    const uint64_t q = descriptor(block.rows(0, 0) + first_row * Pitch<4>::kBytes);
    const uint64_t keys = descriptor(block.rows(1, 0)), values = descriptor(block.rows(2, 0));
    Attended<4> sums;
    int32_t key = 0;
#pragma unroll 1
    for (; key + 64 <= axis.N; key += 64) {
        const uint64_t skipped = key / 16 * kNextRows;
        hopper_attend_step<T, 64, true>(sums, q, keys + skipped, values + skipped, unit, key, axis.N);
    }
#pragma unroll 1
    for (; key < axis.N; key += 16) {
        const uint64_t skipped = key / 16 * kNextRows;
        hopper_attend_step<T, 16, false>(sums, q, keys + skipped, values + skipped, unit, key, axis.N);
    }
    store_attended<T>(p, axis, Sequence(block.first, axis), first_row + rows_of_warp(), sums);
}

template <class T>
VIVIT_DEVICE void hopper_forward(const AttentionParams& p, const Axis& axis, int64_t number) {
    const Block<4, false> block(axis, p.B, number);
    const Sequence at(block.first, axis);
    const Chunks chunks;
    chunks.copy(block.rows(0, 0), Rows(p.q, at, axis), axis.N, block.layout.rows);
    chunks.copy(block.rows(1, 0), Rows(p.k, at, axis), axis.N, block.layout.rows);
    chunks.copy(block.rows(2, 0), Rows(p.v, at, axis), axis.N, block.layout.rows);
    copies_commit();
    copies_wait<0>();
    group_fence();
    block_barrier();
    const int32_t group = same_in_warp(block.thread() / 128), groups = kHopperThreads / 128;
#pragma unroll 1
    for (int32_t first = group * kGroupRows; first < axis.N; first += groups * kGroupRows) {
        hopper_attend<T>(block, first, p, axis);
    }
}

// ---- backward ----

// x = a rows^T and y = b others^T, done.
template <class T, int kColumns>
VIVIT_DEVICE void group_across_both(float (&x)[kColumns / 8][4], uint64_t a, uint64_t rows, float (&y)[kColumns / 8][4],
                                    uint64_t b, uint64_t others) {
    group_begin();
    group_across<T, kColumns>(x, a, rows);
    group_across<T, kColumns>(y, b, others);
    group_commit();
    group_wait<0>();
    group_settle(x), group_settle(y);
}

// The next kColumns queries, in dk and dv of 64 keys. floats: lse of the first of them, delta after `rows` more.
template <class T, int kColumns>
VIVIT_DEVICE void hopper_keys_step(RowSums<4>& dk, RowSums<4>& dv, uint64_t k, uint64_t v, uint64_t queries,
                                   uint64_t d_outputs, const float* floats, int32_t rows, float unit) {
    float x[kColumns / 8][4], dp[kColumns / 8][4];
    group_across_both<T, kColumns>(x, k, queries, dp, v, d_outputs);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
        float &y = x[i / 4][i % 4], &dy = dp[i / 4][i % 4];
        const int32_t place = 8 * (i / 4) + 2 * (lane_number() % 4) + i % 2;
        y = exp2_fast(y * unit - floats[place]);
        dy = y * (dy - floats[rows + place]);
    }
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
        group_along<T>(dv.of, weights[j], d_outputs + j * kNextRows);
        group_along<T>(dk.of, ds[j], queries + j * kNextRows);
    }
    group_commit();
    group_wait<0>();
    group_settle(weights), group_settle(ds), group_settle(dv.of), group_settle(dk.of);
}

// The next kColumns keys, in dq of 64 queries.
template <class T, int kColumns, bool kWhole>
VIVIT_DEVICE void hopper_queries_step(RowSums<4>& dq, uint64_t q, uint64_t d_o, uint64_t keys, uint64_t values,
                                      const float (&lse)[2], const float (&delta)[2], float unit, int32_t first_key,
                                      int32_t N) {
    float x[kColumns / 8][4], dp[kColumns / 8][4];
    group_across_both<T, kColumns>(x, q, keys, dp, d_o, values);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
        float &y = x[i / 4][i % 4], &dy = dp[i / 4][i % 4];
        y = exp2_fast(y * unit - lse[i % 4 / 2]);
        if (!kWhole && first_key + 8 * (i / 4) + 2 * (lane_number() % 4) + i % 2 >= N) y = 0.f;
        dy = y * (dy - delta[i % 4 / 2]);
    }
    uint32_t ds[kColumns / 16][4];
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) as_operand<T>(ds[j], dp[2 * j], dp[2 * j + 1]);
    group_settle(ds), group_settle(dq.of);
    group_begin();
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) group_along<T>(dq.of, ds[j], keys + j * kNextRows);
    group_commit();
    group_wait<0>();
    group_settle(ds), group_settle(dq.of);
}

// dk and dv of 64 keys.
template <class T>
VIVIT_DEVICE void hopper_gradients_of_keys(const Block<4, true>& block, int32_t first_key, const AttentionParams& p,
                                           const Axis& axis) {
    const float unit = p.scale * kLog2E;
    const int32_t skip = first_key * Pitch<4>::kBytes, rows = block.layout.rows;
    const uint64_t k = descriptor(block.rows(1, 0) + skip), v = descriptor(block.rows(2, 0) + skip);
    const uint64_t queries = descriptor(block.rows(0, 0)), d_outputs = descriptor(block.rows(3, 0));
    const float* floats = block.floats(0);
    RowSums<4> dk, dv;
    int32_t row = 0;
#pragma unroll 1
    for (; row + 32 <= rows; row += 32) {
        const uint64_t skipped = row / 16 * kNextRows;
        hopper_keys_step<T, 32>(dk, dv, k, v, queries + skipped, d_outputs + skipped, floats + row, rows, unit);
    }
    if (row < rows) {
        const uint64_t skipped = row / 16 * kNextRows;
        hopper_keys_step<T, 16>(dk, dv, k, v, queries + skipped, d_outputs + skipped, floats + row, rows, unit);
    }
    const Sequence at(block.first, axis);
    store_rows<T>(p, Rows(p.dv, at, axis), first_key + rows_of_warp(), axis.N, dv, 1.f, 1.f);
    store_rows<T>(p, Rows(p.dk, at, axis), first_key + rows_of_warp(), axis.N, dk, p.scale, p.scale);
}

// dq of 64 queries.
template <class T>
VIVIT_DEVICE void hopper_gradient_of_queries(const Block<4, true>& block, int32_t first_row, const AttentionParams& p,
                                             const Axis& axis) {
    const float unit = p.scale * kLog2E;
    const int32_t skip = first_row * Pitch<4>::kBytes, rows = block.layout.rows;
    const uint64_t q = descriptor(block.rows(0, 0) + skip), d_o = descriptor(block.rows(3, 0) + skip);
    const uint64_t keys = descriptor(block.rows(1, 0)), values = descriptor(block.rows(2, 0));
    const int32_t row = first_row + rows_of_warp() + lane_number() / 4;
    const float* floats = block.floats(0);
    float lse[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const bool there = row + 8 * r < rows;
        lse[r] = there ? floats[row + 8 * r] : 0.f, delta[r] = there ? floats[rows + row + 8 * r] : 0.f;
    }
    RowSums<4> dq;
    int32_t key = 0;
#pragma unroll 1
    for (; key + 32 <= axis.N; key += 32) {
        const uint64_t skipped = key / 16 * kNextRows;
        hopper_queries_step<T, 32, true>(dq, q, d_o, keys + skipped, values + skipped, lse, delta, unit, key, axis.N);
    }
#pragma unroll 1
    for (; key < axis.N; key += 16) {
        const uint64_t skipped = key / 16 * kNextRows;
        hopper_queries_step<T, 16, false>(dq, q, d_o, keys + skipped, values + skipped, lse, delta, unit, key, axis.N);
    }
    store_rows<T>(p, Rows(p.dq, Sequence(block.first, axis), axis), first_row + rows_of_warp(), axis.N, dq, p.scale,
                  p.scale);
}

// o of up to 32 kMost rows on its way to delta: the loads are under way while the other tensors are copied.
template <class T>
struct Outputs {
    static constexpr int kMost = 8;
    uint4 chunk[kMost];

    VIVIT_DEVICE void load(const Rows& o, const Chunks& mine, int32_t first, int32_t N) {
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            const int32_t row = first + mine.row + i * mine.kRows;
            chunk[i] = load_16(o.row(row) + 16 * mine.chunk, row < N);
        }
    }
    // delta = sum(do * o) of each row, of its eight lanes in each.
    VIVIT_DEVICE void store_delta(const char* d_outputs, const Chunks& mine, int32_t first, int32_t rows,
                                  float* delta) const {
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            const int32_t row = first + mine.row + i * mine.kRows;
            if (row - mine.row >= rows) break;  // of all lanes of a warp alike: rows are a multiple of 16
            float sum = 0.f;
            if (row < rows) {
                const uint4 y = *reinterpret_cast<const uint4*>(d_outputs + Pitch<4>::place(row, mine.chunk));
                const uint32_t ours[4] = {chunk[i].x, chunk[i].y, chunk[i].z, chunk[i].w},
                               theirs[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
                for (int w = 0; w < 4; ++w) {
                    const float2 a = unpacked<T>(ours[w]), b = unpacked<T>(theirs[w]);
                    sum += a.x * b.x + a.y * b.y;
                }
            }
            sum = sum_of_row(sum);
            sum += from_lane_xor(sum, 4);
            if (row < rows && mine.chunk == 0) delta[row] = sum;
        }
    }
};

template <class T>
VIVIT_DEVICE void hopper_backward(const AttentionParams& p, const Axis& axis, int64_t number) {
    const Block<4, true> block(axis, p.B, number);
    const Sequence at(block.first, axis);
    const Chunks chunks;
    const int32_t rows = block.layout.rows;
    chunks.copy(block.rows(3, 0), Rows(p.d_o, at, axis), axis.N, rows);
    chunks.copy(block.rows(0, 0), Rows(p.q, at, axis), axis.N, rows);
    chunks.copy(block.rows(1, 0), Rows(p.k, at, axis), axis.N, rows);
    chunks.copy(block.rows(2, 0), Rows(p.v, at, axis), axis.N, rows);
    copies_commit();
    float *lse = block.floats(0), *delta = lse + rows;
    Outputs<T> outputs;
    outputs.load(Rows(p.o, at, axis), chunks, 0, axis.N);
    for (int32_t row = block.thread(); row < rows; row += kHopperThreads) {
        lse[row] = row < axis.N ? load_one(p.lse + query_number(p, at, axis, row)) : kInfinity;
    }
    copies_wait<0>();  // of do a thread reads now what it copied itself
    group_fence();
    outputs.store_delta(block.rows(3, 0), chunks, 0, rows, delta);
    constexpr int32_t kPart = Outputs<T>::kMost * Chunks::kRows;
    for (int32_t first = kPart; first < rows; first += kPart) {
        outputs.load(Rows(p.o, at, axis), chunks, first, axis.N);
        outputs.store_delta(block.rows(3, 0), chunks, first, rows, delta);
    }
    block_barrier();
    const int32_t group = same_in_warp(block.thread() / 128), groups = kHopperThreads / 128;
    const int32_t tiles = (axis.N + kGroupRows - 1) / kGroupRows;
#pragma unroll 1
    for (int32_t i = group; i < 2 * tiles; i += groups) {  // the longer ones first
        if (i < tiles) {
            hopper_gradients_of_keys<T>(block, i * kGroupRows, p, axis);
        } else {
            hopper_gradient_of_queries<T>(block, (i - tiles) * kGroupRows, p, axis);
        }
    }
}

}  // namespace vivit::cuda
