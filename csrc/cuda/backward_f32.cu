#include "float32.cuh"

template int vivit::cuda::launch_float32<true>(const vivit::cuda::AttentionParams&, void*);
