// The resident regime's forward with Hopper's products (hopper_rows.cuh).
#pragma once

#include "hopper_rows.cuh"
#include "resident_forward.cuh"

namespace vivit::cuda {

// The next kColumns keys of 64 queries, of which the warp has those from first_row on. bias: of the first of all keys.
template <class T, int kColumns, bool kPlain, bool kWhole, int kSteps>
VIVIT_DEVICE void hopper_attend_step(Attended<kSteps>& sums, const SlicedRows<kSteps>& q,
                                     const SlicedRows<kSteps>& keys, const SlicedRows<kSteps>& values,
                                     const float* bias, const Rules<kPlain>& rules, int64_t sequence, int32_t first_row,
                                     int32_t first_key) {
    float x[kColumns / 8][4];
    group_begin();
    group_across<T, kColumns>(x, q, keys.from(first_key));
    group_commit();
    group_wait<0>();
    group_settle(x);
    weigh_keys<kSteps, kColumns / 8, kPlain, kWhole>(x, sums, bias + first_key, rules, sequence, first_row, first_key);
    uint32_t weights[kColumns / 16][4];
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) as_operand<T>(weights[j], x[2 * j], x[2 * j + 1]);
    group_settle(weights), group_settle(sums.o.of);
    group_begin();
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) group_along_rows<T>(sums.o, weights[j], values, first_key + 16 * j);
    group_commit();
    group_wait<0>();
    group_settle(weights), group_settle(sums.o.of);
}

// o and lse of 64 queries from first_row on, of one sequence.
template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void hopper_attend(const SlicedBlock<kSteps, false>& block, int32_t first_row,
                                const Rules<kPlain>& rules) {
    const SlicedRows<kSteps> q = block.rows(0).from(first_row), keys = block.rows(1), values = block.rows(2);
    const float* bias = block.floats();
    const int32_t mine = first_row + rows_of_warp(), in_steps = kPlain ? rules.axis.N : block.layout.rows;
    Attended<kSteps> sums;
    int32_t key = 0;
#pragma unroll 1
    for (; key + 64 <= in_steps; key += 64) {
        hopper_attend_step<T, 64, kPlain, kPlain>(sums, q, keys, values, bias, rules, block.number, mine, key);
    }
#pragma unroll 1
    for (; key < in_steps; key += 16) {
        hopper_attend_step<T, 16, kPlain, false>(sums, q, keys, values, bias, rules, block.number, mine, key);
    }
    store_attended<T>(rules.p, rules.axis, Sequence(block.number, rules.axis), mine, sums);
}

template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void hopper_forward(const AttentionParams& p, const RowMaps<kSteps>& maps, const Axis& axis,
                                 int64_t number) {
    const SlicedBlock<kSteps, false> block(axis, number);
    const Arriving<kSteps, false> arriving(block, maps, axis);
    if (!kPlain) {
        write_bias(p, axis, number, 1, block.layout.rows, block.floats(), kHopperThreads);
        block_barrier();
    }
    arriving.wait();
    if (!kPlain && p.cos != nullptr) block.template turn<T>(p, axis);
    const Rules<kPlain> rules(p, axis);
    const int32_t group = same_in_warp(block.thread() / 128), groups = kHopperThreads / 128;
    const Cut<kSteps> cut(block.layout.rows);
    int32_t tile = group;
#pragma unroll 1
    for (; tile < cut.tiles; tile += groups) hopper_attend<T>(block, tile * kGroupRows, rules);
    if constexpr (Cut<kSteps>::kRests) {
        const int32_t mine = same_in_warp(rows_of_warp());
        if (tile == cut.tiles && mine < 16 * cut.rest) {
            attend<T, kSteps>(block.of_warps(axis, p.B), 0, cut.rest_from + mine, rules);
        }
    }
}

}  // namespace vivit::cuda
