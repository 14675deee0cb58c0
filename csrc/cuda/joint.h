// What a caller of the CUDA kernels of joint attention fills in. Torch-free; joint/bindings.cpp and the host simulator
// include it.
#pragma once

#include <cstdint>

#include "attention.h"

namespace vivit::cuda {

// A tensor [B, N, H, D] of any strides (in elements) but a unit last one, each row at a multiple of 16 bytes.
struct Tokens {
    void* data = nullptr;
    int64_t stride_b = 0, stride_n = 0, stride_h = 0;
};

// Every query attends to every key of its clip. 16 bits. Tables of angles are there only where N_q = N_k.
struct JointParams : AttentionOptions {
    int32_t B = 0, H = 0;
    int32_t N_q = 0, N_k = 0;  // of q, o, d_o and dq; of k, v, dk and dv
    Tokens q, k, v;
    Tokens o;                // written by a forward, read by a backward
    Tokens d_o, dq, dk, dv;  // backward only
    void* turned = nullptr;  // [2, B, N_q, H, D] or none: written with q and k turned, if it helps
    float* delta = nullptr;  // backward only, [B, H, N_q]: sum(d_o * o) of each query, written and then read
};

// Where gradients of scores cancel, the rounding of o shows in a delta that is taken from it: with few keys, which
// leave nothing else in the sum, and in few queries, whose errors no others average out. There delta is summed from
// probabilities that are computed for it, sum(p * d_o v): 2 products more of a call that is short on one side.
constexpr int32_t kFewRows = 16;

// Of one launch, at most: a block keeps at least 64 rows.
constexpr int64_t most_joint_blocks(const JointParams& p) {
    const int64_t rows = p.N_q > p.N_k ? p.N_q : p.N_k;
    return static_cast<int64_t>(p.B) * p.H * ((rows + 63) / 64);
}

// On `stream` (a cudaStream_t) of the current device. Returns a cudaError_t, 0 for success.
int launch_joint_forward(const JointParams& params, void* stream);
int launch_joint_backward(const JointParams& params, void* stream);

}  // namespace vivit::cuda
