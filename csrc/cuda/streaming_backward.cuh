// Streaming backward, two launches. The first keeps queries and goes over the keys, for dq (3 products), and leaves
// delta = sum(do * o) of each query behind (of a call with few rows one before it does, joint.h); the second keeps
// keys and goes over the queries, for dk and dv (4 products). One pass would recompute two products less, but would
// have to add to dq from every block: here each gradient is summed in registers and written once, the same bits in
// every run, with no float32 copy of dq.
#pragma once

#include "streaming.cuh"

namespace vivit::cuda {

// Gradients of rows of q or k, first_row, ... of N, as they were before they were turned. memory: at least
// turned_bytes, which no warp reads or copies to any more.
template <int kSteps>
VIVIT_BOTH int32_t turned_bytes(int32_t warps) {
    return warps * 16 * kTurnedPitch<kSteps> * 4;
}
template <class T, bool kPlain, int kSteps>
VIVIT_DEVICE void store_gradient(const StreamRules<kPlain>& rules, const Rows& to, int32_t first_row, int32_t N,
                                 const RowSums<kSteps>& sums, char* memory) {
    if (rules.turns()) {
        float* scratch = reinterpret_cast<float*>(memory + turned_bytes<kSteps>(warp_number()));
        store_turned_rows<T>(rules.p, to, first_row, N, sums, scratch, [](int32_t row) -> int64_t { return row; });
    } else {
        store_rows<T>(rules.p, to, first_row, N, sums, rules.p.scale, rules.p.scale);
    }
}

// ---- by queries: dq, delta ----

template <int kSteps>
struct QueriesShape {
    static constexpr int kTiles = kSteps <= 4 ? 2 : 1;  // of 16 queries, to a warp
    static constexpr int kThreads = 128, kQueries = 16 * kTiles * kThreads / 32;
    static constexpr int kGroups = 1;  // 16 keys each, to a step
    using KeysAndValues = Ring<kSteps, 2, kThreads, kTileRows>;
    static constexpr int32_t kBytes = KeysAndValues::kBytes;
    // at first queries and gradients of outputs lie where the ring does, at last rows on their way back
    static_assert(2 * kQueries * Pitch<kSteps>::kBytes <= kBytes && turned_bytes<kSteps>(kThreads / 32) <= kBytes);
};

// What a warp keeps of its queries.
template <int kSteps, int kTiles>
struct Queries {
    Operand<kSteps> q[kTiles], d_o[kTiles];
    float lse[kTiles][2], delta[kTiles][2];  // of rows g and g + 8
};

// Products x of queries and 16 kGroups keys, gradients dp of their weights; may: which keys may be attended, a bit
// each.
template <class T, int kGroups, int kSteps, int kTiles, bool kPlain>
VIVIT_DEVICE void queries_products(Pairs<kGroups> (&x)[kTiles], Pairs<kGroups> (&dp)[kTiles],
                                   uint32_t (&may)[(kGroups + 1) / 2], const Queries<kSteps, kTiles>& own,
                                   const char* keys, const char* values, const Places<kSteps>& places,
                                   const StreamRules<kPlain>& rules, int32_t first_row, int32_t first_key) {
    bool hides = false;
#pragma unroll
    for (int i = 0; i < (kGroups + 1) / 2; ++i) {
        may[i] = keys_that_may(rules, first_key + 32 * i);
        hides = hides || may[i] != ~0u;
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        across_step<T>(x, own.q, keys, places.across, s);
        across_step<T>(dp, own.d_o, values, places.across, s);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        if (rules.drops()) {
#pragma unroll
            for (int j = 0; j < kGroups; ++j) {
                multiply_dropped(dp[tile].of[j], rules.dropout, first_key + 16 * j, [&](int r) {
                    return rules.at.query_number(rules.p, first_row + 16 * tile + lane_number() / 4 + 8 * r);
                });
            }
        }
        if (kPlain && hides) hide(x[tile], may);  // a plain score of minus infinity is that of a product
    }
}

// Whether the key of a column may be attended, as queries_products says. A plain one that may not has no score left.
template <bool kPlain, int kCount>
VIVIT_DEVICE bool may_be(const uint32_t (&may)[kCount], int32_t column) {
    return kPlain || (may[column / 32] >> column % 32 & 1u) != 0;
}

// The share of 16 kGroups keys in dq.
template <class T, int kGroups, int kSteps, int kTiles, bool kPlain>
VIVIT_DEVICE void queries_step(RowSums<kSteps> (&dq)[kTiles], const Queries<kSteps, kTiles>& own, const char* keys,
                               const char* values, const Places<kSteps>& places, const StreamRules<kPlain>& rules,
                               int32_t first_row, int32_t first_key) {
    Pairs<kGroups> x[kTiles], dp[kTiles];
    uint32_t may[(kGroups + 1) / 2];
    queries_products<T>(x, dp, may, own, keys, values, places, rules, first_row, first_key);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        score_gradients(x[tile].blocks(), dp[tile].blocks(), rules.scores, own.lse[tile], own.delta[tile],
                        [&](int32_t column) { return may_be<kPlain>(may, column); });
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
        uint32_t a[kTiles][4];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) as_operand<T>(a[tile], x[tile].of[j][0], x[tile].of[j][1]);
        along_rows<T>(dq, a, keys + 16 * j * Pitch<kSteps>::kBytes, places.along);
    }
}

