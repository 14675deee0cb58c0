// Attention: the entry points of one instruction set.
#pragma once

#include "backward.h"
#include "forward.h"

#define VIVIT_NAME_OF(isa) #isa
#define VIVIT_NAME(isa) VIVIT_NAME_OF(isa)

namespace vivit::cpu::VIVIT_ISA {

template <template <class, class> class Kernel>
struct Entry {
    static int64_t units(const AttentionParams& p, Axis axis) {
        return with_kernel<Kernel>(p.dtype, [&](auto one) { return typename decltype(one)::Type(p, axis).units(); });
    }
    static void run(const AttentionParams& p, Axis axis, int64_t first, int64_t end) {
        with_kernel<Kernel>(p.dtype, [&](auto one) { typename decltype(one)::Type(p, axis).run(first, end); });
    }
};

extern const AttentionKernels kAttention;
const AttentionKernels kAttention = {VIVIT_NAME(VIVIT_ISA), Entry<Forward>::units, Entry<Forward>::run,
                                     Entry<Backward>::units, Entry<Backward>::run};

}  // namespace vivit::cpu::VIVIT_ISA
