#include "joint.cuh"

template int vivit::cuda::launch_joint<vivit::cuda::Float16, true>(const vivit::cuda::JointParams&, void*);
