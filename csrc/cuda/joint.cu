// What joint/bindings.cpp calls. The kernels are compiled elsewhere, by dtype and direction, so that it can be done
// side by side.
#include "joint.cuh"
#include "joint_hopper.h"
#include "joint_hopper_backward.h"

namespace vivit::cuda {

extern template int launch_joint<BFloat16, false>(const JointParams&, void*);
extern template int launch_joint<BFloat16, true>(const JointParams&, void*);
extern template int launch_joint<Float16, false>(const JointParams&, void*);
extern template int launch_joint<Float16, true>(const JointParams&, void*);

int launch_joint_forward(const JointParams& params, void* stream) {
    if (joint_hopper_runs(params)) return launch_joint_hopper(params, stream);
    return params.dtype == DType::kBFloat16 ? launch_joint<BFloat16, false>(params, stream)
                                            : launch_joint<Float16, false>(params, stream);
}

int launch_joint_backward(const JointParams& params, void* stream) {
    if (joint_hopper_backward_runs(params)) return launch_joint_hopper_backward(params, stream);
    return params.dtype == DType::kBFloat16 ? launch_joint<BFloat16, true>(params, stream)
                                            : launch_joint<Float16, true>(params, stream);
}

}  // namespace vivit::cuda
