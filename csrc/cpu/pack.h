// From rows in memory to the operands of a product, and back: convert, rotate, transpose, pair.
#pragma once

#include "arithmetic.h"
#include "sequence.h"

namespace vivit::cpu::VIVIT_ISA {

// Tables of the rotary embedding, [tokens, D / 2] in float32, or none.
struct Rotary {
    const float* cos = nullptr;
    const float* sin = nullptr;
};

// to[0, D) = from, pairs (i, i + D / 2) rotated by the angles of the token, or by their negatives.
template <class E>
void rotate_row(E* to, const E* from, int64_t D, Rotary table, int64_t token, float direction) {
    const int64_t half = D / 2;
    const float* cos = table.cos + token * half;
    const float* sin = table.sin + token * half;
    for (int64_t i = 0; i < half; i += kLanes) {
        const int count = static_cast<int>(smallest<int64_t>(kLanes, half - i));
        const Floats c = load_floats(cos + i, count), s = load_floats(sin + i, count) * direction;
        const Floats a = load_floats(from + i, count), b = load_floats(from + half + i, count);
        store_floats(to + i, a * c - b * s, count);
        store_floats(to + half + i, b * c + a * s, count);
    }
}

// A row of D elements of type E as words of the arithmetic.
template <class E, class Arithmetic>
struct Packing {
    static constexpr int kPack = Arithmetic::kPack;
    static constexpr bool kNative = sizeof(E) * kPack == 4;  // a row in memory is its words, but for kStep
    static_assert(kPack == 1 || kNative);

    static VIVIT_INLINE int64_t words(int64_t n) { return round_up((n + kPack - 1) / kPack, Arithmetic::kStep); }

    // A vector of words, of whose elements `count` are there; the others are zero.
    static VIVIT_INLINE Words load_words(const E* from, int64_t count) {
        if (count >= int64_t{kLanes} * kPack) {
            if constexpr (kNative)
                return load<Words>(from);
            else
                return bits<Words>(load_floats(from));
        }
        if constexpr (kNative) {
            E copy[kLanes * kPack] = {};
            __builtin_memcpy(copy, from, sizeof(E) * static_cast<uint64_t>(count));
            return load<Words>(copy);
        } else {
            return bits<Words>(load_floats(from, static_cast<int>(count)));
        }
    }

    // Rows as words, [rows, words(D)], contiguous; zero behind their elements.
    static void straight(uint32_t* to, const Rows<const E>& from, int64_t first, int64_t count, int64_t D) {
        const int64_t width = words(D);
        for (int64_t r = 0; r < count; ++r, to += width) {
            const E* row = from.row(first + r);
            for (int64_t w = 0; w < width; w += kLanes) {
                const int64_t left = width - w;
                const Words x = load_words(row + w * kPack, D - w * kPack);
                if (left >= kLanes)
                    store(to + w, x);
                else
                    __builtin_memcpy(to + w, &x, 4 * static_cast<uint64_t>(left));
            }
        }
    }

    // Transposed: to[word][lane] = word of row `first + lane`; lanes from `count` up to `lanes` are zero.
    static void transposed(uint32_t* to, const Rows<const E>& from, int64_t first, int64_t count, int64_t lanes,
                           int64_t D) {
        const int64_t width = words(D);
        constexpr int64_t kWhole = int64_t{kLanes} * kPack;
        for (int64_t block = 0; block < lanes; block += kLanes) {
            for (int64_t w = 0; w < width; w += kLanes) {
                const int64_t left = D - w * kPack;
                Words tile[kLanes];
                if (block + kLanes <= count && left >= kWhole) {
#pragma GCC unroll 16
                    for (int lane = 0; lane < kLanes; ++lane) {
                        tile[lane] = load_words(from.row(first + block + lane) + w * kPack, kWhole);
                    }
                } else {
                    for (int lane = 0; lane < kLanes; ++lane) {
                        const bool there = block + lane < count;
                        tile[lane] = there ? load_words(from.row(first + block + lane) + w * kPack, left) : Words{};
                    }
                }
                transpose(tile);
                const int64_t here = smallest<int64_t>(kLanes, width - w);
                for (int64_t i = 0; i < here; ++i) store(to + (w + i) * lanes + block, tile[i]);
            }
        }
    }

