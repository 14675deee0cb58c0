// Rows of a head as the copy engine brings them and products of a warpgroup take them, in either direction.
#pragma once

#include "hopper_ring.cuh"
#include "joint.h"

namespace vivit::cuda {

// Rows of kSteps x 16 channels as the copy engine brings them: slabs of 64 channels, the one behind the other, rows of
// 128 bytes; of what is left, 16 or 32 channels, one of rows of 32 or 64 bytes.
template <int kSteps>
struct Slabs {
    static constexpr int kWide = kSteps / 4, kTail = kSteps % 4, kCount = kWide + (kTail > 0 ? 1 : 0);
    static constexpr int32_t kWideBytes = 128, kTailBytes = 32 * kTail, kRowBytes = kWide * kWideBytes + kTailBytes;
    static_assert(kTail != 3);

    static constexpr int steps_of(int slab) { return slab < kWide ? 4 : kTail; }
};

// One of a call's tensors to the copy engine: (D, H, N, B), boxes of a slab's channels of some rows.
struct SlabMaps {
    TensorMap wide, tail;
};

template <int kSteps>
VIVIT_DEVICE void prefetch_maps(const SlabMaps& maps) {
    if (Slabs<kSteps>::kWide > 0) prefetch_map(maps.wide);
    if (Slabs<kSteps>::kTail > 0) prefetch_map(maps.tail);
}

// kRows rows from `first` on of head at.h of clip at.b, slab by slab; not announced to the barrier.
template <int kSteps, int32_t kRows, class Place>
VIVIT_DEVICE void copy_boxes(char* to, const SlabMaps& from, PhaseBarrier* full, const Place& at, int32_t first) {
    using Rows = Slabs<kSteps>;
#pragma unroll
    for (int slab = 0; slab < Rows::kCount; ++slab) {
        const TensorMap& map = slab < Rows::kWide ? from.wide : from.tail;
        copy_box(to + slab * kRows * Rows::kWideBytes, map, full, 64 * slab, at.h, first, at.b);
    }
}

// The same, all of them in the barrier's current phase, with one arrival.
template <int kSteps, int32_t kRows, class Place>
VIVIT_DEVICE void copy_slabs(char* to, const SlabMaps& from, PhaseBarrier* full, const Place& at, int32_t first) {
    phase_expect(full, kRows * Slabs<kSteps>::kRowBytes);
    copy_boxes<kSteps, kRows>(to, from, full, at, first);
}

}  // namespace vivit::cuda
