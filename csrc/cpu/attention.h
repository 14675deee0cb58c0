// What a caller of the CPU attention kernels fills in, and what an instruction set has to offer. Torch-free.
#pragma once

#include <cstdint>

namespace vivit::cpu {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A tensor [B, T, S, H, D] of any strides (in elements) but a unit last one.
struct Grid {
    void* data = nullptr;
    int64_t stride_b = 0, stride_t = 0, stride_s = 0, stride_h = 0;
};

// Attention on the token grid: heads below temporal_heads attend over T, the others over S. Joint attention is a grid
// of one frame, which may have other keys (S_k) than queries (S).
struct AttentionParams {
    int64_t B = 0, T = 0, S = 0, S_k = 0, H = 0, D = 0;
    int64_t temporal_heads = 0;
    DType dtype = DType::kFloat32;
    Grid q, k, v, o;
    Grid d_o, dq, dk, dv;        // backward only
    float* stats = nullptr;      // [2, B, H, T * S] or none: of each query the largest score, and 1 / sum of exp
    const bool* mask = nullptr;  // [B, T * S_k] or none, true may be attended
    const float* cos = nullptr;  // [T * S, D / 2] or none
    const float* sin = nullptr;  // beside cos
    double scale = 1;
    double softcap = 0;      // 0: none
    bool dropout = false;    // the rest of this struct counts only with it
    float keep_scale = 1.f;  // 1 / (1 - p), or 0 where everything is dropped
    uint64_t keep_from = 0;  // a pair is kept iff its 32 bits are at least this; 2^32: none is
    int64_t seed = 0, offset = 0;
};

enum class Axis : int32_t { kTime = 0, kSpace = 1 };

// Sequences up to this many keys have their backward in one piece, without o and statistics of the forward. In float32
// all have: with sum(do * o) of a rounded o, a key that has nearly all the probability errs by several times what eager
// PyTorch does; that costs a fifth of the time at 3,137 keys, whose scores then leave the second-level cache.
constexpr int64_t kResidentKeys = 512;
constexpr bool is_resident(DType dtype, int64_t keys) { return dtype == DType::kFloat32 || keys <= kResidentKeys; }

// One axis of a call is a number of units of work, each independent of all others and of how they are shared out.
struct AttentionKernels {
    const char* name;
    int64_t (*forward_units)(const AttentionParams&, Axis);
    void (*forward)(const AttentionParams&, Axis, int64_t first, int64_t end);
    int64_t (*backward_units)(const AttentionParams&, Axis);
    void (*backward)(const AttentionParams&, Axis, int64_t first, int64_t end);
};

// Instruction sets in rising order; which of them are compiled in and run here is not the same everywhere.
enum class Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAvx512Amx = 4 };
constexpr int32_t kIsaCount = 5;

// The best that this processor runs.
Isa best_isa();
// Of an instruction set, or null where it is not compiled in.
const AttentionKernels* attention_kernels(Isa isa);

// 64-byte aligned memory of the calling thread, kept from call to call; its content is undefined. Throws
// std::bad_alloc.
void* thread_scratch(int64_t bytes);
// Asks for large pages in memory that is about to be written whole, if it is large: of fresh memory the first touch of
// each small page is a fault (8 clips of 16 x 196 tokens in bfloat16, output included: 26 ms without, 14 ms with).
void expect_writes(void* data, int64_t bytes);

// For tests: scratch memory is handed out full of NaN, so that what nobody wrote cannot pass.
void poison_scratch(bool on);

}  // namespace vivit::cpu
