// Joint attention's forward for Hopper: the whole of it, of the four verbs' files. Read them in the order in which they
// include each other: schedule, copy, multiply, softmax.
//
// One tile of keys, as a warpgroup goes through it. Products run on their own from `start` to `wait`:
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

// 64 queries of a tile on their way over the keys.
template <class T, class Variant>
struct HopperQueries {
    static constexpr int kSteps = Variant::kSteps, kKeys = Variant::kKeys;
    static constexpr bool kPlain = Variant::kPlain;
    using Memory = HopperMemory<Variant>;
    using Keys = SlabOperand<kSteps, kKeys>;

    const JointHopperParams& p;
    const Memory& memory;
    const Turns<Variant>& turns;
    const Dropout& dropout;
    const HopperTile at;
    const int32_t first_row;  // of the lane: row g of its warp
    SlabOperand<kSteps, Memory::kQueries> q;
    TileOutput<Variant> o = {};
    RowState rows;
    TileWeights<Variant> weights;

    VIVIT_DEVICE HopperQueries(const JointHopperParams& params, const Memory& shared, const Turns<Variant>& of_groups,
                               const Dropout& of_pairs, uint32_t number)
        : p(params),
          memory(shared),
          turns(of_groups),
          dropout(of_pairs),
          at(params, number, Memory::kQueries),
          first_row(at.first_query + of_groups.group * kGroupQueries + static_cast<int32_t>(threadIdx.x) / 32 % 4 * 16 +
                    lane_number() / 4),
          q(shared.q, of_groups.group * kGroupQueries) {}

    VIVIT_DEVICE Keys keys(const Ring& ring) const { return Keys(memory.k + ring.stage * Memory::kKeyBytes); }
    VIVIT_DEVICE Keys values(const Ring& ring) const { return Keys(memory.v + ring.stage * Memory::kKeyBytes); }

    // Products with keys first_key, ... become weights; as weigh().
    VIVIT_DEVICE bool weigh_products(TileScores<Variant>& x, const MayBeAttended<kKeys>& may, int32_t first_key,
                                     float (&shrink)[2]) {
        // NOLINTNEXTLINE(misc-const-correctness): with options it is another
        float unit = p.options.scale * kLog2E;
        if constexpr (!kPlain) unit = score(x, Scores<false>(p.options));
        may.hide_others(x);
        const bool rises = weigh<Variant>(x, rows, unit, shrink);
        if (!kPlain && dropout.on) drop(x, dropout, at.query_number(p, first_row), first_key);
        return rises;
    }

    // The last keys, of which some may be none: weights alone, there are no outputs yet.
    VIVIT_DEVICE void begin(const Ring& ring, int32_t first_key) {
        TileScores<Variant> x;
        float shrink[2];
        phase_wait(memory.k_full + ring.stage, ring.parity);
        group_begin();
        start_across<T>(x, q, keys(ring));
        group_commit();
        MayBeAttended<kKeys> may;
        may.look(p.options.mask, p.N_k, at.b, first_key);
        group_wait<0>();
        group_settle(x);
        release(memory.k_empty + ring.stage);
        weigh_products(x, may, first_key, shrink);
        round_weights<T>(weights, x);
    }

    // Weights of the keys at `ring`, first_key, ...; outputs of those at `last`.
    VIVIT_DEVICE void step(const Ring& ring, const Ring& last, int32_t first_key) {
        TileScores<Variant> x;
        float shrink[2];
        phase_wait(memory.k_full + ring.stage, ring.parity);
        turns.wait();
        group_settle(weights), group_settle(o);
        group_begin();
        start_across<T>(x, q, keys(ring));
        group_commit();
        phase_wait(memory.v_full + last.stage, last.parity);
        group_begin();
        start_along<T>(o, weights, values(last));
        group_commit();
        turns.pass();
        MayBeAttended<kKeys> may;
        if (!kPlain) may.look(p.options.mask, p.N_k, at.b, first_key);
        group_wait<1>();
        group_settle(x);
        release(memory.k_empty + ring.stage);
        const bool rises = weigh_products(x, may, first_key, shrink);
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
        start_along<T>(o, weights, values(last));
        group_commit();
        group_wait<0>();
        group_settle(weights), group_settle(o);
        release(memory.v_empty + last.stage);
    }

    // Lane 4 g + t has of each 8 channels two, in rows g and g + 8. Neighbouring lanes trade, so that each stores 8
    // bytes and four of them 32 of a row, a whole sector.
    VIVIT_DEVICE void store() const {
        const int32_t t = lane_number() % 4;
        const bool odd = t % 2 != 0;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int32_t query = first_row + 8 * r;
            const float total = sum_of_row(rows.total[r]);
            const bool none = !kPlain && total == 0.f;  // no key may be attended
            const float factor = none ? 0.f : __fdividef(dropout.on ? dropout.keep_scale : 1.f, total);
            if (p.options.lse != nullptr && t == 0 && query < p.N_q) {
                const float lse = none ? kInfinity : rows.base[r] + log2_fast(total);
                store_one(p.options.lse + at.query_number(p, query), lse);
            }
            char* to = static_cast<char*>(p.o.data) +
                       2 * (at.b * p.o.stride_b + query * p.o.stride_n + at.h * p.o.stride_h) + 8 * (t / 2) +
                       (odd ? 16 : 0);
#pragma unroll
            for (int n = 0; n < 2 * kSteps; n += 2) {
                const uint32_t left = packed<T>(o[n][2 * r] * factor, o[n][2 * r + 1] * factor);
                const uint32_t right = packed<T>(o[n + 1][2 * r] * factor, o[n + 1][2 * r + 1] * factor);
                const uint32_t other = from_lane_xor(odd ? left : right, 1);
                const uint2 both = {odd ? other : left, odd ? right : other};
                if (query < p.N_q && n + (odd ? 1 : 0) < p.options.D / 8) store_8(to + 16 * n, both);
            }
        }
    }
};

template <class T, class Variant>
VIVIT_DEVICE void hopper_compute_tiles(const JointHopperParams& p, const HopperMemory<Variant>& memory, int32_t group) {
    const Turns<Variant> turns(group);
    const Dropout dropout(Variant::kPlain ? AttentionOptions() : p.options);
    const int32_t tiles = key_tiles<Variant>(p);
    Ring ring;
    uint32_t parity = 0;  // of the phase in which this tile's queries come
    for (uint32_t number = blockIdx.x; number < p.tiles; number += gridDim.x) {
        HopperQueries<T, Variant> queries(p, memory, turns, dropout, number);
        phase_wait(memory.q_full, parity);
        int32_t first_key = (tiles - 1) * Variant::kKeys;
        queries.begin(ring, first_key);
        Ring last = ring;
        ring.advance();
#pragma unroll 1
        for (first_key -= Variant::kKeys; first_key >= 0; first_key -= Variant::kKeys) {
            queries.step(ring, last, first_key);
            last = ring;
            ring.advance();
        }
        release(memory.q_empty);
        queries.end(last);
        queries.store();
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
