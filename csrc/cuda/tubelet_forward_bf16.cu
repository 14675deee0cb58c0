#include "tubelet_launch.cuh"

template int vivit::cuda::launch_forward_products<vivit::cuda::BFloat16>(const vivit::cuda::ForwardParams&,
                                                                         vivit::cuda::Element, void*);
