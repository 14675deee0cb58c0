// What PyTorch sees of the CUDA kernels of tubelet_embedding, as ../bindings.cpp of those of attention: checks tensors,
// fills in the kernels' parameters, launches on the current stream. It allocates nothing and waits for nothing; its
// callers are this package's launchers, and what is checked here keeps a wrong one from reading foreign memory.
#if defined(VIVIT_CUDA)

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <optional>

#include "../launching.h"
#include "../tubelet.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using vivit::cuda::Element;
using vivit::cuda::Table;
using vivit::cuda::TubeletParams;
using MaybeTensor = std::optional<Tensor>;

constexpr const char* kWho = "vivit_kernels_native.cuda_tubelet: ";
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

Element element_of(const Tensor& x, const char* name) {
    switch (x.scalar_type()) {
        case ScalarType::Byte:
            return Element::kUint8;
        case ScalarType::BFloat16:
            return Element::kBFloat16;
        case ScalarType::Half:
            return Element::kFloat16;
        default:
            STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, kWho, name, " has a dtype that no kernel reads");
            return Element::kFloat32;
    }
}

// Tensors of one call: on one device, their sizes those of its parameters.
struct Call {
    TubeletParams params;
    int32_t device = 0;
    int64_t groups = 0, rows = 0;  // of tokens and class rows

    void check(bool fits, const char* name, const char* rule) const {
        STD_TORCH_CHECK(fits, kWho, name, " must be ", rule);
    }
    // Contiguous, of that many numbers, at a multiple of 16 bytes.
    void* whole(const Tensor& x, int64_t numel, Element type, const char* name) const {
        check(x.is_cuda() && x.get_device_index() == device, name, "on the CUDA device of the video");
        check(element_of(x, name) == type && x.is_contiguous() && x.numel() == numel, name,
              "contiguous, of this call's sizes and dtype");
        check(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, name, "at a multiple of 16 bytes");
        return x.data_ptr();
    }
    template <class T>
    T* maybe(const MaybeTensor& x, int64_t numel, Element type, const char* name) const {
        return x.has_value() ? static_cast<T*>(whole(*x, numel, type, name)) : nullptr;
    }
    // [count, E], in float32 or the dtype of the products.
    Table table(const MaybeTensor& x, int64_t count, const char* name) const {
        if (!x.has_value()) return {};
        const bool is_float = element_of(*x, name) == Element::kFloat32;
        const int64_t E = params.E, bytes = is_float ? 4 : 2;
        check(x->is_cuda() && x->get_device_index() == device, name, "on the CUDA device of the video");
        check(is_float || element_of(*x, name) == params.dtype, name, "of float32 or the weight's dtype");
        check(x->dim() == 2 && x->size(0) == count && x->size(1) == E && x->stride(1) == 1, name, "rows of this call");
        check(reinterpret_cast<uintptr_t>(x->data_ptr()) % 16 == 0 && (count == 1 || x->stride(0) * bytes % 16 == 0),
              name, "rows at multiples of 16 bytes");
        return {x->data_ptr(), x->stride(0), is_float};
    }
    // The gradient of such a parameter, contiguous.
    Table gradient(const MaybeTensor& x, int64_t count, const char* name) const {
        if (!x.has_value()) return {};
        const Element type = element_of(*x, name) == Element::kFloat32 ? Element::kFloat32 : params.dtype;
        return {whole(*x, count * params.E, type, name), params.E, type == Element::kFloat32};
    }
    int64_t numel() const { return groups * rows * params.E; }
    int64_t weights() const { return int64_t{params.E} * params.C * params.f * params.y * params.x; }
    int64_t operand_numel() const { return params.E * vivit::cuda::pitch_of(params); }
};

