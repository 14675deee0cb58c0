// Copies of boxes for the simulator's own tests, alone and through stages with phases, with the mistakes that it is
// there to find as a choice.
#pragma once

#include "verbs_hopper.cuh"

namespace vivit::cuda::examples {

enum class CopyFault : int32_t {
    kNone,
    kNotMade,           // a barrier is used that nobody made
    kNoPhaseFence,      // behind its making
    kNoBarrier,         // between its making and its use
    kWrongPhase,        // a consumer waits for the phase before
    kNoWait,            // a consumer does not wait
    kNoBytes,           // the producer arrives without its bytes
    kTooFewBytes,       // half of them
    kExpectsTwice,      // it arrives once more
    kNoArrival,         // a warp of consumers does not say that it is done
    kArrivesTwice,      // says it twice
    kArrivesEarly,      // before its products are done
    kProducerWrong,     // the producer waits for the phase before
    kProducerNoWait,    // or not at all
    kWrongCount,        // one warpgroup means a barrier of fewer threads
    kNoTurn,            // a warpgroup does not pass its turn on
    kNeverEmpty,        // a turn that nobody takes is left at the end
    kTooManyRegisters,  // more than were given back
    kSwizzle,           // rows are read as if they were the next ones
    kMisplaced,         // the box lies 64 bytes further
    kNoFence,           // behind what threads did by hand where a box comes next
    kEarlyFence,        // before it
    kOverwritten        // a barrier's word
};

// ---- a box, read by hand, where threads were before ----

struct BoxParams {
    TensorMap map;
    uint16_t* out;  // [rows of the box, 64]
    int32_t first[kMostDimensions], rank, rows;
    int32_t before;  // what the last thread did there: 0 nothing, 1 read a box, 2 wrote
    CopyFault fault;
};

VIVIT_DEVICE void copy_box_of(void* to, const BoxParams& p, PhaseBarrier* barrier) {
    const int32_t* c = p.first;
    if (p.rank == 2) copy_box(to, p.map, barrier, c[0], c[1]);
    if (p.rank == 3) copy_box(to, p.map, barrier, c[0], c[1], c[2]);
    if (p.rank == 4) copy_box(to, p.map, barrier, c[0], c[1], c[2], c[3]);
    if (p.rank == 5) copy_box(to, p.map, barrier, c[0], c[1], c[2], c[3], c[4]);
}

constexpr int32_t kMostBoxRows = 256, kBoxRowBytes = 128, kBoxShared = kMostBoxRows * kBoxRowBytes + 1024;

VIVIT_DEVICE void touch_before_box(const BoxParams& p, char* rows, PhaseBarrier* there) {
    const int32_t thread = static_cast<int32_t>(threadIdx.x);
    if (p.before == 1 && thread == 0) {
        phase_expect(there, p.rows * kBoxRowBytes);
        copy_box_of(rows, p, there);
    }
    block_barrier();
    if (p.before == 1) phase_wait(there, 0);
    if (p.fault == CopyFault::kEarlyFence) group_fence();
    float x[4] = {};
    if (thread == 63)
        p.before == 1 ? read_four(x, reinterpret_cast<const float*>(rows))
                      : write_four(reinterpret_cast<float*>(rows), x);
    if (p.fault != CopyFault::kNoFence && p.fault != CopyFault::kEarlyFence) group_fence();
    block_barrier();
}

__global__ void __launch_bounds__(64) one_box(const __grid_constant__ BoxParams p) {
    const int32_t thread = static_cast<int32_t>(threadIdx.x);
    char* rows = shared_memory();
    PhaseBarrier* there = reinterpret_cast<PhaseBarrier*>(rows + kMostBoxRows * kBoxRowBytes);
    if (thread == 0) {
        phase_init(there, 1);
        phase_fence();
    }
    if (p.before != 0) touch_before_box(p, rows, there);
    if (thread == 0) {
        phase_expect(there, p.rows * kBoxRowBytes);
        copy_box_of(rows + (p.fault == CopyFault::kMisplaced ? 64 : 0), p, there);
    }
    block_barrier();
    phase_wait(there, p.before == 1 ? 1 : 0);
    for (int32_t i = thread; i < 8 * p.rows; i += 64) {
        const int32_t row = i / 8, chunk = i % 8, turned = p.fault == CopyFault::kSwizzle ? row + 1 : row;
        float x[4];
        read_four(x, reinterpret_cast<const float*>(rows + row * kBoxRowBytes + 16 * (chunk ^ (turned % 8))));
        store_16(p.out + 64 * row + 8 * chunk,
                 {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])});
    }
}

// ---- c[g] = x x^T of each 64 rows x, by two warpgroups g in turn, from stages that a third one fills ----

struct StreamParams {
    TensorMap rows;  // (64, heads, N, clips), boxes of 64 of N
    float* c;        // [2, boxes, 64, 64]
    int32_t boxes, head, clip;
    CopyFault fault;
};

