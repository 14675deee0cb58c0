// Joint attention's backward for Hopper: the kernels. Read them in the order in which the files include each other:
// joint_hopper_backward_schedule.cuh, copy, multiply, scores.
//
// A tile of rows that pass by, as a warpgroup goes through it. Products run on their own from `start` to `wait`, one
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

#include "joint_hopper_backward_scores.cuh"

namespace vivit::cuda {

// ---- by queries: dq, delta ----

template <class T, class Variant>
struct QueriesOfGroup {
    using Ring = typename BackwardGroup<Variant>::Ring;
    static constexpr int kSteps = Variant::kSteps, kPassing = Variant::kPassing, kNumbers = kPassing / 2;

    const BackwardGroup<Variant>& group;
    const JointPlace& at;
    KeptRows<Variant, 0> q;
    KeptRows<Variant, 1> d_o;
    float lse[2], delta[2];  // of rows g and g + 8
    RowSums<kSteps> dq;
    RoundedTile<Variant> ds = {};

    VIVIT_DEVICE QueriesOfGroup(const BackwardGroup<Variant>& mine, const JointPlace& place)
        : group(mine), at(place), q(mine.memory.kept(0), mine.rows), d_o(mine.memory.kept(1), mine.rows) {
        const JointParams& p = group.call.p;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int32_t row = group.rows + 8 * r + lane_number() / 4, query = at.first + row;
            const bool there = query < p.N_q;
            const int64_t number = at.query_number(p, query);
            lse[r] = there ? load_one(p.lse + number) : kInfinity;
            delta[r] = delta_of_kept_row<T, kSteps>(at.rows(p.o).row(query), there, group.memory.kept(1), row, p.D);
            if (there && lane_number() % 4 == 0) store_one(p.delta + number, delta[r]);
        }
    }

    VIVIT_DEVICE void start(BackwardTile<Variant>& x, BackwardTile<Variant>& dp, const Ring& stage) const {
        group.wait(stage);
        group_begin();
        start_across<T>(x, q, group.passing(stage, 0));
        group_commit();
        start_across<T>(dp, d_o, group.passing(stage, 1));
        group_commit();
    }
    // Scores are there, and dq of the tile before.
    VIVIT_DEVICE void wait_for_scores(BackwardTile<Variant>& x, const Ring& last, bool first) {
        group_wait<1>();
        group_settle(x), group_settle(ds), group_settle(dq.of);
        if (!first) group.done(last);
    }
    // Probabilities x (times slopes) and gradients dp of the weights become dq.
    VIVIT_DEVICE void add(BackwardTile<Variant>& x, const BackwardTile<Variant>& dp, const Ring& stage) {
#pragma unroll
        for (int i = 0; i < kNumbers; ++i) product(x, i) *= dp[i / 4][i % 4] - delta[i % 4 / 2];
        round_weights<T>(ds, x);
        group_settle(ds), group_settle(dq.of);
        group_begin();
        start_along<T>(dq.of, ds, group.passing(stage, 0));
        group_commit();
    }

    // A plain call. kWhole: of the tile's keys all are there, else `keys`. last: the tile before, unless this is the
    // first.
    template <bool kWhole>
    VIVIT_DEVICE void step(const Ring& stage, const Ring& last, bool first, int32_t keys) {
        BackwardTile<Variant> x, dp;
        start(x, dp, stage);
        wait_for_scores(x, last, first);
        uint32_t signs = 0;
#pragma unroll
        for (int i = 0; i < kNumbers; ++i) {
            float& y = product(x, i);
            y = exp2_fast(y * group.unit - lse[i % 4 / 2]);
            signs |= __float_as_uint(y);
        }
        if (!kWhole) {  // of keys that are not there k is 0, and 2^-lse any number
#pragma unroll
            for (int i = 0; i < kNumbers; ++i) product(x, i) = column_of(i) < keys ? product(x, i) : 0.f;
        }
        compute_first(__uint_as_float(signs));
        group_wait<0>();
        group_settle(dp), group_settle(x);
        add(x, dp, stage);
    }

    // A call with options, keys first_key, ...
    VIVIT_DEVICE void step_with_options(const Ring& stage, const Ring& last, bool first, int32_t first_key) {
        const JointParams& p = group.call.p;
        const Dropout& dropout = group.dropout;
        const Scores<false> scores(p);
        BackwardTile<Variant> x, dp;
        start(x, dp, stage);
        MayBeAttended<kPassing> may;
        may.look(p.mask, p.N_k, at.b, first_key);
        const int64_t row = at.query_number(p, at.first + group.rows + lane_number() / 4);
        const uint32_t kept = dropout.on ? kept_queries_first<kPassing / 8>(dropout, row, first_key) : 0;
        wait_for_scores(x, last, first);
        if (scores.cap == 0.f) {
            slope_queries_first<false>(x, scores, lse);
        } else {
            slope_queries_first<true>(x, scores, lse);
        }
        may.hide_others(x, 0.f);
        uint32_t signs = 0;
#pragma unroll
        for (int i = 0; i < kNumbers; ++i) signs |= __float_as_uint(product(x, i));
        compute_first(__uint_as_float(signs));
        group_wait<0>();
        group_settle(dp), group_settle(x);
        if (dropout.on) drop_gradients(dp, dropout, kept, [](int i) { return i; });
        add(x, dp, stage);
    }

