#include "hopper_launch.cuh"

template int vivit::cuda::launch_hopper<vivit::cuda::Float16, false>(const vivit::cuda::AttentionParams&, void*);
