// Attention, backward: scores are computed again for each block of queries; dk and dv add up over blocks in float32.
//
//     p = softmax(scale * q.k)             dv = p^T do     dp = do v^T
//     ds = p * (dp - sum(p * dp))          dq = ds k       dk = ds^T q
//
// Sequences that are resident (attention.h) need nothing of the forward; others read its o and statistics, and go over
// their keys in blocks. Every gradient is written once, by one thread.
#pragma once

#include "on_grid.h"
#include "softmax_backward.h"

namespace vivit::cpu::VIVIT_ISA {

constexpr int64_t kKeyBlockBackward = 128;

template <class E, class Arithmetic>
class Backward : OnGrid<E, Arithmetic> {
    using Base = OnGrid<E, Arithmetic>;
    using Pack = typename Base::Pack;
    using Base::columns_, Base::p_, Base::plain_, Base::row_high_, Base::row_low_, Base::rules_, Base::rotary_,
        Base::short_, Base::size_;
    static constexpr int kPack = Pack::kPack;

  public:
    Backward(const AttentionParams& p, Axis axis)
        : Base(p, axis),
          scale_(static_cast<float>(p.scale)),
          whole_(is_resident(p.dtype, size_.N_k)),
          key_block_(whole_ ? size_.N_k : smallest(size_.N_k, kKeyBlockBackward)) {}

    int64_t units() const { return short_ ? this->places() : this->places() * size_.heads; }

    void run(int64_t first, int64_t end) {
        carve(*this);
        for (int64_t unit = first; unit < end; ++unit) {
            if (!short_) {
                one_sequence(this->sequence(unit / size_.heads, unit % size_.heads));
                continue;
            }
            for (int64_t h = 0; h < size_.heads; ++h) {
                if (unit + 1 < end) approach_share(unit + 1, h);
                one_sequence(this->sequence(unit, h));
            }
        }
    }

    void lay_out(Carver& carver) {
        const int64_t words = Pack::words(p_.D), keys = size_.N_k, lanes = kQueryLanes,
                      rows = tile_rows<Arithmetic>(keys);
        const int64_t scores = tile_rows<Arithmetic>(key_block_) * lanes;
        const bool turns = p_.cos != nullptr;
        q_columns_ = carver.take<uint32_t>(words * lanes), do_columns_ = carver.take<uint32_t>(words * lanes);
        q_pairs_ = carver.take<uint32_t>(Pack::words(lanes) * columns_);
        do_pairs_ = carver.take<uint32_t>(Pack::words(lanes) * columns_);
        k_words_ = carver.take<uint32_t>(rows * words), v_words_ = carver.take<uint32_t>(rows * words);
        dq_.lay_out(carver, keys, lanes, columns_);
        k_rotated_ = carver.take<E>(turns ? keys * p_.D : 0), q_rotated_ = carver.take<E>(turns ? lanes * p_.D : 0);
        at_.scores = carver.take<float>(scores), at_.dp = carver.take<float>(scores);
        at_.slope = p_.softcap > 0 ? carver.take<float>(scores) : nullptr;
        at_.p_rows = kPack == 1 ? reinterpret_cast<uint32_t*>(at_.scores) : carver.take<uint32_t>(scores / kPack);
        at_.ds_rows = kPack == 1 ? reinterpret_cast<uint32_t*>(at_.dp) : carver.take<uint32_t>(scores / kPack);
        at_.ds_pairs = kPack == 1 ? at_.ds_rows : carver.take<uint32_t>(Pack::words(key_block_) * lanes);
        at_.largest = carver.take<float>(lanes), at_.inverse = carver.take<float>(lanes);
        at_.delta = carver.take<float>(lanes);
        dk_ = carver.take<float>(rows * columns_), dv_ = carver.take<float>(rows * columns_);
        row_low_ = carver.take<uint32_t>(lanes), row_high_ = carver.take<uint32_t>(lanes);
    }

  private:
    void approach_share(int64_t place, int64_t h) const {
        const Sequence<E> next = this->sequence(place, 0);
        this->template approach<false>(next.q, next.N, p_.q, h),
            this->template approach<false>(next.d_o, next.N, p_.d_o, h);
        this->template approach<false>(next.k, next.N_k, p_.k, h),
            this->template approach<false>(next.v, next.N_k, p_.v, h);
        this->template approach<true>(next.dq, next.N, p_.dq, h);
        this->template approach<true>(next.dk, next.N_k, p_.dk, h),
            this->template approach<true>(next.dv, next.N_k, p_.dv, h);
    }

    void one_sequence(const Sequence<E>& one) {
        const Rows<const E> k = this->turned(one.k, one, 0, one.N_k, k_rotated_);
        k_ = this->operand(k, k_words_);
        v_ = this->operand({one.v.data, one.v.stride}, v_words_);
        dq_.pack(k, one.N_k, p_.D);
        const QueryBlocks blocks(one.N, kQueryLanes, kPack * Arithmetic::kStep);
        for (int64_t i = 0; i < blocks.blocks; ++i) queries(one, blocks.first(i), blocks.lanes(i));
        for (int64_t j = 0; j < one.N_k; ++j) {
            store_gradient(one.dk.row(j), dk_ + j * columns_, p_.D, scale_, rotary_, this->token(one, j));
            store_row(one.dv.row(j), dv_ + j * columns_, p_.D, 1.f);
        }
    }

