// Copy: what the copying warpgroup's one thread asks for, in the order in which it is computed with.
#pragma once

#include "joint_hopper_schedule.cuh"

namespace vivit::cuda {

// Keys go by from the last tile to the first: what lies beyond the last key is hidden once, at the start.
template <class Variant>
VIVIT_DEVICE void hopper_copy_tiles(const JointHopperParams& p, const HopperMemory<Variant>& memory) {
    using Memory = HopperMemory<Variant>;
    constexpr int kSteps = Variant::kSteps, kKeys = Variant::kKeys;
    prefetch_maps<kSteps>(p.q), prefetch_maps<kSteps>(p.k), prefetch_maps<kSteps>(p.v);
    Ring ring;
    uint32_t before = 1;  // parity of the phase in which the last tile's queries were read
    const int32_t tiles = key_tiles<Variant>(p);
    for (uint32_t number = blockIdx.x; number < p.tiles; number += gridDim.x) {
        const HopperTile at(p, number, Memory::kQueries);
        for (int32_t tile = tiles - 1; tile >= 0; --tile, ring.advance()) {
            const int32_t skip = ring.stage * Memory::kKeyBytes;
            phase_wait(memory.k_empty + ring.stage, ring.parity ^ 1);
            copy_slabs<kSteps, kKeys>(memory.k + skip, p.k, memory.k_full + ring.stage, at, tile * kKeys);
            if (tile == tiles - 1) {  // behind the keys: these need not wait for the last tile's queries to be read
                phase_wait(memory.q_empty, before);
                copy_slabs<kSteps, Memory::kQueries>(memory.q, p.q, memory.q_full, at, at.first_query);
                before ^= 1;
            }
            phase_wait(memory.v_empty + ring.stage, ring.parity ^ 1);
            copy_slabs<kSteps, kKeys>(memory.v + skip, p.v, memory.v_full + ring.stage, at, tile * kKeys);
        }
    }
}

}  // namespace vivit::cuda
