#include "tubelet_hopper_video.cuh"
#include "tubelet_hopper_weights_launch.cuh"

template int vivit::cuda::launch_hopper_weights<vivit::cuda::Float16>(const vivit::cuda::HopperWeights&,
                                                                      vivit::cuda::Element, void*);
template int vivit::cuda::launch_hopper_video<vivit::cuda::Float16>(const vivit::cuda::HopperVideo&, void*);
