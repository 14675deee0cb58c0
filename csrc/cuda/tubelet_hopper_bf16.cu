#include "tubelet_hopper_launch.cuh"

template int vivit::cuda::launch_hopper_forward<vivit::cuda::BFloat16>(const vivit::cuda::HopperForward&,
                                                                       vivit::cuda::Element, void*);
