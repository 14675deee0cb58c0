// The two ways of multiplying matrices: in float32, and in pairs of bfloat16 where the processor adds them up in
// float32. Both see their operands as 32-bit words along the contraction: one float, or two neighbouring bfloat16.
#pragma once

#include "attention.h"
#include "vector.h"

namespace vivit::cpu::VIVIT_ISA {

struct InFloat32 {
    using Element = float;  // a word holds kPack of them
    static constexpr int kPack = 1;
    static constexpr bool kTiles = false;  // of a matrix unit: tiles.h
    static constexpr int64_t kStep = 1;    // rows end after a multiple of so many words
    static constexpr bool kExact = true;   // probabilities are not rounded
    // Products added up in one chain of roundings; fewer in scores, whose errors exp magnifies. Chains of 64 instead of
    // 16 leave the error as it is, as a sum over chains errs too, and the sums can be in one tile of registers: on a
    // Xeon with AVX-512 joint attention of 3,137 tokens takes 440 ms instead of 499, forward and backward.
#if defined(__FMA__)
    static constexpr int64_t kChain = 64, kScoreChain = 8;
#else
    static constexpr int64_t kChain = 16, kScoreChain = 4;  // here every product rounds too
#endif

    static VIVIT_INLINE Floats add_product(Floats sum, uint32_t a, Words b) {
        return sum + all(bits<float>(a)) * bits<Floats>(b);
    }
    // Words whose elements are one row's, from their floats.
    static VIVIT_INLINE void store_row(uint32_t* to, Floats x) { store(to, x); }
    // Words that pair rows k and k + 1 of the contraction.
    static VIVIT_INLINE void store_pair(uint32_t* to, Floats first, Floats) { store(to, first); }
};

// The same for elements of bfloat16, whose own roundings are far larger.
struct InFloat32Coarsely : InFloat32 {
    static constexpr bool kExact = false;
    static constexpr int64_t kChain = 1 << 30, kScoreChain = kChain;
};

#if defined(__AVX512BF16__)
struct InBFloat16 {
    using Element = BFloat16;
    static constexpr int kPack = 2;
    static constexpr bool kTiles = false;
    static constexpr int64_t kStep = 1;
    static constexpr bool kExact = false;
    static constexpr int64_t kChain = 1 << 30, kScoreChain = kChain;

    static VIVIT_INLINE Floats add_product(Floats sum, uint32_t a, Words b) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(a)), (__m512bh)b);
    }
    static VIVIT_INLINE void store_row(uint32_t* to, Floats x) { store(to, to_bfloat16(x)); }
    static VIVIT_INLINE void store_pair(uint32_t* to, Floats first, Floats second) {
        const __m512i halves =
            (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);  // first in the low 256 bits
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, halves));
    }
};
#endif

// Calls work with a Named of the kernel for a dtype: which arithmetic each takes.
template <class K>
struct Named {
    using Type = K;
};

template <template <class, class> class Kernel, class Work>
auto with_kernel(DType dtype, Work work) {
    if (dtype == DType::kFloat32) return work(Named<Kernel<float, InFloat32>>{});
    if (dtype == DType::kFloat16) return work(Named<Kernel<Float16, InFloat32>>{});
#if defined(__AVX512BF16__)
    return work(Named<Kernel<BFloat16, InBFloat16>>{});
#else
    return work(Named<Kernel<BFloat16, InFloat32Coarsely>>{});
#endif
}

// Rows of A and columns of vectors of B whose sums fit into the registers beside their operands: 32 of AVX-512, 16
// else. Enough sums in flight to hide the latency of an addition.
//
// Where a sum is one of short chains, both can stay in registers, of a smaller tile: with the sums in memory between
// two chains, scores took a third more time. GFLOP/s of 256 keys, 64 queries, D = 64, q k^T in chains of 8. On a core
// of a Zen 4 (peak 118), sums in memory -> in registers: AVX-512, 6 rows by 4 vectors -> 4 by 2, 87..99 -> 113; AVX2, 6
// by 2 -> 3 by 2, 86 -> 111. On a core of a Xeon (peak 191), whose two units want more sums in flight: 4 by 2 157, 6 by
// 2 167, 4 by 3 140, 8 by 1, which loads more than it multiplies, 143; P v in chains of 16 by 6 by 2 158, in one chain
// by 6 by 4 188.
#if defined(__AVX512F__)
constexpr bool keeps_sums(int64_t chain) { return chain <= 16; }
constexpr int column_vectors(bool keeps) { return keeps ? 2 : 4; }
constexpr int rows_at_once(int vectors, bool keeps) {
    if (keeps) return vectors >= 2 ? 6 : 8;
    return vectors >= 4 ? 6 : 8;
}
#else
constexpr bool keeps_sums(int64_t chain) { return chain <= 8; }
constexpr int column_vectors(bool /*keeps*/) { return 2; }
constexpr int rows_at_once(int vectors, bool keeps) {
    if (keeps) return vectors >= 2 ? 3 : 6;
    return vectors >= 2 ? 6 : 8;
}
#endif

enum class Walk { kRows, kColumns };  // word (row, k) of A lies at row * lda + k, or at k * lda + row

// sum[r][v] += A(r, k) * b[k][v] over k, in one chain each.
template <class Arithmetic, Walk kWalk, int R, int V>
VIVIT_INLINE void add_products(Floats (&sum)[R][V], const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                               int64_t K) {
    for (int64_t k = 0; k < K; ++k) {
        Words column[V];
#pragma GCC unroll 4
        for (int64_t v = 0; v < V; ++v) column[v] = load<Words>(b + k * ldb + v * kLanes);
#pragma GCC unroll 8
        for (int64_t r = 0; r < R; ++r) {
            const uint32_t word = load<uint32_t>(kWalk == Walk::kRows ? a + r * lda + k : a + k * lda + r);
#pragma GCC unroll 4
            for (int64_t v = 0; v < V; ++v) sum[r][v] = Arithmetic::add_product(sum[r][v], word, column[v]);
        }
    }
}

