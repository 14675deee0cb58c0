// How a launch is cut, and why: from what its kernel takes of a multiprocessor. By Little's law memory is busy while
// bandwidth x latency bytes are on their way. An H200 moves 4.25 TB/s (its copy as measured); 1 us from asking to
// having, which is taken and not measured, makes that 32 KB in each of its 132 multiprocessors. An H100 (3.0 TB/s)
// needs 23 KB, an A100 (1.9 TB/s, 108) 18 KB.
//
// Packed sequences need no stages. A warp asks for all of its rows at once (zero_behind), 6 KB of q, k and v of 16 x 64
// and of a backward 8 KB with do, and by their registers 24 (of a backward 16) warps share a multiprocessor of sm_90:
// 144 (128) KB, so that memory is busy if a warp waits for it during a quarter of its time. `python -m bench cuda_gate`
// counts both from the machine code, of every head size. Stages in shared memory would take each row through it, with
// a barrier beside, for nothing that is missing.
//
// Sequences of 17 to 32 tokens stay in shared memory: of 64 channels a block of three asks for 37 KB of a forward while
// another block computes (128 registers, two blocks), and a second stage for 34 KB of a backward (193 registers, one
// block): each the 32 KB that keep memory busy. In registers a warp would have 96 words a lane of a forward's rows and
// 128 of a backward's beside its scores and sums, which packed_attention of 16 tokens takes 32 and 55 registers for: by
// 12 and 8 warps 144 and 128 KB on their way, for the same bytes and products. From 80 channels on a backward's rows
// alone are 160 words and more, with no room for its sums. That is counted (nvcc 13.0, sm_90), not timed.
//
// Resident sequences do where registers leave room for one block: nothing is on its way while it computes. Where they
// leave room for two, one copies while the other computes.
#pragma once

#include "resident.cuh"

namespace vivit::cuda {

constexpr int32_t kInFlight = 32 << 10;  // bytes, of a multiprocessor
constexpr int32_t kReserved = 1 << 10;   // bytes of shared memory that the system takes in every block

// Stages of a launch over one axis, whose block computes alone: the fewest with which enough is on its way meanwhile,
// or as many as fit. most: bytes that a block may have of shared memory, which is all that there is but for what the
// system takes.
template <int kSteps, bool kBackward>
VIVIT_BOTH int32_t stages_of(const Layout<kSteps, kBackward>& layout, bool rotary, int32_t most) {
    int32_t stages = 1;
    while (stages < kMostStages && (stages - 1) * layout.before_scratch() < kInFlight &&
           layout.bytes(rotary, stages + 1) <= most) {
        ++stages;
    }
    return stages;
}

// Blocks of such a launch: as many as shared memory has room for at a time, each of which takes some of the axis in
// turn. Registers may allow fewer; the others then come when the first are done.
template <int kSteps, bool kBackward>
VIVIT_BOTH int64_t blocks_in_stages(const Layout<kSteps, kBackward>& layout, bool rotary, int32_t most, int32_t stages,
                                    int32_t multiprocessors) {
    return int64_t(multiprocessors) * ((most + kReserved) / (layout.bytes(rotary, stages) + kReserved));
}

}  // namespace vivit::cuda
