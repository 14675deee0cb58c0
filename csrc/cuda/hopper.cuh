// The resident regime with Hopper's products: heads of 40 to 64 channels, which zeros fill up to 64, sequences of more
// than 64 tokens. A block of two
// warpgroups takes one sequence, a warpgroup 64 rows at a time; the other rows go by in steps of 64 or 32, at the end
// of 16. As in resident.cuh the backward goes over each sequence twice, by keys and by queries. Up to 32 rows at a
// sequence's end are left to one or two warps of a group, and to their own products of 16 rows: of 196 tokens the last
// four would else keep four warps as busy as sixty-four do. The copy engine brings a sequence's rows, asked by one
// thread, swizzled as all products want them.
//
// Rows of the last 64 that are beyond a tensor's lie in what follows it in shared memory: what comes of them belongs to
// rows that are not stored.
#pragma once

#include "resident_backward.cuh"
#include "resident_forward.cuh"
#include "resident_short.cuh"
#include "verbs_hopper.cuh"

namespace vivit::cuda {

constexpr int kGroupRows = 64, kHopperThreads = 256;

// q, k, v and of a backward do as the copy engine knows them, a box of rows at a time.
struct RowMaps {
    TensorMap of[4];
};

// A call as the kernels get it. Of an axis whose sequences are packed there are no maps.
struct HopperCall {
    AttentionParams p;
    RowMaps over_space, over_time;
};

// What the rows of a last tile may reach beyond the last tensor, of 64 rows 16 at most (see Cut), and a barrier.
constexpr int32_t kBeyondRows = 16 * Pitch<4>::kBytes, kBeyond = kBeyondRows + 16;

VIVIT_BOTH int32_t hopper_bytes(int32_t N, bool backward, bool rotary) {
    return kBeyond + (backward ? Layout<4, true>(N).bytes(rotary) : Layout<4, false>(N).bytes(rotary));
}

// The first of a warp's rows among those of its warpgroup.
VIVIT_DEVICE int32_t rows_of_warp() { return static_cast<int32_t>(threadIdx.x) / 32 % 4 * 16; }

// How a sequence, padded to sixteens, is cut: tiles of 64 rows for a warpgroup, and from `rest_from` on up to two
// sixteens for single warps.
struct Cut {
    int32_t tiles, rest, rest_from;

    VIVIT_DEVICE explicit Cut(int32_t rows) : tiles(rows / kGroupRows), rest(rows % kGroupRows / 16) {
        if (rest > 2) ++tiles, rest = 0;
        rest_from = tiles * kGroupRows;
    }
};

// Rows of a box: as many as a copy may bring, in equal boxes of a sequence that is padded to `rows`.
VIVIT_BOTH int32_t box_rows(int32_t rows) {
    int32_t boxes = (rows + 255) / 256;
    while (rows % (16 * boxes) != 0) ++boxes;
    return rows / boxes;
}

// The rows of a block's sequence on their way: of all of its tensors, zeros where the sequence has no more. They are
// there after phase_wait(barrier, 0).
template <bool kBackward>
struct Arriving {
    PhaseBarrier* barrier;

    VIVIT_DEVICE Arriving(const Block<4, kBackward>& block, const RowMaps& maps, const Axis& axis)
        : barrier(reinterpret_cast<PhaseBarrier*>(block.memory + block.layout.before_scratch() + kBeyondRows)) {
        if (block.thread() == 0) {
            constexpr int32_t kTensors = Layout<4, kBackward>::kTensors;
            const int32_t rows = block.layout.rows, box = box_rows(rows);
            const Sequence at(block.first, axis);
            phase_init(barrier, 1);
            phase_fence();
            phase_expect(barrier, kTensors * block.layout.tensor_bytes());
            for (int32_t tensor = 0; tensor < kTensors; ++tensor) {
                for (int32_t row = 0; row < rows; row += box) {
                    char* to = block.rows(tensor, 0) + row * Pitch<4>::kBytes;
                    copy_box(to, maps.of[tensor], barrier, 0, at.h, axis.over_time ? at.g : row,
                             axis.over_time ? row : at.g, at.b);
                }
            }
        }
        block_barrier();
    }
    VIVIT_DEVICE void wait() const { phase_wait(barrier, 0); }
};

// A thread's part of o: chunk thread % 8 of rows thread / 8, + 32, ...
struct Chunks {
    static constexpr int32_t kRows = kHopperThreads / 8;
    int32_t row, chunk;

