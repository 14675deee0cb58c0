// Pairs of a query and a key of which nothing is to come, for the pipelined kernels: a bit for each.
#pragma once

#include "hopper_ring.cuh"
#include "joint.h"
#include "scores.cuh"

namespace vivit::cuda {

// Of the keys of a tile those that may be attended, a bit for each; all lanes have the same.
template <int kKeys>
struct MayBeAttended {
    uint32_t word[(kKeys + 31) / 32];
    bool all = true;

    // Keys `first`, ... of clip b. Loads take their time: before something that can be waited for as well.
    VIVIT_DEVICE void look(const bool* mask, int32_t N_k, int32_t b, int32_t first) {
        if (mask == nullptr && first + kKeys <= N_k) return;
        const int64_t skip = static_cast<int64_t>(b) * N_k;
#pragma unroll
        for (int i = 0; i < (kKeys + 31) / 32; ++i) {
            const int32_t in_tile = 32 * i + lane_number(), key = first + in_tile;
            bool may = key < N_k;
            if (may && mask != nullptr) may = load_one(mask + skip + key);
            word[i] = lanes_where(may || in_tile >= kKeys);
            all = all && word[i] == ~0u;
        }
    }

    VIVIT_DEVICE void hide_others(float (&x)[kKeys / 8][4], float instead = -kInfinity) const {
        if (all) return;
        const int32_t t = lane_number() % 4;
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
            if ((word[i / 16] >> 2 * t & 1u << (8 * (i / 4 % 4) + i % 2)) == 0) x[i / 4][i % 4] = instead;
        }
    }
};

// ---- dropout, a bit for each of a thread's products, set where it keeps the pair ----

// Of four words, keys that lie side by side, the lowest bit first.
VIVIT_DEVICE uint32_t bits_of(const Dropout& dropout, const uint4& words) {
    const uint32_t from = dropout.keep_from;
    return (words.x >= from ? 1u : 0u) | (words.y >= from ? 2u : 0u) | (words.z >= from ? 4u : 0u) |
           (words.w >= from ? 8u : 0u);
}

// Queries first: bit i of number i of the products. row: the number of the query of row g. Lanes t and t ^ 1 need words
// of the same four keys: each makes those of one row, and they trade.
template <int kBlocks>
VIVIT_DEVICE uint32_t kept_queries_first(const Dropout& dropout, int64_t row, int32_t first_key) {
    static_assert(kBlocks <= 8);
    const int32_t t = lane_number() % 4;
    const bool odd = t % 2 != 0;
    const uint32_t first_group = static_cast<uint32_t>(first_key) / 4 + t / 2;
    uint32_t made = 0;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
        made |= bits_of(dropout, dropout.words(row + (odd ? 8 : 0), first_group + 2 * n)) << 4 * n;
    const uint32_t other = from_lane_xor(made, 1), skip = odd ? 2 : 0;
    const uint32_t first = odd ? other : made, second = odd ? made : other;
    return (first >> skip & 0x33333333u) | (second >> skip & 0x33333333u) << 2;
}

// Keys first: bit kept_place(i) of number i. row: the number of the query of column 0; first_key: of the warp's rows.
// Lanes of four neighbouring keys, at the same columns, need the same words: each makes those of every fourth query for
// all four of them, and they trade.
VIVIT_BOTH int kept_place(int i) { return i / 8 * 8 + i % 4 / 2 * 4 + i % 8 / 4 * 2 + i % 2; }
template <int kBlocks>
VIVIT_DEVICE uint32_t kept_keys_first(const Dropout& dropout, int64_t row, int32_t first_key) {
    static_assert(kBlocks <= 8 && kBlocks % 2 == 0);
    const int32_t g = lane_number() / 4, mine = g % 4;
    row += 2 * (lane_number() % 4) + 8 * (mine / 2) + mine % 2;
    const uint32_t group = static_cast<uint32_t>(first_key + g) / 4;
    uint32_t made = 0;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)  // of queries of two blocks, for keys g and then for g + 8
        made |= bits_of(dropout, dropout.words(row + 16 * (i / 2), group + 2 * (i % 2))) << 4 * i;
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t other = i == 0 ? made : from_lane_xor(made, 4 * i);
        found |= (other >> mine & 0x11111111u) << (mine ^ i);
    }
    return found;
}

}  // namespace vivit::cuda