// The lane's share of 16 kGroups keys in delta.
template <class T, int kGroups, int kSteps, int kTiles, bool kPlain>
VIVIT_DEVICE void delta_step(float (&delta)[kTiles][2], const Queries<kSteps, kTiles>& own, const char* keys,
                             const char* values, const Places<kSteps>& places, const StreamRules<kPlain>& rules,
                             int32_t first_row, int32_t first_key) {
    Pairs<kGroups> x[kTiles], dp[kTiles];
    uint32_t may[(kGroups + 1) / 2];
    queries_products<T>(x, dp, may, own, keys, values, places, rules, first_row, first_key);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 8 * kGroups; ++i) {
            const float weight = exp2_fast(rules.scores.of(product(x[tile].blocks(), i)) - own.lse[tile][i % 4 / 2]);
            if (may_be<kPlain>(may, column_of(i))) delta[tile][i % 4 / 2] += weight * product(dp[tile].blocks(), i);
        }
    }
}

// The queries of a block to its warps, through `memory`. delta(d_outputs, row, query): of one of them, by its four
// lanes.
template <class T, int kSteps, int kTiles, bool kPlain, class Delta>
VIVIT_DEVICE void load_queries(Queries<kSteps, kTiles>& own, const StreamRules<kPlain>& rules, char* memory,
                               const Delta& delta) {
    using Shape = QueriesShape<kSteps>;
    constexpr int kThreads = Shape::kThreads;
    constexpr int32_t kRowBytes = Pitch<kSteps>::kBytes;
    const JointParams& p = rules.p;
    const Stretch& at = rules.at;
    char *queries = memory, *d_outputs = queries + Shape::kQueries * kRowBytes;
    copy_stretch<kSteps, kThreads>(queries, at.rows(p.q), at.first, p.N_q, Shape::kQueries, p.D);
    copy_stretch<kSteps, kThreads>(d_outputs, at.rows(p.d_o), at.first, p.N_q, Shape::kQueries, p.D);
    copies_commit();
    copies_wait<0>();
    block_barrier();
    if (rules.turns()) turn_stretch<T, kSteps, kThreads>(p, queries, at.first, p.N_q, Shape::kQueries);
    const int32_t mine = 16 * kTiles * warp_number();
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
        own.q[i] = Operand<kSteps>(queries + (mine + 16 * i) * kRowBytes);
        own.d_o[i] = Operand<kSteps>(d_outputs + (mine + 16 * i) * kRowBytes);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int32_t row = mine + 16 * i + 8 * r + lane_number() / 4, query = at.first + row;
            own.lse[i][r] = query < p.N_q ? load_one(p.lse + at.query_number(p, query)) : kInfinity;
            own.delta[i][r] = delta(d_outputs, row, query);
        }
    }
    block_barrier();
}

VIVIT_DEVICE void store_delta(const JointParams& p, const Stretch& at, int32_t query, float delta) {
    if (query < p.N_q && lane_number() % 4 == 0) store_one(p.delta + at.query_number(p, query), delta);
}

// Of a call with few rows, before the others.
template <class T, int kSteps, bool kPlain>
__global__ void __launch_bounds__(QueriesShape<kSteps>::kThreads) streaming_delta(const JointParams p) {
    using Shape = QueriesShape<kSteps>;
    constexpr int kTiles = Shape::kTiles, kStep = 16 * Shape::kGroups;
    const Stretch at(p, p.N_q, Shape::kQueries);
    const StreamRules<kPlain> rules(p, at);
    const typename Shape::KeysAndValues ring{shared_memory(), at.rows(p.k), at.rows(p.v), p.N_k, p.D};
    const int32_t first_row = at.first + 16 * kTiles * warp_number();
    Queries<kSteps, kTiles> own;
    load_queries<T>(own, rules, ring.memory, [](const char*, int32_t, int32_t) { return 0.f; });
    const Places<kSteps> places;
    ring.begin();
    over_keys<T, kSteps, kStep, Shape::kThreads>(
        ring, rules, [&](const char* keys, const char* values, int32_t first_key) {
            delta_step<T, Shape::kGroups>(own.delta, own, keys, values, places, rules, first_row, first_key);
        });
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i)
        store_delta(p, at, first_row + 8 * i + lane_number() / 4, sum_of_row(own.delta[i / 2][i % 2]));
}

