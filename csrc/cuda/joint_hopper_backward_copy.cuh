// Copy: what the first warpgroup does, in the order in which it is computed with. Either launch of the backward has the
// same copies; only the second, whose queries pass by, has statistics.
#pragma once

#include "joint_hopper_backward_schedule.cuh"

namespace vivit::cuda {

// By one thread.
VIVIT_DEVICE void backward_copy(const JointHopperBackward& call, const BackwardMemory& memory) {
    const int32_t tiles = passing_tiles(call);
    for (int i = 0; i < 2; ++i) prefetch_map(call.kept[i]), prefetch_map(call.passing[i]);
    BackwardRing ring;
    uint32_t before = 1;  // parity of the phase in which the last piece's rows were read
    for (uint32_t number = blockIdx.x; number < call.pieces; number += gridDim.x) {
        const JointPlace at(call.p, number, call.N_kept, kKeptRows);
        phase_wait(memory.kept_empty, before);
        phase_expect(memory.kept_full, 2 * kKeptBytes);
        for (int tensor = 0; tensor < 2; ++tensor) {
            for (int32_t half = 0; half < kBackwardGroups; ++half) {  // the second may have none: zeros
                copy_box(memory.kept(tensor) + half * kHalfBytes, call.kept[tensor], memory.kept_full, 0, at.h,
                         at.first + half * kHalfRows, at.b);
            }
        }
        before ^= 1;
        for (int32_t tile = 0; tile < tiles; ++tile, ring.advance()) {
            phase_wait(memory.empty + ring.stage, ring.parity ^ 1);
            phase_expect(memory.full + ring.stage, BackwardMemory::kStageBytes);
            for (int tensor = 0; tensor < 2; ++tensor) {
                copy_box(memory.passing(ring.stage, tensor), call.passing[tensor], memory.full + ring.stage, 0, at.h,
                         tile * kPassingRows, at.b);
            }
        }
    }
}

// Of queries first, first + 1 those that are there; of others such that nothing comes of them.
VIVIT_DEVICE void load_two_statistics(float (&two)[4], const JointHopperBackward& call, const JointPlace& at,
                                      int32_t first) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const bool there = first + i < call.p.N_q;
        const int64_t number = at.query_number(call.p, first + i);
        two[2 * i] = there ? load_one(call.p.lse + number) : kInfinity;
        two[2 * i + 1] = there ? load_one(call.p.delta + number) : 0.f;
    }
}

// By one warp, two queries a lane. They are loaded before the wait for their place: both take their time at once.
VIVIT_DEVICE void backward_statistics(const JointHopperBackward& call, const BackwardMemory& memory) {
    const int32_t tiles = passing_tiles(call), mine = 2 * lane_number();
    BackwardRing ring;
    for (uint32_t number = blockIdx.x; number < call.pieces; number += gridDim.x) {
        const JointPlace at(call.p, number, call.N_kept, kKeptRows);
        for (int32_t tile = 0; tile < tiles; ++tile, ring.advance()) {
            float two[4];
            load_two_statistics(two, call, at, tile * kPassingRows + mine);
            phase_wait(memory.empty + ring.stage, ring.parity ^ 1);
            write_four(&memory.statistics[ring.stage * kPassingRows + mine].lse, two);
            warp_barrier();
            release(memory.full + ring.stage);
        }
    }
}

}  // namespace vivit::cuda
