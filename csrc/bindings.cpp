// The one file that knows PyTorch, by its stable ABI: checks tensors, fills in the kernels' parameters, shares out the
// work. The ops are called by vivit_kernels' launchers, which have checked what users give; what is checked here keeps
// a wrong launcher from reading foreign memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <optional>

#include "cpu/linear.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using vivit::cpu::Activation;
using vivit::cpu::AttentionKernels;
using vivit::cpu::AttentionParams;
using vivit::cpu::Axis;
using vivit::cpu::DType;
using vivit::cpu::Grid;
using vivit::cpu::Isa;
using vivit::cpu::LinearParams;
using vivit::cpu::LinearWork;
using vivit::cpu::Matrix;
using vivit::cpu::Pixel;
using vivit::cpu::TubeletKernels;
using vivit::cpu::TubeletParams;
using vivit::cpu::Tubelets;
using vivit::cpu::TwoSteps;
using MaybeTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float:
            return DType::kFloat32;
        case ScalarType::BFloat16:
            return DType::kBFloat16;
        case ScalarType::Half:
            return DType::kFloat16;
        default:
            STD_TORCH_CHECK(false, "vivit_kernels_native: float32, bfloat16 or float16 expected");
    }
}

Grid grid_of(const Tensor& x, const AttentionParams& p, int64_t S, const char* name) {
    const bool fits = x.dim() == 5 && x.size(0) == p.B && x.size(1) == p.T && x.size(2) == S && x.size(3) == p.H &&
                      x.size(4) == p.D && x.stride(4) == 1 && dtype_of(x) == p.dtype && x.is_cpu();
    STD_TORCH_CHECK(fits, "vivit_kernels_native: ", name, " is not a grid [B, T, S, H, D] of this call on the CPU");
    return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// A grid that is about to be written.
Grid output_of(const Tensor& x, const AttentionParams& p, int64_t S, const char* name) {
    const Grid grid = grid_of(x, p, S, name);
    int64_t last = 0;
    for (int i = 0; i < 5; ++i) last += (x.size(i) - 1) * x.stride(i);
    if (x.numel() > 0) vivit::cpu::expect_writes(grid.data, (last + 1) * (p.dtype == DType::kFloat32 ? 4 : 2));
    return grid;
}

template <class T>
T* flat(const MaybeTensor& x, ScalarType type, int64_t numel, const char* name) {
    if (!x.has_value()) return nullptr;
    const bool fits = x->scalar_type() == type && x->numel() == numel && x->is_contiguous() && x->is_cpu();
    STD_TORCH_CHECK(fits, "vivit_kernels_native: ", name, " must be contiguous on the CPU, of ", numel, " elements");
    return static_cast<T*>(x->data_ptr());
}

AttentionParams params_of(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& stats,
                          const MaybeTensor& mask, const MaybeTensor& seed, const MaybeTensor& cos,
                          const MaybeTensor& sin, int64_t temporal_heads, double scale, double softcap,
                          double dropout_p) {
    STD_TORCH_CHECK(q.dim() == 5 && k.dim() == 5, "vivit_kernels_native: q and k must be [B, T, S, H, D]");
    AttentionParams p;
    p.B = q.size(0), p.T = q.size(1), p.S = q.size(2), p.S_k = k.size(2), p.H = q.size(3), p.D = q.size(4);
    p.temporal_heads = temporal_heads;
    p.dtype = dtype_of(q);
    STD_TORCH_CHECK(p.D % 8 == 0 && p.D >= 8 && p.D <= 160, "vivit_kernels_native: head size ", p.D,
                    " is not 8, 16, ..., 160");
    STD_TORCH_CHECK(0 <= temporal_heads && temporal_heads <= p.H, "vivit_kernels_native: temporal_heads");
    STD_TORCH_CHECK(p.S == p.S_k || (temporal_heads == 0 && p.T == 1), "vivit_kernels_native: other keys than queries");
    p.q = grid_of(q, p, p.S, "q"), p.k = grid_of(k, p, p.S_k, "k"), p.v = grid_of(v, p, p.S_k, "v");
    const int64_t tokens = p.T * p.S;
    p.stats = flat<float>(stats, ScalarType::Float, 2 * p.B * p.H * tokens, "stats");
    p.mask = flat<const bool>(mask, ScalarType::Bool, p.B * p.T * p.S_k, "mask");
    p.cos = flat<const float>(cos, ScalarType::Float, tokens * (p.D / 2), "cos");
    p.sin = flat<const float>(sin, ScalarType::Float, tokens * (p.D / 2), "sin");
    STD_TORCH_CHECK((p.cos == nullptr) == (p.sin == nullptr), "vivit_kernels_native: cos without sin");
    p.scale = scale, p.softcap = softcap;
    const int64_t* words = flat<const int64_t>(seed, ScalarType::Long, 2, "seed");
    if (words != nullptr) {
        p.dropout = true;
        p.seed = words[0], p.offset = words[1];
        p.keep_scale = dropout_p < 1 ? static_cast<float>(1 / (1 - dropout_p)) : 0.f;
        p.keep_from = static_cast<uint64_t>(std::ceil(dropout_p * 4294967296.0));
    }
    return p;
}

// find: of an op, the kernels for an instruction set.
template <class Kernels>
const Kernels& kernels_of(int64_t isa, const Kernels* (*find)(Isa)) {
    const int64_t best = static_cast<int64_t>(vivit::cpu::best_isa());
    const int64_t wanted = isa < 0 ? best : isa;
    STD_TORCH_CHECK(wanted <= best, "vivit_kernels_native: instruction set ", wanted,
                    " does not run on this processor");
    const Kernels* found = find(static_cast<Isa>(wanted));
    STD_TORCH_CHECK(found != nullptr, "vivit_kernels_native: instruction set ", wanted, " is not in this build");
    return *found;
}

template <class Units, class Work>
void share_out(const AttentionParams& p, Units units, Work work) {
    for (const Axis axis : {Axis::kTime, Axis::kSpace}) {
        const bool used = axis == Axis::kTime ? p.temporal_heads > 0 : p.temporal_heads < p.H;
        const int64_t count = used ? units(p, axis) : 0;
        torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t end) { work(p, axis, first, end); });
    }
}

void attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const MaybeTensor& stats,
                   const MaybeTensor& mask, const MaybeTensor& seed, const MaybeTensor& cos, const MaybeTensor& sin,
                   int64_t temporal_heads, double scale, double softcap, double dropout_p, int64_t isa) {
    const AttentionKernels& kernels = kernels_of(isa, vivit::cpu::attention_kernels);
    AttentionParams p = params_of(q, k, v, stats, mask, seed, cos, sin, temporal_heads, scale, softcap, dropout_p);
    p.o = output_of(o, p, p.S, "o");
    share_out(p, kernels.forward_units, kernels.forward);
}

void attention_bwd(const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& o,
                   const MaybeTensor& stats, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                   const MaybeTensor& mask, const MaybeTensor& seed, const MaybeTensor& cos, const MaybeTensor& sin,
                   int64_t temporal_heads, double scale, double softcap, double dropout_p, int64_t isa) {
    const AttentionKernels& kernels = kernels_of(isa, vivit::cpu::attention_kernels);
    AttentionParams p = params_of(q, k, v, stats, mask, seed, cos, sin, temporal_heads, scale, softcap, dropout_p);
    const bool streams = (p.temporal_heads > 0 && !vivit::cpu::is_resident(p.dtype, p.T)) ||
                         (p.temporal_heads < p.H && !vivit::cpu::is_resident(p.dtype, p.S_k));
    STD_TORCH_CHECK(!streams || (o.has_value() && p.stats != nullptr),
                    "vivit_kernels_native: the backward of long sequences needs o and stats");
    if (o.has_value()) p.o = grid_of(*o, p, p.S, "o");
    p.d_o = grid_of(d_o, p, p.S, "do"), p.dq = output_of(dq, p, p.S, "dq");
    p.dk = output_of(dk, p, p.S_k, "dk"), p.dv = output_of(dv, p, p.S_k, "dv");
    share_out(p, kernels.backward_units, kernels.backward);
}

