// Softmax: from scores to weights, in the registers of the thread that has them.
//
// A multiprocessor starts 16 exponentials in a cycle, and does 4,096 of the 4 x 64 operations that a score takes of the
// two products: at D = 64 both take 1/16 cycle a score. Two things are done about it, choices of the variant. Neither
// has been timed; counted are instructions of a warp for 128 keys, in nvcc 13.0's machine code (`python -m bench
// cuda_model`). Of two warpgroups a scheduler has 1,024 cycles for two such warps, as long as their products take.
//
//   of 16 by polynomial   exponentials, cycles of two warps   issued by two warps
//   0                     1056                                792
//   2 (chosen)            928                                 906
//   4                     800                                 1018
//
// A share of the exponentials by the FMA pipes (Cody and Waite 1980): x = n + f, n the nearest whole number, 2^f a
// polynomial, n added to its exponent: 8 instructions instead of 1. An eighth is where both leave the same room. At 80
// channels and more the products take longest (from 1,280 cycles on, against 1,056), and none is done so.
//
// Fewer changes of the base: weights are 2^(score - base). The base of a row is raised only when a score is more than
// kSlack above it; otherwise weights up to 2^kSlack come out, whose share in the sum is the same. In fp16, too, 2^8 is
// far from the largest number. Two instructions more, and a warp whose sixteen bases all stay multiplies nothing: 32
// instructions less. At a slack of 0 some base of the sixteen rises in about half of the tiles even after 25 of them,
// if keys come in a random order.
#pragma once

#include "joint_hopper_multiply.cuh"
#include "joint_hopper_pairs.cuh"
#include "joint_hopper_schedule.cuh"

namespace vivit::cuda {

template <class Variant>
using TileScores = float[Variant::kKeys / 8][4];
template <class Variant>
using TileWeights = uint32_t[Variant::kKeys / 16][4];
template <class Variant>
using TileOutput = float[2 * Variant::kSteps][4];

// 2^x for x of at most 126, within 1.1e-4 of it; below 2^-126 a number from 0 to 2^-126. Of NaN nothing finite comes
// out in 16 bits.
//
// The coefficients have the smallest largest relative error of degree 3 on [-1/2, 1/2] with 2^0 = 1, so that the
// largest weight of a row is exact: 1.02e-4 (tests/test_cuda_joint_hopper.py, of every f). 1.5 * 2^23 + x has whole
// numbers as its last place; the lowest bits of that sum are n, and move to the exponent.
VIVIT_DEVICE float exp2_polynomial(float x) {
    constexpr float kWhole = 12582912.f;
    x = larger_or_nan(x, -127.f);
    const float shifted = x + kWhole;
    const float f = x - (shifted - kWhole);
    const float y = __fmaf_rn(__fmaf_rn(__fmaf_rn(0.05500893f, f, 0.24221096f), f, 0.69328293f), f, 1.f);
    return __uint_as_float(__float_as_uint(y) + (__float_as_uint(shifted) << 23));
}

// Of rows g and g + 8 of a warp's sixteen.
struct RowState {
    float base[2] = {-kInfinity, -kInfinity};
    float total[2] = {0.f, 0.f};  // the thread's share of the sum of weights
};

// Products become scores, over the number that is returned: positive, so that the largest product has the largest
// score. A soft-cap, and a scale that is not positive, have to be applied before that is looked for.
template <int kBlocks>
VIVIT_DEVICE float score(float (&x)[kBlocks][4], const Scores<false>& scores) {
    if (scores.cap == 0.f && scores.unit > 0.f) return scores.unit;
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) x[i / 4][i % 4] = scores.of(x[i / 4][i % 4]);
    return 1.f;
}

// Weights of pairs that dropout drops become 0; all are scaled at the end, with their row, so that none leaves the
// range of 16 bits. row: the number of the query of row g. Lanes t and t ^ 1 need words of the same four keys, which
// are made together: each makes those of one row, and they trade halves.
template <int kBlocks>
VIVIT_DEVICE void drop(float (&x)[kBlocks][4], const Dropout& dropout, int64_t row, int32_t first_key) {
    const int32_t t = lane_number() % 4;
    const bool odd = t % 2 != 0;
    const uint32_t first_group = static_cast<uint32_t>(first_key) / 4 + t / 2;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
        const uint4 made = dropout.words(row + (odd ? 8 : 0), first_group + 2 * n);
        const uint32_t first = from_lane_xor(odd ? made.x : made.z, 1);
        const uint32_t second = from_lane_xor(odd ? made.y : made.w, 1);
        const uint32_t word[4] = {odd ? first : made.x, odd ? second : made.y, odd ? made.z : first,
                                  odd ? made.w : second};
#pragma unroll
        for (int i = 0; i < 4; ++i) x[n][i] = word[i] >= dropout.keep_from ? x[n][i] : 0.f;
    }
}

// The largest, or the sum, of each of two rows that a thread has a part of, four chains at a time: an instruction waits
// some cycles for the one before it in its chain.
struct PerRow {
    float chain[2][4];

    // Of number i of the scores; numbers come in order.
    VIVIT_DEVICE float& of(int i) { return chain[i % 4 / 2][i / 4 % 2 * 2 + i % 2]; }
    VIVIT_DEVICE void raise(int i, float x) { of(i) = i < 8 ? x : fmaxf(of(i), x); }
    VIVIT_DEVICE void add(int i, float x) { of(i) = i < 8 ? x : of(i) + x; }
    VIVIT_DEVICE float largest(int r) const {
        return fmaxf(fmaxf(chain[r][0], chain[r][1]), fmaxf(chain[r][2], chain[r][3]));
    }
    VIVIT_DEVICE float sum(int r) const { return (chain[r][0] + chain[r][1]) + (chain[r][2] + chain[r][3]); }
};

// x becomes weights; shrink: what sums so far are to be multiplied by. True where that is not 1 for a row of the warp.
template <class Variant>
VIVIT_DEVICE bool weigh(TileScores<Variant>& x, RowState& rows, float unit, float (&shrink)[2]) {
    constexpr int kNumbers = Variant::kKeys / 2;
    PerRow highest, total;
    float from[2];
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) highest.raise(i, x[i / 4][i % 4]);
    bool rises = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float most = largest_of_row(highest.largest(r)) * unit;  // a positive number: the largest score, scaled
        const bool above = most - rows.base[r] > static_cast<float>(Variant::kSlack);
        const float base = above ? most : rows.base[r];
        shrink[r] = exp2_fast(rows.base[r] - base);
        from[r] = base;
        if constexpr (!Variant::kPlain) {  // a row may be without keys so far
            if (!above) shrink[r] = 1.f;
            if (base == -kInfinity) from[r] = 0.f;
        }
        rows.base[r] = base;
        rises = rises || above;
    }
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
        float& y = x[i / 4][i % 4];
        y = y * unit - from[i % 4 / 2];
        const bool by_polynomial = i * Variant::kPolynomial % 16 < Variant::kPolynomial;
        y = by_polynomial ? exp2_polynomial(y) : exp2_fast(y);
        total.add(i, y);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) rows.total[r] = rows.total[r] * shrink[r] + total.sum(r);
    return any_in_warp(rises);
}

template <int kBlocks>
VIVIT_DEVICE void rescale(float (&o)[kBlocks][4], const float (&shrink)[2]) {
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) o[i / 4][i % 4] *= shrink[i % 4 / 2];
}

}  // namespace vivit::cuda
