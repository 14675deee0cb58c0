#include "tubelet_launch.cuh"

template int vivit::cuda::launch_weight_products<vivit::cuda::BFloat16>(const vivit::cuda::WeightGradientParams&,
                                                                        vivit::cuda::Element, int32_t, void*);
template int vivit::cuda::launch_video_products<vivit::cuda::BFloat16>(const vivit::cuda::VideoGradientParams&, void*);