Pixel pixel_of(const Tensor& x) {
    if (x.scalar_type() == ScalarType::Byte) return Pixel::kUInt8;
    return static_cast<Pixel>(dtype_of(x));  // numbered alike
}

// pixels [B, T, rows, columns, taps...]: a view of a video, whose last dimensions are merged to runs where they can be.
Tubelets tubelets_of(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 8 && x.is_cpu(),
                    "vivit_kernels_native: pixels must be [B, T, rows, columns, 4 of taps]");
    Tubelets cut;
    cut.pixel = pixel_of(x), cut.data = x.data_ptr();
    const int64_t size = cut.pixel == Pixel::kUInt8 ? 1 : cut.pixel == Pixel::kFloat32 ? 4 : 2;
    int64_t behind = 1;
    for (int i = 0; i < 8; ++i) behind += (x.size(i) - 1) * x.stride(i);
    cut.end = static_cast<char*>(cut.data) + behind * size;
    for (int i = 0; i < 4; ++i) cut.size[i] = x.size(i), cut.stride[i] = x.stride(i);
    int last = 7;
    for (; last >= 4 && (x.stride(last) == cut.run || x.size(last) == 1); --last) cut.run *= x.size(last);
    for (int i = 4; i <= last; ++i) cut.loops[i - 4] = x.size(i), cut.loop_stride[i - 4] = x.stride(i);
    return cut;
}

// [groups, tokens, E] of a call, of unit last stride.
void set_rows(TubeletParams& p, const Tensor& rows) {
    const bool fits = rows.dim() == 3 && rows.is_cpu() && (rows.stride(2) == 1 || rows.size(2) == 1);
    STD_TORCH_CHECK(fits, "vivit_kernels_native: tokens must be [groups, tokens, E] on the CPU, E neighbours");
    p.dtype = dtype_of(rows);
    p.rows = {rows.data_ptr(), rows.size(1), rows.stride(0), rows.stride(1)};
    p.tokens = rows.size(0) * rows.size(1), p.E = rows.size(2);
}

void set_video(TubeletParams& p, const Tensor& pixels) {
    p.video = tubelets_of(pixels);
    p.K = 1;
    for (int i = 4; i < 8; ++i) p.K *= pixels.size(i);
    int64_t tokens = 1;
    for (int i = 0; i < 4; ++i) tokens *= pixels.size(i);
    STD_TORCH_CHECK(tokens == p.tokens && tokens > 0 && p.K > 0 && p.E > 0,
                    "vivit_kernels_native: pixels and tokens do not fit, or are none");
}

void* matrix(const Tensor& x, const TubeletParams& p, const char* name) {
    const bool fits = x.dim() == 2 && x.size(0) == p.E && x.size(1) == p.K && x.is_contiguous() && x.is_cpu();
    STD_TORCH_CHECK(fits && dtype_of(x) == p.dtype, "vivit_kernels_native: ", name, " must be a contiguous [E, K]");
    return x.data_ptr();
}

// [K], and what a vector may read behind.
const float* per_tap(const MaybeTensor& x, const TubeletParams& p, const char* name) {
    return flat<const float>(x, ScalarType::Float, p.K + vivit::cpu::kTapsBehind, name);
}

void set_affine(TubeletParams& p, const MaybeTensor& pixel_scale, const MaybeTensor& pixel_shift, double factor,
                const MaybeTensor& scale, const MaybeTensor& shift) {
    p.pixel_scale = per_tap(pixel_scale, p, "pixel_scale"), p.pixel_shift = per_tap(pixel_shift, p, "pixel_shift");
    STD_TORCH_CHECK((p.pixel_scale == nullptr) == (p.pixel_shift == nullptr),
                    "vivit_kernels_native: pixel_scale without pixel_shift");
    p.factor = static_cast<float>(factor);
    p.scale = per_tap(scale, p, "scale"), p.shift = per_tap(shift, p, "shift");
}

