// What forward and backward share: a call on the token grid, its sequences, and their rows as operands.
#pragma once

#include "over_keys.h"
#include "probabilities.h"
#include "scratch.h"

namespace vivit::cpu::VIVIT_ISA {

constexpr int64_t kQueryLanes = 64;  // queries of a block: four vectors of AVX-512, as wide as a tile of a product

template <class E, class Arithmetic>
class OnGrid {
  protected:
    using Pack = Packing<E, Arithmetic>;

    struct Operand {  // rows of words
        const uint32_t* words;
        int64_t stride;
    };

    OnGrid(const AttentionParams& p, Axis axis)
        : p_(p),
          axis_(axis),
          size_(size_of(p, axis)),
          rules_(p),
          rotary_{p.cos, p.sin},
          columns_(round_up<int64_t>(p.D, kLanes)),
          plain_(p.mask == nullptr && !p.dropout && !rules_.turns),
          short_(size_.N <= kQueryLanes && size_.across > 1) {}

    int64_t places() const { return p_.B * size_.across; }

    Sequence<E> sequence(int64_t place, int64_t head) const {
        return sequence_of<E>(p_, axis_, place / size_.across, place % size_.across, size_.first_head + head);
    }

    int64_t token(const Sequence<E>& one, int64_t row) const { return one.token + row * one.token_stride; }

    // A share of a place's rows, one for each head, on their way into the cache. Where the heads of a row are
    // neighbours memory is read in long runs; head by head it would be in pieces of 128 bytes. The loads bring the
    // pages' addresses in: a prefetch is dropped where these are missing (EPYC Zen 4 in a virtual machine, 16 rows of
    // 64 bfloat16: 2,100 ns a sequence with neither, 2,100 with prefetches alone, 1,090 with both; 720 where everything
    // is in the cache).
    //
    // What will be written is touched by writing: a read of fresh memory would map a page of zeros first and have it
    // replaced later (90 instead of 25 ms for 8 clips of 16 x 196 tokens, output included).
    template <bool kWritten>
    void approach(const Rows<E>& rows, int64_t count, const Grid& grid, int64_t head) const {
        if (grid.stride_h != p_.D) return;
        constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(E)), kPage = 64 * kLine;
        const int64_t width = p_.D * size_.heads, end = count * (head + 1) / size_.heads;
        for (int64_t i = count * head / size_.heads; i < end; ++i) {
            E* row = rows.row(i);
            for (int64_t d = 0; d < width; d += kPage) touch<kWritten>(row + d);
            touch<kWritten>(row + width - 1);
            for (int64_t d = 0; d < width; d += kLine) __builtin_prefetch(row + d, kWritten ? 1 : 0, 2);
        }
    }

    // Rows [first, first + count) as they are, or rotated into `memory`.
    Rows<const E> turned(const Rows<E>& x, const Sequence<E>& one, int64_t first, int64_t count, E* memory) const {
        if (p_.cos == nullptr) return {x.row(first), x.stride};
        for (int64_t i = 0; i < count; ++i) {
            rotate_row(memory + i * p_.D, static_cast<const E*>(x.row(first + i)), p_.D, rotary_, token(one, first + i),
                       1.f);
        }
        return {memory, p_.D};
    }

    // All keys' rows as words: where they lie if they are few or read once, else gathered from the pages of the grid,
    // in which every block of queries would look them up again.
    Operand operand(const Rows<const E>& rows, uint32_t* memory) const {
        const int64_t bytes = rows.stride * static_cast<int64_t>(sizeof(E));
        const bool read_once = size_.N <= kQueryLanes;
        if (Pack::kNative && !Arithmetic::kTiles && (read_once || size_.N_k <= kResidentKeys) && bytes % 4 == 0) {
            return {reinterpret_cast<const uint32_t*>(rows.data), bytes / 4};
        }
        Pack::straight(memory, rows, 0, size_.N_k, p_.D);
        return {memory, Pack::words(p_.D)};
    }

    // Dropout rows of the queries in a block's lanes.
    void name_rows(const Sequence<E>& one, int64_t first, int64_t lanes) const {
        if (!p_.dropout) return;
        for (int64_t i = 0; i < lanes; ++i) {
            const int64_t row = one.first_row + token(one, first + i);
            row_low_[i] = static_cast<uint32_t>(row), row_high_[i] = static_cast<uint32_t>(row >> 32);
        }
    }

    Block block_of(const Sequence<E>& one, int64_t first_key, int64_t keys, int64_t lanes) const {
        const bool* mask = one.mask == nullptr ? nullptr : one.mask + first_key * one.mask_stride;
        return {first_key, keys, lanes, mask, one.mask_stride, row_low_, row_high_};
    }

    int64_t stat_rows() const { return p_.B * p_.H * p_.T * p_.S; }

    const AttentionParams& p_;
    const Axis axis_;
    const AxisSize size_;
    const Rules rules_;
    const Rotary rotary_;
    const int64_t columns_;         // D in whole vectors
    const bool plain_;              // no option that a score has to ask about
    const bool short_;              // the sequences of a place, one of many, are one unit of work
    uint32_t* row_low_ = nullptr;   // [kQueryLanes]
    uint32_t* row_high_ = nullptr;  // beside row_low_

  private:
    template <bool kWritten>
    static VIVIT_INLINE void touch(E* at) {
        volatile char* byte = reinterpret_cast<volatile char*>(at);
        if (kWritten) {
            *byte = 0;
        } else {
            (void)*byte;
        }
    }
};

}  // namespace vivit::cpu::VIVIT_ISA
