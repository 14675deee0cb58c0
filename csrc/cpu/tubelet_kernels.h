// Tubelet embedding: the entry points of one instruction set.
#pragma once

#include "tubelet_backward.h"
#include "tubelet_forward.h"

namespace vivit::cpu::VIVIT_ISA {

template <template <class, class> class Kernel>
struct TubeletEntry {
    static int64_t shared_bytes(const TubeletParams& p) {
        return with_kernel<Kernel>(p.dtype, [&](auto kernel) { return decltype(kernel)::Type::shared_bytes(p); });
    }
    static int64_t pack_units(const TubeletParams& p) {
        return with_kernel<Kernel>(p.dtype, [&](auto kernel) { return decltype(kernel)::Type::pack_units(p); });
    }
    static void pack(const TubeletParams& p, int64_t first, int64_t end) {
        with_kernel<Kernel>(p.dtype, [&](auto kernel) { decltype(kernel)::Type::pack(p, first, end); });
    }
    static int64_t units(const TubeletParams& p) {
        return with_kernel<Kernel>(p.dtype, [&](auto kernel) { return decltype(kernel)::Type::units(p); });
    }
    static void run(const TubeletParams& p, int64_t first, int64_t end) {
        with_kernel<Kernel>(p.dtype, [&](auto kernel) { decltype(kernel)::Type::run(p, first, end); });
    }

    static constexpr TubeletWork kWork = {shared_bytes, {pack_units, units}, {pack, run}};
};

extern const TubeletKernels kTubelets;
const TubeletKernels kTubelets = {TubeletEntry<TubeletForward>::kWork, TubeletEntry<WeightGradient>::kWork,
                                  TubeletEntry<VideoGradient>::kWork};

}  // namespace vivit::cpu::VIVIT_ISA
