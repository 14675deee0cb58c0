// What bindings.cpp calls. The kernels are compiled elsewhere, by dtype and direction, so that it can be done side by
// side.
#include "attention.cuh"
#include "float32.cuh"

namespace vivit::cuda {

extern template int launch_attention<BFloat16, false>(const AttentionParams&, void*);
extern template int launch_attention<BFloat16, true>(const AttentionParams&, void*);
extern template int launch_attention<Float16, false>(const AttentionParams&, void*);
extern template int launch_attention<Float16, true>(const AttentionParams&, void*);
extern template int launch_float32<false>(const AttentionParams&, void*);
extern template int launch_float32<true>(const AttentionParams&, void*);

namespace {

template <int kSteps>
int32_t bytes_of(int32_t N, bool backward, bool rotary) {
    return backward ? Layout<kSteps, true>(N).bytes(rotary) : Layout<kSteps, false>(N).bytes(rotary);
}

int32_t resident_bytes(int32_t N, int32_t D, bool backward, bool rotary) {
    return with_steps(D, [&](auto steps) { return bytes_of<steps>(N, backward, rotary); });
}

}  // namespace

Regime regime_of(int32_t N, int32_t D, DType dtype, bool backward, bool rotary, int32_t shared_bytes) {
    int32_t bytes = shared_bytes + 1;
    if (dtype == DType::kFloat32) {
        if (N <= 4096)
            bytes = backward ? FloatLayout<true>(N, D).least_bytes() : FloatLayout<false>(N, D).least_bytes();
    } else {
        if (is_packed(N)) return Regime::kPacked;
        if (N <= 4096) bytes = resident_bytes(N, D, backward, rotary);
    }
    return bytes <= shared_bytes ? Regime::kResident : Regime::kTooLong;
}

bool keeps_output(int32_t T, int32_t S, int32_t H, int32_t temporal_heads, DType dtype) {
    if (dtype == DType::kFloat32) return false;
    return (temporal_heads > 0 && T > kShortTokens) || (temporal_heads < H && S > kShortTokens);
}

int launch_forward(const AttentionParams& params, void* stream) {
    switch (params.dtype) {
        case DType::kBFloat16:
            return launch_attention<BFloat16, false>(params, stream);
        case DType::kFloat16:
            return launch_attention<Float16, false>(params, stream);
        default:
            return launch_float32<false>(params, stream);
    }
}

int launch_backward(const AttentionParams& params, void* stream) {
    switch (params.dtype) {
        case DType::kBFloat16:
            return launch_attention<BFloat16, true>(params, stream);
        case DType::kFloat16:
            return launch_attention<Float16, true>(params, stream);
        default:
            return launch_float32<true>(params, stream);
    }
}

}  // namespace vivit::cuda
