// What a caller of the CPU linear layer fills in, and what an instruction set has to offer. Torch-free.
#pragma once

#include "tubelet.h"

namespace vivit::cpu {

enum class Activation : int32_t { kNone = 0, kTanhGelu = 1 };

// y [M, N] = activation(x [M, K] * weight [N, K]^T + bias [N]), all in bfloat16. Elements of a row are neighbours.
struct LinearParams {
    int64_t M = 0, N = 0, K = 0;
    const void* x = nullptr;
    const void* weight = nullptr;
    const void* bias = nullptr;  // or none
    void* y = nullptr;
    int64_t x_stride = 0, weight_stride = 0, y_stride = 0;
    Activation activation = Activation::kNone;
    void* shared = nullptr;  // memory of `shared_bytes` of the call
};

using LinearWork = TwoSteps<LinearParams>;

// Of an instruction set, or null: without a matrix unit there is none, as libraries do as well.
const LinearWork* linear_kernels(Isa isa);

}  // namespace vivit::cpu
