// Sums over keys for a block of queries: o = P v of the forward, dq = ds k of the backward. P and ds come as words that
// pair neighbouring keys, [keys / kPack][lanes].
#pragma once

#include "pack.h"
#include "tiles.h"

namespace vivit::cpu::VIVIT_ISA {

// In vectors: sums [lanes][columns], of paired rows.
template <class E, class Arithmetic, bool kTiles = Arithmetic::kTiles>
class OverKeys {
    using Pack = Packing<E, Arithmetic>;

  public:
    template <class Carver>
    void lay_out(Carver& carver, int64_t keys, int64_t lanes, int64_t columns) {
        columns_ = columns;
        operand_ = carver.template take<uint32_t>(Pack::words(keys) * columns);
        sums_ = carver.template take<float>(lanes * columns);
    }

    // The keys' rows, in whole, before any sum over them.
    void pack(const Rows<const E>& rows, int64_t keys, int64_t D) {
        Pack::paired(operand_, rows, 0, keys, columns_, D);
    }

    // Sums of the first `count` queries = or += pairs * the rows of `keys` keys from first_key on.
    void add(uint32_t* pairs, int64_t lanes, int64_t count, int64_t first_key, int64_t keys) {
        const uint32_t* rows = operand_ + first_key / Pack::kPack * columns_;
        const int64_t vectors = columns_ / kLanes, depth = Pack::words(keys);
        if (first_key == 0) {
            product<Arithmetic, Walk::kColumns, false>(sums_, columns_, pairs, lanes, rows, columns_, count, vectors,
                                                       depth);
        } else {
            product<Arithmetic, Walk::kColumns, true>(sums_, columns_, pairs, lanes, rows, columns_, count, vectors,
                                                      depth);
        }
    }

    // Each query's sums times its factor.
    void scale(const float* factors, int64_t lanes) {
        for (int64_t i = 0; i < lanes; ++i) {
            float* row = sums_ + i * columns_;
            for (int64_t d = 0; d < columns_; d += kLanes) store(row + d, load<Floats>(row + d) * factors[i]);
        }
    }

    // [count][columns]
    float* rows(int64_t /*lanes*/) { return sums_; }

  private:
    int64_t columns_ = 0;
    uint32_t* operand_ = nullptr;  // [keys / kPack][columns]
    float* sums_ = nullptr;
};

#if defined(__AMX_BF16__)
// In tiles: sums [columns][lanes], for which the pairs are the right operand as they are, and rows lie across.
template <class E, class Arithmetic>
class OverKeys<E, Arithmetic, true> {
    using Pack = Packing<E, Arithmetic>;
    static constexpr int64_t kTileKeys = Arithmetic::kStep * Pack::kPack;

  public:
    template <class Carver>
    void lay_out(Carver& carver, int64_t keys, int64_t lanes, int64_t columns) {
        columns_ = columns;
        operand_ = carver.template take<uint32_t>(Pack::words(keys) * columns);
        sums_ = carver.template take<float>(lanes * columns);
        rows_ = carver.template take<float>(lanes * columns);
    }

    void pack(const Rows<const E>& rows, int64_t keys, int64_t D) {
        for (int64_t key = 0; key < keys; key += kTileKeys) {
            Pack::across(operand_ + key / Pack::kPack * columns_, rows, key, smallest(kTileKeys, keys - key), columns_,
                         D);
        }
    }

    // first_key is a multiple of kTileKeys; pairs have room for whole tiles.
    void add(uint32_t* pairs, int64_t lanes, int64_t /*count*/, int64_t first_key, int64_t keys) {
        const uint32_t* rows = operand_ + first_key / Pack::kPack * columns_;
        const int64_t there = (keys + Pack::kPack - 1) / Pack::kPack, depth = Pack::words(keys);
        for (int64_t i = there * lanes; i < depth * lanes; i += kLanes) store(pairs + i, Words{});
        constexpr int64_t kStep = Arithmetic::kStep;
        if (first_key == 0) {
            tiles_product<false>(sums_, lanes, rows, kStep, kStep * columns_, pairs, lanes, columns_, lanes / kLanes,
                                 depth);
        } else {
            tiles_product<true>(sums_, lanes, rows, kStep, kStep * columns_, pairs, lanes, columns_, lanes / kLanes,
                                depth);
        }
    }

    void scale(const float* factors, int64_t lanes) {
        for (int64_t d = 0; d < columns_; ++d) {
            for (int64_t i = 0; i < lanes; i += kLanes) {
                float* at = sums_ + d * lanes + i;
                store(at, load<Floats>(at) * load<Floats>(factors + i));
            }
        }
    }

    float* rows(int64_t lanes) {
        for (int64_t i = 0; i < lanes; i += kLanes) {
            for (int64_t d = 0; d < columns_; d += kLanes) {
                Words block[kLanes];
#pragma GCC unroll 16
                for (int64_t j = 0; j < kLanes; ++j) block[j] = load<Words>(sums_ + (d + j) * lanes + i);
                transpose(block);
#pragma GCC unroll 16
                for (int64_t j = 0; j < kLanes; ++j) store(rows_ + (i + j) * columns_ + d, block[j]);
            }
        }
        return rows_;
    }

  private:
    int64_t columns_ = 0;
    uint32_t* operand_ = nullptr;  // [keys / kTileKeys][columns][kStep]
    float *sums_ = nullptr, *rows_ = nullptr;
};
#endif

}  // namespace vivit::cpu::VIVIT_ISA
