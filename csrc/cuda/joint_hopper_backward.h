// Joint attention's backward by Hopper's own instructions: which calls it runs, and the launches. Torch-free.
#pragma once

#include "joint.h"

namespace vivit::cuda {

// Calls of 16 bits with heads of up to 128 channels, on sm_90, whose q, k, v and do the copy engine takes as they lie
// (tensor_map.h), with tables of angles only where there is room for q and k turned (JointParams::turned). Others, and
// those with few rows (joint.h), go to the kernels of sm_80.
bool joint_hopper_backward_runs(const JointParams& params);

// On `stream` (a cudaStream_t) of the current device; only for calls that it runs. Returns a cudaError_t.
int launch_joint_hopper_backward(const JointParams& params, void* stream);

}  // namespace vivit::cuda