    VIVIT_DEVICE void end(const Ring& last, bool any) {
        group_wait<0>();
        group_settle(ds), group_settle(dq.of);
        if (any) group.done(last);
    }
};

template <class T, class Variant>
VIVIT_DEVICE void compute_gradient_of_queries(const JointHopperBackward& call, const BackwardMemory<Variant>& memory) {
    constexpr int32_t kPassing = Variant::kPassing;
    const BackwardGroup<Variant> group(call, memory);
    // A plain call has its last tile on its own, unless it is whole.
    const int32_t tiles = Variant::kPlain ? call.N_passing / kPassing : passing_tiles<Variant>(call);
    const int32_t left = Variant::kPlain ? call.N_passing % kPassing : 0;
    typename BackwardGroup<Variant>::Ring ring, last;
    uint32_t parity = 0;  // of the phase in which this piece's queries come
    for (uint32_t number = blockIdx.x; number < call.pieces; number += gridDim.x, parity ^= 1) {
        const JointPlace at(call.p, number, call.N_kept, kKeptRows);
        phase_wait(memory.kept_full, parity);
        QueriesOfGroup<T, Variant> queries(group, at);
        group.loaded_kept();
#pragma unroll 1
        for (int32_t tile = 0; tile < tiles; ++tile) {
            if constexpr (Variant::kPlain) {
                queries.template step<true>(ring, last, tile == 0, kPassing);
            } else {
                queries.step_with_options(ring, last, tile == 0, tile * kPassing);
            }
            last = ring;
            ring.advance();
        }
        queries.end(last, tiles > 0);
        if (left > 0) {  // on its own: a product that runs from one way into another is waited for at once (nvcc 13.0)
            queries.template step<false>(ring, last, true, left);
            queries.end(ring, true);
            ring.advance();
        }
        group.multiplied_kept();
        store_kept_gradient<T>(group, at.rows(call.p.dq), at.first + group.rows, call.p.N_q, queries.dq);
    }
}

// ---- by keys: dk, dv ----

template <class T, class Variant>
struct KeysOfGroup {
    using Ring = typename BackwardGroup<Variant>::Ring;
    static constexpr int kSteps = Variant::kSteps, kPassing = Variant::kPassing, kBlocks = kPassing / 8;

    const BackwardGroup<Variant>& group;
    const JointPlace& at;
    KeptRows<Variant, 0> k;
    KeptRows<Variant, 1> v;
    RowSums<kSteps> dk, dv;
    RoundedTile<Variant> weights = {}, ds = {};

    VIVIT_DEVICE KeysOfGroup(const BackwardGroup<Variant>& mine, const JointPlace& place)
        : group(mine), at(place), k(mine.memory.kept(0), mine.rows), v(mine.memory.kept(1), mine.rows) {}

    VIVIT_DEVICE const Statistic* two_of(const Ring& stage) const {
        return group.memory.statistics + stage.stage * kPassing + 2 * (lane_number() % 4);
    }

    // first_query: of the tile.
    VIVIT_DEVICE void step(const Ring& stage, const Ring& last, bool first, int32_t first_query) {
        BackwardTile<Variant> x, dp;
        group.wait(stage);
        group_begin();
        start_across<T>(x, k, group.passing(stage, 0));
        group_commit();
        start_across<T>(dp, v, group.passing(stage, 1));
        group_commit();
        // NOLINTNEXTLINE(misc-const-correctness): with options it is another
        uint32_t kept = ~0u;
        if constexpr (!Variant::kPlain) {
            const JointParams& p = group.call.p;
            if (group.dropout.on) {
                kept = kept_keys_first<kBlocks>(group.dropout, at.query_number(p, first_query), at.first + group.rows);
            }
        }
        group_wait<1>();
        group_settle(x), group_settle(weights), group_settle(ds), group_settle(dk.of), group_settle(dv.of);
        if (!first) group.done(last);
        float delta[kBlocks][2];
        weigh(x, delta, two_of(stage), kept);
        warp_barrier();  // all lanes have read statistics before one says in the next step that the stage may go
        group_settle(weights), group_settle(dv.of);
        group_begin();
        start_along<T>(dv.of, weights, group.passing(stage, 1));
        group_commit();
        group_wait<1>();
        group_settle(dp), group_settle(x);
        if constexpr (!Variant::kPlain) {
            if (group.dropout.on) drop_gradients(dp, group.dropout, kept, [](int i) { return kept_place(i); });
        }
#pragma unroll
        for (int i = 0; i < 4 * kBlocks; ++i) product(x, i) *= product(dp, i) - delta[i / 4][i % 2];
        round_weights<T>(ds, x);
        group_settle(ds), group_settle(dk.of);
        group_begin();
        start_along<T>(dk.of, ds, group.passing(stage, 0));
        group_commit();
    }

