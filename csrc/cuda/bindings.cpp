// What PyTorch sees of the CUDA attention kernels, by its stable ABI, in a library that has them: checks tensors, fills
// in the kernels' parameters, launches on the current stream. It allocates nothing and waits for nothing. As in
// ../bindings.cpp, callers are this package's launchers, which have checked what users give; what is checked here keeps
// a wrong launcher from reading foreign memory.
#if defined(VIVIT_CUDA)

#include "bindings.h"

namespace {

using vivit::cuda::AttentionParams;
using vivit::cuda::Checks;
using vivit::cuda::DType;
using vivit::cuda::Grid;
using vivit::cuda::kShortTokens;
using vivit::cuda::MaybeTensor;
using vivit::cuda::ScalarType;
using vivit::cuda::Tensor;

constexpr const char* kWho = "vivit_kernels_native.cuda_attention: ";

// Tensors of one call: on one device, their sizes those of its parameters.
struct Call : Checks {
    AttentionParams params;

    Grid grid(const Tensor& x, const char* name) const {
        same_device(x, name);
        const AttentionParams& p = params;
        const bool fits = x.dim() == 5 && x.size(0) == p.B && x.size(1) == p.T && x.size(2) == p.S &&
                          x.size(3) == p.H && x.size(4) == p.D && x.stride(4) == 1 && dtype(x) == p.dtype;
        STD_TORCH_CHECK(fits, kWho, name, " is not a grid [B, T, S, H, D] of this call with unit stride along D");
        aligned_rows(x, name);
        return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
    }

    // More of either than a kernel is compiled for is refused by the launch.
    void tile(int64_t packed_warps, int64_t stages) {
        constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
        STD_TORCH_CHECK(packed_warps >= 0 && packed_warps <= kMost && stages >= 0 && stages <= kMost, kWho,
                        "packed_warps ", packed_warps, ", stages ", stages);
        params.tiling.packed_warps = static_cast<int32_t>(packed_warps);
        params.tiling.stages = static_cast<int32_t>(stages);
    }
};

Call call_of(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& lse, const MaybeTensor& mask,
             const MaybeTensor& seed, const MaybeTensor& cos, const MaybeTensor& sin, int64_t temporal_heads,
             double scale, double softcap, double dropout_p) {
    STD_TORCH_CHECK(q.is_cuda(), kWho, "q is not on a CUDA device");
    STD_TORCH_CHECK(q.dim() == 5, kWho, "q must be [B, T, S, H, D]");
    Call call{{kWho, q.get_device_index()}, {}};
    AttentionParams& p = call.params;
    p.B = call.size(q, 0), p.T = call.size(q, 1), p.S = call.size(q, 2), p.H = call.size(q, 3), p.D = call.size(q, 4);
    STD_TORCH_CHECK(p.B > 0 && p.T > 0 && p.S > 0 && p.H > 0, kWho, "an empty grid");
    const int64_t most = static_cast<int64_t>(p.B) * p.H * (p.T > p.S ? p.T : p.S);  // and blocks of a launch
    STD_TORCH_CHECK(most <= std::numeric_limits<int32_t>::max(), kWho, most, " sequences, 2^31 - 1 at most");
    call.head_size(p.D);
    STD_TORCH_CHECK(0 <= temporal_heads && temporal_heads <= p.H, kWho, "temporal_heads ", temporal_heads);
    p.temporal_heads = static_cast<int32_t>(temporal_heads);
    p.dtype = call.dtype(q);
    p.q = call.grid(q, "q"), p.k = call.grid(k, "k"), p.v = call.grid(v, "v");
    const int64_t tokens = static_cast<int64_t>(p.T) * p.S;
    p.lse = call.flat<float>(lse, ScalarType::Float, tokens * p.B * p.H, "lse");
    call.options(p, mask, seed, cos, sin, tokens * p.B, tokens, scale, softcap, dropout_p);
    return call;
}

void check_launch(int error, const AttentionParams& p, const char* direction) {
    STD_TORCH_CHECK(error == 0, "factorized_attention: the ", direction, " of backend 'cuda' did not start for q [",
                    p.B, ", ", p.T, ", ", p.S, ", ", p.H, ", ", p.D, "], ", vivit::cuda::name_of(p.dtype),
                    ", temporal_heads=", p.temporal_heads, ": ", vivit::cuda::why_not(error), "\n  (CUDA error ", error,
                    ")");
}

void attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const MaybeTensor& lse,
                   const MaybeTensor& mask, const MaybeTensor& seed, const MaybeTensor& cos, const MaybeTensor& sin,
                   int64_t temporal_heads, double scale, double softcap, double dropout_p, bool tf32,
                   int64_t packed_warps, int64_t stages) {
    Call call = call_of(q, k, v, lse, mask, seed, cos, sin, temporal_heads, scale, softcap, dropout_p);
    call.params.o = call.grid(o, "o"), call.params.tf32 = tf32;
    call.tile(packed_warps, stages);
    const torch::stable::accelerator::DeviceGuard guard(call.device);
    check_launch(vivit::cuda::launch_forward(call.params, call.current_stream()), call.params, "forward");
}