template <class Params>
void share_out(Params& p, const TwoSteps<Params>& work) {
    const vivit::cpu::SharedMemory memory(work.shared_bytes(p));
    p.shared = memory.data();
    for (int step = 0; step < 2; ++step) {
        torch::stable::parallel_for(0, work.units[step](p), 1,
                                    [&](int64_t first, int64_t end) { work.run[step](p, first, end); });
    }
}

void tubelet_fwd(const Tensor& pixels, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& position,
                 const Tensor& out, const MaybeTensor& pixel_scale, const MaybeTensor& pixel_shift, double factor,
                 const MaybeTensor& scale, const MaybeTensor& shift, int64_t isa) {
    const TubeletKernels& kernels = kernels_of(isa, vivit::cpu::tubelet_kernels);
    TubeletParams p;
    set_rows(p, out), set_video(p, pixels);
    p.weight = matrix(weight, p, "weight");
    set_affine(p, pixel_scale, pixel_shift, factor, scale, shift);
    p.bias = flat<const float>(bias, ScalarType::Float, p.E, "bias");
    if (position.has_value()) {
        p.position_is_float = position->scalar_type() == ScalarType::Float;
        const bool fits = position->dim() == 2 && position->size(0) == p.rows.group && position->size(1) == p.E &&
                          (position->stride(1) == 1 || p.E == 1) && position->is_cpu() &&
                          (p.position_is_float || dtype_of(*position) == p.dtype);
        STD_TORCH_CHECK(fits, "vivit_kernels_native: position must be [tokens, E], float32 or as the tokens");
        p.position = position->data_ptr(), p.position_stride = position->stride(0);
    }
    const int64_t last = (out.size(0) - 1) * out.stride(0) + (out.size(1) - 1) * out.stride(1) + p.E - 1;
    vivit::cpu::expect_writes(p.rows.data, (last + 1) * (p.dtype == DType::kFloat32 ? 4 : 2));
    share_out(p, kernels.forward);
}

void tubelet_weight_gradient(const Tensor& d_out, const Tensor& pixels, const Tensor& dweight, const Tensor& sums,
                             const MaybeTensor& pixel_scale, const MaybeTensor& pixel_shift, double factor,
                             const MaybeTensor& scale, const MaybeTensor& shift, int64_t isa) {
    const TubeletKernels& kernels = kernels_of(isa, vivit::cpu::tubelet_kernels);
    TubeletParams p;
    set_rows(p, d_out), set_video(p, pixels);
    p.dweight = matrix(dweight, p, "dweight");
    p.sums = flat<float>(sums, ScalarType::Float, p.E, "sums");
    set_affine(p, pixel_scale, pixel_shift, factor, scale, shift);
    share_out(p, kernels.weight_gradient);
}

void tubelet_video_gradient(const Tensor& d_out, const Tensor& weight, const Tensor& d_pixels, const MaybeTensor& scale,
                            int64_t isa) {
    const TubeletKernels& kernels = kernels_of(isa, vivit::cpu::tubelet_kernels);
    TubeletParams p;
    set_rows(p, d_out), set_video(p, d_pixels);
    STD_TORCH_CHECK(p.video.pixel != Pixel::kUInt8, "vivit_kernels_native: uint8 has no gradient");
    p.weight = matrix(weight, p, "weight");
    p.scale = per_tap(scale, p, "scale");
    share_out(p, kernels.video_gradient);
}

// [rows, columns] in the call's dtype: one of the two dimensions has neighbours.
Matrix matrix_of(const Tensor& x, DType dtype, int64_t rows, int64_t columns, const char* name) {
    const bool fits = x.dim() == 2 && x.is_cpu() && dtype_of(x) == dtype && x.size(0) == rows && x.size(1) == columns;
    const bool straight = fits && (x.stride(1) == 1 || columns == 1), across = fits && (x.stride(0) == 1 || rows == 1);
    STD_TORCH_CHECK(straight || across, "vivit_kernels_native: ", name, " must be [", rows, ", ", columns,
                    "] of x's dtype on the CPU, elements of a row or of a column neighbours");
    return {x.data_ptr(), straight ? x.stride(0) : x.stride(1), !straight};
}

