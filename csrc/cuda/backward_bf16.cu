#include "attention.cuh"

template int vivit::cuda::launch_attention<vivit::cuda::BFloat16, true>(const vivit::cuda::AttentionParams&, void*);
