// Copy: what the first warpgroup does, in the order in which it is computed with. Either launch of the backward has the
// same copies; only the second, whose queries pass by, has statistics.
#pragma once

#include "joint_hopper_backward_schedule.cuh"

namespace vivit::cuda {

// By one thread.
template <class Variant>
VIVIT_DEVICE void backward_copy(const JointHopperBackward& call, const BackwardMemory<Variant>& memory) {
    using Memory = BackwardMemory<Variant>;
    constexpr int kSteps = Variant::kSteps;
    const int32_t tiles = passing_tiles<Variant>(call);
    for (int i = 0; i < 2; ++i) prefetch_maps<kSteps>(call.kept[i]), prefetch_maps<kSteps>(call.passing[i]);
    RingPlace<Memory::kStages> ring;
    uint32_t before = 1;  // parity of the phase in which the last piece's rows were read
    for (uint32_t number = blockIdx.x; number < call.pieces; number += gridDim.x) {
        const JointPlace at(call.p, number, call.N_kept, kKeptRows);
        phase_wait(memory.kept_empty, before);
        phase_expect(memory.kept_full, 2 * Memory::kKeptBytes);
        for (int tensor = 0; tensor < 2; ++tensor)
            copy_boxes<kSteps, kKeptRows>(memory.kept(tensor), call.kept[tensor], memory.kept_full, at, at.first);
        before ^= 1;
        for (int32_t tile = 0; tile < tiles; ++tile, ring.advance()) {
            PhaseBarrier* full = memory.full + ring.stage;
            phase_wait(memory.empty + ring.stage, ring.parity ^ 1);
            phase_expect(full, Memory::kStageBytes);
            for (int tensor = 0; tensor < 2; ++tensor) {
                copy_boxes<kSteps, Variant::kPassing>(memory.passing(ring.stage, tensor), call.passing[tensor], full,
                                                      at, tile * Variant::kPassing);
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
template <class Variant>
VIVIT_DEVICE void backward_statistics(const JointHopperBackward& call, const BackwardMemory<Variant>& memory) {
    const int32_t tiles = passing_tiles<Variant>(call), mine = 2 * lane_number();
    RingPlace<BackwardMemory<Variant>::kStages> ring;
    for (uint32_t number = blockIdx.x; number < call.pieces; number += gridDim.x) {
        const JointPlace at(call.p, number, call.N_kept, kKeptRows);
        for (int32_t tile = 0; tile < tiles; ++tile, ring.advance()) {
            float two[4];
            load_two_statistics(two, call, at, tile * Variant::kPassing + mine);
            phase_wait(memory.empty + ring.stage, ring.parity ^ 1);
            if (mine < Variant::kPassing)
                write_four(&memory.statistics[ring.stage * Variant::kPassing + mine].lse, two);
            warp_barrier();
            release(memory.full + ring.stage);
        }
    }
}

}  // namespace vivit::cuda