    // Products become probabilities (with options times slopes) and, rounded, weights; delta: of the lane's columns.
    VIVIT_DEVICE void weigh(BackwardTile<Variant>& x, float (&delta)[kBlocks][2], const Statistic* two, uint32_t kept) {
        if constexpr (!Variant::kPlain) {
            const Scores<false> scores(group.call.p);
            if (scores.cap == 0.f) {
                slope_keys_first<T, false>(weights, x, scores, two, kept);
            } else {
                slope_keys_first<T, true>(weights, x, scores, two, kept);
            }
        }
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
            float of[4];  // lse and delta of the lane's two columns
            read_four(of, &two[8 * n].lse);
            delta[n][0] = of[1], delta[n][1] = of[3];
            if constexpr (Variant::kPlain) {
#pragma unroll
                for (int i = 0; i < 4; ++i) x[n][i] = exp2_fast(x[n][i] * group.unit - of[i % 2 * 2]);
            }
        }
        if constexpr (Variant::kPlain) round_weights<T>(weights, x);
    }

    VIVIT_DEVICE void end(const Ring& last) {
        group_wait<0>();
        group_settle(weights), group_settle(ds), group_settle(dk.of), group_settle(dv.of);
        group.done(last);
    }

    // Nothing comes of keys that may not be attended: what is in their rows is of no other key.
    VIVIT_DEVICE void forget_hidden_keys() {
        const JointParams& p = group.call.p;
        if (p.mask == nullptr) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int32_t key = at.first + group.rows + 8 * r + lane_number() / 4;
            if (key < p.N_k && load_one(p.mask + static_cast<int64_t>(at.b) * p.N_k + key)) continue;
#pragma unroll
            for (int i = 0; i < 4 * kSteps; ++i) {
                dk.of[i / 2][2 * r + i % 2] = 0.f;
                dv.of[i / 2][2 * r + i % 2] = 0.f;
            }
        }
    }
};

template <class T, class Variant>
VIVIT_DEVICE void compute_gradients_of_keys(const JointHopperBackward& call, const BackwardMemory<Variant>& memory) {
    const BackwardGroup<Variant> group(call, memory);
    const int32_t tiles = passing_tiles<Variant>(call);
    typename BackwardGroup<Variant>::Ring ring, last;
    uint32_t parity = 0;
    for (uint32_t number = blockIdx.x; number < call.pieces; number += gridDim.x, parity ^= 1) {
        const JointPlace at(call.p, number, call.N_kept, kKeptRows);
        phase_wait(memory.kept_full, parity);
        KeysOfGroup<T, Variant> keys(group, at);
        group.loaded_kept();
#pragma unroll 1
        for (int32_t tile = 0; tile < tiles; ++tile) {
            keys.step(ring, last, tile == 0, tile * Variant::kPassing);
            last = ring;
            ring.advance();
        }
        keys.end(last);
        group.multiplied_kept();
        if constexpr (!Variant::kPlain) keys.forget_hidden_keys();
        const int32_t first_key = at.first + group.rows;
        const float kept = Variant::kPlain || !group.dropout.on ? 1.f : group.dropout.keep_scale;
        store_rows<T>(call.p, at.rows(call.p.dv), first_key, call.p.N_k, keys.dv, kept, kept);
        store_kept_gradient<T>(group, at.rows(call.p.dk), first_key, call.p.N_k, keys.dk);
    }
}

// ---- the launches ----

// A launch gives each thread 168 registers; what the first warpgroup gives back is for the two that compute.
constexpr int kFewRegisters = 40, kManyRegisters = 232;

template <class T, class Variant>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    pipelined_joint_gradient_of_queries(const __grid_constant__ JointHopperBackward call) {
#if defined(VIVIT_HOPPER) || defined(VIVIT_SIM)
    const BackwardMemory<Variant> memory;
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

template <class T, class Variant>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    pipelined_joint_gradients_of_keys(const __grid_constant__ JointHopperBackward call) {
#if defined(VIVIT_HOPPER) || defined(VIVIT_SIM)
    const BackwardMemory<Variant> memory;
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
