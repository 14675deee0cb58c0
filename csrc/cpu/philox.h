// Which pairs dropout keeps: Philox-4x32-10 (Salmon et al. 2011), counted as kernels/vivit_kernels/_philox.py says.
#pragma once

#include "attention.h"
#include "vector.h"

namespace vivit::cpu::VIVIT_ISA {

VIVIT_INLINE void multiply(Words a, uint32_t b, Words& high, Words& low) {
    low = a * b;
#if defined(__AVX512F__)
    const __m512i factor = _mm512_set1_epi64(b);
    const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
    high = (Words)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
    const __m256i factor = _mm256_set1_epi64x(b);
    const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
    high = (Words)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
    for (int i = 0; i < kLanes; ++i) high[i] = static_cast<uint32_t>(static_cast<uint64_t>(a[i]) * b >> 32);
#endif
}

// The words of kLanes queries (their rows in two halves) for the four keys 4 * group, ..., 4 * group + 3.
VIVIT_INLINE void philox(int64_t seed, int64_t offset, uint32_t group, Words row_low, Words row_high,
                         Words (&word)[4]) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    Words c0 = all_words(group), c1 = all_words(static_cast<uint32_t>(offset)), c2 = row_low, c3 = row_high;
    for (int round = 0; round < 10; ++round) {
        Words high0, low0, high1, low1;
        multiply(c0, 0xD2511F53u, high0, low0);
        multiply(c2, 0xCD9E8D57u, high1, low1);
        c0 = high1 ^ c1 ^ key0, c1 = low1;
        c2 = high0 ^ c3 ^ key1, c3 = low0;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

}  // namespace vivit::cpu::VIVIT_ISA
