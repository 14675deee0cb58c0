// The entry points of one instruction set: which arithmetic each dtype takes.
#pragma once

#include "forward.h"

namespace vivit::cpu::VIVIT_ISA {

// Calls work(element, arithmetic) with values of the types.
template <class Work>
auto with_types(DType dtype, Work work) {
#if defined(__AVX512BF16__)
    if (dtype == DType::kBFloat16) return work(BFloat16{}, InBFloat16{});
#else
    if (dtype == DType::kBFloat16) return work(BFloat16{}, InFloat32{});
#endif
    if (dtype == DType::kFloat16) return work(Float16{}, InFloat32{});
    return work(0.f, InFloat32{});
}

static int64_t forward_units(const AttentionParams& p, Axis axis) {
    return with_types(p.dtype, [&](auto element, auto arithmetic) {
        return Forward<decltype(element), decltype(arithmetic)>(p, axis).units();
    });
}

static void forward(const AttentionParams& p, Axis axis, int64_t first, int64_t end) {
    with_types(p.dtype, [&](auto element, auto arithmetic) {
        Forward<decltype(element), decltype(arithmetic)>(p, axis).run(first, end);
    });
}

static int64_t none(const AttentionParams&, Axis) { return 0; }
static void nothing(const AttentionParams&, Axis, int64_t, int64_t) {}
extern const AttentionKernels kAttention;
const AttentionKernels kAttention = {"x", forward_units, forward, none, nothing};

}  // namespace vivit::cpu::VIVIT_ISA