Call call_of(const Tensor& video, const Tensor& weight, const Tensor& affine, bool per_frame, bool has_class) {
    Call call;
    TubeletParams& p = call.params;
    STD_TORCH_CHECK(video.is_cuda() && video.dim() == 5, kWho, "video must be [B, C, F, Y, X] on a CUDA device");
    STD_TORCH_CHECK(weight.dim() == 5 && weight.size(1) == video.size(1), kWho, "weight must be [E, C, f, y, x]");
    call.device = video.get_device_index();
    int64_t whole[3], tubelets = video.size(0), taps = weight.size(1);
    for (int i = 0; i < 3; ++i) {
        whole[i] = weight.size(2 + i) > 0 ? video.size(2 + i) / weight.size(2 + i) : 0;
        tubelets *= whole[i], taps *= weight.size(2 + i);
    }
    const int64_t E = weight.size(0), C = weight.size(1);
    STD_TORCH_CHECK(tubelets > 0 && taps > 0 && tubelets < kMost && taps < kMost - 128 && E < kMost - 128, kWho,
                    "no tubelets, or more than 2^31");
    STD_TORCH_CHECK(E % 8 == 0 && E > 0 && C <= vivit::cuda::kMostChannels, kWho, E, " channels of ", C);
    const auto size = [](int64_t n) { return static_cast<int32_t>(n); };
    p.B = size(video.size(0)), p.C = size(C), p.E = size(E);
    p.T = size(whole[0]), p.rows = size(whole[1]), p.columns = size(whole[2]);
    p.f = size(weight.size(2)), p.y = size(weight.size(3)), p.x = size(weight.size(4));
    p.dtype = element_of(weight, "weight");
    STD_TORCH_CHECK(p.dtype == Element::kBFloat16 || p.dtype == Element::kFloat16, kWho, "weight must be of 16 bits");
    p.video = {video.data_ptr(), element_of(video, "video"),
               video.stride(0),  video.stride(1),
               video.stride(2),  video.stride(3),
               video.stride(4)};
    STD_TORCH_CHECK(p.video.type == Element::kUint8 || p.video.type == Element::kFloat32 || p.video.type == p.dtype,
                    kWho, "video must be of uint8, float32 or the weight's dtype");
    STD_TORCH_CHECK(weight.is_cuda() && weight.get_device_index() == call.device && weight.is_contiguous(), kWho,
                    "weight must be contiguous on the CUDA device of the video");
    p.weight = weight.data_ptr();
    const bool has_affine = affine.is_cpu() && affine.scalar_type() == ScalarType::Double && affine.is_contiguous() &&
                            affine.numel() == 2 * C;
    STD_TORCH_CHECK(has_affine, kWho, "affine must be float64 [2, C] on the CPU");
    const double* numbers = static_cast<const double*>(affine.data_ptr());
    for (int64_t c = 0; c < C; ++c) p.scale[c] = numbers[c], p.shift[c] = numbers[C + c];
    p.per_frame = per_frame, p.has_class = has_class;
    call.groups = per_frame ? video.size(0) * whole[0] : video.size(0);
    call.rows = whole[1] * whole[2] * (per_frame ? 1 : whole[0]) + (has_class ? 1 : 0);
    return call;
}

void set_operand(Call& call, const MaybeTensor& operand, bool backward) {
    TubeletParams& p = call.params;
    STD_TORCH_CHECK(operand.has_value() || !vivit::cuda::needs_operand(p, backward), kWho,
                    "this weight needs memory for a copy");
    p.operand = operand.has_value() ? call.whole(*operand, call.operand_numel(), p.dtype, "operand")
                                    : const_cast<void*>(p.weight);
}

void* current_stream(int32_t device) {
    void* stream = nullptr;
    const char* why = vivit::cuda::find_current_stream(device, &stream);
    STD_TORCH_CHECK(why == nullptr, kWho, why);
    return stream;
}

void check_launch(int error, const TubeletParams& p, const char* what) {
    STD_TORCH_CHECK(error == 0, "tubelet_embedding: the ", what, " of backend 'cuda' did not start for ", p.B,
                    " clips of ", p.T, "x", p.rows, "x", p.columns, " tubelets of ", p.f, "x", p.y, "x", p.x,
                    ", E=", p.E, ": ", vivit::cuda::why_not(error), "\n  (CUDA error ", error, ")");
}

void tubelet_fwd(const Tensor& video, const Tensor& weight, const MaybeTensor& operand, const MaybeTensor& bias,
                 const MaybeTensor& row, const MaybeTensor& position, const MaybeTensor& class_token, const Tensor& out,
                 const Tensor& affine, bool per_frame) {
    Call call = call_of(video, weight, affine, per_frame, class_token.has_value());
    TubeletParams& p = call.params;
    set_operand(call, operand, false);
    const bool adds = bias.has_value() || p.video.type == Element::kUint8;
    STD_TORCH_CHECK(!adds || row.has_value(), kWho, "a bias or uint8 video needs memory for a row");
    p.bias = call.table(bias, 1, "bias"), p.row = call.maybe<float>(row, p.E, Element::kFloat32, "row");
    p.position = call.table(position, call.rows, "position");
    p.class_token = call.table(class_token, 1, "class token");
    p.out = call.whole(out, call.numel(), p.dtype, "out");
    const torch::stable::accelerator::DeviceGuard guard(call.device);
    void* const stream = current_stream(call.device);
    if (p.row != nullptr || operand.has_value()) {
        check_launch(vivit::cuda::launch_tubelet_prepare(p, false, stream), p, "forward");
    }
    check_launch(vivit::cuda::launch_tubelet_forward(p, stream), p, "forward");
}

