// Products of a warpgroup for the simulator's own tests, with the mistakes that it is there to find as a choice.
#pragma once

#include "verbs.cuh"

namespace vivit::cuda::examples {

enum class GroupFault : int32_t {
    kNone,
    kNoBarrier,
    kNoFence,
    kLateFence,  // behind the barrier
    kNoBegin,
    kWritesAfterBegin,
    kNoCommit,
    kNoWait,
    kWaitsTooLittle,
    kCopiesInFlight,  // to an operand
    kWritesInFlight,  // the same, by a plain access
    kWritesRegisters,
    kScalesSums,
    kWritesTooEarly,  // after the wait, but other warps may still read
    kWarpMissing,
    kLaneMissing,
    kReturnsEarly,
    kBarrierInBranch,
    kOneThreadElsewhere,
    kWrongPhase,
    kHalfAStep,
    kReadsBeyond,
    kRunsOver  // an address of more than 14 bits
};

// Of group g of 128 threads: c = a[first_a + 64 g + ...] b[first_b + ...]^T over 64 channels, and
// d += w[64 g + ...] b[first_b + ...].
struct GroupParams {
    const uint16_t *a, *b;  // rows of 64 numbers
    const uint16_t* w;      // [64 groups, 32]
    const float* start;     // [64 groups, 64], d before
    float *c, *d;           // [64 groups, columns], [64 groups, 64]
    int32_t first_a, first_b;
    bool by_address;  // descriptors of these rows, instead of steps from those of the first
    GroupFault fault;
};

constexpr int32_t kRowsOfA = 144, kRowsOfB = 160, kGroupRowBytes = 128, kStepsAlong = 2;
constexpr int32_t kGroupBytes = (kRowsOfA + kRowsOfB) * kGroupRowBytes;

VIVIT_DEVICE void copy_swizzled(char* to, const uint16_t* from, int32_t rows) {
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < 8 * rows; i += static_cast<int32_t>(blockDim.x)) {
        const int32_t row = i / 8, chunk = i % 8;
        copy_16(to + row * kGroupRowBytes + 16 * (chunk ^ (row % 8)), from + 64 * row + 8 * chunk, true);
    }
}

VIVIT_DEVICE void prepare(const GroupParams& p) {
    copy_swizzled(shared_memory(), p.a, kRowsOfA);
    copy_swizzled(shared_memory() + kRowsOfA * kGroupRowBytes, p.b, kRowsOfB);
    copies_commit();
    copies_wait<0>();
    if (p.fault != GroupFault::kNoFence && p.fault != GroupFault::kLateFence) group_fence();
    if (p.fault != GroupFault::kNoBarrier) block_barrier();
    if (p.fault == GroupFault::kLateFence) group_fence();
}

VIVIT_DEVICE uint64_t rows_at(const GroupParams& p, const char* rows, int32_t first) {
    return p.by_address ? descriptor(rows + first * kGroupRowBytes) : descriptor(rows) + (first * kGroupRowBytes >> 4);
}

// Row and column of word or sum i of a thread, within 16 columns.
VIVIT_DEVICE int32_t group_row(int32_t thread, int32_t second) {
    return thread / 32 * 16 + thread % 32 / 4 + 8 * second;
}

// What is done to operands and sums of products that are on their way.
VIVIT_DEVICE void disturb(const GroupParams& p, float (&d)[8][4], uint32_t (&w)[4]) {
    char* row = shared_memory() + (kRowsOfA + p.first_b) * kGroupRowBytes;
    const bool chosen = threadIdx.x == 77;
    if (chosen && p.fault == GroupFault::kCopiesInFlight) copy_16(row, p.b, true);
    if (chosen && p.fault == GroupFault::kWritesInFlight) *reinterpret_cast<volatile uint16_t*>(row) ^= 1;
    if (chosen && p.fault == GroupFault::kWritesRegisters) w[2] ^= 1;
    if (chosen && p.fault == GroupFault::kScalesSums) d[3][1] *= 0.5f;
}

