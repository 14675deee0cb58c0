// A linear layer in tiles of bfloat16. The weight is packed once for all threads, then each block of rows is packed and
// multiplied panel by panel; a block's rows stay in the second-level cache, a part of a panel in the first.
#pragma once

#include "gather.h"
#include "gelu.h"
#include "scratch.h"
#include "tiles.h"

namespace vivit::cpu::VIVIT_ISA {

#if defined(__AMX_BF16__)
class LinearInTiles {
    using E = BFloat16;
    static constexpr int64_t kColumns = 32, kTile = 256;  // of a panel; words of a tile
    static constexpr int64_t kDepth = 8;                  // steps of a panel at a time, 32 elements each: 16 KB
    static constexpr int64_t kRows = 128;                 // of a block

  public:
    explicit LinearInTiles(const LinearParams& p)
        : p_(p), steps_((p.K + 31) / 32), panels_((p.N + kColumns - 1) / kColumns) {}

    // The weight, tile by tile: [panels][steps][2].
    static int64_t shared_bytes(const LinearParams& p) {
        const LinearInTiles one(p);
        return 4 * one.panels_ * one.panel_words();
    }

    static int64_t pack_units(const LinearParams& p) { return LinearInTiles(p).panels_; }

    static void pack(const LinearParams& p, int64_t first, int64_t end) {
        const LinearInTiles one(p);
        for (int64_t panel = first; panel < end; ++panel) {
            for (int64_t v = 0; v < 2; ++v) one.pack_columns(panel, v);
        }
    }

    static int64_t units(const LinearParams& p) { return (p.M + kRows - 1) / kRows; }

    static void run(const LinearParams& p, int64_t first, int64_t end) {
        LinearInTiles one(p);
        carve(one);
        const WithTiles here;
        const int64_t tiles = (p.M + 15) / 16, all = units(p);
        for (int64_t i = first; i < end; ++i) one.block(tiles * i / all * 16, tiles * (i + 1) / all * 16);
    }

    void lay_out(Carver& carver) {
        rows_ = carver.take<uint32_t>(kRows * 16 * steps_);
        sums_ = carver.take<float>(kRows * kColumns);
    }

  private:
    int64_t panel_words() const { return steps_ * 2 * kTile; }

    uint32_t* packed(int64_t panel) const { return static_cast<uint32_t*>(p_.shared) + panel * panel_words(); }

    static const E* row(const void* of, int64_t stride, int64_t i) { return static_cast<const E*>(of) + i * stride; }

    // 32 elements as words, of which `count` are there.
    static VIVIT_INLINE Words words(const E* from, int64_t count) {
        if (count >= 32) return load<Words>(from);
        E copy[32] = {};
        __builtin_memcpy(copy, from, sizeof(E) * static_cast<uint64_t>(count));
        return load<Words>(copy);
    }

    // Sixteen rows of the weight become columns.
    void pack_columns(int64_t panel, int64_t v) const {
        uint32_t* to = packed(panel) + v * kTile;
        const int64_t n = panel * kColumns + v * 16;
        for (int64_t k = 0; k < p_.K; k += 32, to += 2 * kTile) {
            Words tile[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) {
                tile[i] = n + i < p_.N ? words(row(p_.weight.data, p_.weight.stride, n + i) + k, p_.K - k) : Words{};
            }
            transpose(tile);
            for (int64_t i = 0; i < kLanes; ++i) store(to + i * kLanes, tile[i]);
        }
    }

    void block(int64_t first, int64_t end) {
        if (first >= end) return;
        pack_rows(first, smallest(end, p_.M));
        for (int64_t panel = 0; panel < panels_; ++panel) {
            multiply(end - first, panel);
            with_activation(p_.activation, [&](auto activation) {
                finish<decltype(activation)::kValue>(first, smallest(end, p_.M), panel * kColumns);
            });
        }
    }

