#include "hopper_launch.cuh"

template int vivit::cuda::launch_hopper<vivit::cuda::Float16, true>(const vivit::cuda::AttentionParams&, void*);
