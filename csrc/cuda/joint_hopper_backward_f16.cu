#include "joint_hopper_backward_launch.cuh"

template int vivit::cuda::launch_hopper_backward_dtype<vivit::cuda::Float16, true>(const vivit::cuda::JointParams&,
                                                                                   void*);