template <class T, int kSteps, bool kPlain>
__global__ void __launch_bounds__(QueriesShape<kSteps>::kThreads) streaming_gradient_of_queries(const JointParams p) {
    using Shape = QueriesShape<kSteps>;
    constexpr int kTiles = Shape::kTiles, kStep = 16 * Shape::kGroups;
    const Stretch at(p, p.N_q, Shape::kQueries);
    const StreamRules<kPlain> rules(p, at);
    const typename Shape::KeysAndValues ring{shared_memory(), at.rows(p.k), at.rows(p.v), p.N_k, p.D};
    const int32_t first_row = at.first + 16 * kTiles * warp_number();
    const bool few = min(p.N_q, p.N_k) < kFewRows;
    Queries<kSteps, kTiles> own;
    load_queries<T>(own, rules, ring.memory, [&](const char* d_outputs, int32_t row, int32_t query) {
        const bool there = query < p.N_q;
        if (few) return there ? load_one(p.delta + at.query_number(p, query)) : 0.f;
        const float delta = delta_of_row<T, kSteps>(at.rows(p.o).row(query), there, d_outputs, row, p.D);
        store_delta(p, at, query, delta);
        return delta;
    });
    const Places<kSteps> places;
    RowSums<kSteps> dq[kTiles];
    ring.begin();
    over_keys<T, kSteps, kStep, Shape::kThreads>(
        ring, rules, [&](const char* keys, const char* values, int32_t first_key) {
            queries_step<T, Shape::kGroups>(dq, own, keys, values, places, rules, first_row, first_key);
        });
    if (rules.turns()) block_barrier();
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
        store_gradient<T>(rules, at.rows(p.dq), first_row + 16 * i, p.N_q, dq[i], ring.memory);
    }
}

// ---- by keys: dk, dv ----

template <int kSteps>
struct KeysShape {
    static constexpr int kThreads = 128, kKeys = 16 * kThreads / 32;
    // 16 rows of k and v stay in a warp's registers where their gradients leave room, else each step reads them again
    static constexpr bool kKept = kSteps <= 6;
    static constexpr int kQueries = kSteps <= 6 ? 64 : 32;  // to a tile
    using QueriesAndGradients = Ring<kSteps, 2, kThreads, kQueries>;
    static constexpr int32_t kTensorBytes = kKeys * Pitch<kSteps>::kBytes;  // of k and of v, before the ring
    static constexpr int32_t kStatistics = 2 * kTensorBytes + QueriesAndGradients::kBytes;
    static constexpr int32_t kBytes = kStatistics + 2 * 2 * kQueries * 4;  // of each place of the ring lse and delta
    static_assert(2 * kQueries <= kThreads && turned_bytes<kSteps>(kThreads / 32) <= kStatistics);
};

// 16 rows as the left operand of products over channels, in registers, or where they lie in shared memory.
template <int kSteps, bool kKept>
struct LeftRows : Operand<kSteps> {
    using Operand<kSteps>::Operand;
    VIVIT_DEVICE void read(uint32_t (&a)[4], int s) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = this->of[s][i];
    }
};
template <int kSteps>
struct LeftRows<kSteps, false> {
    const char* rows;
    int32_t place;

    VIVIT_DEVICE explicit LeftRows(const char* from)
        : rows(from), place(Pitch<kSteps>::place(lane_number() % 16, lane_number() / 16)) {}
    VIVIT_DEVICE void read(uint32_t (&a)[4], int s) const { load_blocks(a, rows + Pitch<kSteps>::further(place, s)); }
};

// The share of 16 queries in dk and dv of 16 keys. Scores lie keys first, so that no product has to transpose them.
// lse, delta: of the query of the lane's first column; may: whether keys g and g + 8 may be attended.
template <class T, bool kPlain, int kSteps, bool kKept>
VIVIT_DEVICE void keys_step(RowSums<kSteps>& dk, RowSums<kSteps>& dv, const LeftRows<kSteps, kKept>& k,
                            const LeftRows<kSteps, kKept>& v, const char* queries, const char* d_outputs,
                            const float* lse, const float* delta, const Places<kSteps>& places, const bool (&may)[2],
                            const StreamRules<kPlain>& rules, int32_t first_row, int32_t first_key) {
    Pairs<1> x, dp;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        Operand<1> left;
        k.read(left.of[0], s);
        across_step<T>(x, left, queries + Pitch<kSteps>::further(places.across, s), 0, 0);
        v.read(left.of[0], s);
        across_step<T>(dp, left, d_outputs + Pitch<kSteps>::further(places.across, s), 0, 0);
    }
    weigh_keys_first<true>(x.blocks(), dp.blocks(), rules.scores, lse, delta, may, [&](int32_t column, int r) {
        if (!rules.drops()) return 1.f;
        const int64_t number = rules.at.query_number(rules.p, first_row + column);
        return rules.dropout.factor(number, first_key + lane_number() / 4 + 8 * r);
    });
    uint32_t a[4];
    as_operand<T>(a, x.of[0][0], x.of[0][1]);
    along_rows<T>(dv, a, d_outputs, places.along);
    as_operand<T>(a, dp.of[0][0], dp.of[0][1]);
    along_rows<T>(dk, a, queries, places.along);
}

