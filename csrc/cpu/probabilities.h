// From a block of scores to probabilities. Scores lie key by key, [keys][lanes] with a query in each lane: largest
// value and sum of a softmax are then taken vertically, a masked key is a row, and dropout's words come in whole
// vectors.
#pragma once

#include "arithmetic.h"
#include "philox.h"

namespace vivit::cpu::VIVIT_ISA {

constexpr double kLog2E = 1.4426950408889634;

// How a product of a query and a key becomes a probability; the same for a whole call. A block's scores are the
// products themselves where these rise with the probability, and a `unit` makes exp a power of two; else they are
// turned first: into their tanh, or, with a negative scale, over.
struct Rules {
    float unit, unit_rest;  // the second is what the first loses by rounding
    bool caps, turns;
    float into_tanh;
    bool dropout;
    float keep_scale;
    uint32_t keep_from;
    int64_t seed, offset;

    explicit Rules(const AttentionParams& p)
        : unit(static_cast<float>(unit_of(p))),
          unit_rest(static_cast<float>(unit_of(p) - static_cast<float>(unit_of(p)))),
          caps(p.softcap > 0),
          turns(caps || p.scale < 0),
          into_tanh(caps ? static_cast<float>(p.scale / p.softcap) : 0.f),
          dropout(p.dropout),
          keep_scale(p.keep_scale),
          keep_from(static_cast<uint32_t>(smallest<uint64_t>(p.keep_from, 0xffffffffu))),
          seed(p.seed),
          offset(p.offset) {}

    static double unit_of(const AttentionParams& p) {
        const double factor = p.softcap > 0 ? p.softcap : p.scale;
        return (factor < 0 ? -factor : factor) * kLog2E;
    }
    VIVIT_INLINE Floats turned(Floats product) const { return caps ? tanh(product * into_tanh) : -product; }
};

// The keys of a block and the queries in its lanes.
struct Block {
    int64_t first_key, keys, lanes;
    const bool* mask;  // of the first key, or none
    int64_t mask_stride;
    const uint32_t *row_low, *row_high;  // [lanes], dropout rows of the queries

    VIVIT_INLINE bool allowed(int64_t key) const { return mask == nullptr || mask[key * mask_stride]; }
};

// Words of dropout for one vector of queries, four keys at a time.
struct Keep {
    Words word[4];

    VIVIT_INLINE void draw(const Rules& rules, const Block& block, int64_t key, int64_t lane) {
        philox(rules.seed, rules.offset, static_cast<uint32_t>((block.first_key + key) / 4),
               load<Words>(block.row_low + lane), load<Words>(block.row_high + lane), word);
    }
    // All bits of a lane set where the pair is kept.
    VIVIT_INLINE Words kept(const Rules& rules, int64_t key) const {
        return (Words)(word[key % 4] >= all_words(rules.keep_from));
    }
    // x where the pair is kept, else 0.
    VIVIT_INLINE Floats of(Floats x, const Rules& rules, int64_t key) const {
        return bits<Floats>(bits<Words>(x) & kept(rules, key));
    }
};

constexpr float kNothing = -__builtin_inff();

// Sums over keys are sums of sums of so many: behind one probability of nearly 1, a long sum loses all small ones.
constexpr int64_t kShortSum = 16;

// Of each query so far: the largest score, the sum of 2^(score - largest), and what the last block scaled older sums
// by.
struct Softmax {
    float *largest, *sum, *shrink;  // [lanes]

    void clear(int64_t lanes) const {
        for (int64_t i = 0; i < lanes; ++i) largest[i] = kNothing, sum[i] = 0.f;
    }
};

// Turns a block's products into scores for one vector of queries, where that takes anything.
VIVIT_INLINE void turn(float* scores, const Rules& rules, const Block& block, int64_t lane) {
    if (!rules.turns) return;
    for (int64_t j = 0; j < block.keys; ++j) {
        float* at = scores + j * block.lanes + lane;
        store(at, rules.turned(load<Floats>(at)));
    }
}

// The larger of `largest` and a block's scores.
template <bool kPlain>
VIVIT_INLINE Floats largest_of(const float* scores, const Block& block, int64_t lane, Floats largest) {
    constexpr int kChains = 8;  // one would wait for each comparison
    Floats chain[kChains];
#pragma GCC unroll 8
    for (int i = 0; i < kChains; ++i) chain[i] = largest;
    int64_t j = 0;
    for (; kPlain && j + kChains <= block.keys; j += kChains) {
#pragma GCC unroll 8
        for (int i = 0; i < kChains; ++i) {
            chain[i] = larger(chain[i], load<Floats>(scores + (j + i) * block.lanes + lane));
        }
    }
    for (; j < block.keys; ++j) {
        if (kPlain || block.allowed(j)) largest = larger(largest, load<Floats>(scores + j * block.lanes + lane));
    }
#pragma GCC unroll 8
    for (int i = 0; i < kChains; ++i) largest = larger(largest, chain[i]);
    return largest;
}

// exp of a score's difference to the largest one of its query. kExact: exactly 1 where there is none, which a product
// rounded apart would miss.
template <bool kExact>
class Power {
  public:
    VIVIT_INLINE Power(const Rules& rules, Floats largest)
        : unit_(rules.unit), rest_(rules.unit_rest), largest_(kCoarse ? largest * rules.unit : largest) {}

