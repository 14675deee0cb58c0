// The two steps of a kernel of one instruction set, with the arithmetic that each dtype takes.
#pragma once

#include "arithmetic.h"
#include "tubelet.h"

namespace vivit::cpu::VIVIT_ISA {

template <template <class, class> class Kernel, class Params>
struct StepsOf {
    static int64_t shared_bytes(const Params& p) {
        return with_kernel<Kernel>(p.dtype, [&](auto kernel) { return decltype(kernel)::Type::shared_bytes(p); });
    }
    static int64_t pack_units(const Params& p) {
        return with_kernel<Kernel>(p.dtype, [&](auto kernel) { return decltype(kernel)::Type::pack_units(p); });
    }
    static void pack(const Params& p, int64_t first, int64_t end) {
        with_kernel<Kernel>(p.dtype, [&](auto kernel) { decltype(kernel)::Type::pack(p, first, end); });
    }
    static int64_t units(const Params& p) {
        return with_kernel<Kernel>(p.dtype, [&](auto kernel) { return decltype(kernel)::Type::units(p); });
    }
    static void run(const Params& p, int64_t first, int64_t end) {
        with_kernel<Kernel>(p.dtype, [&](auto kernel) { decltype(kernel)::Type::run(p, first, end); });
    }

    static constexpr TwoSteps<Params> kWork = {shared_bytes, {pack_units, units}, {pack, run}};
};

}  // namespace vivit::cpu::VIVIT_ISA