    void queries(const Sequence<E>& one, int64_t first, int64_t lanes) {
        const int64_t count = smallest(lanes, one.N - first);
        const Rows<const E> q = this->turned(one.q, one, first, count, q_rotated_);
        const Rows<const E> d_o{one.d_o.row(first), one.d_o.stride};
        Pack::transposed(q_columns_, q, 0, count, lanes, p_.D);
        Pack::transposed(do_columns_, d_o, 0, count, lanes, p_.D);
        Pack::paired(q_pairs_, q, 0, count, columns_, p_.D);
        Pack::paired(do_pairs_, d_o, 0, count, columns_, p_.D);
        this->name_rows(one, first, lanes);
        if (!whole_) statistics(one, first, count, lanes);
        for (int64_t key = 0; key < one.N_k; key += key_block_) {
            const Block block = this->block_of(one, key, smallest(key_block_, one.N_k - key), lanes);
            first == 0 ? keys<false>(block, count) : keys<true>(block, count);
        }
        float* dq = dq_.rows(lanes);
        for (int64_t i = 0; i < count; ++i) {
            store_gradient(one.dq.row(first + i), dq + i * columns_, p_.D, scale_, rotary_,
                           this->token(one, first + i));
        }
    }

    // What the forward left of a block's queries; nothing of the lanes behind them, which then add nothing.
    void statistics(const Sequence<E>& one, int64_t first, int64_t count, int64_t lanes) {
        for (int64_t i = 0; i < lanes; ++i) {
            const bool there = i < count;
            const int64_t row = there ? one.first_row + this->token(one, first + i) : 0;
            const float largest = there ? p_.stats[row] : 0.f;
            at_.largest[i] = largest == kNothing ? 0.f : largest;
            at_.inverse[i] = there ? p_.stats[this->stat_rows() + row] : 0.f;
            at_.delta[i] = there ? dot(one.o.row(first + i), one.d_o.row(first + i)) : 0.f;
        }
    }

    float dot(const E* a, const E* b) const {
        Floats sum{};
        for (int64_t d = 0; d < p_.D; d += kLanes) {
            const int here = static_cast<int>(smallest<int64_t>(kLanes, p_.D - d));
            sum += load_floats(a + d, here) * load_floats(b + d, here);
        }
        float total = 0.f;
        for (int i = 0; i < kLanes; ++i) total += sum[i];
        return total;
    }

    // One block of keys and queries: its share of dq, dk and dv. kLater: not the first queries of the sequence.
    template <bool kLater>
    void keys(const Block& block, int64_t count) {
        const int64_t lanes = block.lanes, key = block.first_key, n = block.keys;
        const int64_t vectors = columns_ / kLanes, words = Pack::words(p_.D), depth = Pack::words(count);
        product_of_rows<Arithmetic, false, Arithmetic::kScoreChain>(
            at_.scores, lanes, k_.words + key * k_.stride, k_.stride, q_columns_, lanes, n, lanes / kLanes, words);
        product_of_rows<Arithmetic, false>(at_.dp, lanes, v_.words + key * v_.stride, v_.stride, do_columns_, lanes, n,
                                           lanes / kLanes, words);
        softmax(block);
        product_of_rows<Arithmetic, kLater>(dv_ + key * columns_, columns_, at_.p_rows, lanes / kPack, do_pairs_,
                                            columns_, n, vectors, depth);
        product_of_rows<Arithmetic, kLater>(dk_ + key * columns_, columns_, at_.ds_rows, lanes / kPack, q_pairs_,
                                            columns_, n, vectors, depth);
        dq_.add(at_.ds_pairs, lanes, count, key, n);
    }

    void softmax(const Block& block) {
        if (whole_) {
            plain_ ? softmax_backward_whole<Arithmetic, true>(at_, rules_, block)
                   : softmax_backward_whole<Arithmetic, false>(at_, rules_, block);
        } else {
            plain_ ? softmax_backward_part<Arithmetic, true>(at_, rules_, block)
                   : softmax_backward_part<Arithmetic, false>(at_, rules_, block);
        }
    }

    const float scale_;
    const bool whole_;         // all keys in one block
    const int64_t key_block_;  // keys of a block
    typename Base::Operand k_{}, v_{};
    uint32_t *q_columns_, *do_columns_;  // [words(D)][lanes]
    uint32_t *q_pairs_, *do_pairs_;      // [lanes / kPack][columns]
    uint32_t *k_words_, *v_words_;       // [keys][words(D)]
    E *q_rotated_, *k_rotated_;
    ScoreGradient at_{};
    OverKeys<E, Arithmetic> dq_;
    float *dk_, *dv_;  // [keys][columns]
};

}  // namespace vivit::cpu::VIVIT_ISA
