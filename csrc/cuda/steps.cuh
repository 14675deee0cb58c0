// Head sizes that kernels are compiled for, in steps of 16 channels: a head of 40 channels is run as one of 64.
#pragma once

#include <type_traits>

#include "verbs.cuh"

namespace vivit::cuda {

VIVIT_BOTH int steps_of(int32_t D) { return D <= 32 ? 2 : D <= 64 ? 4 : D <= 80 ? 5 : D <= 96 ? 6 : D <= 128 ? 8 : 10; }

// call(steps), steps a number that the compiler knows.
template <class Call>
auto with_steps(int32_t D, const Call& call) {
    switch (steps_of(D)) {
        case 2:
            return call(std::integral_constant<int, 2>());
        case 4:
            return call(std::integral_constant<int, 4>());
        case 5:
            return call(std::integral_constant<int, 5>());
        case 6:
            return call(std::integral_constant<int, 6>());
        case 8:
            return call(std::integral_constant<int, 8>());
        default:
            return call(std::integral_constant<int, 10>());
    }
}

}  // namespace vivit::cuda
