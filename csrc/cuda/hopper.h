// The resident regime with Hopper's products, as the launcher of all kernels of the token grid knows it: compiled
// elsewhere, by dtype and direction.
#pragma once

#include "attention.h"

namespace vivit::cuda {

constexpr int kLeftToWarps = -1;  // no cudaError_t

// One launch where every sequence is packed or longer than 64 tokens, kernels are there for its head size, and the copy
// engine takes its tensors: a cudaError_t. Else nothing is launched and kLeftToWarps returned.
template <class T, bool kBackward>
int launch_hopper(const AttentionParams& p, void* stream);

}  // namespace vivit::cuda
