// Multiply: products of rows in slabs, each started to run on its own, and their layouts.
//
// A thread 32 w + 4 g + t of a warpgroup has of [64, columns] sums rows 16 w + g and 16 w + g + 8: x[n][0], x[n][1] are
// columns 8 n + 2 t and the next of the first, x[n][2], x[n][3] of the second (PTX manual, wgmma, D fragments). Two
// neighbouring blocks n of the scores' sums, rounded, are therefore just what a thread needs of the left operand [64,
// 16] of the second product: the weights never leave its registers.
#pragma once

#include "joint_hopper_slabs.cuh"
#include "scores.cuh"

namespace vivit::cuda {

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

// x [64, kRows] = a b^T, 16 channels at a step.
template <class T, int kSteps, int32_t kLeft, int32_t kRows>
VIVIT_DEVICE void start_across(float (&x)[kRows / 8][4], const SlabOperand<kSteps, kLeft>& a,
                               const SlabOperand<kSteps, kRows>& b) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) group_across_step<T, kRows>(x, a.step(s), b.step(s), s > 0);
}

// sums [64, channels] += a rows, 16 rows at a step, a product for the channels of each slab.
template <class T, int kSteps, int32_t kRows>
VIVIT_DEVICE void start_along(float (&sums)[2 * kSteps][4], const uint32_t (&a)[kRows / 16][4],
                              const SlabOperand<kSteps, kRows>& rows) {
    using Rows = Slabs<kSteps>;
#pragma unroll
    for (int j = 0; j < kRows / 16; ++j) {
#pragma unroll
        for (int slab = 0; slab < Rows::kWide; ++slab)
            group_along_step<T, 64>(reinterpret_cast<float (&)[8][4]>(sums[8 * slab]), a[j], rows.rows_of(slab, j));
        if constexpr (Rows::kTail > 0) {
            using Tail = float (&)[2 * Rows::kTail][4];
            group_along_step<T, 16 * Rows::kTail>(reinterpret_cast<Tail>(sums[8 * Rows::kWide]), a[j],
                                                  rows.rows_of(Rows::kWide, j));
        }
    }
}

// Sums, rounded, as the left operand of a product that sums over their columns.
template <class T, int kWeights, int kBlocks>
VIVIT_DEVICE void round_weights(uint32_t (&weights)[kWeights][4], const float (&x)[kBlocks][4]) {
#pragma unroll
    for (int j = 0; j < kWeights; ++j) as_operand<T>(weights[j], x[2 * j], x[2 * j + 1]);
}

}  // namespace vivit::cuda