    // Paired: to[row / kPack][column] holds the elements of kPack neighbouring rows; columns from D up to `columns` and
    // missing last rows are zero.
    static void paired(uint32_t* to, const Rows<const E>& from, int64_t first, int64_t count, int64_t columns,
                       int64_t D) {
        for (int64_t r = 0; r < count; r += kPack, to += columns) {
            const E* row = from.row(first + r);
            const E* next = kPack == 2 && r + 1 < count ? from.row(first + r + 1) : nullptr;
            for (int64_t d = 0; d < columns; d += kLanes) {
                const int here = static_cast<int>(d < D ? smallest<int64_t>(kLanes, D - d) : 0);
                store(to + d,
                      here == kLanes ? pair<false>(row + d, next, d, kLanes) : pair<true>(row + d, next, d, here));
            }
        }
        for (int64_t left = words(count) - (count + kPack - 1) / kPack; left > 0; --left, to += columns) {
            for (int64_t d = 0; d < columns; d += kLanes) store(to + d, Words{});
        }
    }

    // Across: to[column][word] holds the elements of kPack neighbouring rows, kLanes words of a column; columns from D
    // up to `columns` and missing rows are zero.
    static void across(uint32_t* to, const Rows<const E>& from, int64_t first, int64_t count, int64_t columns,
                       int64_t D) {
        for (int64_t d = 0; d < columns; d += kLanes, to += int64_t{kLanes} * kLanes) {
            const int here = static_cast<int>(smallest<int64_t>(kLanes, D - d));
            Words tile[kLanes];
            if (count == int64_t{kLanes} * kPack && here == kLanes) {
#pragma GCC unroll 16
                for (int64_t i = 0; i < kLanes; ++i) {
                    const E* row = from.row(first + i * kPack);
                    tile[i] = pair<false>(row + d, kPack == 2 ? row + from.stride : nullptr, d, kLanes);
                }
            } else {
                for (int64_t i = 0; i < kLanes; ++i) {
                    const int64_t r = i * kPack;
                    const E* row = r < count ? from.row(first + r) : nullptr;
                    const E* next = kPack == 2 && r + 1 < count ? from.row(first + r + 1) : nullptr;
                    tile[i] = row == nullptr ? Words{} : pair<true>(row + d, next, d, here);
                }
            }
            transpose(tile);
#pragma GCC unroll 16
            for (int64_t i = 0; i < kLanes; ++i) store(to + i * kLanes, tile[i]);
        }
    }

  private:
    template <bool kPartial>
    static VIVIT_INLINE Words pair(const E* row, const E* next, int64_t d, int here) {
        if constexpr (kPack == 1) {
            return bits<Words>(kPartial ? load_floats(row, here) : load_floats(row));
        } else {
            // a bfloat16 is the upper half of its float
            const Words low = bits<Words>(kPartial ? load_floats(row, here) : load_floats(row)) >> 16;
            if (next == nullptr) return low;
            return low | bits<Words>(kPartial ? load_floats(next + d, here) : load_floats(next + d));
        }
    }
};

// to[0, D) = from * factor in E, rotated back where a table is given.
template <class E>
VIVIT_INLINE void store_row(E* to, const float* from, int64_t D, float factor) {
    int64_t d = 0;
    for (; d + kLanes <= D; d += kLanes) store_floats(to + d, load_floats(from + d) * factor);
    if (d < D) store_floats(to + d, load_floats(from + d) * factor, static_cast<int>(D - d));
}

template <class E>
void store_gradient(E* to, float* from, int64_t D, float factor, Rotary table, int64_t token) {
    if (table.cos != nullptr) rotate_row(from, from, D, table, token, -1.f);
    store_row(to, from, D, factor);
}

}  // namespace vivit::cpu::VIVIT_ISA