void tubelet_bwd(const Tensor& d_out, const Tensor& video, const Tensor& weight, const MaybeTensor& parts,
                 const MaybeTensor& strips, const MaybeTensor& d_weight, const MaybeTensor& d_bias,
                 const MaybeTensor& d_position, const MaybeTensor& d_class, const MaybeTensor& operand,
                 const MaybeTensor& d_video, const Tensor& affine, bool per_frame, bool has_class) {
    Call call = call_of(video, weight, affine, per_frame, has_class);
    TubeletParams& p = call.params;
    p.d_out = call.whole(d_out, call.numel(), p.dtype, "do");
    p.d_weight = call.maybe<void>(d_weight, call.weights(), p.dtype, "dweight");
    p.d_bias = call.gradient(d_bias, 1, "dbias"), p.d_position = call.gradient(d_position, call.rows, "dposition");
    p.d_class = call.gradient(d_class, 1, "dclass");
    p.splits = parts.has_value() ? static_cast<int32_t>(parts->size(0)) : 0;
    p.parts = call.maybe<float>(parts, p.splits * call.operand_numel(), Element::kFloat32, "parts");
    p.strip_count = strips.has_value() ? static_cast<int32_t>(strips->size(0)) : 0;
    p.strips = call.maybe<float>(strips, int64_t{p.strip_count} * p.E, Element::kFloat32, "strips");
    const bool shifted = d_weight.has_value() && p.video.type == Element::kUint8;
    STD_TORCH_CHECK(parts.has_value() == d_weight.has_value(), kWho, "dweight needs memory for parts");
    STD_TORCH_CHECK(strips.has_value() || !(shifted || d_bias.has_value()), kWho, "these gradients need strips");
    STD_TORCH_CHECK(vivit::cuda::no_share_is_empty(p), kWho, "a part or strip is empty");
    const torch::stable::accelerator::DeviceGuard guard(call.device);
    void* const stream = current_stream(call.device);
    if (strips.has_value() || d_position.has_value() || d_class.has_value()) {
        check_launch(vivit::cuda::launch_tubelet_row_sums(p, stream), p, "backward");
    }
    if (parts.has_value()) check_launch(vivit::cuda::launch_tubelet_weight_gradient(p, stream), p, "backward");
    if (d_weight.has_value() || d_bias.has_value()) {
        check_launch(vivit::cuda::launch_tubelet_finish(p, stream), p, "backward");
    }
    if (!d_video.has_value()) return;
    set_operand(call, operand, true);
    p.d_video = call.whole(*d_video, video.numel(), p.video.type, "dvideo");
    p.d_video_b = d_video->stride(0), p.d_video_c = d_video->stride(1);
    p.d_video_f = d_video->stride(2), p.d_video_y = d_video->stride(3);
    if (operand.has_value()) check_launch(vivit::cuda::launch_tubelet_prepare(p, true, stream), p, "backward");
    check_launch(vivit::cuda::launch_tubelet_video_gradient(p, stream), p, "backward");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vivit_kernels_native, m) {
    m.def(
        "cuda_tubelet_fwd(Tensor video, Tensor weight, Tensor(a!)? operand, Tensor? bias, Tensor(b!)? row, "
        "Tensor? position, Tensor? class_token, Tensor(c!) out, Tensor affine, bool per_frame) -> ()");
    m.def(
        "cuda_tubelet_bwd(Tensor d_out, Tensor video, Tensor weight, Tensor(a!)? parts, Tensor(b!)? strips, "
        "Tensor(c!)? d_weight, Tensor(d!)? d_bias, Tensor(e!)? d_position, Tensor(f!)? d_class, Tensor(g!)? operand, "
        "Tensor(h!)? d_video, Tensor affine, bool per_frame, bool has_class) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vivit_kernels_native, CompositeExplicitAutograd, m) {
    m.impl("cuda_tubelet_fwd", TORCH_BOX(&tubelet_fwd));
    m.impl("cuda_tubelet_bwd", TORCH_BOX(&tubelet_bwd));
}

#endif  // VIVIT_CUDA
