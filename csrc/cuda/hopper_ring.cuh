// What Hopper's pipelined kernels share, of either op and in either direction: stages of shared memory that come round.
#pragma once

#include "verbs_hopper.cuh"

namespace vivit::cuda {

// A stage, and the parity of the phase in which it is used this time round. Who fills it waits for the phase before,
// which of a new barrier counts as over.
template <int kStages>
struct RingPlace {
    int32_t stage = 0;
    uint32_t parity = 0;

    VIVIT_DEVICE int32_t last() const { return stage == 0 ? kStages - 1 : stage - 1; }
    VIVIT_DEVICE void advance() {
        if (++stage < kStages) return;
        stage = 0, parity ^= 1;
    }
};

// Says, for a warp, that it is done with something.
VIVIT_DEVICE void release(PhaseBarrier* empty) {
    if (static_cast<int32_t>(threadIdx.x) % 32 == 0) phase_arrive(empty);
}

}  // namespace vivit::cuda
