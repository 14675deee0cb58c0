// Joint attention's backward for Hopper: the kernels. Read joint_hopper_backward_schedule.cuh first.
//
// A tile of 64 rows that pass by, as a warpgroup goes through it. Products run on their own from `start` to `wait`, one
// after the other, and beside them what stands in the next line:
//
//   start scores, start gradients of weights
//   wait 1        scores are there, and all products of the tile before: probabilities
//                 (by keys: start dv of them)
//   wait          gradients of weights are there: those of scores
//                 start dq, or dk, of them
//
// Scores have the kept rows first (by keys that is k q^T). So probabilities and gradients of scores are, rounded, just
// what a thread needs of the left operand of the products that sum (joint_hopper_multiply.cuh says why): they never
// leave its registers, and nothing is transposed.
#pragma once

#include "joint_hopper_backward_copy.cuh"

namespace vivit::cuda {

constexpr int kTileBlocks = kPassingRows / 8, kTileSteps = kPassingRows / 16;

using BackwardTile = float[kTileBlocks][4];   // [64 kept rows, 64 that pass], and [64 kept rows, 64 channels]
using RoundedTile = uint32_t[kTileSteps][4];  // the same as a left operand

// x = a rows^T over 64 channels, 16 at a step: 32 bytes further in each row, in a descriptor 2.
template <class T>
VIVIT_DEVICE void start_across(BackwardTile& x, const Operand<4>& a, const char* rows) {
    const uint64_t b = descriptor(rows);
#pragma unroll
    for (int s = 0; s < 4; ++s) group_across_step<T, kPassingRows>(x, a.of[s], b + 2 * s, s > 0);
    group_commit();
}

// sums += a rows, 16 rows at a step.
template <class T>
VIVIT_DEVICE void start_along(RowSums<4>& sums, const RoundedTile& a, const char* rows) {
    const uint64_t b = descriptor(rows);
#pragma unroll
    for (int j = 0; j < kTileSteps; ++j) group_along<T>(sums.of, a[j], b + j * (16 * kHeadBytes >> 4));
    group_commit();
}

template <class T>
VIVIT_DEVICE void round_tile(RoundedTile& a, const BackwardTile& x) {
#pragma unroll
    for (int j = 0; j < kTileSteps; ++j) as_operand<T>(a[j], x[2 * j], x[2 * j + 1]);
}

// What a warpgroup needs wherever it is.
struct BackwardGroup {
    const JointHopperBackward& call;
    const BackwardMemory& memory;
    int32_t rows;  // the warp's first among the kept ones
    float unit;

    VIVIT_DEVICE BackwardGroup(const JointHopperBackward& of, const BackwardMemory& shared)
        : call(of),
          memory(shared),
          rows(static_cast<int32_t>(threadIdx.x) / 32 * 16 - kHalfRows),
          unit(of.p.scale * kLog2E) {}

    // The warp's rows of a kept tensor.
    VIVIT_DEVICE Operand<4> kept(int32_t tensor) const { return Operand<4>(memory.kept(tensor) + rows * kHeadBytes); }
    // All lanes have read what they need of the kept rows: the next piece's may come.
    VIVIT_DEVICE void has_kept() const {
        warp_barrier();
        release(memory.kept_empty);
    }
    VIVIT_DEVICE const char* passing(const BackwardRing& at, int32_t tensor) const {
        return memory.passing(at.stage, tensor);
    }
    VIVIT_DEVICE void wait(const BackwardRing& at) const { phase_wait(memory.full + at.stage, at.parity); }
    VIVIT_DEVICE void done(const BackwardRing& at) const { release(memory.empty + at.stage); }
};

// ---- by queries: dq, delta ----

template <class T>
struct QueriesOfGroup {
    const BackwardGroup& group;
    Operand<4> q, d_o;
    float lse[2], delta[2];  // of rows g and g + 8
    RowSums<4> dq;
    RoundedTile ds = {};

    VIVIT_DEVICE QueriesOfGroup(const BackwardGroup& mine, const JointPlace& at)
        : group(mine), q(mine.kept(0)), d_o(mine.kept(1)) {
        const JointParams& p = group.call.p;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int32_t row = group.rows + 8 * r + lane_number() / 4, query = at.first + row;
            const bool there = query < p.N_q;
            const int64_t number = at.query_number(p, query);
            lse[r] = there ? load_one(p.lse + number) : kInfinity;
            delta[r] = delta_of_row<T, 4>(at.rows(p.o).row(query), there, group.memory.kept(1), row, p.D);
            if (there && lane_number() % 4 == 0) store_one(p.delta + number, delta[r]);
        }
    }

