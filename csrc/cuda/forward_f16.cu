#include "attention.cuh"

template int vivit::cuda::launch_attention<vivit::cuda::Float16, false>(const vivit::cuda::AttentionParams&, void*);
