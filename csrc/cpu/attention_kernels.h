// The entry points of one instruction set: which arithmetic each dtype takes.
#pragma once

#include "backward.h"
#include "forward.h"

#define VIVIT_NAME_OF(isa) #isa
#define VIVIT_NAME(isa) VIVIT_NAME_OF(isa)

namespace vivit::cpu::VIVIT_ISA {

template <template <class, class> class Kernel>
struct Entry {
    template <class Work>
    static auto with_types(DType dtype, Work work) {
        if (dtype == DType::kFloat32) return work(static_cast<Type<float, InFloat32>*>(nullptr));
        if (dtype == DType::kFloat16) return work(static_cast<Type<Float16, InFloat32>*>(nullptr));
#if defined(__AVX512BF16__)
        return work(static_cast<Type<BFloat16, InBFloat16>*>(nullptr));
#else
        return work(static_cast<Type<BFloat16, InFloat32>*>(nullptr));
#endif
    }

    static int64_t units(const AttentionParams& p, Axis axis) {
        return with_types(p.dtype, [&](auto* type) { return make(type, p, axis).units(); });
    }

    static void run(const AttentionParams& p, Axis axis, int64_t first, int64_t end) {
        with_types(p.dtype, [&](auto* type) { make(type, p, axis).run(first, end); });
    }

  private:
    template <class E, class Arithmetic>
    struct Type {};

    template <class E, class Arithmetic>
    static Kernel<E, Arithmetic> make(Type<E, Arithmetic>*, const AttentionParams& p, Axis axis) {
        return Kernel<E, Arithmetic>(p, axis);
    }
};

extern const AttentionKernels kAttention;
const AttentionKernels kAttention = {VIVIT_NAME(VIVIT_ISA), Entry<Forward>::units, Entry<Forward>::run,
                                     Entry<Backward>::units, Entry<Backward>::run};

}  // namespace vivit::cpu::VIVIT_ISA
