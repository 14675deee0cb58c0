// Products of bfloat16 on AMX: tiles of 16 rows of 16 words, 16 x 16 sums in float32. Compiled where the compiler has
// it; see arithmetic.h for what a product is.
#pragma once

#include "arithmetic.h"

namespace vivit::cpu::VIVIT_ISA {

#if defined(__AMX_BF16__)
// Rows in memory are whole tiles: contractions are zero up to a whole number of kStep words, and rows of A up to a
// whole number of kTileRows may hold anything, but are there. So are those of the result.
struct InTiles : InBFloat16 {
    static constexpr bool kTiles = true;
    static constexpr int64_t kStep = 16;
};

// All eight tiles of the calling thread in full size, while it lives. Others who use tiles configure them anew.
class WithTiles {
  public:
    WithTiles() {
        alignas(64) static constexpr Shape kShape{};
        _tile_loadconfig(&kShape);
    }
    ~WithTiles() { _tile_release(); }
    WithTiles(const WithTiles&) = delete;
    WithTiles& operator=(const WithTiles&) = delete;

  private:
    struct Shape {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static_assert(sizeof(Shape) == 64);
};

// c[row][column] = or += sum over k of A(row, k) * b[k][column], for R x V tiles of c. Word (row, k) of A lies at
// row * lda + k % 16 + k / 16 * step. Tiles: 0..3 sums, 4 and 5 of A, 6 and 7 of b. The names have to be literals.
template <bool kAdd, int R, int V>
VIVIT_INLINE void tiles_part(float* c, int64_t ldc, const uint32_t* a, int64_t lda, int64_t step, const uint32_t* b,
                             int64_t ldb, int64_t K) {
    const int64_t c_bytes = ldc * 4, a_bytes = lda * 4, b_bytes = ldb * 4;
    // NOLINTNEXTLINE(misc-const-correctness): tiles are stored to it, by macros of assembly
    float* below = c + 16 * ldc;
    if constexpr (kAdd) {
        _tile_loadd(0, c, c_bytes);
        if constexpr (V == 2) _tile_loadd(1, c + 16, c_bytes);
        if constexpr (R == 2) _tile_loadd(2, below, c_bytes);
        if constexpr (R == 2 && V == 2) _tile_loadd(3, below + 16, c_bytes);
    } else {
        _tile_zero(0);
        if constexpr (V == 2) _tile_zero(1);
        if constexpr (R == 2) _tile_zero(2);
        if constexpr (R == 2 && V == 2) _tile_zero(3);
    }
    for (int64_t k = 0; k < K; k += 16, a += step, b += 16 * ldb) {
        _tile_loadd(4, a, a_bytes);
        _tile_loadd(6, b, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (V == 2) {
            _tile_loadd(7, b + 16, b_bytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (R == 2) {
            _tile_loadd(5, a + 16 * lda, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (V == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (V == 2) _tile_stored(1, c + 16, c_bytes);
    if constexpr (R == 2) _tile_stored(2, below, c_bytes);
    if constexpr (R == 2 && V == 2) _tile_stored(3, below + 16, c_bytes);
}

template <bool kAdd, int R>
VIVIT_INLINE void tiles_row(float* c, int64_t ldc, const uint32_t* a, int64_t lda, int64_t step, const uint32_t* b,
                            int64_t ldb, int64_t vectors, int64_t K) {
    int64_t v = 0;
    for (; v + 2 <= vectors; v += 2) tiles_part<kAdd, R, 2>(c + v * 16, ldc, a, lda, step, b + v * 16, ldb, K);
    if (v < vectors) tiles_part<kAdd, R, 1>(c + v * 16, ldc, a, lda, step, b + v * 16, ldb, K);
}

// c [rows, vectors * 16] = or += A [rows, K] * b [K, vectors * 16], rows and K up to whole tiles.
template <bool kAdd>
__attribute__((noinline)) void tiles_product(float* c, int64_t ldc, const uint32_t* a, int64_t lda, int64_t step,
                                             const uint32_t* b, int64_t ldb, int64_t rows, int64_t vectors, int64_t K) {
    asm volatile("" ::: "memory");  // loads of tiles are not known to read memory (g++ 12)
    int64_t row = 0;
    for (; row + 16 < rows; row += 32) {
        tiles_row<kAdd, 2>(c + row * ldc, ldc, a + row * lda, lda, step, b, ldb, vectors, K);
    }
    if (row < rows) tiles_row<kAdd, 1>(c + row * ldc, ldc, a + row * lda, lda, step, b, ldb, vectors, K);
    asm volatile("" ::: "memory");
}
#endif

// Rows of A and of a product that have to be there for so many.
template <class Arithmetic>
constexpr int64_t tile_rows(int64_t rows) {
    return Arithmetic::kTiles ? round_up<int64_t>(rows, 16) : rows;
}

// A product over rows of A, in the arithmetic's own way.
template <class Arithmetic, bool kAdd, int64_t kChain = Arithmetic::kChain>
VIVIT_INLINE void product_of_rows(float* c, int64_t ldc, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                                  int64_t rows, int64_t vectors, int64_t K) {
#if defined(__AMX_BF16__)
    if constexpr (Arithmetic::kTiles) {
        tiles_product<kAdd>(c, ldc, a, lda, Arithmetic::kStep, b, ldb, rows, vectors, K);
        return;
    }
#endif
    product<Arithmetic, Walk::kRows, kAdd, kChain>(c, ldc, a, lda, b, ldb, rows, vectors, K);
}

}  // namespace vivit::cpu::VIVIT_ISA