// c[row][column] = or += sum over k of A(row, k) * b[k][column], for R rows and V vectors of columns.
template <class Arithmetic, Walk kWalk, bool kAdd, int R, int V>
VIVIT_INLINE void product_part(float* c, int64_t ldc, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                               int64_t K) {
    Floats sum[R][V] = {};
    add_products<Arithmetic, kWalk>(sum, a, lda, b, ldb, K);
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int64_t v = 0; v < V; ++v) {
            float* to = c + r * ldc + v * kLanes;
            store(to, kAdd ? load<Floats>(to) + sum[r][v] : sum[r][v]);
        }
    }
}

// The same, of sums of kChain products each.
template <class Arithmetic, int64_t kChain, Walk kWalk, bool kAdd, int R, int V>
VIVIT_INLINE void product_of_chains(float* c, int64_t ldc, const uint32_t* a, int64_t lda, const uint32_t* b,
                                    int64_t ldb, int64_t K) {
    Floats total[R][V];
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int64_t v = 0; v < V; ++v) total[r][v] = kAdd ? load<Floats>(c + r * ldc + v * kLanes) : Floats{};
    }
    const int64_t step = kWalk == Walk::kRows ? 1 : lda;
    for (int64_t k = 0; k < K; k += kChain) {
        Floats sum[R][V] = {};
        add_products<Arithmetic, kWalk>(sum, a + k * step, lda, b + k * ldb, ldb, smallest(K - k, kChain));
#pragma GCC unroll 8
        for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int64_t v = 0; v < V; ++v) total[r][v] += sum[r][v];
        }
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int64_t v = 0; v < V; ++v) store(c + r * ldc + v * kLanes, total[r][v]);
    }
}

// In parts of the contraction: in one chain a float32 sum of 160 terms errs 2.5 times as much as in chains of 16.
template <class Arithmetic, int64_t kChain, Walk kWalk, bool kAdd, int R, int V>
VIVIT_INLINE void product_tile(float* c, int64_t ldc, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                               int64_t K) {
    if constexpr (keeps_sums(kChain)) {
        product_of_chains<Arithmetic, kChain, kWalk, kAdd, R, V>(c, ldc, a, lda, b, ldb, K);
        return;
    }
    const int64_t step = kWalk == Walk::kRows ? 1 : lda;
    product_part<Arithmetic, kWalk, kAdd, R, V>(c, ldc, a, lda, b, ldb, smallest(K, kChain));
    for (int64_t k = kChain; k < K; k += kChain) {
        product_part<Arithmetic, kWalk, true, R, V>(c, ldc, a + k * step, lda, b + k * ldb, ldb,
                                                    smallest(K - k, kChain));
    }
}

template <class Arithmetic, int64_t kChain, Walk kWalk, bool kAdd, int V>
VIVIT_INLINE void product_columns(float* c, int64_t ldc, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                                  int64_t rows, int64_t K) {
    constexpr int R = rows_at_once(V, keeps_sums(kChain));
    const int64_t step = kWalk == Walk::kRows ? lda : 1;
    int64_t row = 0;
    for (; row + R <= rows; row += R) {
        product_tile<Arithmetic, kChain, kWalk, kAdd, R, V>(c + row * ldc, ldc, a + row * step, lda, b, ldb, K);
    }
    if (R > 4 && row + 4 <= rows) {
        product_tile<Arithmetic, kChain, kWalk, kAdd, 4, V>(c + row * ldc, ldc, a + row * step, lda, b, ldb, K);
        row += 4;
    }
    if (row + 2 <= rows) {
        product_tile<Arithmetic, kChain, kWalk, kAdd, 2, V>(c + row * ldc, ldc, a + row * step, lda, b, ldb, K);
        row += 2;
    }
    if (row < rows) {
        product_tile<Arithmetic, kChain, kWalk, kAdd, 1, V>(c + row * ldc, ldc, a + row * step, lda, b, ldb, K);
    }
}

// c [rows, vectors * kLanes] = or += A [rows, K] * b [K, vectors * kLanes]; K counts words.
template <class Arithmetic, Walk kWalk, bool kAdd, int64_t kChain = Arithmetic::kChain>
__attribute__((noinline)) void product(float* c, int64_t ldc, const uint32_t* a, int64_t lda, const uint32_t* b,
                                       int64_t ldb, int64_t rows, int64_t vectors, int64_t K) {
    constexpr int kMost = column_vectors(keeps_sums(kChain));
    while (vectors > 0) {
        // five vectors are three and two, not four and one: a narrow tile loads more than it multiplies
        const bool split = kMost == 4 && vectors == kMost + 1;
        const int64_t now = split ? 3 : smallest<int64_t>(vectors, kMost);
        if constexpr (kMost == 4) {
            if (now == 4) product_columns<Arithmetic, kChain, kWalk, kAdd, 4>(c, ldc, a, lda, b, ldb, rows, K);
            if (now == 3) product_columns<Arithmetic, kChain, kWalk, kAdd, 3>(c, ldc, a, lda, b, ldb, rows, K);
        }
        if (now == 2) product_columns<Arithmetic, kChain, kWalk, kAdd, 2>(c, ldc, a, lda, b, ldb, rows, K);
        if (now == 1) product_columns<Arithmetic, kChain, kWalk, kAdd, 1>(c, ldc, a, lda, b, ldb, rows, K);
        c += now * kLanes, b += now * kLanes, vectors -= now;
    }
}

}  // namespace vivit::cpu::VIVIT_ISA
