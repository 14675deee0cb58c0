// What the bindings of both attention ops share: tensors and options checked, the current stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>

#include "attention.h"
#include "launching.h"

namespace vivit::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kRowAlignment = 16;  // bytes; a row is read and written 16 at a time

inline const char* name_of(DType dtype) {
    return dtype == DType::kBFloat16 ? "bfloat16" : dtype == DType::kFloat16 ? "float16" : "float32";
}

// What is checked of the tensors of one call. `who` begins each message.
struct Checks {
    const char* who;
    int32_t device = 0;

    DType dtype(const Tensor& x) const {
        const ScalarType type = x.scalar_type();
        if (type == ScalarType::BFloat16) return DType::kBFloat16;
        if (type == ScalarType::Half) return DType::kFloat16;
        STD_TORCH_CHECK(type == ScalarType::Float, who, "bfloat16, float16 or float32 expected");
        return DType::kFloat32;
    }

    int32_t size(const Tensor& x, int dim) const {
        STD_TORCH_CHECK(x.size(dim) <= std::numeric_limits<int32_t>::max(), who, "dimension ", dim, " is ", x.size(dim),
                        ", 2^31 - 1 at most");
        return static_cast<int32_t>(x.size(dim));
    }

    void head_size(int32_t D) const {
        STD_TORCH_CHECK(D % 8 == 0 && D >= 16 && D <= 160, who, "head size ", D, " is not 16, 24, ..., 160");
    }

    void same_device(const Tensor& x, const char* name) const {
        STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == device, who, name, " is not on the CUDA device of q");
    }

    void aligned_rows(const Tensor& x, const char* name) const {
        const int64_t bytes = x.scalar_type() == ScalarType::Float ? 4 : 2;
        bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % kRowAlignment == 0;
        for (int i = 0; i + 1 < x.dim(); ++i) {
            aligned = aligned && (x.size(i) == 1 || x.stride(i) * bytes % kRowAlignment == 0);
        }
        STD_TORCH_CHECK(aligned, who, "rows of ", name, " do not begin at multiples of 16 bytes");
    }

    template <class T>
    T* flat(const MaybeTensor& x, ScalarType type, int64_t numel, const char* name) const {
        if (!x.has_value()) return nullptr;
        same_device(*x, name);
        const bool fits = x->scalar_type() == type && x->numel() == numel && x->is_contiguous();
        STD_TORCH_CHECK(fits, who, name, " must be contiguous, of ", numel, " elements");
        return static_cast<T*>(x->data_ptr());
    }

    // All options but lse. keys: of all clips together; positions: rows of the tables of angles.
    void options(AttentionOptions& p, const MaybeTensor& mask, const MaybeTensor& seed, const MaybeTensor& cos,
                 const MaybeTensor& sin, int64_t keys, int64_t positions, double scale, double softcap,
                 double dropout_p) const {
        p.mask = flat<const bool>(mask, ScalarType::Bool, keys, "mask");
        p.cos = flat<const float>(cos, ScalarType::Float, positions * (p.D / 2), "cos");
        p.sin = flat<const float>(sin, ScalarType::Float, positions * (p.D / 2), "sin");
        STD_TORCH_CHECK((p.cos == nullptr) == (p.sin == nullptr), who, "cos without sin");
        p.scale = static_cast<float>(scale), p.softcap = static_cast<float>(softcap);
        p.seed = flat<const int64_t>(seed, ScalarType::Long, 2, "seed");
        if (p.seed != nullptr) set_dropout(p, dropout_p);
    }

    void* current_stream() const {
        void* stream = nullptr;
        const char* why = find_current_stream(device, &stream);
        STD_TORCH_CHECK(why == nullptr, who, why);
        return stream;
    }
};

}  // namespace vivit::cuda