void attention_bwd(const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& o,
                   const MaybeTensor& lse, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                   const MaybeTensor& mask, const MaybeTensor& seed, const MaybeTensor& cos, const MaybeTensor& sin,
                   int64_t temporal_heads, double scale, double softcap, double dropout_p, bool tf32,
                   int64_t packed_warps, int64_t stages, const MaybeTensor& o_again) {
    Call call = call_of(q, k, v, lse, mask, seed, cos, sin, temporal_heads, scale, softcap, dropout_p);
    AttentionParams& p = call.params;
    p.tf32 = tf32;
    call.tile(packed_warps, stages);
    const bool reads_output = vivit::cuda::keeps_output(p.T, p.S, p.H, p.temporal_heads, p.dtype);
    STD_TORCH_CHECK(!reads_output || (o.has_value() && p.lse != nullptr), kWho,
                    "the backward of sequences longer than ", kShortTokens, " tokens needs o and lse");
    STD_TORCH_CHECK(!reads_output || !o_again.has_value(), kWho, "the backward of sequences longer than ", kShortTokens,
                    " tokens does not write o again");
    if (o.has_value()) p.o = call.grid(*o, "o");
    if (o_again.has_value()) p.o_again = call.grid(*o_again, "o_again");
    p.d_o = call.grid(d_o, "do"), p.dq = call.grid(dq, "dq");
    p.dk = call.grid(dk, "dk"), p.dv = call.grid(dv, "dv");
    const torch::stable::accelerator::DeviceGuard guard(call.device);
    check_launch(vivit::cuda::launch_backward(p, call.current_stream()), p, "backward");
}

// element_bytes: 4 of float32, else 2.
DType dtype_of(int64_t element_bytes) { return element_bytes == 4 ? DType::kFloat32 : DType::kBFloat16; }

int64_t regime(int64_t tokens, int64_t head_size, int64_t element_bytes, bool backward, bool rotary,
               int64_t shared_bytes) {
    return static_cast<int64_t>(vivit::cuda::regime_of(static_cast<int32_t>(tokens), static_cast<int32_t>(head_size),
                                                       dtype_of(element_bytes), backward, rotary,
                                                       static_cast<int32_t>(shared_bytes)));
}

bool keeps_output(int64_t T, int64_t S, int64_t H, int64_t temporal_heads, int64_t element_bytes) {
    return vivit::cuda::keeps_output(static_cast<int32_t>(T), static_cast<int32_t>(S), static_cast<int32_t>(H),
                                     static_cast<int32_t>(temporal_heads), dtype_of(element_bytes));
}

}  // namespace

// A name of their own: who has no CUDA library has no such op. Of every device, so that a tensor of another one is
// answered above and not by the dispatcher.
STABLE_TORCH_LIBRARY_FRAGMENT(vivit_kernels_native, m) {
    m.def(
        "cuda_regime(int tokens, int head_size, int element_bytes, bool backward, bool rotary, int shared_bytes) -> "
        "int");
    m.def("cuda_keeps_output(int T, int S, int H, int temporal_heads, int element_bytes) -> bool");
    m.def(
        "cuda_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor(a!) o, Tensor(b!)? lse, Tensor? mask, Tensor? seed, "
        "Tensor? cos, Tensor? sin, int temporal_heads, float scale, float softcap, float dropout_p, bool tf32=False, "
        "int packed_warps=0, int stages=0) -> ()");
    m.def(
        "cuda_attention_bwd(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor? o, Tensor? lse, Tensor(a!) dq, "
        "Tensor(b!) dk, Tensor(c!) dv, Tensor? mask, Tensor? seed, Tensor? cos, Tensor? sin, int temporal_heads, "
        "float scale, float softcap, float dropout_p, bool tf32=False, int packed_warps=0, int stages=0, "
        "Tensor(d!)? o_again=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vivit_kernels_native, CompositeExplicitAutograd, m) {
    m.impl("cuda_regime", TORCH_BOX(&regime));
    m.impl("cuda_keeps_output", TORCH_BOX(&keeps_output));
    m.impl("cuda_attention_fwd", TORCH_BOX(&attention_fwd));
    m.impl("cuda_attention_bwd", TORCH_BOX(&attention_bwd));
}

#endif  // VIVIT_CUDA
