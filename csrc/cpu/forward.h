// Attention, forward: for each block of queries an online softmax over blocks of keys. Scores of a block stay in the
// cache; nothing is permuted, rows are read where they lie.
#pragma once

#include "on_grid.h"

namespace vivit::cpu::VIVIT_ISA {

// Keys of a block, a multiple of four, as dropout draws words for four. 64 to 256 are equal over 3,137 keys; of 196 one
// block takes 6 % less than two.
constexpr int64_t kKeyBlock = 256;

template <class E, class Arithmetic>
class Forward : OnGrid<E, Arithmetic> {
    using Base = OnGrid<E, Arithmetic>;
    using Pack = typename Base::Pack;
    using Base::block_of, Base::columns_, Base::p_, Base::plain_, Base::row_high_, Base::row_low_, Base::rules_,
        Base::short_, Base::size_;

  public:
    Forward(const AttentionParams& p, Axis axis)
        : Base(p, axis), most_lanes_(Arithmetic::kTiles && size_.N > kQueryLanes ? kQueryLanes / 2 : kQueryLanes) {}

    // Short sequences: all heads of a place in one unit, whose rows are neighbours. Longer ones: a block of queries.
    int64_t units() const {
        if (short_) return this->places();
        return this->places() * size_.heads * QueryBlocks(size_.N, most_lanes_).blocks;
    }

    void run(int64_t first, int64_t end) {
        carve(*this);
        const int64_t H = size_.heads, blocks = QueryBlocks(size_.N, most_lanes_).blocks;
        int64_t packed = -1;  // the sequence whose keys are packed
        for (int64_t unit = first; unit < end; ++unit) {
            if (short_) {
                for (int64_t h = 0; h < H; ++h) {
                    if (unit + 1 < end) approach_share(unit + 1, h);
                    const Sequence<E> one = this->sequence(unit, h);
                    pack_keys(one);
                    block(one, 0);
                }
                continue;
            }
            const int64_t index = unit / blocks;
            const Sequence<E> one = this->sequence(index / H, index % H);
            if (index != packed) pack_keys(one);
            packed = index;
            block(one, unit % blocks);
        }
    }

    void lay_out(Carver& carver) {
        const int64_t words = Pack::words(p_.D), keys = size_.N_k, block_keys = smallest(keys, kKeyBlock);
        const int64_t rotated = p_.cos == nullptr ? 0 : (keys > kQueryLanes ? keys : kQueryLanes) * p_.D;
        q_ = carver.take<uint32_t>(words * kQueryLanes);
        k_words_ = carver.take<uint32_t>(tile_rows<Arithmetic>(keys) * words);
        values_.lay_out(carver, keys, kQueryLanes, columns_);
        k_rotated_ = carver.take<E>(rotated), q_rotated_ = carver.take<E>(rotated);
        scores_ = carver.take<float>(tile_rows<Arithmetic>(block_keys) * kQueryLanes);
        probabilities_ = Pack::kPack == 1 ? reinterpret_cast<uint32_t*>(scores_)  // in place
                                          : carver.take<uint32_t>(Pack::words(block_keys) * kQueryLanes);
        softmax_.largest = carver.take<float>(kQueryLanes), softmax_.sum = carver.take<float>(kQueryLanes);
        softmax_.shrink = carver.take<float>(kQueryLanes);
        row_low_ = carver.take<uint32_t>(kQueryLanes), row_high_ = carver.take<uint32_t>(kQueryLanes);
    }

  private:
    // While head h of a place is computed, an H-th of the next place's rows.
    void approach_share(int64_t place, int64_t h) const {
        const Sequence<E> next = this->sequence(place, 0);
        this->template approach<false>(next.q, next.N, p_.q, h), this->template approach<true>(next.o, next.N, p_.o, h);
        this->template approach<false>(next.k, next.N_k, p_.k, h),
            this->template approach<false>(next.v, next.N_k, p_.v, h);
    }

    void pack_keys(const Sequence<E>& one) {
        values_.pack({one.v.data, one.v.stride}, one.N_k, p_.D);
        k_ = this->operand(this->turned(one.k, one, 0, one.N_k, k_rotated_), k_words_);
    }

    void block(const Sequence<E>& one, int64_t index) {
        const QueryBlocks blocks(one.N, most_lanes_);
        const int64_t first = blocks.first(index), lanes = blocks.lanes(index), count = smallest(lanes, one.N - first);
        Pack::transposed(q_, this->turned(one.q, one, first, count, q_rotated_), 0, count, lanes, p_.D);
        softmax_.clear(lanes);
        this->name_rows(one, first, lanes);
        for (int64_t key = 0; key < one.N_k; key += kKeyBlock) {
            step(block_of(one, key, smallest(kKeyBlock, one.N_k - key), lanes));
        }
        finish(one, first, count, lanes);
    }

    void step(const Block& block) {
        const int64_t lanes = block.lanes;
        product_of_rows<Arithmetic, false, Arithmetic::kScoreChain>(
            scores_, lanes, k_.words + block.first_key * k_.stride, k_.stride, q_, lanes, block.keys, lanes / kLanes,
            Pack::words(p_.D));
        const bool shrinks = plain_ ? softmax_step<Arithmetic, true>(scores_, probabilities_, rules_, block, softmax_)
                                    : softmax_step<Arithmetic, false>(scores_, probabilities_, rules_, block, softmax_);
        if (shrinks && block.first_key > 0) values_.scale(softmax_.shrink, lanes);
        values_.add(probabilities_, lanes, lanes, block.first_key, block.keys);
    }

    void finish(const Sequence<E>& one, int64_t first, int64_t count, int64_t lanes) {
        const float* o = values_.rows(lanes);
        for (int64_t i = 0; i < count; ++i) {
            const float inverse = softmax_.sum[i] > 0.f ? 1.f / softmax_.sum[i] : 0.f;  // no key left: zeros
            store_row(one.o.row(first + i), o + i * columns_, p_.D, inverse);
            if (p_.stats == nullptr) continue;
            const int64_t row = one.first_row + this->token(one, first + i);
            p_.stats[row] = softmax_.largest[i], p_.stats[this->stat_rows() + row] = inverse;
        }
    }

    // Queries of a block. In tiles half of them, so that scores and probabilities of a key block take 48 KB and not 96:
    // 3,137 queries come in 88 % of the time, 784 in 91, 197 in 97 (one core of a Xeon with AMX).
    const int64_t most_lanes_;
    typename Base::Operand k_{};
    uint32_t *q_, *k_words_;  // [words(D)][lanes], [keys][words(D)]
    E *q_rotated_, *k_rotated_;
    float* scores_;            // [keys of a block][lanes]
    uint32_t* probabilities_;  // [keys of a block / kPack][lanes]
    OverKeys<E, Arithmetic> values_;
    Softmax softmax_;
};

}  // namespace vivit::cpu::VIVIT_ISA
