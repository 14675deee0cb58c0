// From scores and dP to the operands of dq, dk and dv. Layout as in probabilities.h: a query in each lane.
#pragma once

#include "probabilities.h"

namespace vivit::cpu::VIVIT_ISA {

// Of a block: products q.k and do.v come in, probabilities and ds go out. `rows` have a key's queries side by side, for
// products that add up over queries; `pairs` have neighbouring keys together, for those that add up over keys. In
// float32 all three are where the inputs lie.
struct ScoreGradient {
    float *scores, *dp, *slope;             // [keys][lanes]; slope only with a soft-cap
    uint32_t *p_rows, *ds_rows, *ds_pairs;  // [keys][lanes / kPack] twice, [keys / kPack][lanes]
    float *largest, *inverse, *delta;       // [lanes], of each query: see AttentionParams::stats; sum(do * o)
};

// Probabilities before dropout from dropped ones: the sign bit of a power marks a pair that dropout drops.
constexpr uint32_t kDropped = 0x80000000u;

// 2^(score - largest), marked; dp after dropout; the slope of the soft-cap.
template <class Arithmetic, bool kPlain>
VIVIT_INLINE void powers_of_key(const Power<Arithmetic::kExact>& of, const ScoreGradient& at, const Rules& rules,
                                const Block& block, int64_t key, int64_t lane, Keep& keep, Floats& weight, Floats& dp) {
    const int64_t i = key * block.lanes + lane;
    weight = power<Arithmetic, kPlain>(of, at.scores, block, key, lane);
    dp = load<Floats>(at.dp + i);
    if (kPlain) return;
    if (at.slope != nullptr) {
        const Floats tanh_of = load<Floats>(at.scores + i);
        store(at.slope + i, 1.f - tanh_of * tanh_of);
    }
    if (!rules.dropout) return;
    if (key % 4 == 0) keep.draw(rules, block, key, lane);
    dp = keep.of(dp * rules.keep_scale, rules, key);
    weight = bits<Floats>(bits<Words>(weight) | (~keep.kept(rules, key) & kDropped));
}

// p (dropped, as the product with v has seen it) and ds of a key from its marked power.
template <bool kPlain>
VIVIT_INLINE void gradient_of_key(const ScoreGradient& at, const Rules& rules, const Block& block, int64_t key,
                                  int64_t lane, Floats weight, Floats dp, Floats inverse, Floats delta, Floats& p,
                                  Floats& ds) {
    const Words marked = bits<Words>(weight);
    p = kPlain ? weight * inverse : bits<Floats>(marked & ~kDropped) * inverse;
    ds = p * (dp - delta);
    if (kPlain) return;
    if (at.slope != nullptr) ds *= load<Floats>(at.slope + key * block.lanes + lane);
    if (rules.dropout) p = (marked & kDropped) == Words{} ? p * rules.keep_scale : Floats{};
}

template <class Arithmetic>
VIVIT_INLINE void store_gradients(const ScoreGradient& at, const Block& block, int64_t key, int64_t lane,
                                  const Floats (&p)[2], const Floats (&ds)[2]) {
    constexpr int kPack = Arithmetic::kPack;
    for (int i = 0; i < kPack && key + i < block.keys; ++i) {
        const int64_t word = ((key + i) * block.lanes + lane) / kPack;
        Arithmetic::store_row(at.p_rows + word, p[i]);
        Arithmetic::store_row(at.ds_rows + word, ds[i]);
    }
    if (kPack > 1) Arithmetic::store_pair(at.ds_pairs + key / kPack * block.lanes + lane, ds[0], ds[kPack - 1]);
}

// The block holds all keys of its queries: largest, sum and delta = sum(p * dp) come of it, without the roundings of a
// saved o.
template <class Arithmetic, bool kPlain>
void softmax_backward_whole(const ScoreGradient& at, const Rules& rules, const Block& block) {
    constexpr int kPack = Arithmetic::kPack;
    for (int64_t lane = 0; lane < block.lanes; lane += kLanes) {
        if (!kPlain) turn(at.scores, rules, block, lane);
        const Floats found = largest_of<kPlain>(at.scores, block, lane, all(kNothing));
        const Power<Arithmetic::kExact> power_of(rules, found == all(kNothing) ? Floats{} : found);
        Floats sum{}, product_sum{};
        Keep keep;
        for (int64_t first = 0; first < block.keys; first += kShortSum) {
            Floats part{}, product_part{};
            for (int64_t j = first; j < smallest(block.keys, first + kShortSum); ++j) {
                Floats weight, dp;
                powers_of_key<Arithmetic, kPlain>(power_of, at, rules, block, j, lane, keep, weight, dp);
                const Floats unmarked = kPlain ? weight : bits<Floats>(bits<Words>(weight) & ~kDropped);
                part += unmarked, product_part += unmarked * dp;
                store(at.scores + j * block.lanes + lane, weight);
                if (!kPlain && rules.dropout) store(at.dp + j * block.lanes + lane, dp);
            }
            sum += part, product_sum += product_part;
        }
        const Floats inverse = sum > Floats{} ? 1.f / sum : Floats{};  // no key left: zeros
        const Floats delta = product_sum * inverse;
        for (int64_t j = 0; j < block.keys; j += kPack) {
            Floats p[2] = {}, ds[2] = {};
#pragma GCC unroll 2
            for (int i = 0; i < kPack; ++i) {
                if (j + i >= block.keys) break;
                const int64_t word = (j + i) * block.lanes + lane;
                gradient_of_key<kPlain>(at, rules, block, j + i, lane, load<Floats>(at.scores + word),
                                        load<Floats>(at.dp + word), inverse, delta, p[i], ds[i]);
            }
            store_gradients<Arithmetic>(at, block, j, lane, p, ds);
        }
    }
}

// A block of some keys: what needs all of them was left by the forward.
template <class Arithmetic, bool kPlain>
void softmax_backward_part(const ScoreGradient& at, const Rules& rules, const Block& block) {
    constexpr int kPack = Arithmetic::kPack;
    for (int64_t lane = 0; lane < block.lanes; lane += kLanes) {
        if (!kPlain) turn(at.scores, rules, block, lane);
        const Power<Arithmetic::kExact> power_of(rules, load<Floats>(at.largest + lane));
        const Floats inverse = load<Floats>(at.inverse + lane), delta = load<Floats>(at.delta + lane);
        Keep keep;
        for (int64_t j = 0; j < block.keys; j += kPack) {
            Floats p[2] = {}, ds[2] = {};
#pragma GCC unroll 2
            for (int i = 0; i < kPack; ++i) {
                if (j + i >= block.keys) break;
                Floats weight, dp;
                powers_of_key<Arithmetic, kPlain>(power_of, at, rules, block, j + i, lane, keep, weight, dp);
                gradient_of_key<kPlain>(at, rules, block, j + i, lane, weight, dp, inverse, delta, p[i], ds[i]);
            }
            store_gradients<Arithmetic>(at, block, j, lane, p, ds);
        }
    }
}

}  // namespace vivit::cpu::VIVIT_ISA
