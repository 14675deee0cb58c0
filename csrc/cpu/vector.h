// Vectors of floats and 32-bit words in the width of the instruction set: GCC's vector extension, and intrinsics where
// it has no word for an instruction. No std templates here or in the other headers of one instruction set: the linker
// keeps one copy of each, which may then hold instructions that an older processor has not.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vivit::cpu::VIVIT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

#define VIVIT_INLINE inline __attribute__((always_inline))

template <class V, class T>
VIVIT_INLINE V load(const T* from) {
    V x;
    __builtin_memcpy(&x, from, sizeof(V));
    return x;
}

template <class V, class T>
VIVIT_INLINE void store(T* to, V x) {
    __builtin_memcpy(to, &x, sizeof(V));
}

template <class To, class From>
VIVIT_INLINE To bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    __builtin_memcpy(&y, &x, sizeof(To));
    return y;
}

VIVIT_INLINE Floats all(float x) { return x - Floats{}; }  // not 0 + x, which is an addition: it makes 0 of -0
VIVIT_INLINE Words all_words(uint32_t x) { return Words{} + x; }

VIVIT_INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

VIVIT_INLINE bool any(Ints lanes) {  // all bits or none of each
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_epi8((__m256i)lanes) != 0;
#else
    int32_t found = 0;
    for (int i = 0; i < kLanes; ++i) found |= lanes[i];
    return found != 0;
#endif
}

template <class T>
VIVIT_INLINE T smallest(T a, T b) {
    return a < b ? a : b;
}

template <class T>
VIVIT_INLINE T round_up(T x, T step) {
    return (x + step - 1) / step * step;
}

