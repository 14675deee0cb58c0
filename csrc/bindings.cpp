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

#include "cpu/attention.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using vivit::cpu::AttentionKernels;
using vivit::cpu::AttentionParams;
using vivit::cpu::Axis;
using vivit::cpu::DType;
using vivit::cpu::Grid;
using vivit::cpu::Isa;
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

const AttentionKernels& kernels_of(int64_t isa) {
    const int64_t best = static_cast<int64_t>(vivit::cpu::best_isa());
    const int64_t wanted = isa < 0 ? best : isa;
    STD_TORCH_CHECK(wanted <= best, "vivit_kernels_native: instruction set ", wanted,
                    " does not run on this processor");
    const AttentionKernels* found = vivit::cpu::attention_kernels(static_cast<Isa>(wanted));
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
    const AttentionKernels& kernels = kernels_of(isa);
    AttentionParams p = params_of(q, k, v, stats, mask, seed, cos, sin, temporal_heads, scale, softcap, dropout_p);
    p.o = output_of(o, p, p.S, "o");
    share_out(p, kernels.forward_units, kernels.forward);
}

void attention_bwd(const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& o,
                   const MaybeTensor& stats, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                   const MaybeTensor& mask, const MaybeTensor& seed, const MaybeTensor& cos, const MaybeTensor& sin,
                   int64_t temporal_heads, double scale, double softcap, double dropout_p, int64_t isa) {
    const AttentionKernels& kernels = kernels_of(isa);
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
}

STABLE_TORCH_LIBRARY_IMPL(vivit_kernels_native, CompositeExplicitAutograd, m) {
    m.impl("best_isa", TORCH_BOX(&best_isa));
    m.impl("resident_keys", TORCH_BOX(&resident_keys));
    m.impl("poison_scratch", TORCH_BOX(&poison_scratch));
}

STABLE_TORCH_LIBRARY_IMPL(vivit_kernels_native, CPU, m) {
    m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
    m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}