    VIVIT_DEVICE Chunks() : row(static_cast<int32_t>(threadIdx.x) / 8), chunk(static_cast<int32_t>(threadIdx.x) % 8) {}
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

// The next kColumns keys of 64 queries, of which the warp has those from first_row on.
template <class T, int kColumns, bool kPlain, bool kWhole>
VIVIT_DEVICE void hopper_attend_step(Attended<4>& sums, uint64_t q, uint64_t keys, uint64_t values, const float* bias,
                                     const Rules<kPlain>& rules, int64_t sequence, int32_t first_row,
                                     int32_t first_key) {
    float x[kColumns / 8][4];
    group_begin();
    group_across<T, kColumns>(x, q, keys);
    group_commit();
    group_wait<0>();
    group_settle(x);
    weigh_keys<4, kColumns / 8, kPlain, kWhole>(x, sums, bias, rules, sequence, first_row, first_key);
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
template <class T, bool kPlain>
VIVIT_DEVICE void hopper_attend(const Block<4, false>& block, int32_t first_row, const Rules<kPlain>& rules) {
    const uint64_t q = descriptor(block.rows(0, 0) + first_row * Pitch<4>::kBytes);
    const uint64_t keys = descriptor(block.rows(1, 0)), values = descriptor(block.rows(2, 0));
    const float* bias = block.floats(0);
    const int32_t mine = first_row + rows_of_warp(), in_steps = kPlain ? rules.axis.N : block.layout.rows;
    Attended<4> sums;
    int32_t key = 0;
#pragma unroll 1
    for (; key + 64 <= in_steps; key += 64) {
        const uint64_t skipped = key / 16 * kNextRows;
        hopper_attend_step<T, 64, kPlain, kPlain>(sums, q, keys + skipped, values + skipped, bias + key, rules,
                                                  block.first, mine, key);
    }
#pragma unroll 1
    for (; key < in_steps; key += 16) {
        const uint64_t skipped = key / 16 * kNextRows;
        hopper_attend_step<T, 16, kPlain, false>(sums, q, keys + skipped, values + skipped, bias + key, rules,
                                                 block.first, mine, key);
    }
    store_attended<T>(rules.p, rules.axis, Sequence(block.first, rules.axis), mine, sums);
}

template <class T, bool kPlain>
VIVIT_DEVICE void hopper_forward(const AttentionParams& p, const RowMaps& maps, const Axis& axis, int64_t number) {
    const Block<4, false> block(axis, p.B, number, kBeyond);
    const Arriving<false> arriving(block, maps, axis);
    if (!kPlain) write_bias(p, axis, block);
    arriving.wait();
    if (!kPlain) {
        if (p.cos != nullptr) block.template turn<T>(p, axis);
        group_fence();
        block_barrier();
    }
    const Rules<kPlain> rules(p, axis);
    const int32_t group = same_in_warp(block.thread() / 128), groups = kHopperThreads / 128;
    const Cut cut(block.layout.rows);
    int32_t tile = group;
#pragma unroll 1
    for (; tile < cut.tiles; tile += groups) hopper_attend<T>(block, tile * kGroupRows, rules);
    const int32_t mine = same_in_warp(rows_of_warp());
    if (tile == cut.tiles && mine < 16 * cut.rest) attend<T, 4>(block, 0, cut.rest_from + mine, rules);
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

// The next kColumns queries, in dk and dv of 64 keys, of which the warp has those from first_key on. floats, may: as
// differentiate_keys has them.
template <class T, int kColumns, bool kPlain>
VIVIT_DEVICE void hopper_keys_step(RowSums<4>& dk, RowSums<4>& dv, uint64_t k, uint64_t v, uint64_t queries,
                                   uint64_t d_outputs, const float* floats, int32_t rows, const bool (&may)[2],
                                   const Rules<kPlain>& rules, const Sequence& at, int32_t first_row,
                                   int32_t first_key) {
    float x[kColumns / 8][4], dp[kColumns / 8][4];
    group_across_both<T, kColumns>(x, k, queries, dp, v, d_outputs);
    differentiate_keys<true>(x, dp, floats, rows, may, rules, at, first_row, first_key);
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

// The next kColumns keys, in dq of 64 queries, of which the warp has those from first_row on.
template <class T, int kColumns, bool kPlain, bool kWhole>
VIVIT_DEVICE void hopper_queries_step(RowSums<4>& dq, uint64_t q, uint64_t d_o, uint64_t keys, uint64_t values,
                                      const float (&lse)[2], const float (&delta)[2], const Rules<kPlain>& rules,
                                      const Sequence& at, int32_t first_row, int32_t first_key) {
    float x[kColumns / 8][4], dp[kColumns / 8][4];
    group_across_both<T, kColumns>(x, q, keys, dp, d_o, values);
    differentiate_queries<kWhole>(x, dp, lse, delta, rules, at, first_row, first_key);
    uint32_t ds[kColumns / 16][4];
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) as_operand<T>(ds[j], x[2 * j], x[2 * j + 1]);
    group_settle(ds), group_settle(dq.of);
    group_begin();
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) group_along<T>(dq.of, ds[j], keys + j * kNextRows);
    group_commit();
    group_wait<0>();
    group_settle(ds), group_settle(dq.of);
}

// dk and dv of 64 keys.
template <class T, bool kPlain>
VIVIT_DEVICE void hopper_gradients_of_keys(const Block<4, true>& block, int32_t first_key, const Rules<kPlain>& rules) {
    const AttentionParams& p = rules.p;
    const Axis& axis = rules.axis;
    const int32_t skip = first_key * Pitch<4>::kBytes, rows = block.layout.rows;
    const uint64_t k = descriptor(block.rows(1, 0) + skip), v = descriptor(block.rows(2, 0) + skip);
    const uint64_t queries = descriptor(block.rows(0, 0)), d_outputs = descriptor(block.rows(3, 0));
    const float* floats = block.floats(0) + 2 * (lane_number() % 4);
    const int32_t mine = first_key + rows_of_warp(), g = lane_number() / 4;
    const Sequence at(block.first, axis);
    const bool may[2] = {kPlain || may_be_attended(p, at, axis, mine + g),
                         kPlain || may_be_attended(p, at, axis, mine + g + 8)};
    RowSums<4> dk, dv;
    int32_t row = 0;
#pragma unroll 1
    for (; row + 32 <= rows; row += 32) {
        const uint64_t skipped = row / 16 * kNextRows;
        hopper_keys_step<T, 32>(dk, dv, k, v, queries + skipped, d_outputs + skipped, floats + row, rows, may, rules,
                                at, row, mine);
    }
    if (row < rows) {
        const uint64_t skipped = row / 16 * kNextRows;
        hopper_keys_step<T, 16>(dk, dv, k, v, queries + skipped, d_outputs + skipped, floats + row, rows, may, rules,
                                at, row, mine);
    }
    store_rows<T>(p, Rows(p.dv, at, axis), mine, axis.N, dv, 1.f, 1.f);
    store_gradient<T>(block, rules, p.dk, at, mine, dk);
}

// dq of 64 queries.
template <class T, bool kPlain>
VIVIT_DEVICE void hopper_gradient_of_queries(const Block<4, true>& block, int32_t first_row,
                                             const Rules<kPlain>& rules) {
    const Axis& axis = rules.axis;
    const int32_t skip = first_row * Pitch<4>::kBytes, rows = block.layout.rows;
    const uint64_t q = descriptor(block.rows(0, 0) + skip), d_o = descriptor(block.rows(3, 0) + skip);
    const uint64_t keys = descriptor(block.rows(1, 0)), values = descriptor(block.rows(2, 0));
    const int32_t mine = first_row + rows_of_warp(), row = mine + lane_number() / 4;
    const float* floats = block.floats(0);
    float lse[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const bool there = row + 8 * r < rows;
        lse[r] = there ? floats[row + 8 * r] : 0.f, delta[r] = there ? floats[rows + row + 8 * r] : 0.f;
    }
    const Sequence at(block.first, axis);
    RowSums<4> dq;
    int32_t key = 0;
#pragma unroll 1
    for (; key + 32 <= axis.N; key += 32) {
        const uint64_t skipped = key / 16 * kNextRows;
        hopper_queries_step<T, 32, kPlain, true>(dq, q, d_o, keys + skipped, values + skipped, lse, delta, rules, at,
                                                 mine, key);
    }
#pragma unroll 1
    for (; key < axis.N; key += 16) {
        const uint64_t skipped = key / 16 * kNextRows;
        hopper_queries_step<T, 16, kPlain, false>(dq, q, d_o, keys + skipped, values + skipped, lse, delta, rules, at,
                                                  mine, key);
    }
    store_gradient<T>(block, rules, rules.p.dq, at, mine, dq);
}

// o of up to 32 kMost rows on its way to delta: the loads are under way while the other tensors are copied.
template <class T>
struct Outputs {
    static constexpr int kMost = 8;
    uint4 chunk[kMost];

    VIVIT_DEVICE void load(const Rows& o, const Chunks& mine, int32_t first, int32_t N, int32_t D) {
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            const int32_t row = first + mine.row + i * mine.kRows;
            chunk[i] = load_16(o.row(row) + 16 * mine.chunk, row < N && mine.chunk < D / 8);
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

// Of the rest, sixteen number `sixteen`: dk, dv and dq by a warp each, which so has the registers for it.
template <class T, bool kPlain>
VIVIT_DEVICE void hopper_gradients_of_rest(const Block<4, true>& block, const Cut& cut, int32_t sixteen,
                                           const Rules<kPlain>& rules) {
    if (sixteen >= cut.rest) return;
    const int32_t first = cut.rest_from + 16 * sixteen, which = same_in_warp(rows_of_warp()) / 16;
    if (which == 0) gradients_of_keys<T, 4, kPlain, true, false>(block, 0, first, rules);
    if (which == 1) gradients_of_keys<T, 4, kPlain, false, true>(block, 0, first, rules);
    if (which == 2) gradient_of_queries<T, 4, kPlain>(block, 0, first, rules);
}

// lse of each row and delta = sum(do * o), where do is on its way.
template <class T>
VIVIT_DEVICE void load_statistics(const AttentionParams& p, const Axis& axis, const Block<4, true>& block,
                                  const Arriving<true>& arriving) {
    const Sequence at(block.first, axis);
    const Chunks chunks;
    const int32_t rows = block.layout.rows;
    float *lse = block.floats(0), *delta = lse + rows;
    Outputs<T> outputs;
    outputs.load(Rows(p.o, at, axis), chunks, 0, axis.N, p.D);
    for (int32_t row = block.thread(); row < rows; row += kHopperThreads) {
        lse[row] = row < axis.N ? load_one(p.lse + query_number(p, at, axis, row)) : kInfinity;
    }
    arriving.wait();
    outputs.store_delta(block.rows(3, 0), chunks, 0, rows, delta);
    constexpr int32_t kPart = Outputs<T>::kMost * Chunks::kRows;
    for (int32_t first = kPart; first < rows; first += kPart) {
        outputs.load(Rows(p.o, at, axis), chunks, first, axis.N, p.D);
        outputs.store_delta(block.rows(3, 0), chunks, first, rows, delta);
    }
}

template <class T, bool kPlain>
VIVIT_DEVICE void hopper_backward(const AttentionParams& p, const RowMaps& maps, const Axis& axis, int64_t number) {
    const Block<4, true> block(axis, p.B, number, kBeyond);
    load_statistics<T>(p, axis, block, Arriving<true>(block, maps, axis));
    block_barrier();
    if (!kPlain && p.cos != nullptr) {
        block.template turn<T>(p, axis);
        group_fence();
        block_barrier();
    }
    const int32_t group = same_in_warp(block.thread() / 128), groups = kHopperThreads / 128;
    const Cut cut(block.layout.rows);
    const Rules<kPlain> rules(p, axis);
    // before the tiles: what it needs would else lie in local memory while they are done
    hopper_gradients_of_rest<T>(block, cut, groups - 1 - group, rules);
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
