// Attention of sequences of any length: a block keeps some rows of one clip and head, and the rows on the other side go
// by in tiles, through a ring in shared memory. What the forward and the backward have in common.
#pragma once

#include "joint.h"
#include "joint_place.cuh"
#include "weights.cuh"

namespace vivit::cuda {

constexpr int32_t kTileRows = 64;

// What a block keeps.
struct Stretch : JointPlace {
    VIVIT_DEVICE Stretch(const JointParams& p, int32_t N, int32_t rows) : JointPlace(p, blockIdx.x, N, rows) {}
};

VIVIT_BOTH int64_t stretches(const JointParams& p, int32_t N, int32_t rows) {
    return static_cast<int64_t>(p.B) * p.H * ((N + rows - 1) / rows);
}

VIVIT_DEVICE int32_t thread_number() { return static_cast<int32_t>(threadIdx.x); }
VIVIT_DEVICE int32_t warp_number() { return thread_number() / 32; }

// Rows first, ... of N into shared memory, `count` of them, those beyond N as zeros; not yet waited for.
template <int kSteps, int kThreads>
VIVIT_DEVICE void copy_stretch(char* to, const Rows& from, int32_t first, int32_t N, int32_t count, int32_t D) {
    copy_rows<kSteps>(to, {from.row(first), from.step}, N - first, count, D, thread_number(), kThreads);
}

// Rows of q or k, first, ... of N, turned where they lie in shared memory, by all threads and for all.
template <class T, int kSteps, int kThreads>
VIVIT_DEVICE void turn_stretch(const JointParams& p, char* rows, int32_t first, int32_t N, int32_t count) {
    turn_rows<T, kSteps>(p, rows, N - first < count ? N - first : count, thread_number(), kThreads,
                         [&](int32_t row) -> int64_t { return first + row; });
    block_barrier();
}

// Tiles of kRows rows of two tensors on their way through shared memory, kStages - 1 of them ahead of their use.
template <int kSteps, int kStages, int kThreads, int kRows>
struct Ring {
    static constexpr int32_t kTensorBytes = kRows * Pitch<kSteps>::kBytes;
    static constexpr int32_t kBytes = kStages * 2 * kTensorBytes;

    char* memory;
    Rows first, second;
    int32_t N, D;

    VIVIT_DEVICE int32_t tiles() const { return (N + kRows - 1) / kRows; }
    // Where the rows of a tile lie, of tensor 0 or 1.
    VIVIT_DEVICE char* rows(int32_t tile, int32_t tensor) const {
        return memory + (tile % kStages * 2 + tensor) * kTensorBytes;
    }

    // A group of copies for each tile, an empty one beyond the last: so that the groups tell which tile is there.
    VIVIT_DEVICE void start(int32_t tile) const {
        if (tile < tiles()) {
            copy_stretch<kSteps, kThreads>(rows(tile, 0), first, tile * kRows, N, kRows, D);
            copy_stretch<kSteps, kThreads>(rows(tile, 1), second, tile * kRows, N, kRows, D);
        }
        copies_commit();
    }
    VIVIT_DEVICE void begin() const {
#pragma unroll
        for (int tile = 0; tile < kStages - 1; ++tile) start(tile);
    }
    // Waits for a tile, and starts the copy of one further on: into the place of the tile before this one, which no
    // warp reads any more once all have come here.
    VIVIT_DEVICE void next(int32_t tile) const {
        copies_wait<kStages - 2>();
        block_barrier();
        start(tile + kStages - 1);
    }
};

// What the steps of a warp over the other rows have in common.
template <bool kPlain>
struct StreamRules {
    const JointParams& p;
    const Stretch& at;
    Scores<kPlain> scores;
    Dropout dropout;

    VIVIT_DEVICE StreamRules(const JointParams& params, const Stretch& of)
        : p(params), at(of), scores(params), dropout(params) {}
    VIVIT_DEVICE bool drops() const { return !kPlain && dropout.on; }
    VIVIT_DEVICE bool turns() const { return !kPlain && p.cos != nullptr; }
};

// step(keys, values, first_key) for every kStep keys that go by in a ring which has begun, in order.
template <class T, int kSteps, int kStep, int kThreads, bool kPlain, class KeysAndValues, class Step>
VIVIT_DEVICE void over_keys(const KeysAndValues& ring, const StreamRules<kPlain>& rules, const Step& step) {
    constexpr int32_t kRowBytes = Pitch<kSteps>::kBytes;
    const JointParams& p = rules.p;
    for (int32_t tile = 0; tile < ring.tiles(); ++tile) {
        ring.next(tile);
        char *keys = ring.rows(tile, 0), *values = ring.rows(tile, 1);
        const int32_t first_key = tile * kTileRows;
        if (rules.turns()) turn_stretch<T, kSteps, kThreads>(p, keys, first_key, p.N_k, kTileRows);
#pragma unroll 1
        for (int32_t i = 0; i < kTileRows && first_key + i < p.N_k; i += kStep) {
            step(keys + i * kRowBytes, values + i * kRowBytes, first_key + i);
        }
    }
}

VIVIT_DEVICE bool may_be_attended(const JointParams& p, const Stretch& at, int32_t key) {
    if (key >= p.N_k) return false;
    return p.mask == nullptr || load_one(p.mask + static_cast<int64_t>(at.b) * p.N_k + key);
}

// Of the 32 keys first, ... those that may be attended, a bit for each. All lanes have the same.
template <bool kPlain>
VIVIT_DEVICE uint32_t keys_that_may(const StreamRules<kPlain>& rules, int32_t first) {
    const JointParams& p = rules.p;
    if (kPlain && first + 32 <= p.N_k) return ~0u;
    return lanes_where(may_be_attended(p, rules.at, first + lane_number()));
}

// Scores of keys whose bit is not there become minus infinity. may: of 32 keys each.
template <int kGroups>
VIVIT_DEVICE void hide(Pairs<kGroups>& x, const uint32_t (&may)[(kGroups + 1) / 2]) {
#pragma unroll
    for (int i = 0; i < 8 * kGroups; ++i) {
        if ((may[i / 16] >> column_of(i % 16) & 1u) == 0) product(x.blocks(), i) = -kInfinity;
    }
}

// As across_step and along_rows of shared_rows.cuh, for 16 kTiles rows on the left: what is on the right is loaded
// once.
template <class T, int kSteps, int kTiles, int kGroups>
VIVIT_DEVICE void across_step(Pairs<kGroups> (&d)[kTiles], const Operand<kSteps> (&a)[kTiles], const char* rows,
                              int32_t place, int s) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
        uint32_t b[4];
        load_blocks(b, rows + Pitch<kSteps>::further(place, s) + 16 * j * Pitch<kSteps>::kBytes);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            multiply_add<T>(d[i].of[j][0], a[i].of[s], b[0], b[1]);
            multiply_add<T>(d[i].of[j][1], a[i].of[s], b[2], b[3]);
        }
    }
}
template <class T, int kSteps, int kTiles>
VIVIT_DEVICE void along_rows(RowSums<kSteps> (&sums)[kTiles], const uint32_t (&a)[kTiles][4], const char* rows,
                             int32_t place) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        uint32_t b[4];
        load_blocks_transposed(b, rows + Pitch<kSteps>::further(place, s));
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            multiply_add<T>(sums[i].of[2 * s], a[i], b[0], b[1]);
            multiply_add<T>(sums[i].of[2 * s + 1], a[i], b[2], b[3]);
        }
    }
}

}  // namespace vivit::cuda