constexpr int32_t kStreamStages = 2, kStreamRows = 64, kStreamBytes = kStreamRows * kBoxRowBytes;
constexpr int32_t kStreamThreads = 384, kStreamShared = kStreamStages * kStreamBytes + 1024;

struct Stages {
    char* rows;
    PhaseBarrier *full, *empty;

    VIVIT_DEVICE Stages()
        : rows(shared_memory()),
          full(reinterpret_cast<PhaseBarrier*>(rows + kStreamStages * kStreamBytes)),
          empty(full + kStreamStages) {}
};

VIVIT_DEVICE void produce(const StreamParams& p, const Stages& stages) {
    registers_shrink<24>();
    if (threadIdx.x != 0) return;
    for (int32_t box = 0; box < p.boxes; ++box) {
        const int32_t stage = box % kStreamStages, round = box / kStreamStages;
        const uint32_t before = p.fault == CopyFault::kProducerWrong ? round % 2 : (round + 1) % 2;
        if (p.fault != CopyFault::kProducerNoWait) phase_wait(stages.empty + stage, before);
        if (p.fault == CopyFault::kNoBytes && box == 1) {
            phase_arrive(stages.full + stage);
        } else {
            const bool few = p.fault == CopyFault::kTooFewBytes && box == 1;
            phase_expect(stages.full + stage, few ? kStreamBytes / 2 : kStreamBytes);
            if (p.fault == CopyFault::kExpectsTwice) phase_arrive(stages.full + stage);
        }
        copy_box(stages.rows + stage * kStreamBytes, p.rows, stages.full + stage, 0, p.head, box * kStreamRows, p.clip);
    }
}

template <class T>
VIVIT_DEVICE void consume(const StreamParams& p, const Stages& stages) {
    const int32_t thread = static_cast<int32_t>(threadIdx.x), lane = thread % 32, t = thread % 4;
    const int32_t group = thread / 128, other = 3 - group;  // 1 and 2; each waits at the barrier of its own number
    if (p.fault == CopyFault::kTooManyRegisters) {
        registers_grow<256>();
    } else {
        registers_grow<240>();
    }
    if (group == 2) named_arrive(other, 256);
    for (int32_t box = 0; box < p.boxes; ++box) {
        const int32_t stage = box % kStreamStages, round = box / kStreamStages;
        const uint64_t rows = descriptor(stages.rows + stage * kStreamBytes);
        named_wait(group, p.fault == CopyFault::kWrongCount && group == 2 ? 192 : 256);
        if (p.fault != CopyFault::kNoWait)
            phase_wait(stages.full + stage, p.fault == CopyFault::kWrongPhase ? (round + 1) % 2 : round % 2);
        float c[8][4];
        group_begin();
        for (int s = 0; s < 4; ++s) group_across_step<T, 64>(c, rows + 2 * s, rows + 2 * s, s > 0);
        group_commit();
        if (p.fault != CopyFault::kNoTurn || group != 2 || box != 1) named_arrive(other, 256);
        if (p.fault == CopyFault::kArrivesEarly && lane == 0) phase_arrive(stages.empty + stage);
        group_wait<0>();
        const bool silent = p.fault == CopyFault::kNoArrival && thread / 32 == 7;
        if (lane == 0 && p.fault != CopyFault::kArrivesEarly && !silent) phase_arrive(stages.empty + stage);
        if (lane == 0 && p.fault == CopyFault::kArrivesTwice) phase_arrive(stages.empty + stage);
        float* to = p.c + ((group - 1) * p.boxes + box) * kStreamRows * kStreamRows;
        const int32_t first = thread % 128 / 32 * 16 + lane / 4;
        for (int32_t i = 0; i < 32; ++i)
            store_one(to + (first + 8 * (i % 4 / 2)) * kStreamRows + 8 * (i / 4) + 2 * t + i % 2, c[i / 4][i % 4]);
    }
    if (group == 1 && p.fault != CopyFault::kNeverEmpty) named_wait(group, 256);
}

template <class T>
__global__ void __launch_bounds__(kStreamThreads, 1) streamed(const __grid_constant__ StreamParams p) {
    const Stages stages;
    if (threadIdx.x == 0) {
        for (int32_t stage = 0; stage < kStreamStages; ++stage) {
            phase_init(stages.full + stage, 1);
            if (p.fault != CopyFault::kNotMade || stage == 0) phase_init(stages.empty + stage, 8);
        }
        if (p.fault != CopyFault::kNoPhaseFence) phase_fence();
        if (p.fault == CopyFault::kOverwritten) *reinterpret_cast<volatile uint32_t*>(stages.empty) = 7;
    }
    if (p.fault != CopyFault::kNoBarrier) block_barrier();
    if (threadIdx.x < 128) {
        produce(p, stages);
    } else {
        consume<T>(p, stages);
    }
}

}  // namespace vivit::cuda::examples