    // kWhole: of the tile's keys all are there, else `keys`. last: the tile before, unless this is the first.
    template <bool kWhole>
    VIVIT_DEVICE void step(const BackwardRing& at, const BackwardRing& last, bool first, int32_t keys) {
        BackwardTile x, dp;
        group.wait(at);
        group_begin();
        start_across<T>(x, q, group.passing(at, 0));
        start_across<T>(dp, d_o, group.passing(at, 1));
        group_wait<1>();
        group_settle(x), group_settle(ds), group_settle(dq.of);
        if (!first) group.done(last);
        uint32_t signs = 0;
#pragma unroll
        for (int i = 0; i < 4 * kTileBlocks; ++i) {
            float& y = product(x, i);
            y = exp2_fast(y * group.unit - lse[i % 4 / 2]);
            signs |= __float_as_uint(y);
        }
        if (!kWhole) {  // of keys that are not there k is 0, and 2^-lse any number
#pragma unroll
            for (int i = 0; i < 4 * kTileBlocks; ++i) product(x, i) = column_of(i) < keys ? product(x, i) : 0.f;
        }
        compute_first(__uint_as_float(signs));
        group_wait<0>();
        group_settle(dp), group_settle(x);
#pragma unroll
        for (int i = 0; i < 4 * kTileBlocks; ++i) product(x, i) *= product(dp, i) - delta[i % 4 / 2];
        round_tile<T>(ds, x);
        group_settle(ds), group_settle(dq.of);
        group_begin();
        start_along<T>(dq, ds, group.passing(at, 0));
    }

    VIVIT_DEVICE void end(const BackwardRing& last, bool any) {
        group_wait<0>();
        group_settle(ds), group_settle(dq.of);
        if (any) group.done(last);
    }
};

template <class T>
VIVIT_DEVICE void compute_gradient_of_queries(const JointHopperBackward& call, const BackwardMemory& memory) {
    const BackwardGroup group(call, memory);
    const int32_t whole = call.N_passing / kPassingRows, left = call.N_passing % kPassingRows;
    BackwardRing ring, last;
    uint32_t parity = 0;  // of the phase in which this piece's queries come
    for (uint32_t number = blockIdx.x; number < call.pieces; number += gridDim.x, parity ^= 1) {
        const JointPlace at(call.p, number, call.N_kept, kKeptRows);
        phase_wait(memory.kept_full, parity);
        QueriesOfGroup<T> queries(group, at);
        group.has_kept();
#pragma unroll 1
        for (int32_t tile = 0; tile < whole; ++tile) {
            queries.template step<true>(ring, last, tile == 0, kPassingRows);
            last = ring;
            ring.advance();
        }
        queries.end(last, whole > 0);
        if (left > 0) {  // on its own: a product that runs from one way into another is waited for at once (nvcc 13.0)
            queries.template step<false>(ring, last, true, left);
            queries.end(ring, true);
            ring.advance();
        }
        store_rows<T>(call.p, at.rows(call.p.dq), at.first + group.rows, call.p.N_q, queries.dq, call.p.scale,
                      call.p.scale);
    }
}

// ---- by keys: dk, dv ----

template <class T>
struct KeysOfGroup {
    const BackwardGroup& group;
    Operand<4> k, v;
    RowSums<4> dk, dv;
    RoundedTile weights = {}, ds = {};

    VIVIT_DEVICE explicit KeysOfGroup(const BackwardGroup& mine) : group(mine), k(mine.kept(0)), v(mine.kept(1)) {}

