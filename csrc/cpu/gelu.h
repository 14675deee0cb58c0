// The GELU of a vector of floats, in its two forms.
#pragma once

#include "linear.h"
#include "vector.h"

namespace vivit::cpu::VIVIT_ISA {

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) as x / (1 + e^(-2 ...)).
VIVIT_INLINE Floats tanh_gelu(Floats x) {
    constexpr float kLinear = -2.302208198f, kCubic = kLinear * 0.044715f;  // -2 * log2(e) * sqrt(2 / pi)
    const Floats power = x * (x * x * kCubic + kLinear);
    // 2^128 is infinity, which divides any x to zero; of a NaN the second operand is taken
    const Floats bounded = larger(all(-126.f), -larger(all(-128.f), -power));
    return x / (exp2<true>(bounded, 1.f, 0.f) + 1.f);
}

// x * Phi(x), with Phi(-m) = e^(-m^2 / 2) * Q(1 / (1 + m / 4)): what is left of max(x, 0) by the tail on the other
// side, so that nothing cancels. Q is a polynomial of least relative error, 4e-7 with its roundings up to m = 9, behind
// which the power is below 3e-18.
VIVIT_INLINE Floats exact_gelu(Floats x) {
    constexpr float kUnit = -0.721347520f, kRest = static_cast<float>(-0.72134752044448170368 - double{kUnit});
    const Floats m = -larger(-bits<Floats>(bits<Words>(x) & 0x7fffffffu), all(-16.f));  // infinity is none of its own
    const Floats t = 1.f / (m * 0.25f + 1.f);
    Floats q = all(0x1.38a5e4p-5f);
    q = q * t - 0x1.bfdfe0p-3f;
    q = q * t + 0x1.c98ba6p-2f;
    q = q * t - 0x1.9a6572p-2f;
    q = q * t + 0x1.6f3e44p-2f;
    q = q * t - 0x1.8b2510p-5f;
    q = q * t + 0x1.0ba096p-3f;
    q = q * t + 0x1.7cf238p-4f;
    q = q * t + 0x1.9b5a3cp-4f;
    q = q * t - 0x1.01249cp-15f;
    return larger(Floats{}, x) - m * q * exp2<true>(m * m, kUnit, kRest);
}

template <Activation kActivation_>
struct Chosen {
    static constexpr Activation kValue = kActivation_;
};

// Calls work with the Chosen activation.
template <class Work>
VIVIT_INLINE void with_activation(Activation activation, Work work) {
    if (activation == Activation::kTanhGelu) return work(Chosen<Activation::kTanhGelu>{});
    if (activation == Activation::kGelu) return work(Chosen<Activation::kGelu>{});
    work(Chosen<Activation::kNone>{});
}

template <Activation kActivation>
VIVIT_INLINE Floats activated(Floats x) {
    if constexpr (kActivation == Activation::kTanhGelu) return tanh_gelu(x);
    if constexpr (kActivation == Activation::kGelu) return exact_gelu(x);
    return x;
}

}  // namespace vivit::cpu::VIVIT_ISA
