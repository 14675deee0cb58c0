// Streaming forward: a block keeps 128 queries, and keys with their values go by in tiles of 64. Softmax is made on the
// way: of each query the largest score so far is kept, and sums are scaled down when a larger one comes.
#pragma once

#include "streaming.cuh"

namespace vivit::cuda {

template <int kSteps>
struct ForwardShape {
    // Two tiles of 16 queries to a warp take each key and value from shared memory once for both; the sums of long rows
    // leave no registers for that.
    static constexpr int kTiles = kSteps <= 6 ? 2 : 1, kWarps = kTiles == 2 ? 4 : 8;
    static constexpr int kThreads = 32 * kWarps, kQueries = 16 * kTiles * kWarps;
    static constexpr int kGroups = kSteps <= 4 ? 4 : 2;  // 16 keys each, to a step
    static constexpr int kStages = kSteps <= 4 ? 3 : 2;
    using KeysAndValues = Ring<kSteps, kStages, kThreads, kTileRows>;
    static constexpr int32_t kBytes = KeysAndValues::kBytes;
    // at first the queries lie where the last tile of the ring does
    static_assert(kQueries * Pitch<kSteps>::kBytes <= kBytes / kStages);
};

// The next 16 kGroups keys of a warp's queries, the first of which is first_row.
template <class T, int kGroups, int kSteps, int kTiles, bool kPlain>
VIVIT_DEVICE void attend_keys(RowSums<kSteps> (&o)[kTiles], Softmax (&sums)[kTiles], const Operand<kSteps> (&q)[kTiles],
                              const char* keys, const char* values, const Places<kSteps>& places,
                              const StreamRules<kPlain>& rules, int32_t first_row, int32_t first_key) {
    uint32_t may[kGroups / 2];
    bool hides = false;
#pragma unroll
    for (int i = 0; i < kGroups / 2; ++i) {
        may[i] = keys_that_may(rules, first_key + 32 * i);
        hides = hides || may[i] != ~0u;
    }
    Pairs<kGroups> x[kTiles];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) across_step<T>(x, q, keys, places.across, s);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        if (!kPlain) {
#pragma unroll
            for (int i = 0; i < 8 * kGroups; ++i)
                product(x[tile].blocks(), i) = rules.scores.of(product(x[tile].blocks(), i));
        }
        if (hides) hide(x[tile], may);
        // a plain score is the product times a positive number, so that the largest is found before it is scaled
        const float2 shrink = weigh(sums[tile], x[tile].blocks(), kPlain ? rules.scores.unit : 1.f);
        // the longer the way, the more seldom a key has a score larger than all before it
        if (lanes_where(shrink.x != 1.f || shrink.y != 1.f) != 0) shrink_rows(o[tile], shrink);
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
        uint32_t weights[kTiles][4];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            if (rules.drops()) {
                multiply_dropped(x[tile].of[j], rules.dropout, first_key + 16 * j, [&](int r) {
                    return rules.at.query_number(rules.p, first_row + 16 * tile + lane_number() / 4 + 8 * r);
                });
            }
            as_operand<T>(weights[tile], x[tile].of[j][0], x[tile].of[j][1]);
        }
        along_rows<T>(o, weights, values + 16 * j * Pitch<kSteps>::kBytes, places.along);
    }
}

template <class T, int kSteps, bool kPlain>
__global__ void __launch_bounds__(ForwardShape<kSteps>::kThreads, kSteps <= 4 && kPlain ? 2 : 1)
    streaming_forward(const JointParams p) {
    using Shape = ForwardShape<kSteps>;
    constexpr int kTiles = Shape::kTiles, kThreads = Shape::kThreads;
    constexpr int32_t kRowBytes = Pitch<kSteps>::kBytes, kStep = 16 * Shape::kGroups;
    const Stretch at(p, p.N_q, Shape::kQueries);
    const typename Shape::KeysAndValues ring{shared_memory(), at.rows(p.k), at.rows(p.v), p.N_k, p.D};

    // The queries pass through the ring's last place, which no tile takes before all warps have them.
    char* queries = ring.rows(Shape::kStages - 1, 0);
    copy_stretch<kSteps, kThreads>(queries, at.rows(p.q), at.first, p.N_q, Shape::kQueries, p.D);
    copies_commit();
    ring.begin();
    copies_wait<Shape::kStages - 1>();
    block_barrier();
    const StreamRules<kPlain> rules(p, at);
    if (rules.turns()) turn_stretch<T, kSteps, kThreads>(p, queries, at.first, p.N_q, Shape::kQueries);
    const int32_t mine = 16 * kTiles * warp_number(), first_row = at.first + mine;
    Operand<kSteps> q[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) q[i] = Operand<kSteps>(queries + (mine + 16 * i) * kRowBytes);

    const Places<kSteps> places;
    RowSums<kSteps> o[kTiles];
    Softmax sums[kTiles];
    over_keys<T, kSteps, kStep, kThreads>(ring, rules, [&](const char* keys, const char* values, int32_t first_key) {
        attend_keys<T, Shape::kGroups>(o, sums, q, keys, values, places, rules, first_row, first_key);
    });
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
        store_attended<T>(p, at.rows(p.o), first_row + 16 * i, p.N_q, o[i], sums[i],
                          [&](int32_t row) { return at.query_number(p, row); });
    }
}

}  // namespace vivit::cuda
