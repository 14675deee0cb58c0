// Joint attention's forward for Hopper: the whole of it, of the four verbs' files. Read them in the order in which they
// include each other: schedule, copy, multiply, softmax.
//
// One tile of 128 keys, as a warpgroup goes through it. Products run on their own from `start` to `wait`:
//
//   its turn      start scores of this tile; start outputs of the last one; pass the turn on
//   wait 1        scores are there: find the largest, exponentials           (outputs of the last tile still run)
//   wait 0        outputs are there: rescale them where a base rose; round the weights
//
// so that exponentials run beside this warpgroup's second product, and beside all products of the others.
#pragma once

#include "joint_hopper_copy.cuh"
#include "joint_hopper_softmax.cuh"

namespace vivit::cuda {

// Says, for a warp, that it is done with something.
VIVIT_DEVICE void release(PhaseBarrier* empty) {
    if (lane_number() == 0) phase_arrive(empty);
}

// 64 queries of a tile on their way over the keys.
template <class T, class Variant>
struct HopperQueries {
    const JointHopperParams& p;
    const HopperMemory<Variant>& memory;
    const Turns<Variant>& turns;
    uint64_t q;  // descriptor of the warpgroup's queries
    TileOutput o = {};
    RowState rows;
    TileWeights weights;

    VIVIT_DEVICE HopperQueries(const JointHopperParams& params, const HopperMemory<Variant>& shared,
                               const Turns<Variant>& of_groups)
        : p(params),
          memory(shared),
          turns(of_groups),
          q(descriptor(shared.q + of_groups.group * kGroupQueries * kRowBytes)) {}

    VIVIT_DEVICE uint64_t keys(const Ring& at) const { return descriptor(memory.k + at.stage * kKeyBytes); }
    VIVIT_DEVICE uint64_t values(const Ring& at) const { return descriptor(memory.v + at.stage * kKeyBytes); }

    // The last keys, of which some may be none: weights alone, there are no outputs yet.
    VIVIT_DEVICE void begin(const Ring& at, int32_t tiles) {
        TileScores x;
        float shrink[2];
        phase_wait(memory.k_full + at.stage, at.parity);
        group_begin();
        start_scores<T>(x, q, keys(at));
        group_commit();
        group_wait<0>();
        group_settle(x);
        release(memory.k_empty + at.stage);
        if (p.N_k % kTileKeys != 0) hide_keys(x, p.N_k - (tiles - 1) * kTileKeys);
        weigh<Variant>(x, rows, p.unit, shrink);
        round_weights<T>(weights, x);
    }

    // Weights of the keys at `at`, outputs of those at `last`.
    VIVIT_DEVICE void step(const Ring& at, const Ring& last) {
        TileScores x;
        float shrink[2];
        phase_wait(memory.k_full + at.stage, at.parity);
        turns.wait();
        group_settle(weights), group_settle(o);
        group_begin();
        start_scores<T>(x, q, keys(at));
        group_commit();
        phase_wait(memory.v_full + last.stage, last.parity);
        group_begin();
        start_outputs<T>(o, weights, values(last));
        group_commit();
        turns.pass();
        group_wait<1>();
        group_settle(x);
        release(memory.k_empty + at.stage);
        const bool rises = weigh<Variant>(x, rows, p.unit, shrink);
        compute_first(rows.total[0] + rows.total[1]);
        group_wait<0>();
        group_settle(weights), group_settle(o), group_settle(x);
        release(memory.v_empty + last.stage);
        if (rises) rescale(o, shrink);
        round_weights<T>(weights, x);
    }

    // Outputs of the first keys, whose weights come last.
    VIVIT_DEVICE void end(const Ring& last) {
        phase_wait(memory.v_full + last.stage, last.parity);
        group_settle(weights), group_settle(o);
        group_begin();
        start_outputs<T>(o, weights, values(last));
        group_commit();
        group_wait<0>();
        group_settle(weights), group_settle(o);
        release(memory.v_empty + last.stage);
    }

    // Lane 4 g + t has of each 8 channels two, in rows g and g + 8. Neighbouring lanes trade, so that each stores 8
    // bytes and four of them 32 of a row, a whole sector.
    VIVIT_DEVICE void store(const HopperTile& at) {
        const int32_t g = lane_number() / 4, t = lane_number() % 4;
        const bool odd = t % 2 != 0;
        const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32 % 4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int32_t query = at.first_query + turns.group * kGroupQueries + 16 * warp + g + 8 * r;
            const float total = sum_of_row(rows.total[r]), factor = __fdividef(1.f, total);
            if (p.lse != nullptr && t == 0 && query < p.N_q)
                store_one(p.lse + (static_cast<int64_t>(at.b) * p.H + at.h) * p.N_q + query,
                          rows.base[r] + log2_fast(total));
            char* to = static_cast<char*>(p.o.data) +
                       2 * (at.b * p.o.stride_b + query * p.o.stride_n + at.h * p.o.stride_h) + 8 * (t / 2) +
                       (odd ? 16 : 0);
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                const uint32_t left = packed<T>(o[n][2 * r] * factor, o[n][2 * r + 1] * factor);
                const uint32_t right = packed<T>(o[n + 1][2 * r] * factor, o[n + 1][2 * r + 1] * factor);
                const uint32_t other = from_lane_xor(odd ? left : right, 1);
                const uint2 both = {odd ? other : left, odd ? right : other};
                if (query < p.N_q && n + (odd ? 1 : 0) < p.D / 8) store_8(to + 16 * n, both);
            }
        }
    }
};

template <class T, class Variant>
VIVIT_DEVICE void hopper_compute_tiles(const JointHopperParams& p, const HopperMemory<Variant>& memory, int32_t group) {
    const Turns<Variant> turns(group);
    const int32_t tiles = key_tiles(p);
    Ring ring;
    uint32_t parity = 0;  // of the phase in which this tile's queries come
    for (uint32_t number = blockIdx.x; number < p.tiles; number += gridDim.x) {
        HopperQueries<T, Variant> queries(p, memory, turns);
        phase_wait(memory.q_full, parity);
        queries.begin(ring, tiles);
        Ring last = ring;
        ring.advance();
#pragma unroll 1
        for (int32_t tile = 1; tile < tiles; ++tile) {
            queries.step(ring, last);
            last = ring;
            ring.advance();
        }
        release(memory.q_empty);
        queries.end(last);
        queries.store(HopperTile(p, number, HopperMemory<Variant>::kQueries));
        parity ^= 1;
    }
    turns.end();
}

template <class T, class Variant>
__global__ void __launch_bounds__(Variant::kThreads, 1)
    pipelined_joint_forward(const __grid_constant__ JointHopperParams p) {
#if defined(VIVIT_HOPPER) || defined(VIVIT_SIM)
    const HopperMemory<Variant> memory;
    if (threadIdx.x == 0) memory.make_barriers();
    block_barrier();
    const int32_t group = same_in_warp(static_cast<int32_t>(threadIdx.x) / 128);
    if (group == 0) {
        registers_shrink<Variant::kFew>();
        if (threadIdx.x == 0) hopper_copy_tiles(p, memory);
    } else {
        registers_grow<Variant::kMany>();
        hopper_compute_tiles<T>(p, memory, group - 1);
    }
#endif
}

}  // namespace vivit::cuda
