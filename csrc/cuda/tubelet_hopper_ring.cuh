// How what the copy engine brings passes through shared memory in Hopper's own kernels of tubelet_embedding: a ring of
// stages, which one thread asks for and two warpgroups multiply with.
//
// Why one warpgroup goes ahead: it stores its sums while the other still multiplies, and the other way round. The one
// behind asks for stages: of one that it has done with, the other has, too. A warp of its own for that would cost
// registers: nvcc 13.0 gives a thread of 288 no more than one of 384, 168.
//
// A block stays on its multiprocessor and takes every gridDim.x-th of `params.units` units. What these are a kernel
// says:
//
//   Unit(params, number)
//   unit.stages(params)               how many stages it takes
//   unit.copy(params, to, full, i)    asks for the i-th of them, for all bytes of a stage
#pragma once

#include "hopper_ring.cuh"
#include "tubelet_hopper_verbs.cuh"
#include "tubelet_product.cuh"

namespace vivit::cuda {

constexpr int32_t kGatherGroups = 2, kGatherThreads = 128 * kGatherGroups;
constexpr int32_t kAhead = 2;  // steps that the first warpgroup goes ahead

// Shared memory: stages, and barriers of each. `full`: the copy engine has brought it. `empty`: each warp that computes
// has multiplied with it.
template <int32_t kCount, int32_t kBytesOfStage>
struct RingMemory {
    static constexpr int32_t kStages = kCount, kStageBytes = kBytesOfStage;
    static constexpr int32_t kRingBytes = kStages * (kStageBytes + 16);  // what follows lies at a multiple of 16
    static_assert(kStageBytes % 1024 == 0);

    char* const stages;
    PhaseBarrier *const full, *const empty;

    VIVIT_DEVICE RingMemory()
        : stages(shared_memory()),
          full(reinterpret_cast<PhaseBarrier*>(stages + kStages * kStageBytes)),
          empty(full + kStages) {}

    VIVIT_DEVICE char* stage(int32_t number) const { return stages + number * kStageBytes; }
    VIVIT_DEVICE char* behind() const { return reinterpret_cast<char*>(empty + kStages); }
    // By one thread.
    VIVIT_DEVICE void make_barriers() const {
        for (int32_t i = 0; i < kStages; ++i) phase_init(full + i, 1), phase_init(empty + i, 4 * kGatherGroups);
        phase_fence();
    }
};

// What one thread asks the copy engine for, in the order in which it is multiplied with.
template <class Unit, class Params, class Memory>
struct RingCopies {
    const Params& p;
    const Memory& memory;
    int32_t number, done = 0;  // unit, and those of its stages that were asked for
    RingPlace<Memory::kStages> at;

    VIVIT_DEVICE RingCopies(const Params& params, const Memory& shared)
        : p(params), memory(shared), number(static_cast<int32_t>(blockIdx.x)) {}

    VIVIT_DEVICE void next() {
        if (number >= p.units) return;
        const Unit unit(p, number);
        PhaseBarrier* const full = memory.full + at.stage;
        phase_wait(memory.empty + at.stage, at.parity ^ 1);
        phase_expect(full, Memory::kStageBytes);
        unit.copy(p, memory.stage(at.stage), full, done);
        at.advance();
        if (++done < unit.stages(p)) return;
        done = 0, number += static_cast<int32_t>(gridDim.x);
    }
};

// A warpgroup's way round.
template <class Unit, class Params, class Memory>
struct GroupRing {
    const Memory& memory;
    int32_t ahead;  // steps left before the other warpgroup may begin
    bool copies;    // whether this thread asks for stages
    RingCopies<Unit, Params, Memory> copied;
    RingPlace<Memory::kStages> at;

    VIVIT_DEVICE GroupRing(const Params& p, const Memory& shared, int32_t group)
        : memory(shared), ahead(group == 0 ? kAhead : 0), copies(threadIdx.x == 128), copied(p, shared) {
        if (copies) {
            for (int32_t i = 0; i < Memory::kStages; ++i) copied.next();
        }
        if (group > 0) named_wait(1, kGatherThreads);
    }

    VIVIT_DEVICE void wait() const { phase_wait(memory.full + at.stage, at.parity); }
    VIVIT_DEVICE const char* stage() const { return memory.stage(at.stage); }
    VIVIT_DEVICE void advance() { at.advance(); }
    // After a step's products have started. Not by an early return, behind which nvcc 13.0 takes a warp's lanes for
    // apart: a step of the weight's gradient then has 537 instructions, not 511.
    VIVIT_DEVICE void let_other_begin() {
        if (ahead > 0) {
            --ahead;
            if (ahead == 0) named_arrive(1, kGatherThreads);
        }
    }
    // Says, for a warp, that it is done with the stage before this one, and asks for more.
    VIVIT_DEVICE void release_last() {
        release(memory.empty + at.last());
        if (copies) copied.next();
    }
};

}  // namespace vivit::cuda
