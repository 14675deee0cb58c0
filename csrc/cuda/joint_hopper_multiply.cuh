// Multiply: the two products of a tile of keys, each started to run on its own, and their layouts.
//
// A thread 32 w + 4 g + t of a warpgroup has of [64, columns] sums rows 16 w + g and 16 w + g + 8: x[n][0], x[n][1] are
// columns 8 n + 2 t and the next of the first, x[n][2], x[n][3] of the second (PTX manual, wgmma, D fragments). Two
// neighbouring blocks n of the scores' sums, rounded, are therefore just what a thread needs of the left operand [64,
// 16] of the second product: the weights never leave its registers.
#pragma once

#include "joint_hopper_schedule.cuh"

namespace vivit::cuda {

template <class Variant>
using TileScores = float[Variant::kKeys / 8][4];
template <class Variant>
using TileWeights = uint32_t[Variant::kKeys / 16][4];
template <class Variant>
using TileOutput = float[2 * Variant::kSteps][4];

// kRows rows in shared memory, as products know them; `skip` of them passed by.
template <int kSteps, int32_t kRows>
struct SlabOperand {
    using Rows = Slabs<kSteps>;
    uint64_t wide, tail;

    VIVIT_DEVICE explicit SlabOperand(const char* rows, int32_t skip = 0) : wide(0), tail(0) {
        if constexpr (Rows::kWide > 0) wide = descriptor(rows + skip * Rows::kWideBytes);
        if constexpr (Rows::kTail > 0)
            tail = narrow_descriptor<Rows::kTailBytes>(rows + Rows::kWide * kRows * Rows::kWideBytes +
                                                       skip * Rows::kTailBytes);
    }

    // The 16 channels of a step: 32 bytes further in each row, or in the next slab.
    VIVIT_DEVICE uint64_t step(int s) const {
        return s < 4 * Rows::kWide ? wide + ((s / 4 * kRows * Rows::kWideBytes + s % 4 * 32) >> 4) : tail + s % 4 * 2;
    }
    // Channels of a slab, of 16 j rows further.
    VIVIT_DEVICE uint64_t rows_of(int slab, int j) const {
        return slab < Rows::kWide ? wide + (slab * kRows + 16 * j) * (Rows::kWideBytes >> 4)
                                  : tail + j * Rows::kTailBytes;
    }
};

// x [64 queries, kKeys] = q k^T, 16 channels at a step.
template <class T, class Variant>
VIVIT_DEVICE void start_scores(TileScores<Variant>& x,
                               const SlabOperand<Variant::kSteps, Variant::kGroups * kGroupQueries>& q,
                               const SlabOperand<Variant::kSteps, Variant::kKeys>& k) {
#pragma unroll
    for (int s = 0; s < Variant::kSteps; ++s) group_across_step<T, Variant::kKeys>(x, q.step(s), k.step(s), s > 0);
}

// o [64 queries, channels] += weights v, 16 keys at a step, a product for the channels of each slab.
template <class T, class Variant>
VIVIT_DEVICE void start_outputs(TileOutput<Variant>& o, const TileWeights<Variant>& weights,
                                const SlabOperand<Variant::kSteps, Variant::kKeys>& v) {
    using Rows = Slabs<Variant::kSteps>;
#pragma unroll
    for (int j = 0; j < Variant::kKeys / 16; ++j) {
#pragma unroll
        for (int slab = 0; slab < Rows::kWide; ++slab)
            group_along_step<T, 64>(reinterpret_cast<float (&)[8][4]>(o[8 * slab]), weights[j], v.rows_of(slab, j));
        if constexpr (Rows::kTail > 0) {
            using Tail = float (&)[2 * Rows::kTail][4];
            group_along_step<T, 16 * Rows::kTail>(reinterpret_cast<Tail>(o[8 * Rows::kWide]), weights[j],
                                                  v.rows_of(Rows::kWide, j));
        }
    }
}

}  // namespace vivit::cuda
