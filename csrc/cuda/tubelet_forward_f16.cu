#include "tubelet_launch.cuh"

template int vivit::cuda::launch_forward_products<vivit::cuda::Float16>(const vivit::cuda::ForwardParams&,
                                                                        vivit::cuda::Element, void*);