// 2^(x * (unit + rest)) for x * unit <= 128; 1 at 0 and 0 far below. Range reduction to [-1/2, 1/2] and a polynomial
// nearly the best in relative error: 2e-8 with kExact, where the product is not rounded either, else 2.8e-6, a
// hundredth of a rounding to bfloat16.
template <bool kExact>
VIVIT_INLINE Floats exp2(Floats x, float unit, float rest) {
    const Floats product = x * unit;
#if defined(__AVX512F__)
    const Floats n = (Floats)_mm512_roundscale_ps((__m512)product, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Floats magic = all(12582912.f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
    const Floats shifted = larger(product, all(-127.f)) + magic;
    const Floats n = shifted - magic;
#endif
    Floats f = kExact ? x * unit - n : product - n;  // the first is fused where the processor can
    if (kExact) f += x * rest;
    Floats y;
    if (kExact) {
        y = all(0x1.41fbbcp-13f);
        y = y * f + 0x1.5f3e54p-10f;
        y = y * f + 0x1.3b2d4cp-7f;
        y = y * f + 0x1.c6aee8p-5f;
        y = y * f + 0x1.ebfbdcp-3f;
        y = y * f + 0x1.62e430p-1f;
        y = y * f + 1.f;
    } else {
        y = all(0x1.3a02ccp-7f);
        y = y * f + 0x1.c9fc46p-5f;
        y = y * f + 0x1.ec0378p-3f;
        y = y * f + 0x1.62e12cp-1f;
        y = y * f + 1.f;
    }
#if defined(__AVX512F__)
    return (Floats)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
    const Words scaled = bits<Words>(y) + (bits<Words>(shifted) << 23);
    return product < all(-126.f) ? Floats{} : bits<Floats>(scaled);
#endif
}

#if defined(__AVX512DQ__)
// 2^x for x <= 0, 1 at 0: the fraction above the integer below x, so that the scaling finds that integer itself. 8.6e-5
// at most: a twentieth of half a rounding to bfloat16.
VIVIT_INLINE Floats coarse_exp2(Floats x) {
    const Floats f = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Floats y = all(0x1.3baacap-4f);
    y = y * f + 0x1.d23776p-3f;
    y = y * f + 0x1.63e65ap-1f;
    y = y * f + 1.f;
    return (Floats)_mm512_scalef_ps((__m512)y, (__m512)x);
}
#endif

// tanh: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel (the split and the coefficients of Cephes' tanhf).
VIVIT_INLINE Floats tanh(Floats x) {
    const Floats magnitude = bits<Floats>(bits<Words>(x) & 0x7fffffffu);
    const Floats z = x * x;
    Floats near = all(-5.70498872745e-3f);
    near = near * z + 2.06390887954e-2f;
    near = near * z - 5.37397155531e-2f;
    near = near * z + 1.33314422036e-1f;
    near = near * z - 3.33332819422e-1f;
    near = near * z * x + x;
    const Floats e = exp2<true>(magnitude, -2.88539008178f, 0.f);  // e^(-2 |x|)
    const Floats far = (1.f - e) / (1.f + e);
    const Floats signed_far = bits<Floats>(bits<Words>(far) | (bits<Words>(x) & 0x80000000u));
    return magnitude < all(0.625f) ? near : signed_far;
}

// ---- elements in memory, as floats ----

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

VIVIT_INLINE Floats load_floats(const float* from) { return load<Floats>(from); }

VIVIT_INLINE Floats load_floats(const BFloat16* from) {
    const Words wide = __builtin_convertvector(load<Halves>(from), Words);
    return bits<Floats>(wide << 16);
}

VIVIT_INLINE Floats load_floats(const Float16* from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps((__m256i)load<Halves>(from));
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps((__m128i)load<Halves>(from));
#else
    // Exponent and mantissa shifted into place are 2^112 too small; the product is exact, denormals included.
    const Words wide = __builtin_convertvector(load<Halves>(from), Words);
    const Floats value = bits<Floats>((wide & 0x7fffu) << 13) * 0x1p112f;
    const Words special = (Words)(value >= all(65536.f)) & 0x7f800000u;  // infinity and NaN
    return bits<Floats>(bits<Words>(value) | special | ((wide & 0x8000u) << 16));
#endif
}

VIVIT_INLINE void store_floats(float* to, Floats x) { store(to, x); }

// To the nearest, ties to even. Of a NaN the quiet bit is set, so that it stays one.
VIVIT_INLINE Halves to_bfloat16(Floats x) {
#if defined(__AVX512BF16__)
    return bits<Halves>(_mm512_cvtneps_pbh((__m512)x));
#else
    const Words word = bits<Words>(x);
    const Words rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    const Words quiet = (word >> 16) | 0x40u;
    return __builtin_convertvector(x == x ? rounded : quiet, Halves);
#endif
}

VIVIT_INLINE void store_floats(BFloat16* to, Floats x) { store(to, to_bfloat16(x)); }

VIVIT_INLINE void store_floats(Float16* to, Floats x) {
#if defined(__AVX512F__)
    store(to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    store(to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    const Words sign = (bits<Words>(x) >> 16) & 0x8000u;
    const Words word = bits<Words>(x) & 0x7fffffffu;
    const Floats magnitude = bits<Floats>(word);
    // Normal: rebias and round to even. Denormal: adding 1/2 leaves the rounded mantissa in the low bits.
    const Words normal = (word - (112u << 23) + 0xfffu + ((word >> 13) & 1u)) >> 13;
    const Words denormal = bits<Words>(magnitude + 0.5f) - 0x3f000000u;
    const Words infinite = all_words(0x7c00u);
    Words half = magnitude < all(0x1p-14f) ? denormal : normal;
    half = magnitude >= all(65520.f) ? infinite : half;
    half = x == x ? half : all_words(0x7e00u);
    store(to, __builtin_convertvector(half | sign, Halves));
#endif
}

// The first `count` lanes alone; what lies behind them is neither read nor written. count 0: zeros.
template <class E>
VIVIT_INLINE Floats load_floats(const E* from, int count) {
    E copy[kLanes] = {};
    __builtin_memcpy(copy, from, sizeof(E) * static_cast<uint32_t>(count));
    return load_floats(copy);
}

template <class E>
VIVIT_INLINE void store_floats(E* to, Floats x, int count) {
    E copy[kLanes];
    store_floats(copy, x);
    __builtin_memcpy(to, copy, sizeof(E) * static_cast<uint32_t>(count));
}

// Lanes of a and, from kLanes on, of b.
VIVIT_INLINE Words shuffle(Words a, Words b, Words from) {
#if defined(__clang__)
    Words x;
    for (int i = 0; i < kLanes; ++i) x[i] = from[i] < kLanes ? a[from[i]] : b[from[i] - kLanes];
    return x;
#else
    return __builtin_shuffle(a, b, from);
#endif
}

// rows[i][j] <-> rows[j][i]: in stage s, rows that differ in bit s exchange blocks of 2^s lanes.
template <int kStage>
VIVIT_INLINE void transpose_stage(Words (&rows)[kLanes]) {
    if constexpr (kStage < kLanes) {
        Words low, high;
        for (int lane = 0; lane < kLanes; ++lane) {
            low[lane] = static_cast<uint32_t>((lane & kStage) == 0 ? lane : lane - kStage + kLanes);
            high[lane] = static_cast<uint32_t>((lane & kStage) == 0 ? lane + kStage : lane + kLanes);
        }
#pragma GCC unroll 16
        for (int row = 0; row < kLanes; ++row) {
            if ((row & kStage) == 0) {
                const Words a = rows[row], b = rows[row + kStage];
                rows[row] = shuffle(a, b, low);
                rows[row + kStage] = shuffle(a, b, high);
            }
        }
        transpose_stage<kStage * 2>(rows);
    }
}

VIVIT_INLINE void transpose(Words (&rows)[kLanes]) { transpose_stage<1>(rows); }

}  // namespace vivit::cpu::VIVIT_ISA
