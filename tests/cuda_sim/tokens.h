// Tensors of joint attention as every part of the Python module gets them.
#pragma once

#include "cuda/joint.h"
#include "cuda_sim/calls.h"

namespace vivit::cuda::sim {

inline Tokens tokens(Run& run, const char* name, const View& view, bool output = false) {
    const auto& strides = std::get<3>(view);
    return {run.add(name, view, output), strides[0], strides[1], strides[2]};
}

}  // namespace vivit::cuda::sim
