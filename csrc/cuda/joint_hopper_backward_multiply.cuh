// Multiply: what a warpgroup keeps as the left operand of its products, and where it is in its piece.
#pragma once

#include <type_traits>

#include "joint_hopper_backward_copy.cuh"
#include "joint_hopper_backward_verbs.cuh"
#include "joint_hopper_multiply.cuh"

namespace vivit::cuda {

template <class Variant>
using BackwardTile = float[Variant::kPassing / 8][4];  // [64 kept rows, kPassing]
template <class Variant>
using RoundedTile = uint32_t[Variant::kPassing / 16][4];  // the same as a left operand
template <class Variant>
using Passing = SlabOperand<Variant::kSteps, Variant::kPassing>;

// A slab of 16 channels, rows of 32 bytes as the copy engine swizzles them: those of 64 and of 128 bytes lie as rows of
// shared_rows.cuh do anyway.
template <>
struct Pitch<1> {
    static constexpr int kBytes = 32;
    static VIVIT_DEVICE int32_t place(int32_t row, int32_t chunk) {
        return row * kBytes + 16 * (chunk ^ (row / 4 % 2));
    }
    static VIVIT_DEVICE int32_t further(int32_t place, int s) { return place ^ (32 * s); }
};

// call(slab's first byte, steps before it, its own steps as a number that the compiler knows) for each slab of the kept
// rows.
template <int kSteps, class Call>
VIVIT_DEVICE void over_kept_slabs(const char* kept, const Call& call) {
    using Rows = Slabs<kSteps>;
#pragma unroll
    for (int slab = 0; slab < Rows::kWide; ++slab)
        call(kept + slab * kKeptRows * Rows::kWideBytes, 4 * slab, std::integral_constant<int, 4>());
    if constexpr (Rows::kTail > 0) {
        call(kept + Rows::kWide * kKeptRows * Rows::kWideBytes, 4 * Rows::kWide,
             std::integral_constant<int, Rows::kTail>());
    }
}

// sum(do * o) of a query, four neighbouring lanes to one: o in memory, do kept in row `row`.
template <class T, int kSteps>
VIVIT_DEVICE float delta_of_kept_row(const char* o, bool there, const char* kept, int32_t row, int32_t D) {
    float delta = 0.f;
    over_kept_slabs<kSteps>(kept, [&](const char* rows, int before, auto steps) {
        const int32_t left = D - 16 * before, channels = 16 * decltype(steps)::value;
        delta += delta_of_row<T, decltype(steps)::value>(o + 32 * before, there, rows, row, min(left, channels));
    });
    return delta;
}

// A warp's 16 of the kept rows, from `first` on, in registers: products then read only what passes by from shared
// memory, which would else be as busy as the tensor cores.
template <int kSteps>
struct HeldRows {
    uint32_t of[kSteps][4];

    VIVIT_DEVICE HeldRows(const char* kept, int32_t first) {
        over_kept_slabs<kSteps>(kept, [&](const char* rows, int before, auto steps) {
            constexpr int kOwn = decltype(steps)::value;
            const Operand<kOwn> slab(rows + first * Pitch<kOwn>::kBytes);
#pragma unroll
            for (int i = 0; i < 4 * kOwn; ++i) of[before + i / 4][i % 4] = slab.of[i / 4][i % 4];
        });
    }
};

// The warpgroup's 64, where they lie.
template <int kSteps>
struct LyingRows : SlabOperand<kSteps, kKeptRows> {
    VIVIT_DEVICE LyingRows(const char* kept, int32_t first)
        : SlabOperand<kSteps, kKeptRows>(kept, first / kHalfRows * kHalfRows) {}
};

template <class Variant, int kTensor>
using KeptRows = std::conditional_t<(kTensor < Variant::kHeld), HeldRows<Variant::kSteps>, LyingRows<Variant::kSteps>>;

// As start_across of joint_hopper_multiply.cuh.
template <class T, int kSteps, int32_t kRows>
VIVIT_DEVICE void start_across(float (&x)[kRows / 8][4], const HeldRows<kSteps>& a,
                               const SlabOperand<kSteps, kRows>& b) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) group_across_step<T, kRows>(x, a.of[s], b.step(s), s > 0);
}

// What a warpgroup needs wherever it is.
template <class Variant>
struct BackwardGroup {
    const JointHopperBackward& call;
    const BackwardMemory<Variant>& memory;
    int32_t rows;  // the warp's first among the kept ones
    float unit;
    Dropout dropout;

    using Ring = RingPlace<BackwardMemory<Variant>::kStages>;

    VIVIT_DEVICE BackwardGroup(const JointHopperBackward& of, const BackwardMemory<Variant>& shared)
        : call(of),
          memory(shared),
          rows(static_cast<int32_t>(threadIdx.x) / 32 * 16 - kHalfRows),
          unit(of.p.scale * kLog2E),
          dropout(Variant::kPlain ? AttentionOptions() : static_cast<const AttentionOptions&>(of.p)) {}

    // A kept tensor is not read any more where it lies: the next piece's may come. Lanes have read it themselves, and
    // the copy engine knows of that only by a fence (PTX manual, proxies).
    VIVIT_DEVICE void has_kept() const {
        group_fence();
        warp_barrier();
        release(memory.kept_empty);
    }
    // At the begin of a piece, and at its end.
    VIVIT_DEVICE void loaded_kept() const {
        if (Variant::kHeld == 2) has_kept();
    }
    VIVIT_DEVICE void multiplied_kept() const {
        if (Variant::kHeld < 2) has_kept();
    }

    VIVIT_DEVICE Passing<Variant> passing(const Ring& at, int32_t tensor) const {
        return Passing<Variant>(memory.passing(at.stage, tensor));
    }
    VIVIT_DEVICE void wait(const Ring& at) const { phase_wait(memory.full + at.stage, at.parity); }
    VIVIT_DEVICE void done(const Ring& at) const { release(memory.empty + at.stage); }
};

// Gradients of the warp's rows of q or k, as they were before they were turned.
template <class T, class Variant>
VIVIT_DEVICE void store_kept_gradient(const BackwardGroup<Variant>& group, const Rows& to, int32_t first, int32_t N,
                                      const RowSums<Variant::kSteps>& sums) {
    const JointParams& p = group.call.p;
    if (!Variant::kPlain && p.cos != nullptr) {
        store_turned_rows<T>(p, to, first, N, sums, group.memory.turning(group.rows / 16),
                             [](int32_t row) -> int64_t { return row; });
    } else {
        store_rows<T>(p, to, first, N, sums, p.scale, p.scale);
    }
}

}  // namespace vivit::cuda
