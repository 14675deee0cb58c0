// Kernels for the simulator's own tests: each verb alone, and two small kernels that are right, with the mistakes that
// the simulator is there to find as a choice.
#pragma once

#include "verbs.cuh"
#include "verbs_tf32.cuh"

namespace vivit::cuda::examples {

// ---- one verb by one warp: registers in and out as [lanes][words] ----

enum class Verb : int32_t {
    kMultiplyAdd,
    kTransposed,
    kLoadBlocks,
    kLoadBlocksTransposed,
    kPacked,
    kUnpacked,
    kExp2,
    kFromLane,
    kAsTf32,
    kMultiplyAddTf32,
    kLanesWhere,
    kFours,         // written, a barrier, read from lane xor mask, a barrier, written again
    kFoursAtOnce,   // the same without the first barrier
    kFoursTooEarly  // without the second, and all lanes read those of lane 0, which the last lane overwrites
};

struct VerbParams {
    Verb verb;
    const uint32_t* in;  // [32][12]
    uint32_t* out;       // [32][4]
    int32_t mask;
};

template <class T>
__global__ void one_verb(VerbParams p) {
    const int32_t lane = static_cast<int32_t>(threadIdx.x);
    uint32_t word[12], result[4] = {0u, 0u, 0u, 0u};
    for (int i = 0; i < 12; ++i) word[i] = load_one(p.in + 12 * lane + i);
    if (p.verb == Verb::kMultiplyAdd) {
        float d[4];
        for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(word[6 + i]);
        const uint32_t a[4] = {word[0], word[1], word[2], word[3]};
        multiply_add<T>(d, a, word[4], word[5]);
        for (int i = 0; i < 4; ++i) result[i] = __float_as_uint(d[i]);
    } else if (p.verb == Verb::kTransposed) {
        result[0] = transposed(word[0]);
    } else if (p.verb == Verb::kLoadBlocks || p.verb == Verb::kLoadBlocksTransposed) {
        char* row = shared_memory() + 16 * (lane ^ p.mask);  // rows in another order than lanes
        store_16(row, {word[0], word[1], word[2], word[3]});
        warp_barrier();
        p.verb == Verb::kLoadBlocks ? load_blocks(result, row) : load_blocks_transposed(result, row);
    } else if (p.verb == Verb::kPacked) {
        result[0] = packed<T>(__uint_as_float(word[0]), __uint_as_float(word[1]));
    } else if (p.verb == Verb::kUnpacked) {
        const float2 both = unpacked<T>(word[0]);
        result[0] = __float_as_uint(both.x), result[1] = __float_as_uint(both.y);
    } else if (p.verb == Verb::kExp2) {
        result[0] = __float_as_uint(exp2_fast(__uint_as_float(word[0])));
    } else if (p.verb == Verb::kFromLane) {
        result[0] = __float_as_uint(from_lane_xor(__uint_as_float(word[0]), p.mask));
        result[1] = from_lane_xor(word[1], p.mask);
    } else if (p.verb == Verb::kAsTf32) {
        result[0] = as_tf32(__uint_as_float(word[0]));
    } else if (p.verb == Verb::kMultiplyAddTf32) {
        float d[4];
        for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(word[6 + i]);
        const uint32_t a[4] = {word[0], word[1], word[2], word[3]};
        multiply_add_tf32(d, a, word[4], word[5]);
        for (int i = 0; i < 4; ++i) result[i] = __float_as_uint(d[i]);
    }
    if (p.verb == Verb::kLanesWhere) result[0] = lanes_where((word[0] & 1u) != 0);
    if (p.verb >= Verb::kFours) {
        float* memory = reinterpret_cast<float*>(shared_memory());
        float x[4], y[4];
        for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(word[i]);
        write_four(memory + 4 * lane, x);
        if (p.verb != Verb::kFoursAtOnce) warp_barrier();
        read_four(y, memory + 4 * (p.verb == Verb::kFoursTooEarly ? 0 : lane ^ p.mask));
        if (p.verb != Verb::kFoursTooEarly) warp_barrier();
        if (lane == 31) write_four(memory, x);
        for (int i = 0; i < 4; ++i) result[i] = __float_as_uint(y[i]);
    }
    store_16(p.out + 4 * lane, {result[0], result[1], result[2], result[3]});
}

// ---- mistakes ----

enum class Fault : int32_t {
    kNone,
    kNoBarrier,        // a block barrier is missing
    kNoWait,           // asynchronous copies are not waited for
    kWaitsTooLittle,   // for one group fewer than needed
    kWrongLane,        // a lane writes its neighbour's sums
    kBarrierInBranch,  // half of the warps pass a barrier that the others do not
    kVerbInBranch,     // half of a warp's lanes multiply
    kReturnsEarly,     // one thread leaves before a barrier
    kReadsBeyond,      // a row too many of a tensor
    kMisaligned,       // a 16-byte access at 8
    kSharedBeyond,     // a write through a pointer behind shared memory
    kCopyBeyond,       // a copy behind shared memory
    kWritesInput,
    kWritesTwice,
    kNoWarpBarrier  // a plain exchange through shared memory within a warp without a barrier
};

// ---- c [16 warps, 16] = a [16 warps, K] b [16, K]^T, in steps of 16 of K that are copied two ahead ----

struct ProductParams {
    const uint16_t *a, *b;  // rows of K numbers; b transposed
    float* c;               // [16 warps, 16]
    int32_t K;
    Fault fault;
};

constexpr int kStages = 3, kProductWarps = 4, kStageBytes = (kProductWarps + 1) * 512, kProductColumns = 16;
constexpr int kProductBytes = kStages * kStageBytes;

// A stage: 16 rows of 32 bytes for each warp, then 16 rows of b.
VIVIT_DEVICE void start_stage(const ProductParams& p, int32_t step) {
    const int32_t rows = 16 * (kProductWarps + 1), count = static_cast<int32_t>(blockDim.x);
    char* stage = shared_memory() + step % kStages * kStageBytes;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < 2 * rows; i += count) {
        const int32_t row = i / 2, half = i % 2, mine = row - 16 * kProductWarps;
        const int32_t beyond = p.fault == Fault::kReadsBeyond && row + 1 == rows ? 1 : 0;
        const uint16_t* from = mine < 0 ? p.a + row * p.K : p.b + (mine + beyond) * p.K;
        copy_16(stage + 16 * i + (p.fault == Fault::kCopyBeyond && step == 1 ? kProductBytes : 0),
                from + 16 * step + 8 * half + (p.fault == Fault::kMisaligned && i == 3 ? 4 : 0), step < p.K / 16);
    }
}

