// Attention, forward: for each block of queries an online softmax over blocks of keys. Scores of a block stay in the
// cache; nothing is permuted, rows are read where they lie.
#pragma once

#include "pack.h"
#include "probabilities.h"
#include "scratch.h"

namespace vivit::cpu::VIVIT_ISA {

constexpr int64_t kQueryLanes = 64;  // queries of a block: four vectors of AVX-512, as wide as a tile of a product
constexpr int64_t kKeyBlock = 128;   // keys of a block, a multiple of four: dropout draws words for four

template <class E, class Arithmetic>
class Forward {
    using Pack = Packing<E, Arithmetic>;

  public:
    Forward(const AttentionParams& p, Axis axis)
        : p_(p),
          axis_(axis),
          size_(size_of(p, axis)),
          rules_(p),
          rotary_{p.cos, p.sin},
          columns_(round_up<int64_t>(p.D, kLanes)) {
        plain_ = p.mask == nullptr && !p.dropout && p.softcap == 0.f;
        resident_ = size_.N_k <= kResidentKeys;
    }

    // Short sequences: all heads of a place in one unit, whose rows are neighbours. Long ones: a block of queries.
    int64_t units() const {
        const int64_t places = p_.B * size_.across;
        if (size_.N <= kQueryLanes) return places;
        return places * size_.heads * (resident_ ? 1 : QueryBlocks(size_.N, kQueryLanes).blocks);
    }

    void run(int64_t first, int64_t end) {
        carve(*this);
        const int64_t H = size_.heads;
        for (int64_t unit = first; unit < end; ++unit) {
            if (size_.N <= kQueryLanes) {
                for (int64_t h = 0; h < H; ++h) whole(unit, h);
            } else if (resident_) {
                whole(unit / H, unit % H);
            } else {
                const int64_t blocks = QueryBlocks(size_.N, kQueryLanes).blocks;
                const int64_t one = unit / blocks;
                block(sequence(one / H, one % H), unit % blocks);
            }
        }
    }

    void lay_out(Carver& carver) {
        const int64_t words = Pack::words(p_.D), keys = resident_ ? size_.N_k : smallest(size_.N_k, kKeyBlock);
        const int64_t block_keys = smallest(size_.N_k, kKeyBlock);
        q_ = carver.take<uint32_t>(words * kQueryLanes);
        k_ = carver.take<uint32_t>(keys * words);
        v_ = carver.take<uint32_t>(Pack::words(keys) * columns_);
        rotated_ = carver.take<E>(p_.cos == nullptr ? 0 : (kQueryLanes > keys ? kQueryLanes : keys) * p_.D);
        scores_ = carver.take<float>(block_keys * kQueryLanes);
        probabilities_ = Pack::kPack == 1 ? nullptr : carver.take<uint32_t>(Pack::words(block_keys) * kQueryLanes);
        o_ = carver.take<float>(kQueryLanes * columns_);
        softmax_ = {carver.take<float>(kQueryLanes), carver.take<float>(kQueryLanes), carver.take<float>(kQueryLanes)};
        row_low_ = carver.take<uint32_t>(kQueryLanes), row_high_ = carver.take<uint32_t>(kQueryLanes);
    }

  private:
    struct Keys {  // of a block: rows of k as words, v paired
        const uint32_t* k;
        int64_t k_stride;
        const uint32_t* v;
    };

    Sequence<E> sequence(int64_t place, int64_t head) const {
        return sequence_of<E>(p_, axis_, place / size_.across, place % size_.across, size_.first_head + head);
    }

    // Rows [first, first + count) as they are, or rotated in scratch memory.
    Rows<const E> turned(const Rows<E>& x, const Sequence<E>& one, int64_t first, int64_t count) {
        if (p_.cos == nullptr) return {x.row(first), x.stride};
        for (int64_t i = 0; i < count; ++i) {
            const int64_t token = one.token + (first + i) * one.token_stride;
            rotate_row(rotated_ + i * p_.D, static_cast<const E*>(x.row(first + i)), p_.D, rotary_, token, 1.f);
        }
        return {rotated_, p_.D};
    }

    Keys keys(const Sequence<E>& one, int64_t first, int64_t count) {
        Pack::paired(v_, {one.v.data, one.v.stride}, first, count, columns_, p_.D);
        const int64_t bytes = one.k.stride * static_cast<int64_t>(sizeof(E));
        if (Pack::kNative && p_.cos == nullptr && bytes % 4 == 0) {
            return {reinterpret_cast<const uint32_t*>(one.k.row(first)), bytes / 4, v_};
        }
        Pack::straight(k_, turned(one.k, one, first, count), 0, count, p_.D);
        return {k_, Pack::words(p_.D), v_};
    }

