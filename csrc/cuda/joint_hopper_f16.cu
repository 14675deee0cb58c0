#include "joint_hopper_launch.cuh"

template int vivit::cuda::launch_hopper_dtype<vivit::cuda::Float16, true>(const vivit::cuda::JointParams&, void*);
