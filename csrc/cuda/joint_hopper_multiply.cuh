// Multiply: the two products of a tile of keys, each started to run on its own, and their layouts.
//
// A thread 32 w + 4 g + t of a warpgroup has of [64, columns] sums rows 16 w + g and 16 w + g + 8: x[n][0], x[n][1] are
// columns 8 n + 2 t and the next of the first, x[n][2], x[n][3] of the second (PTX manual, wgmma, D fragments). Two
// neighbouring blocks n of the scores' sums, rounded, are therefore just what a thread needs of the left operand [64,
// 16] of the second product: the weights never leave its registers.
#pragma once

#include "joint_hopper_schedule.cuh"

namespace vivit::cuda {

constexpr int kScoreBlocks = kTileKeys / 8, kWeightSteps = kTileKeys / 16;

using TileScores = float[kScoreBlocks][4];
using TileWeights = uint32_t[kWeightSteps][4];
using TileOutput = float[8][4];  // 64 channels

// x [64 queries, 128 keys] = q k^T over 64 channels, 16 at a step: 32 bytes further in both rows, in a descriptor 2.
template <class T>
VIVIT_DEVICE void start_scores(TileScores& x, uint64_t q, uint64_t k) {
#pragma unroll
    for (int s = 0; s < 4; ++s) group_across_step<T, kTileKeys>(x, q + 2 * s, k + 2 * s, s > 0);
}

// o [64 queries, 64 channels] += weights v, 16 keys at a step: 16 rows of 128 bytes further, in a descriptor 128.
template <class T>
VIVIT_DEVICE void start_outputs(TileOutput& o, const TileWeights& weights, uint64_t v) {
#pragma unroll
    for (int j = 0; j < kWeightSteps; ++j) group_along<T>(o, weights[j], v + j * (16 * kRowBytes >> 4));
}

}  // namespace vivit::cuda