// y [M, N] = x [M, K] * weight [N, K]^T + bias [N]; either operand may be the transposed view of a tensor.
void linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& y, int64_t activation,
            int64_t isa) {
    const LinearWork& work = kernels_of(isa, vivit::cpu::linear_kernels);
    STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "vivit_kernels_native: x and weight must have two dimensions");
    STD_TORCH_CHECK(activation >= 0 && activation < vivit::cpu::kActivationCount,
                    "vivit_kernels_native: no activation ", activation);
    LinearParams p;
    p.M = x.size(0), p.K = x.size(1), p.N = weight.size(0), p.dtype = dtype_of(x);
    STD_TORCH_CHECK(p.M > 0 && p.K > 0 && p.N > 0, "vivit_kernels_native: a linear layer of nothing");
    p.x = matrix_of(x, p.dtype, p.M, p.K, "x"), p.weight = matrix_of(weight, p.dtype, p.N, p.K, "weight");
    const Matrix rows = matrix_of(y, p.dtype, p.M, p.N, "y");
    STD_TORCH_CHECK(!rows.across, "vivit_kernels_native: elements of y's rows must be neighbours");
    p.y = y.data_ptr(), p.y_stride = rows.stride;
    p.bias = flat<const void>(bias, x.scalar_type(), p.N, "bias");
    p.activation = static_cast<Activation>(activation);
    vivit::cpu::expect_writes(p.y, ((p.M - 1) * p.y_stride + p.N) * (p.dtype == DType::kFloat32 ? 4 : 2));
    share_out(p, work);
}

int64_t best_isa() { return static_cast<int64_t>(vivit::cpu::best_isa()); }

void poison_scratch(bool on) { vivit::cpu::poison_scratch(on); }

int64_t resident_keys() { return vivit::cpu::kResidentKeys; }

}  // namespace

STABLE_TORCH_LIBRARY(vivit_kernels_native, m) {
    m.def("best_isa() -> int");
    m.def("resident_keys() -> int");
    m.def("poison_scratch(bool on) -> ()");
    m.def(
        "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor(a!) o, Tensor(b!)? stats, Tensor? mask, Tensor? seed, "
        "Tensor? cos, Tensor? sin, int temporal_heads, float scale, float softcap, float dropout_p, int isa) -> ()");
    m.def(
        "attention_bwd(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor? o, Tensor? stats, Tensor(a!) dq, "
        "Tensor(b!) dk, Tensor(c!) dv, Tensor? mask, Tensor? seed, Tensor? cos, Tensor? sin, int temporal_heads, "
        "float scale, float softcap, float dropout_p, int isa) -> ()");
    m.def(
        "tubelet_fwd(Tensor pixels, Tensor weight, Tensor? bias, Tensor? position, Tensor(a!) out, "
        "Tensor? pixel_scale, Tensor? pixel_shift, float factor, Tensor? scale, Tensor? shift, int isa) -> ()");
    m.def(
        "tubelet_weight_gradient(Tensor d_out, Tensor pixels, Tensor(a!) dweight, Tensor(b!) sums, "
        "Tensor? pixel_scale, Tensor? pixel_shift, float factor, Tensor? scale, Tensor? shift, int isa) -> ()");
    m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) y, int activation, int isa) -> ()");
    m.def("tubelet_video_gradient(Tensor d_out, Tensor weight, Tensor(a!) d_pixels, Tensor? scale, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vivit_kernels_native, CompositeExplicitAutograd, m) {
    m.impl("best_isa", TORCH_BOX(&best_isa));
    m.impl("resident_keys", TORCH_BOX(&resident_keys));
    m.impl("poison_scratch", TORCH_BOX(&poison_scratch));
}

STABLE_TORCH_LIBRARY_IMPL(vivit_kernels_native, CPU, m) {
    m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
    m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
    m.impl("linear", TORCH_BOX(&linear));
    m.impl("tubelet_fwd", TORCH_BOX(&tubelet_fwd));
    m.impl("tubelet_weight_gradient", TORCH_BOX(&tubelet_weight_gradient));
    m.impl("tubelet_video_gradient", TORCH_BOX(&tubelet_video_gradient));
}