template <class T>
__global__ void product(ProductParams p) {
    const int32_t thread = static_cast<int32_t>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int32_t steps = p.K / 16;
    float d[2][4] = {};
    for (int32_t step = 0; step < kStages - 1; ++step) {
        start_stage(p, step);
        copies_commit();
    }
    for (int32_t step = 0; step < steps; ++step) {
        if (p.fault == Fault::kWaitsTooLittle) {
            copies_wait<kStages - 1>();
        } else if (p.fault != Fault::kNoWait) {
            copies_wait<kStages - 2>();
        }
        if (p.fault == Fault::kReturnsEarly && step == 1 && thread == 37) return;
        if (p.fault == Fault::kBarrierInBranch && warp % 2 == 0) block_barrier();
        if (p.fault != Fault::kNoBarrier) block_barrier();
        if (step + kStages - 1 < steps) start_stage(p, step + kStages - 1);
        copies_commit();
        const char* stage = shared_memory() + step % kStages * kStageBytes;
        uint32_t a[4], b[4];
        load_blocks(a, stage + 512 * warp + lane % 16 * 32 + lane / 16 * 16);
        load_blocks(b, stage + 512 * kProductWarps + (lane % 8 + lane / 16 * 8) * 32 + lane / 8 % 2 * 16);
        if (p.fault == Fault::kVerbInBranch && lane < 16) multiply_add<T>(d[0], a, b[0], b[1]);
        if (p.fault != Fault::kVerbInBranch) multiply_add<T>(d[0], a, b[0], b[1]);
        multiply_add<T>(d[1], a, b[2], b[3]);
    }
    copies_wait<0>();
    const int32_t writes = p.fault == Fault::kWrongLane ? lane ^ 1 : lane;
    for (int n = 0; n < 2; ++n) {
        for (int i = 0; i < 4; ++i) {
            const int32_t row = 16 * warp + writes / 4 + 8 * (i / 2), column = 8 * n + 2 * (writes % 4) + i % 2;
            store_one(p.c + row * kProductColumns + column, d[n][i]);
        }
    }
    if (p.fault == Fault::kWritesTwice && thread == 5) store_one(p.c, 0.f);
    if (p.fault == Fault::kWritesInput && thread == 5) store_16(const_cast<uint16_t*>(p.a), {0u, 0u, 0u, 0u});
}

// ---- y = 2^x / sum(2^x) of each row of x [rows, 128] through shared memory, a block for 4 rows ----

struct SoftmaxParams {
    const float* x;
    float* y;
    int32_t rows;
    Fault fault;
};

constexpr int kSoftmaxColumns = 128, kSoftmaxRows = 4, kSoftmaxBytes = kSoftmaxRows * (kSoftmaxColumns + 32) * 4;

// A warp copies its neighbour's row, so that a block barrier is needed; lanes exchange sums by plain accesses.
__global__ void softmax(SoftmaxParams p) {
    const int32_t thread = static_cast<int32_t>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int32_t row = static_cast<int32_t>(blockIdx.x) * kSoftmaxRows + warp;
    float* rows = reinterpret_cast<float*>(shared_memory());
    const int32_t next = (warp + 1) % kSoftmaxRows, copied = row - warp + next;
    const float* from = p.x + static_cast<int64_t>(copied) * kSoftmaxColumns + 4 * lane;
    copy_16(rows + next * kSoftmaxColumns + 4 * lane, copied < p.rows ? from : p.x, copied < p.rows);
    copies_commit();
    if (p.fault != Fault::kNoWait) copies_wait<0>();
    if (p.fault != Fault::kNoBarrier) block_barrier();
    float* sums = rows + kSoftmaxRows * kSoftmaxColumns + 32 * warp;
    float e[4], sum = 0.f;
    for (int i = 0; i < 4; ++i) {
        e[i] = exp2_fast(rows[warp * kSoftmaxColumns + lane + 32 * i]);
        sum += e[i];
    }
    sums[lane] = sum;
    if (p.fault != Fault::kNoWarpBarrier) warp_barrier();
    sum = 0.f;
    for (int i = 0; i < 32; ++i) sum += sums[i];
    if (p.fault == Fault::kSharedBeyond && thread == 1) rows[kSoftmaxBytes / 4 + 3] = 1.f;
    copies_wait<0>();
    if (row >= p.rows) return;
    for (int i = 0; i < 4; ++i)
        store_one(p.y + static_cast<int64_t>(row) * kSoftmaxColumns + lane + 32 * i, e[i] / sum);
}

}  // namespace vivit::cuda::examples
