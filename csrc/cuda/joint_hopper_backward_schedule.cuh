// Joint attention's backward for Hopper: who does what, and when.
//
// Two launches, as on every other GPU (streaming_backward.cuh). The first keeps queries and goes over the keys, for dq
// (3 products), and leaves delta = sum(do * o) of each query behind; the second keeps keys and goes over the queries,
// for dk and dv (4 products). Each gradient is summed in registers and written once: the same bits in every run, and no
// float32 copy of dq.
//
// A block stays on its multiprocessor and takes piece after piece: 128 rows of one head of one clip, of two tensors (q
// and do, or k and v). One thread of its first warpgroup asks the copy engine for them and for the rows that pass by,
// in stages of 64; each of the two other warpgroups computes 64 of the 128. It has them in registers, as left operands:
// products then read only what passes by from shared memory, which would else be as busy as the tensor cores.
#pragma once

#include "joint_hopper_ring.cuh"
#include "joint_place.cuh"
#include "weights.cuh"

namespace vivit::cuda {

constexpr int32_t kBackwardGroups = 2, kBackwardThreads = 128 * (kBackwardGroups + 1);
constexpr int32_t kHalfRows = 64, kKeptRows = kHalfRows * kBackwardGroups, kPassingRows = 64;
constexpr int32_t kHeadBytes = 128;  // of a row: 64 channels
constexpr int32_t kHalfBytes = kHalfRows * kHeadBytes, kKeptBytes = kKeptRows * kHeadBytes;
constexpr int32_t kPassingBytes = kPassingRows * kHeadBytes, kBackwardStages = 4;

using BackwardRing = StageRing<kBackwardStages>;

// One of the two launches. The maps' boxes are 64 channels of 64 rows.
struct JointHopperBackward {
    TensorMap kept[2], passing[2];
    JointParams p;
    int32_t N_kept, N_passing;
    uint32_t pieces;  // of all heads of all clips
};

VIVIT_BOTH int32_t passing_tiles(const JointHopperBackward& call) {
    return (call.N_passing + kPassingRows - 1) / kPassingRows;
}

// A query's lse and delta, as they lie beside it: of two neighbours in 16 bytes.
struct Statistic {
    float lse, delta;
};

// Shared memory: 128 rows of two tensors, kBackwardStages of 64 rows of two others and of 64 statistics (where queries
// pass), the barriers. `full`: it has been brought. `empty`: each warp that computes has read it.
struct BackwardMemory {
    static constexpr int32_t kBarriers = 2 + 2 * kBackwardStages;
    static constexpr int32_t kStageBytes = 2 * kPassingBytes;
    static constexpr int32_t kStatisticBytes = kBackwardStages * kPassingRows * sizeof(Statistic);
    static constexpr int32_t kBytes = 2 * kKeptBytes + kBackwardStages * kStageBytes + kStatisticBytes + 8 * kBarriers;

    char* start;
    Statistic* statistics;  // [kBackwardStages][kPassingRows]
    PhaseBarrier *kept_full, *kept_empty, *full, *empty;

    VIVIT_DEVICE BackwardMemory()
        : start(shared_memory()),
          statistics(reinterpret_cast<Statistic*>(passing(kBackwardStages, 0))),
          kept_full(reinterpret_cast<PhaseBarrier*>(statistics + kBackwardStages * kPassingRows)),
          kept_empty(kept_full + 1),
          full(kept_empty + 1),
          empty(full + kBackwardStages) {}

    VIVIT_DEVICE char* kept(int32_t tensor) const { return start + tensor * kKeptBytes; }
    VIVIT_DEVICE char* passing(int32_t stage, int32_t tensor) const {
        return start + 2 * kKeptBytes + stage * kStageBytes + tensor * kPassingBytes;
    }

    // By one thread. fillers: what a stage waits for, the copies and perhaps the statistics.
    VIVIT_DEVICE void make_barriers(int32_t fillers) const {
        constexpr int32_t kWarps = 4 * kBackwardGroups;
        phase_init(kept_full, 1), phase_init(kept_empty, kWarps);
        for (int32_t i = 0; i < kBackwardStages; ++i) phase_init(full + i, fillers), phase_init(empty + i, kWarps);
        phase_fence();
    }
};

}  // namespace vivit::cuda
