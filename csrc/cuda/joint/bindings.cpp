// What PyTorch sees of the CUDA kernels of joint attention, as ../bindings.cpp of those on the token grid.
#if defined(VIVIT_CUDA)

#include "../bindings.h"

#include <cstdint>
#include <limits>

#include "../joint.h"

namespace {

using vivit::cuda::Checks;
using vivit::cuda::DType;
using vivit::cuda::JointParams;
using vivit::cuda::MaybeTensor;
using vivit::cuda::ScalarType;
using vivit::cuda::Tensor;
using vivit::cuda::Tokens;

constexpr const char* kWho = "vivit_kernels_native.cuda_joint: ";

// Tensors of one call: on one device, their sizes those of its parameters.
struct Call : Checks {
    JointParams params;

    Tokens tokens(const Tensor& x, int32_t N, const char* name) const {
        same_device(x, name);
        const JointParams& p = params;
        const bool fits = x.dim() == 4 && x.size(0) == p.B && x.size(1) == N && x.size(2) == p.H && x.size(3) == p.D &&
                          x.stride(3) == 1 && dtype(x) == p.dtype;
        STD_TORCH_CHECK(fits, kWho, name, " is not [B, N, H, D] of this call with unit stride along D");
        aligned_rows(x, name);
        return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
    }

    void turns(const MaybeTensor& turned, const Tensor& q) {
        if (turned.has_value()) aligned_rows(*turned, "turned");
        params.turned = flat<void>(turned, q.scalar_type(), 2 * q.numel(), "turned");
    }
};

Call call_of(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& lse, const MaybeTensor& mask,
             const MaybeTensor& seed, const MaybeTensor& cos, const MaybeTensor& sin, double scale, double softcap,
             double dropout_p) {
    STD_TORCH_CHECK(q.is_cuda(), kWho, "q is not on a CUDA device");
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, kWho, "q and k must be [B, N, H, D]");
    Call call{{kWho, q.get_device_index()}, {}};
    JointParams& p = call.params;
    p.B = call.size(q, 0), p.N_q = call.size(q, 1), p.H = call.size(q, 2), p.D = call.size(q, 3);
    p.N_k = call.size(k, 1);
    STD_TORCH_CHECK(p.B > 0 && p.N_q > 0 && p.N_k > 0 && p.H > 0, kWho, "an empty tensor");
    call.head_size(p.D);
    p.dtype = call.dtype(q);
    STD_TORCH_CHECK(p.dtype != DType::kFloat32, kWho, "bfloat16 or float16 expected");
    const int64_t most = vivit::cuda::most_joint_blocks(p);
    STD_TORCH_CHECK(most <= std::numeric_limits<int32_t>::max(), kWho, most, " blocks, 2^31 - 1 at most");
    p.q = call.tokens(q, p.N_q, "q"), p.k = call.tokens(k, p.N_k, "k"), p.v = call.tokens(v, p.N_k, "v");
    const int64_t clips = p.B;
    p.lse = call.flat<float>(lse, ScalarType::Float, clips * p.H * p.N_q, "lse");
    STD_TORCH_CHECK(p.N_q == p.N_k || !cos.has_value(), kWho, "tables of angles for ", p.N_q, " queries and ", p.N_k,
                    " keys");
    call.options(p, mask, seed, cos, sin, clips * p.N_k, p.N_q, scale, softcap, dropout_p);
    return call;
}

void check_launch(int error, const JointParams& p, const char* direction) {
    STD_TORCH_CHECK(error == 0, "joint_attention: the ", direction, " of backend 'cuda' did not start for q [", p.B,
                    ", ", p.N_q, ", ", p.H, ", ", p.D, "], ", vivit::cuda::name_of(p.dtype), ", ", p.N_k,
                    " keys: ", vivit::cuda::why_not(error), "\n  (CUDA error ", error, ")");
}

void joint_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const MaybeTensor& lse,
               const MaybeTensor& mask, const MaybeTensor& seed, const MaybeTensor& cos, const MaybeTensor& sin,
               const MaybeTensor& turned, double scale, double softcap, double dropout_p) {
    Call call = call_of(q, k, v, lse, mask, seed, cos, sin, scale, softcap, dropout_p);
    call.params.o = call.tokens(o, call.params.N_q, "o");
    call.turns(turned, q);
    const torch::stable::accelerator::DeviceGuard guard(call.device);
    check_launch(vivit::cuda::launch_joint_forward(call.params, call.current_stream()), call.params, "forward");
}

void joint_bwd(const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse,
               const Tensor& delta, const Tensor& dq, const Tensor& dk, const Tensor& dv, const MaybeTensor& mask,
               const MaybeTensor& seed, const MaybeTensor& cos, const MaybeTensor& sin, const MaybeTensor& turned,
               double scale, double softcap, double dropout_p) {
    Call call = call_of(q, k, v, lse, mask, seed, cos, sin, scale, softcap, dropout_p);
    call.turns(turned, q);
    JointParams& p = call.params;
    p.delta = call.flat<float>(delta, ScalarType::Float, lse.numel(), "delta");
    p.o = call.tokens(o, p.N_q, "o"), p.d_o = call.tokens(d_o, p.N_q, "do"), p.dq = call.tokens(dq, p.N_q, "dq");
    p.dk = call.tokens(dk, p.N_k, "dk"), p.dv = call.tokens(dv, p.N_k, "dv");
    const torch::stable::accelerator::DeviceGuard guard(call.device);
    check_launch(vivit::cuda::launch_joint_backward(p, call.current_stream()), p, "backward");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vivit_kernels_native, m) {
    m.def(
        "cuda_joint_fwd(Tensor q, Tensor k, Tensor v, Tensor(a!) o, Tensor(b!)? lse, Tensor? mask, Tensor? seed, "
        "Tensor? cos, Tensor? sin, Tensor(c!)? turned, float scale, float softcap, float dropout_p) -> ()");
    m.def(
        "cuda_joint_bwd(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor(a!) delta, "
        "Tensor(b!) dq, Tensor(c!) dk, Tensor(d!) dv, Tensor? mask, Tensor? seed, Tensor? cos, Tensor? sin, "
        "Tensor(e!)? turned, float scale, float softcap, float dropout_p) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vivit_kernels_native, CompositeExplicitAutograd, m) {
    m.impl("cuda_joint_fwd", TORCH_BOX(&joint_fwd));
    m.impl("cuda_joint_bwd", TORCH_BOX(&joint_bwd));
}

#endif  // VIVIT_CUDA
