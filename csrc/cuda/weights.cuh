// From products of queries and keys to weights of values and to gradients of scores: what the kernels share that take
// rows from shared memory, whether a warp multiplies or a warpgroup. A warp has 16 rows and 8 kBlocks columns of them:
// a lane of block i / 4 columns 2 t and 2 t + 1, in rows g and g + 8.
#pragma once

#include "shared_rows.cuh"

namespace vivit::cuda {

// Number i of a lane's 4 kBlocks products, and its column.
template <int kBlocks>
VIVIT_DEVICE float& product(float (&x)[kBlocks][4], int i) {
    return x[i / 4][i % 4];
}
VIVIT_DEVICE int32_t column_of(int i) { return 8 * (i / 4) + 2 * (lane_number() % 4) + i % 2; }

// ---- queries first ----

// Of 16 queries on their way over the keys, in rows g and g + 8: the largest score so far and the lane's share of the
// sum of 2^(score - largest).
struct Softmax {
    float most[2] = {-kInfinity, -kInfinity}, total[2] = {0.f, 0.f};
};

// Scores, over `unit`, become weights 2^(score - largest so far). Returns what sums of earlier weights shrink by, in
// rows g and g + 8.
template <int kBlocks>
VIVIT_DEVICE float2 weigh(Softmax& sums, float (&x)[kBlocks][4], float unit) {
    float highest[2] = {-kInfinity, -kInfinity}, base[2], shrink[2];
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) highest[i % 4 / 2] = fmaxf(highest[i % 4 / 2], product(x, i));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        highest[r] = fmaxf(sums.most[r], largest_of_row(highest[r]) * unit);
        base[r] = highest[r] == -kInfinity ? 0.f : highest[r];
        shrink[r] = exp2_fast(sums.most[r] - base[r]);
        sums.most[r] = highest[r], sums.total[r] *= shrink[r];
    }
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) {
        float& y = product(x, i);
        y = exp2_fast(y * unit - base[i % 4 / 2]);
        sums.total[i % 4 / 2] += y;
    }
    return {shrink[0], shrink[1]};
}

template <int kSteps>
VIVIT_DEVICE void shrink_rows(RowSums<kSteps>& sums, float2 factors) {
#pragma unroll
    for (int i = 0; i < 8 * kSteps; ++i) sums.of[i / 4][i % 4] *= i % 4 < 2 ? factors.x : factors.y;
}

// Each pair of queries and keys by what dropout multiplies its probability by. number(r): of the query of row g + 8 r.
template <int kBlocks, class Number>
VIVIT_DEVICE void multiply_dropped(float (&x)[kBlocks][4], const Dropout& dropout, int32_t first_key,
                                   const Number& number) {
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
        const int n = i / 2, r = i % 2;
        const float2 keep = dropout.factors(number(r), first_key + 8 * n + 2 * (lane_number() % 4));
        x[n][2 * r] *= keep.x, x[n][2 * r + 1] *= keep.y;
    }
}

// Rows first_row + g and + 8 of o, and their lse where it is wanted. number(row): the query's, as lse is counted.
template <class T, int kSteps, class Number>
VIVIT_DEVICE void store_attended(const AttentionOptions& p, const Rows& to, int32_t first_row, int32_t N,
                                 const RowSums<kSteps>& o, const Softmax& sums, const Number& number) {
    float over[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int32_t row = first_row + lane_number() / 4 + 8 * r;
        const float total = sum_of_row(sums.total[r]);
        over[r] = total > 0.f ? 1.f / total : 0.f;
        if (p.lse != nullptr && lane_number() % 4 == 0 && row < N) {
            store_one(p.lse + number(row), total > 0.f ? sums.most[r] + log2_fast(total) : kInfinity);
        }
    }
    store_rows<T>(p, to, first_row, N, o, over[0], over[1]);
}

// Products of q . k and gradients of the weights, in dp, become gradients of scores over the scale, in x. Of rows g and
// g + 8 lse and delta; may(column): whether its key may be attended.
template <int kBlocks, bool kPlain, class May>
VIVIT_DEVICE void score_gradients(float (&x)[kBlocks][4], float (&dp)[kBlocks][4], const Scores<kPlain>& scores,
                                  const float (&lse)[2], const float (&delta)[2], const May& may) {
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) {
        float& y = product(x, i);
        float weight = exp2_fast(scores.of(y) - lse[i % 4 / 2]);
        if (!may(column_of(i))) weight = 0.f;
        y = weight * (product(dp, i) - delta[i % 4 / 2]) * scores.slope(y);
    }
}

// sum(do * o) of a row, four neighbouring lanes to a row: o in memory, do in shared memory.
template <class T, int kSteps>
VIVIT_DEVICE float delta_of_row(const char* o, bool there, const char* d_outputs, int32_t row, int32_t D) {
    float delta = 0.f;
    for (int32_t chunk = lane_number() % 4; chunk < D / 8; chunk += 4) {
        const uint4 x = load_16(o + 16 * chunk, there);
        const uint4 y = *reinterpret_cast<const uint4*>(d_outputs + Pitch<kSteps>::place(row, chunk));
        const uint32_t ours[4] = {x.x, x.y, x.z, x.w}, theirs[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const float2 a = unpacked<T>(ours[w]), b = unpacked<T>(theirs[w]);
            delta += a.x * b.x + a.y * b.y;
        }
    }
    return sum_of_row(delta);
}

// ---- keys first ----

// Products of k . q become probabilities that dropout has been at; gradients of the weights, in dp, those of scores
// over the scale. lse, delta: of the query of the lane's first column, the others beside it; may: whether keys g and
// g + 8 may be attended; keep(column, r): what dropout does to a query and key g + 8 r. kGradients: dp is wanted.
template <bool kGradients, int kBlocks, bool kPlain, class Keep>
VIVIT_DEVICE void weigh_keys_first(float (&x)[kBlocks][4], float (&dp)[kBlocks][4], const Scores<kPlain>& scores,
                                   const float* lse, const float* delta, const bool (&may)[2], const Keep& keep) {
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) {
        float &y = product(x, i), &dy = product(dp, i);
        const int place = 8 * (i / 4) + i % 2;
        float weight = exp2_fast(scores.of(y) - lse[place]);
        if (!kPlain && !may[i % 4 / 2]) weight = 0.f;
        const float kept = keep(column_of(i), i % 4 / 2);
        if (kGradients) dy = weight * (dy * kept - delta[place]) * scores.slope(y);
        y = weight * kept;
    }
}

}  // namespace vivit::cuda
