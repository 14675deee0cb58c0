// What a caller of the CPU linear layer fills in, and what an instruction set has to offer. Torch-free.
#pragma once

#include "tubelet.h"

namespace vivit::cpu {

enum class Activation : int32_t { kNone = 0, kTanhGelu = 1, kGelu = 2 };
constexpr int32_t kActivationCount = 3;

// A matrix whose rows' elements are neighbours, or whose columns' are ("across").
struct Matrix {
    const void* data = nullptr;
    int64_t stride = 0;  // from row to row, or from column to column
    bool across = false;
};

// y [M, N] = activation(x [M, K] * weight [N, K]^T + bias [N]), all of one dtype. That is also a layer's input
// gradient, of a weight that lies across, and its weight gradient, of two such operands.
struct LinearParams {
    int64_t M = 0, N = 0, K = 0;
    DType dtype = DType::kFloat32;
    Matrix x, weight;
    const void* bias = nullptr;  // or none
    void* y = nullptr;
    int64_t y_stride = 0;
    Activation activation = Activation::kNone;
    void* shared = nullptr;  // memory of `shared_bytes` of the call
};

using LinearWork = TwoSteps<LinearParams>;

// Of an instruction set, or null where it is not compiled in.
const LinearWork* linear_kernels(Isa isa);

}  // namespace vivit::cpu
