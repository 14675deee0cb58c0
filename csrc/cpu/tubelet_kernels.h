// Tubelet embedding: the entry points of one instruction set, which arithmetic each dtype takes.
#pragma once

#include "tubelet_backward.h"
#include "tubelet_forward.h"

namespace vivit::cpu::VIVIT_ISA {

template <template <class, class> class Kernel>
struct TubeletEntry {
    static int64_t shared_bytes(const TubeletParams& p) {
        return with_kernel(p, [&](auto kernel) { return decltype(kernel)::Type::shared_bytes(p); });
    }
    static int64_t pack_units(const TubeletParams& p) {
        return with_kernel(p, [&](auto kernel) { return decltype(kernel)::Type::pack_units(p); });
    }
    static void pack(const TubeletParams& p, int64_t first, int64_t end) {
        with_kernel(p, [&](auto kernel) { decltype(kernel)::Type::pack(p, first, end); });
    }
    static int64_t units(const TubeletParams& p) {
        return with_kernel(p, [&](auto kernel) { return decltype(kernel)::Type::units(p); });
    }
    static void run(const TubeletParams& p, int64_t first, int64_t end) {
        with_kernel(p, [&](auto kernel) { decltype(kernel)::Type::run(p, first, end); });
    }

    static constexpr TubeletWork kWork = {shared_bytes, {pack_units, units}, {pack, run}};

  private:
    template <class K>
    struct Named {
        using Type = K;
    };

    template <class Work>
    static auto with_kernel(const TubeletParams& p, Work work) {
        if (p.dtype == DType::kFloat32) return work(Named<Kernel<float, InFloat32>>{});
        if (p.dtype == DType::kFloat16) return work(Named<Kernel<Float16, InFloat32>>{});
#if defined(__AVX512BF16__)
        return work(Named<Kernel<BFloat16, InBFloat16>>{});
#else
        return work(Named<Kernel<BFloat16, InFloat32>>{});
#endif
    }
};

extern const TubeletKernels kTubelets;
const TubeletKernels kTubelets = {TubeletEntry<TubeletForward>::kWork, TubeletEntry<WeightGradient>::kWork,
                                  TubeletEntry<VideoGradient>::kWork};

}  // namespace vivit::cpu::VIVIT_ISA