    VIVIT_INLINE Floats of(Floats score) const {
#if defined(__AVX512DQ__)
        // rounding largest * unit is a factor that all keys of a query have
        if constexpr (kCoarse) {
            return coarse_exp2((Floats)_mm512_fmsub_ps((__m512)score, (__m512)all(unit_), (__m512)largest_));
        }
#endif
        return exp2<kExact>(score - largest_, unit_, rest_);
    }

  private:
#if defined(__AVX512DQ__)
    static constexpr bool kCoarse = !kExact;
#else
    static constexpr bool kCoarse = false;
#endif
    float unit_, rest_;
    Floats largest_;
};

template <class Arithmetic, bool kPlain>
VIVIT_INLINE Floats power(const Power<Arithmetic::kExact>& of, const float* scores, const Block& block, int64_t key,
                          int64_t lane) {
    if (!kPlain && !block.allowed(key)) return Floats{};
    return of.of(load<Floats>(scores + key * block.lanes + lane));
}

// Keys [first, end) of a block, at most kShortSum, as words of `p`, and their sum. kWhole: kShortSum keys, so that the
// loop has no other ends.
template <class Arithmetic, bool kPlain, bool kWhole>
VIVIT_INLINE Floats probabilities_of(const Power<Arithmetic::kExact>& of, const float* scores, uint32_t* p,
                                     const Rules& rules, const Block& block, int64_t first, int64_t end, int64_t lane,
                                     Keep& keep) {
    constexpr int kPack = Arithmetic::kPack;
    Floats sum[kPack] = {};
    for (int64_t j = first; j < (kWhole ? first + kShortSum : end); j += kPack) {
        Floats x[kPack];
        if (!kPlain && rules.dropout && j % 4 == 0) keep.draw(rules, block, j, lane);
#pragma GCC unroll 2
        for (int i = 0; i < kPack; ++i) {
            const bool there = kWhole || j + i < end;
            x[i] = there ? power<Arithmetic, kPlain>(of, scores, block, j + i, lane) : Floats{};
            sum[i] += x[i];
            if (!kPlain && rules.dropout) x[i] = keep.of(x[i] * rules.keep_scale, rules, j + i);
        }
        Arithmetic::store_pair(p + j / kPack * block.lanes + lane, x[0], x[kPack - 1]);
    }
    return kPack == 1 ? sum[0] : sum[0] + sum[kPack - 1];
}

// One step of an online softmax: products q.k in `scores` become the operand `p` of the product with v, in words
// [keys / kPack][lanes]; with kPack 1 it may lie where the scores lie. True if older sums have to shrink.
template <class Arithmetic, bool kPlain>
bool softmax_step(float* scores, uint32_t* p, const Rules& rules, const Block& of_keys, const Softmax& state) {
    const Block block = of_keys;  // of this function alone: what it stores cannot change it
    bool shrinks = false;
    for (int64_t lane = 0; lane < block.lanes; lane += kLanes) {
        const Floats before = load<Floats>(state.largest + lane);
        if (!kPlain) turn(scores, rules, block, lane);
        const Floats largest = largest_of<kPlain>(scores, block, lane, before);
        store(state.largest + lane, largest);
        // without any key so far there is nothing to shrink, and -inf - -inf must not arise
        const Floats base = largest == all(kNothing) ? Floats{} : largest;
        const Floats shrink = before == all(kNothing) ? Floats{} : Power<true>(rules, base).of(before);
        store(state.shrink + lane, shrink);
        shrinks |= any((Ints)(shrink != all(1.f)));
        const Power<Arithmetic::kExact> power_of(rules, base);
        Floats sum = load<Floats>(state.sum + lane) * shrink;
        Keep keep;
        int64_t first = 0;
        for (; first + kShortSum <= block.keys; first += kShortSum) {
            sum += probabilities_of<Arithmetic, kPlain, true>(power_of, scores, p, rules, block, first,
                                                              first + kShortSum, lane, keep);
        }
        sum += probabilities_of<Arithmetic, kPlain, false>(power_of, scores, p, rules, block, first, block.keys, lane,
                                                           keep);
        store(state.sum + lane, sum);
    }
    return shrinks;
}

}  // namespace vivit::cpu::VIVIT_ISA
