// Joint attention's backward for Hopper: who does what, and when.
//
// Two launches, as on every other GPU (streaming_backward.cuh). The first keeps queries and goes over the keys, for dq
// (3 products), and leaves delta = sum(do * o) of each query behind; the second keeps keys and goes over the queries,
// for dk and dv (4 products). Each gradient is summed in registers and written once: the same bits in every run, and no
// float32 copy of dq.
//
// A block stays on its multiprocessor and takes piece after piece: 128 rows of one head of one clip, of two tensors (q
// and do, or k and v). One thread of its first warpgroup asks the copy engine for them and for the rows that pass by,
// in stages; each of the two other warpgroups computes 64 of the 128.
#pragma once

#include "joint_hopper_slabs.cuh"
#include "joint_place.cuh"
#include "weights.cuh"

namespace vivit::cuda {

constexpr int32_t kBackwardGroups = 2, kBackwardThreads = 128 * (kBackwardGroups + 1);
constexpr int32_t kHalfRows = 64, kKeptRows = kHalfRows * kBackwardGroups;

// What one of the two kernels is compiled for.
// kSteps: of 16 channels, that a head is padded to.  kPassing: rows to a stage, a multiple of 16.
// kHeld: of the two kept tensors, how many a warpgroup has in registers, as left operands; of the others products read
// both sides from shared memory.  kPlain: no option of the call but a positive scale.
template <int kStepsOf, int kPassingOf, int kHeldOf, bool kPlainOf>
struct BackwardVariant {
    static constexpr int kSteps = kStepsOf, kPassing = kPassingOf, kHeld = kHeldOf;
    static constexpr bool kPlain = kPlainOf;
    static_assert(kPassing % 16 == 0 && kPassing * kSteps % 32 == 0);  // stages are whole 1024 bytes
};

// One of the two launches. The maps' boxes are a slab's channels of kKeptRows rows, or of kPassing.
struct JointHopperBackward {
    SlabMaps kept[2], passing[2];
    JointParams p;
    int32_t N_kept, N_passing;
    uint32_t pieces;  // of all heads of all clips
};

template <class Variant>
VIVIT_BOTH int32_t passing_tiles(const JointHopperBackward& call) {
    return (call.N_passing + Variant::kPassing - 1) / Variant::kPassing;
}

// A query's lse and delta, as they lie beside it: of two neighbours in 16 bytes.
struct Statistic {
    float lse, delta;
};

// Shared memory: 128 rows of two tensors, kStages of kPassing rows of two others and of as many statistics (where
// queries pass), the barriers; with options room in which rows are turned back. `full`: it has been brought. `empty`:
// each warp that computes has read it.
template <class Variant>
struct BackwardMemory {
    using Rows = Slabs<Variant::kSteps>;
    static constexpr int32_t kWarps = 4 * kBackwardGroups, kMost = 227 << 10;
    static constexpr int32_t kKeptBytes = kKeptRows * Rows::kRowBytes;
    static constexpr int32_t kPassingBytes = Variant::kPassing * Rows::kRowBytes, kStageBytes = 2 * kPassingBytes;
    static constexpr int32_t kTurnedRow = kTurnedPitch<Variant::kSteps>;
    static constexpr int32_t kTurnedBytes = Variant::kPlain ? 0 : kWarps * 16 * kTurnedRow * 4;
    static constexpr int32_t kOfStage = kStageBytes + Variant::kPassing * static_cast<int32_t>(sizeof(Statistic)) + 16;
    static constexpr int32_t kFit = (kMost - 2 * kKeptBytes - kTurnedBytes - 16) / kOfStage;
    static constexpr int32_t kStages = kFit < 4 ? kFit : 4;
    static constexpr int32_t kBytes = 2 * kKeptBytes + kStages * kOfStage + 16 + kTurnedBytes;
    static_assert(kStages >= 2);

    char* start;
    Statistic* statistics;  // [kStages][kPassing]
    PhaseBarrier *kept_full, *kept_empty, *full, *empty;

    VIVIT_DEVICE BackwardMemory()
        : start(shared_memory()),
          statistics(reinterpret_cast<Statistic*>(passing(kStages, 0))),
          kept_full(reinterpret_cast<PhaseBarrier*>(statistics + kStages * Variant::kPassing)),
          kept_empty(kept_full + 1),
          full(kept_empty + 1),
          empty(full + kStages) {}

    VIVIT_DEVICE char* kept(int32_t tensor) const { return start + tensor * kKeptBytes; }
    VIVIT_DEVICE char* passing(int32_t stage, int32_t tensor) const {
        return start + 2 * kKeptBytes + stage * kStageBytes + tensor * kPassingBytes;
    }
    // Of one of the warps that compute.
    VIVIT_DEVICE float* turning(int32_t warp) const {
        return reinterpret_cast<float*>(empty + kStages) + warp * 16 * kTurnedRow;
    }

    // By one thread. fillers: what a stage waits for, the copies and perhaps the statistics.
    VIVIT_DEVICE void make_barriers(int32_t fillers) const {
        phase_init(kept_full, 1), phase_init(kept_empty, kWarps);
        for (int32_t i = 0; i < kStages; ++i) phase_init(full + i, fillers), phase_init(empty + i, kWarps);
        phase_fence();
    }
};

}  // namespace vivit::cuda