    void whole(int64_t place, int64_t head) {
        const Sequence<E> one = sequence(place, head);
        const Keys all = keys(one, 0, one.N_k);
        const QueryBlocks blocks(one.N, kQueryLanes);
        for (int64_t i = 0; i < blocks.blocks; ++i) {
            const int64_t first = blocks.first(i), lanes = blocks.lanes(i);
            start(one, first, lanes);
            for (int64_t key = 0; key < one.N_k; key += kKeyBlock) {
                const int64_t count = smallest(kKeyBlock, one.N_k - key);
                step(one, lanes, key, count,
                     {all.k + key * all.k_stride, all.k_stride, all.v + key / Pack::kPack * columns_});
            }
            finish(one, first, lanes);
        }
    }

    void block(const Sequence<E>& one, int64_t index) {
        const QueryBlocks blocks(one.N, kQueryLanes);
        const int64_t first = blocks.first(index), lanes = blocks.lanes(index);
        start(one, first, lanes);
        for (int64_t key = 0; key < one.N_k; key += kKeyBlock) {
            const int64_t count = smallest(kKeyBlock, one.N_k - key);
            step(one, lanes, key, count, keys(one, key, count));
        }
        finish(one, first, lanes);
    }

    void start(const Sequence<E>& one, int64_t first, int64_t lanes) {
        const int64_t count = smallest(lanes, one.N - first);
        Pack::transposed(q_, turned(one.q, one, first, count), 0, count, lanes, p_.D);
        softmax_.clear(lanes);
        if (!p_.dropout) return;
        for (int64_t i = 0; i < lanes; ++i) {
            const int64_t row = one.first_row + one.token + (first + i) * one.token_stride;
            row_low_[i] = static_cast<uint32_t>(row), row_high_[i] = static_cast<uint32_t>(row >> 32);
        }
    }

    void step(const Sequence<E>& one, int64_t lanes, int64_t first, int64_t count, const Keys& keys) {
        const bool* mask = one.mask == nullptr ? nullptr : one.mask + first * one.mask_stride;
        const Block block{first, count, lanes, mask, one.mask_stride, row_low_, row_high_};
        uint32_t* p = Pack::kPack == 1 ? reinterpret_cast<uint32_t*>(scores_) : probabilities_;
        product<Arithmetic, Walk::kRows, false>(scores_, lanes, keys.k, keys.k_stride, q_, lanes, count, lanes / kLanes,
                                                Pack::words(p_.D));
        const bool shrinks = plain_ ? softmax_step<Arithmetic, true>(scores_, p, rules_, block, softmax_)
                                    : softmax_step<Arithmetic, false>(scores_, p, rules_, block, softmax_);
        const int64_t vectors = columns_ / kLanes, depth = Pack::words(count);
        if (first == 0) {
            product<Arithmetic, Walk::kColumns, false>(o_, columns_, p, lanes, keys.v, columns_, lanes, vectors, depth);
            return;
        }
        if (shrinks) shrink(lanes);
        product<Arithmetic, Walk::kColumns, true>(o_, columns_, p, lanes, keys.v, columns_, lanes, vectors, depth);
    }

    void shrink(int64_t lanes) {
        for (int64_t i = 0; i < lanes; ++i) {
            float* row = o_ + i * columns_;
            for (int64_t d = 0; d < columns_; d += kLanes) store(row + d, load<Floats>(row + d) * softmax_.shrink[i]);
        }
    }

    void finish(const Sequence<E>& one, int64_t first, int64_t lanes) {
        const int64_t count = smallest(lanes, one.N - first), rows = p_.B * p_.H * p_.T * p_.S;
        for (int64_t i = 0; i < count; ++i) {
            const float inverse = softmax_.sum[i] > 0.f ? 1.f / softmax_.sum[i] : 0.f;  // no key left: zeros
            store_row(one.o.row(first + i), o_ + i * columns_, p_.D, inverse);
            if (p_.stats == nullptr) continue;
            const int64_t row = one.first_row + one.token + (first + i) * one.token_stride;
            p_.stats[row] = softmax_.largest[i], p_.stats[rows + row] = inverse;
        }
    }

    const AttentionParams& p_;
    const Axis axis_;
    const AxisSize size_;
    const Rules rules_;
    const Rotary rotary_;
    const int64_t columns_;  // D in whole vectors
    bool plain_, resident_;

    uint32_t *q_, *k_, *v_;  // [words(D)][lanes], [keys][words(D)], [keys / kPack][columns]
    E* rotated_;             // [keys or queries][D]
    float* scores_;          // [keys of a block][lanes]
    uint32_t* probabilities_;
    float* o_;  // [lanes][columns]
    Softmax softmax_;
    uint32_t *row_low_, *row_high_;
};

}  // namespace vivit::cpu::VIVIT_ISA
