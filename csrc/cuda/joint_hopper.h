// Joint attention's forward by Hopper's own instructions: which calls it runs, and the launch. Torch-free.
#pragma once

#include "joint.h"

namespace vivit::cuda {

// Calls of 16 bits on sm_90 whose q, k and v the copy engine takes as they lie (tensor_map.h: strides of multiples of
// 16 bytes), with tables of angles only where there is room for q and k turned (JointParams::turned). Others, and all
// where the driver makes no maps of tensors, go to the kernels of sm_80: nobody is to fail for it.
bool joint_hopper_runs(const JointParams& params);

// On `stream` (a cudaStream_t) of the current device; only for calls that it runs. Returns a cudaError_t.
int launch_joint_hopper(const JointParams& params, void* stream);

}  // namespace vivit::cuda