    VIVIT_DEVICE void step(const BackwardRing& at, const BackwardRing& last, bool first) {
        BackwardTile x, dp;
        group.wait(at);
        group_begin();
        start_across<T>(x, k, group.passing(at, 0));
        start_across<T>(dp, v, group.passing(at, 1));
        group_wait<1>();
        group_settle(x), group_settle(weights), group_settle(ds), group_settle(dk.of), group_settle(dv.of);
        if (!first) group.done(last);
        float delta[kTileBlocks][2];
        const Statistic* two = group.memory.statistics + at.stage * kPassingRows + 2 * (lane_number() % 4);
#pragma unroll
        for (int n = 0; n < kTileBlocks; ++n) {
            float of[4];  // lse and delta of the lane's two columns
            read_four(of, &two[8 * n].lse);
            delta[n][0] = of[1], delta[n][1] = of[3];
#pragma unroll
            for (int i = 0; i < 4; ++i) x[n][i] = exp2_fast(x[n][i] * group.unit - of[i % 2 * 2]);
        }
        warp_barrier();  // all lanes have read statistics before one says in the next step that the stage may go
        round_tile<T>(weights, x);
        group_settle(weights), group_settle(dv.of);
        group_begin();
        start_along<T>(dv, weights, group.passing(at, 1));
        group_wait<1>();
        group_settle(dp), group_settle(x);
#pragma unroll
        for (int i = 0; i < 4 * kTileBlocks; ++i) product(x, i) *= product(dp, i) - delta[i / 4][i % 2];
        round_tile<T>(ds, x);
        group_settle(ds), group_settle(dk.of);
        group_begin();
        start_along<T>(dk, ds, group.passing(at, 0));
    }

    VIVIT_DEVICE void end(const BackwardRing& last) {
        group_wait<0>();
        group_settle(weights), group_settle(ds), group_settle(dk.of), group_settle(dv.of);
        group.done(last);
    }
};

template <class T>
VIVIT_DEVICE void compute_gradients_of_keys(const JointHopperBackward& call, const BackwardMemory& memory) {
    const BackwardGroup group(call, memory);
    const int32_t tiles = passing_tiles(call);
    BackwardRing ring, last;
    uint32_t parity = 0;
    for (uint32_t number = blockIdx.x; number < call.pieces; number += gridDim.x, parity ^= 1) {
        const JointPlace at(call.p, number, call.N_kept, kKeptRows);
        phase_wait(memory.kept_full, parity);
        KeysOfGroup<T> keys(group);
        group.has_kept();
#pragma unroll 1
        for (int32_t tile = 0; tile < tiles; ++tile) {
            keys.step(ring, last, tile == 0);
            last = ring;
            ring.advance();
        }
        keys.end(last);
        const int32_t first_key = at.first + group.rows;
        store_rows<T>(call.p, at.rows(call.p.dv), first_key, call.p.N_k, keys.dv, 1.f, 1.f);
        store_rows<T>(call.p, at.rows(call.p.dk), first_key, call.p.N_k, keys.dk, call.p.scale, call.p.scale);
    }
}

// ---- the launches ----

// A launch gives each thread 168 registers; what the first warpgroup gives back is for the two that compute.
constexpr int kFewRegisters = 40, kManyRegisters = 232;

template <class T>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    pipelined_joint_gradient_of_queries(const __grid_constant__ JointHopperBackward call) {
#if defined(VIVIT_HOPPER) || defined(VIVIT_SIM)
    const BackwardMemory memory;
    if (threadIdx.x == 0) memory.make_barriers(1);
    block_barrier();
    if (same_in_warp(static_cast<int32_t>(threadIdx.x) / 128) == 0) {
        registers_shrink<kFewRegisters>();
        if (threadIdx.x == 0) backward_copy(call, memory);
    } else {
        registers_grow<kManyRegisters>();
        compute_gradient_of_queries<T>(call, memory);
    }
#endif
}

template <class T>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    pipelined_joint_gradients_of_keys(const __grid_constant__ JointHopperBackward call) {
#if defined(VIVIT_HOPPER) || defined(VIVIT_SIM)
    const BackwardMemory memory;
    if (threadIdx.x == 0) memory.make_barriers(2);
    block_barrier();
    const int32_t warp = same_in_warp(static_cast<int32_t>(threadIdx.x) / 32);
    if (warp < 4) {
        registers_shrink<kFewRegisters>();
        if (threadIdx.x == 0) backward_copy(call, memory);
        if (warp == 1) backward_statistics(call, memory);
    } else {
        registers_grow<kManyRegisters>();
        compute_gradients_of_keys<T>(call, memory);
    }
#endif
}

}  // namespace vivit::cuda