    // Rows [first, end) of x as tiles: [rows / 16][steps].
    void pack_rows(int64_t first, int64_t end) {
        for (int64_t i = first; i < end; ++i) {
            uint32_t* to = rows_ + (i - first) / 16 * steps_ * kTile + (i - first) % 16 * kLanes;
            const E* from = row(p_.x.data, p_.x.stride, i);
            for (int64_t k = 0; k < p_.K; k += 32, to += kTile) store(to, words(from + k, p_.K - k));
        }
    }

    // sums [rows][kColumns] = the packed rows * a panel.
    void multiply(int64_t rows, int64_t panel) {
        const int64_t below = steps_ * kTile;  // from a tile to that of the next rows
        asm volatile("" ::: "memory");         // loads of tiles are not known to read memory (g++ 12)
        for (int64_t step = 0; step < steps_; step += kDepth) {
            const int64_t depth = smallest(kDepth, steps_ - step);
            const uint32_t *a = rows_ + step * kTile, *b = packed(panel) + step * 2 * kTile;
            int64_t i = 0;
            for (; i + 32 <= rows; i += 32, a += 2 * below)
                tiles<2>(sums_ + i * kColumns, a, below, b, depth, step > 0);
            if (i < rows) tiles<1>(sums_ + i * kColumns, a, below, b, depth, step > 0);
        }
        asm volatile("" ::: "memory");
    }

    // Of R x 2 tiles. Tiles: 0..3 sums, 4 and 5 of rows, 6 and 7 of columns.
    template <int R>
    static VIVIT_INLINE void tiles(float* sums, const uint32_t* a, int64_t below, const uint32_t* b, int64_t depth,
                                   bool adds) {
        constexpr int64_t kBytes = kColumns * 4;
        // NOLINTNEXTLINE(misc-const-correctness): tiles are stored to it, by macros of assembly
        float* under = sums + 16 * kColumns;
        if (adds) {
            _tile_loadd(0, sums, kBytes);
            _tile_loadd(1, sums + 16, kBytes);
            if constexpr (R == 2) _tile_loadd(2, under, kBytes);
            if constexpr (R == 2) _tile_loadd(3, under + 16, kBytes);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            if constexpr (R == 2) _tile_zero(2);
            if constexpr (R == 2) _tile_zero(3);
        }
        for (int64_t k = 0; k < depth; ++k, a += kTile, b += 2 * kTile) {
            _tile_loadd(4, a, 64);
            _tile_loadd(6, b, 64);
            _tile_loadd(7, b + kTile, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if constexpr (R == 2) {
                _tile_loadd(5, a + below, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, sums, kBytes);
        _tile_stored(1, sums + 16, kBytes);
        if constexpr (R == 2) _tile_stored(2, under, kBytes);
        if constexpr (R == 2) _tile_stored(3, under + 16, kBytes);
    }

    // Rows [first, end) and columns from n on of the result.
    template <Activation kActivation>
    void finish(int64_t first, int64_t end, int64_t n) const {
        for (int64_t v = n; v < smallest(n + kColumns, p_.N); v += kLanes) {
            const int64_t count = p_.N - v;
            const Floats bias = p_.bias == nullptr ? Floats{} : load_some(static_cast<const E*>(p_.bias) + v, count);
            const float* from = sums_ + v - n;
            for (int64_t i = first; i < end; ++i, from += kColumns) {
                const Floats x = activated<kActivation>(load<Floats>(from) + bias);
                store_some(static_cast<E*>(p_.y) + i * p_.y_stride + v, x, count);
            }
        }
    }

    const LinearParams& p_;
    const int64_t steps_, panels_;  // of 32 elements of K; of kColumns of N
    uint32_t* rows_ = nullptr;      // [rows of a block / 16][steps] tiles
    float* sums_ = nullptr;         // [rows of a block][kColumns]
};
#endif

}  // namespace vivit::cpu::VIVIT_ISA