// One number for each thread of the first ones: lse of the tile's queries, then their delta. Of queries that are not
// there such that nothing comes of them.
template <int kQueries>
VIVIT_DEVICE float statistic(const JointParams& p, const Stretch& at, int32_t tile) {
    const int32_t query = tile * kQueries + thread_number() % kQueries;
    const bool is_lse = thread_number() < kQueries;
    if (query >= p.N_q || thread_number() >= 2 * kQueries) return is_lse ? kInfinity : 0.f;
    return load_one((is_lse ? p.lse : p.delta) + at.query_number(p, query));
}

template <class T, int kSteps, bool kPlain>
__global__ void __launch_bounds__(KeysShape<kSteps>::kThreads) streaming_gradients_of_keys(const JointParams p) {
    using Shape = KeysShape<kSteps>;
    constexpr int kThreads = Shape::kThreads, kQueries = Shape::kQueries;
    constexpr int32_t kRowBytes = Pitch<kSteps>::kBytes;
    const Stretch at(p, p.N_k, Shape::kKeys);
    const StreamRules<kPlain> rules(p, at);
    char *memory = shared_memory(), *keys = memory, *values = memory + Shape::kTensorBytes;
    const typename Shape::QueriesAndGradients ring{memory + 2 * Shape::kTensorBytes, at.rows(p.q), at.rows(p.d_o),
                                                   p.N_q, p.D};
    // of each place of the ring, [2 kQueries]
    float* statistics = reinterpret_cast<float*>(memory + Shape::kStatistics);

    copy_stretch<kSteps, kThreads>(keys, at.rows(p.k), at.first, p.N_k, Shape::kKeys, p.D);
    copy_stretch<kSteps, kThreads>(values, at.rows(p.v), at.first, p.N_k, Shape::kKeys, p.D);
    copies_commit();
    ring.begin();
    if (thread_number() < 2 * kQueries) statistics[thread_number()] = statistic<kQueries>(p, at, 0);
    copies_wait<1>();
    block_barrier();
    if (rules.turns()) turn_stretch<T, kSteps, kThreads>(p, keys, at.first, p.N_k, Shape::kKeys);
    const int32_t mine = 16 * warp_number(), first_key = at.first + mine;
    const LeftRows<kSteps, Shape::kKept> k(keys + mine * kRowBytes), v(values + mine * kRowBytes);
    bool may[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int32_t key = first_key + lane_number() / 4 + 8 * r;
        may[r] = kPlain || may_be_attended(p, at, key);
    }

    const Places<kSteps> places;
    RowSums<kSteps> dk, dv;
    for (int32_t tile = 0; tile < ring.tiles(); ++tile) {
        ring.next(tile);
        const float next = statistic<kQueries>(p, at, tile + 1);  // on its way while this tile is multiplied
        char *queries = ring.rows(tile, 0), *d_outputs = ring.rows(tile, 1);
        const int32_t first_row = tile * kQueries;
        if (rules.turns()) turn_stretch<T, kSteps, kThreads>(p, queries, first_row, p.N_q, kQueries);
        const float* lse = statistics + tile % 2 * 2 * kQueries + 2 * (lane_number() % 4);
#pragma unroll 1
        for (int32_t i = 0; i < kQueries && first_row + i < p.N_q; i += 16) {
            keys_step<T>(dk, dv, k, v, queries + i * kRowBytes, d_outputs + i * kRowBytes, lse + i, lse + kQueries + i,
                         places, may, rules, first_row + i, first_key);
        }
        if (thread_number() < 2 * kQueries) statistics[(tile + 1) % 2 * 2 * kQueries + thread_number()] = next;
    }
    store_rows<T>(p, at.rows(p.dv), first_key, p.N_k, dv, 1.f, 1.f);
    if (rules.turns()) block_barrier();
    store_gradient<T>(rules, at.rows(p.dk), first_key, p.N_k, dk, memory);
}

}  // namespace vivit::cuda