template <class T>
VIVIT_DEVICE void along(const GroupParams& p, uint64_t b, float (&d)[8][4]) {
    const int32_t thread = static_cast<int32_t>(threadIdx.x);
    for (int32_t step = 0; step < kStepsAlong; ++step) {
        uint32_t w[4];
        for (int32_t i = 0; i < 4; ++i) {
            const uint16_t* from = p.w + group_row(thread, i % 2) * 16 * kStepsAlong;
            w[i] = load_one(reinterpret_cast<const uint32_t*>(from + 16 * step + 8 * (i / 2) + 2 * (thread % 4)));
        }
        const bool last = step + 1 == kStepsAlong;
        if (!last || p.fault != GroupFault::kNoBegin) group_begin();
        if (last && p.fault == GroupFault::kWritesAfterBegin) d[0][0] += 1.f;
        const bool missing = (p.fault == GroupFault::kWarpMissing && thread / 32 == 2) ||
                             (p.fault == GroupFault::kLaneMissing && thread == 77);
        if (!last || !missing) group_along<T>(d, w, b + step * (16 * kGroupRowBytes >> 4));
        disturb(p, d, w);
        if (!last || p.fault != GroupFault::kNoCommit) group_commit();
        if (last && p.fault == GroupFault::kWaitsTooLittle) {
            group_wait<1>();
        } else if (p.fault != GroupFault::kNoWait) {
            group_wait<0>();
        }
    }
}

template <class T, int kColumns>
__global__ void group_products(GroupParams p) {
    const int32_t thread = static_cast<int32_t>(threadIdx.x), t = thread % 4;
    prepare(p);
    const char* rows_of_b = shared_memory() + kRowsOfA * kGroupRowBytes;
    uint64_t a = rows_at(p, shared_memory(), p.first_a + 64 * (thread / 128)), b = rows_at(p, rows_of_b, p.first_b);
    const uint64_t rows = b;
    if (p.fault == GroupFault::kReturnsEarly && thread == 37) return;
    if (p.fault == GroupFault::kBarrierInBranch && thread / 32 == 1) block_barrier();
    if (p.fault == GroupFault::kOneThreadElsewhere && thread == 77) b += 2;
    if (p.fault == GroupFault::kWrongPhase) b += 3 * kGroupRowBytes >> 4;
    if (p.fault == GroupFault::kHalfAStep) b += 1;
    if (p.fault == GroupFault::kReadsBeyond) a += (kRowsOfA + kRowsOfB - 56) * kGroupRowBytes >> 4;
    if (p.fault == GroupFault::kRunsOver) a += 1 << 14;
    float c[kColumns / 8][4], d[8][4];
    for (int32_t i = 0; i < 32; ++i)
        d[i / 4][i % 4] = load_one(p.start + group_row(thread, i % 4 / 2) * 64 + 8 * (i / 4) + 2 * t + i % 2);
    group_begin();
    for (int s = 0; s < 4; ++s) group_across_step<T, kColumns>(c, a + 2 * s, b + 2 * s, s > 0);
    group_commit();
    if (p.fault != GroupFault::kNoWait) group_wait<0>();
    if (p.fault == GroupFault::kWritesTooEarly && thread == 77)
        store_16(shared_memory() + kRowsOfA * kGroupRowBytes, {0u, 0u, 0u, 0u});
    for (int32_t i = 0; i < kColumns / 2; ++i)
        store_one(p.c + group_row(thread, i % 4 / 2) * kColumns + 8 * (i / 4) + 2 * t + i % 2, c[i / 4][i % 4]);
    along<T>(p, rows, d);
    for (int32_t i = 0; i < 32; ++i)
        store_one(p.d + group_row(thread, i % 4 / 2) * 64 + 8 * (i / 4) + 2 * t + i % 2, d[i / 4][i % 4]);
    copies_wait<0>();
}

}  // namespace vivit::cuda::examples
