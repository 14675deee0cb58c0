// What a caller of the CUDA attention kernels fills in. Torch-free; bindings.cpp and the host simulator include it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace vivit::cuda {

enum class DType : int32_t { kBFloat16 = 1, kFloat16 = 2, kFloat32 = 3 };

// What every attention kernel is told of a call beside its tensors [.., H, D]. Tokens are counted within their clip.
struct AttentionOptions {
    int32_t D = 0;
    DType dtype = DType::kBFloat16;
    float* lse = nullptr;        // [B, H, queries] or none: log2 of the sum of 2^score, +inf where none may be attended
    const bool* mask = nullptr;  // [B, keys] or none, true may be attended
    const float* cos = nullptr;  // [tokens, D / 2] or none
    const float* sin = nullptr;  // beside cos
    float scale = 1.f;
    float softcap = 0.f;            // 0: none
    const int64_t* seed = nullptr;  // (seed, offset) on the device, or none: no dropout
    float keep_scale = 1.f;         // 1 / (1 - p), or 0 where everything is dropped
    uint32_t keep_from = 0;         // a pair is kept iff its 32 bits are at least this
};

// No option of the call but a positive scale: kernels for that alone have nothing else compiled in.
inline bool is_plain(const AttentionOptions& p) {
    return p.scale > 0.f && p.softcap == 0.f && p.mask == nullptr && p.seed == nullptr && p.cos == nullptr;
}

// Of the probability that a pair is dropped.
inline void set_dropout(AttentionOptions& options, double p) {
    const double threshold = std::ceil(p * 4294967296.0);  // 2^32: as many pairs as there are 32-bit words
    const bool keeps_some = threshold < 4294967296.0;
    options.keep_from = keeps_some ? static_cast<uint32_t>(threshold) : std::numeric_limits<uint32_t>::max();
    options.keep_scale = keeps_some ? static_cast<float>(1 / (1 - p)) : 0.f;
}

// A tensor [B, T, S, H, D] of any strides (in elements) but a unit last one, each row at a multiple of 16 bytes.
struct Grid {
    void* data = nullptr;
    int64_t stride_b = 0, stride_t = 0, stride_s = 0, stride_h = 0;
};

// How a launch is cut; 0: the launcher chooses (tiles.cuh).
struct Tiling {
    int32_t packed_warps = 0;  // of a block of packed sequences, each with one or two of them: heads of a block
    int32_t stages = 0;        // how many blocks' sequences lie in shared memory at a time, all but one on their way
    // What the launcher counts, so that not every thread divides: blocks of sequences within frames, and along time.
    uint32_t space_blocks = 0, time_blocks = 0;
};

// Attention on the token grid: heads below temporal_heads attend over T, the others over S; a clip has T * S tokens.
struct AttentionParams : AttentionOptions {
    int32_t B = 0, T = 0, S = 0, H = 0;
    int32_t temporal_heads = 0;
    bool tf32 = false;  // of float32: products by tensor cores, of numbers rounded to the 10 bits that these take
    Grid q, k, v;
    Grid o;                // written by a forward, read by a backward where keeps_output says so
    Grid d_o, dq, dk, dv;  // backward only
    Grid o_again;          // backward that does not read o: o once more, or none
    Tiling tiling;
};

// How a sequence of N tokens is run. kPacked: in registers, a warp for one or two sequences of 16 bits. kResident: in
// shared memory, a warp for 16 rows of it, of float32 for 8. kTooLong: by another backend.
enum class Regime : int32_t { kPacked = 0, kResident = 1, kTooLong = 2 };

constexpr int kPackedTokens = 16;
// Of 16 bits; the backward of longer sequences reads o and lse.
constexpr int kShortTokens = 64;

// shared_bytes: what a block may have. A backward of 16 bits with a rotary embedding needs some more.
Regime regime_of(int32_t N, int32_t D, DType dtype, bool backward, bool rotary, int32_t shared_bytes);

// Whether the backward of such a call reads o and lse, which the forward then writes.
bool keeps_output(int32_t T, int32_t S, int32_t H, int32_t temporal_heads, DType dtype);

// One launch each, on `stream` (a cudaStream_t) of the current device; sequences that are too long are not looked for.
// Returns a cudaError_t, 0 for success.
int launch_forward(const AttentionParams& params, void* stream);
int launch_backward(const AttentionParams& params, void* stream);

}  // namespace vivit::cuda
