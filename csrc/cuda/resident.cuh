// Attention of sequences that fit in shared memory whole, forward and backward: a block for one sequence, or for
// several short ones; a warp takes 16 rows at a time and goes over the other rows in steps of 16.
//
// The backward reads o and the forward's lse, and goes over each sequence twice in one launch: by keys for dk and dv (4
// products), by queries for dq (3). Recomputing costs two products more than keeping dS would, but every gradient is
// summed in registers and written once, without atomics.
#pragma once

#include "shared_rows.cuh"

namespace vivit::cuda {

constexpr int kResidentWarps = 8;      // at most
constexpr int kShortBytes = 64 << 10;  // several sequences share a block as far as they take no more

// What a block of the resident regime has in shared memory: of `per` sequences, each padded to `rows` rows, q, k and v
// and for a backward do; then floats of each row: of a forward what is added to the scores of a key, of a backward lse
// and delta; then of each warp what turning gradients back takes.
template <int kSteps, bool kBackward>
struct Layout {
    static constexpr int32_t kTensors = kBackward ? 4 : 3, kFloats = kBackward ? 2 : 1;
    int32_t rows, per;

    VIVIT_BOTH explicit Layout(int32_t N) : rows((N + 15) / 16 * 16), per(1) {
        const int32_t fit = kShortBytes / before_scratch(), wanted = rows > 64 ? 1 : 128 / rows;
        per = fit < 1 ? 1 : fit < wanted ? fit : wanted;
    }

    VIVIT_BOTH int32_t tensor_bytes() const { return rows * Pitch<kSteps>::kBytes; }
    VIVIT_BOTH int32_t before_scratch() const { return per * (kTensors * tensor_bytes() + 4 * kFloats * rows); }
    VIVIT_BOTH int32_t bytes(bool rotary) const {
        return before_scratch() + (kBackward && rotary ? kResidentWarps * scratch_bytes() : 0);
    }
    static VIVIT_BOTH int32_t scratch_bytes() { return 16 * (16 * kSteps + 4) * 4; }

    // Warps of a block: of the numbers that need the fewest rounds for its tiles of 16 rows, the smallest.
    VIVIT_BOTH int32_t warps() const {
        const int32_t tiles = per * rows / 16 * (kBackward ? 2 : 1);
        const int32_t rounds = (tiles + kResidentWarps - 1) / kResidentWarps;
        return (tiles + rounds - 1) / rounds;
    }
};

// A block: its sequences, and where what it has of them lies in shared memory.
template <int kSteps, bool kBackward>
struct Block {
    Layout<kSteps, kBackward> layout;
    int64_t first;      // number of its first sequence
    int32_t sequences;  // of them
    char* memory;

    VIVIT_DEVICE Block(const Axis& axis, int32_t B, int64_t block)
        : layout(axis.N), first(block * layout.per), memory(shared_memory()) {
        const int64_t left = axis.sequences(B) - first;
        sequences = static_cast<int32_t>(left < layout.per ? left : layout.per);
    }

    VIVIT_DEVICE char* rows(int32_t tensor, int32_t s) const {
        return memory + (tensor * layout.per + s) * layout.tensor_bytes();
    }
    VIVIT_DEVICE float* floats(int32_t s) const {
        return reinterpret_cast<float*>(rows(layout.kTensors, 0)) + s * layout.kFloats * layout.rows;
    }
    VIVIT_DEVICE float* scratch() const {
        return reinterpret_cast<float*>(memory + layout.before_scratch() + thread() / 32 * layout.scratch_bytes());
    }
    static VIVIT_DEVICE int32_t thread() { return static_cast<int32_t>(threadIdx.x); }
    static VIVIT_DEVICE int32_t threads() { return static_cast<int32_t>(blockDim.x); }

    // Sequence s of the block in shared memory as tensor number `tensor`, not yet waited for.
    VIVIT_DEVICE void copy(int32_t tensor, int32_t s, const Grid& x, const Axis& axis, int32_t D) const {
        const Rows from(x, Sequence(first + s, axis), axis);
        copy_rows<kSteps>(rows(tensor, s), from, axis.N, layout.rows, D, thread(), threads());
    }
    // The rows of q and k turned, once all of them are there.
    template <class T>
    VIVIT_DEVICE void turn(const AttentionParams& p, const Axis& axis) const {
        for (int32_t s = 0; s < sequences; ++s) {
            turn_rows<T, kSteps>(p, rows(0, s), Sequence(first + s, axis), axis, thread(), threads());
            turn_rows<T, kSteps>(p, rows(1, s), Sequence(first + s, axis), axis, thread(), threads());
        }
        block_barrier();
    }
};

// x [16, 16] as sums of a product lie, as an operand of the next.
template <class T>
VIVIT_DEVICE void as_left_operand(uint32_t (&a)[4], const float (&x)[2][4]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) a[2 * n + r] = packed<T>(x[n][2 * r], x[n][2 * r + 1]);
    }
}

// ---- forward ----

// 16 queries on their way over the keys: their weighted sum of v, and of rows g and g + 8 the largest score so far and
// the lane's share of the sum of 2^(score - largest).
template <int kSteps>
struct Attended {
    RowSums<kSteps> o;
    float most[2] = {-kInfinity, -kInfinity}, total[2] = {0.f, 0.f};
};

// What the steps of a warp over the other rows have in common.
template <bool kPlain>
struct Rules {
    const AttentionParams& p;
    const Axis& axis;
    Scores<kPlain> scores;
    Dropout dropout;

    VIVIT_DEVICE Rules(const AttentionParams& params, const Axis& of)
        : p(params), axis(of), scores(params), dropout(params) {}
    VIVIT_DEVICE bool drops() const { return !kPlain && dropout.on; }
};

// The next 16 kGroups keys: the sums are rescaled once. bias: of the first of them; kWhole: it is 0 for all of them.
template <class T, int kSteps, int kGroups, bool kPlain, bool kWhole>
VIVIT_DEVICE void attend_step(Attended<kSteps>& sums, const Operand<kSteps>& q, const char* keys, const char* values,
                              const float* bias, const Places<kSteps>& places, const Rules<kPlain>& rules,
                              int64_t sequence, int32_t first_row, int32_t first_key) {
    const int32_t g = lane_number() / 4, t = lane_number() % 4;
    Pairs<kGroups> x;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) across_step<T>(x, q, keys, places.across, s);
    // a plain score is the product times a positive number, so that the largest is found before it is scaled
    const float unit = kPlain ? rules.scores.unit : 1.f;
    float highest[2] = {-kInfinity, -kInfinity}, base[2];
#pragma unroll
    for (int i = 0; i < 8 * kGroups; ++i) {
        float& y = x.of[i / 8][i / 4 % 2][i % 4];
        if (!kPlain) y = rules.scores.of(y);
        if (!kWhole) y += bias[8 * (i / 4) + 2 * t + i % 2];
        highest[i % 4 / 2] = fmaxf(highest[i % 4 / 2], y);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        highest[r] = fmaxf(sums.most[r], largest_of_row(highest[r]) * unit);
        base[r] = highest[r] == -kInfinity ? 0.f : highest[r];
        const float shrink = exp2_fast(sums.most[r] - base[r]);
        sums.most[r] = highest[r], sums.total[r] *= shrink;
#pragma unroll
        for (int i = 0; i < 4 * kSteps; ++i) sums.o.of[i / 2][2 * r + i % 2] *= shrink;
    }
#pragma unroll
    for (int i = 0; i < 8 * kGroups; ++i) {
        float& y = x.of[i / 8][i / 4 % 2][i % 4];
        y = exp2_fast(y * unit - base[i % 4 / 2]);
        sums.total[i % 4 / 2] += y;
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
        if (rules.drops()) {
            const Sequence at(sequence, rules.axis);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int n = i / 2, r = i % 2;
                const int64_t row = query_number(rules.p, at, rules.axis, first_row + g + 8 * r);
                const float2 keep = rules.dropout.factors(row, first_key + 16 * j + 8 * n + 2 * t);
                x.of[j][n][2 * r] *= keep.x, x.of[j][n][2 * r + 1] *= keep.y;
            }
        }
        uint32_t weights[4];
        as_left_operand<T>(weights, x.of[j]);
        along_rows<T>(sums.o, weights, values + 16 * j * Pitch<kSteps>::kBytes, places.along);
    }
}

// o of the rows of a warp from first_row on, and their lse where it is wanted.
template <class T, int kSteps>
VIVIT_DEVICE void store_attended(const AttentionParams& p, const Axis& axis, const Sequence& at, int32_t first_row,
                                 const Attended<kSteps>& sums) {
    float over[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int32_t row = first_row + lane_number() / 4 + 8 * r;
        const float total = sum_of_row(sums.total[r]);
        over[r] = total > 0.f ? 1.f / total : 0.f;
        if (p.lse != nullptr && lane_number() % 4 == 0 && row < axis.N) {
            const float lse = total > 0.f ? sums.most[r] + log2_fast(total) : kInfinity;
            store_one(p.lse + query_number(p, at, axis, row), lse);
        }
    }
    store_rows<T>(p, Rows(p.o, at, axis), first_row, axis.N, sums.o, over[0], over[1]);
}

// o of 16 queries, and their lse where it is wanted.
template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void attend(const Block<kSteps, false>& block, int32_t s, int32_t first_row, const Rules<kPlain>& rules) {
    constexpr int kGroups = 2;
    const char *keys = block.rows(1, s), *values = block.rows(2, s);
    const float* bias = block.floats(s);
    const Operand<kSteps> q(block.rows(0, s) + first_row * Pitch<kSteps>::kBytes);
    const Places<kSteps> places;
    Attended<kSteps> sums;
    constexpr int32_t kBytes = Pitch<kSteps>::kBytes;
    const int32_t in_fours = kPlain ? rules.axis.N : block.layout.rows;
    int32_t key = 0;
#pragma unroll 1
    for (; key + 16 * kGroups <= in_fours; key += 16 * kGroups) {
        attend_step<T, kSteps, kGroups, kPlain, kPlain>(sums, q, keys + key * kBytes, values + key * kBytes, bias + key,
                                                        places, rules, block.first + s, first_row, key);
    }
#pragma unroll 1
    for (; key < block.layout.rows; key += 16) {
        attend_step<T, kSteps, 1, kPlain, false>(sums, q, keys + key * kBytes, values + key * kBytes, bias + key,
                                                 places, rules, block.first + s, first_row, key);
    }
    store_attended<T>(rules.p, rules.axis, Sequence(block.first + s, rules.axis), first_row, sums);
}

template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void resident_forward(const AttentionParams& p, const Axis& axis, int64_t number) {
    const Block<kSteps, false> block(axis, p.B, number);
    const int32_t sequences = block.sequences, rows = block.layout.rows;
    for (int32_t s = 0; s < sequences; ++s) {
        block.copy(0, s, p.q, axis, p.D), block.copy(1, s, p.k, axis, p.D), block.copy(2, s, p.v, axis, p.D);
    }
    copies_commit();
    for (int32_t i = block.thread(); i < sequences * rows; i += block.threads()) {
        const int32_t s = i / rows, key = i % rows;
        const bool may = kPlain ? key < axis.N : may_be_attended(p, Sequence(block.first + s, axis), axis, key);
        block.floats(s)[key] = may ? 0.f : -kInfinity;
    }
    copies_wait<0>();
    block_barrier();
    if (!kPlain && p.cos != nullptr) block.template turn<T>(p, axis);
    const Rules<kPlain> rules(p, axis);
    const int32_t tiles = rows / 16;
    for (int32_t i = block.thread() / 32; i < sequences * tiles; i += block.threads() / 32) {
        attend<T>(block, i / tiles, i % tiles * 16, rules);
    }
}

// ---- backward ----

// delta = sum(do * o) of each row, four lanes to a row, and lse, into shared memory. do is there already.
template <class T, int kSteps>
VIVIT_DEVICE void load_statistics(const AttentionParams& p, const Axis& axis, const Block<kSteps, true>& block) {
    const int32_t rows = block.layout.rows, t = block.thread() % 4;
    for (int32_t i = block.thread() / 4; i < block.sequences * rows; i += block.threads() / 4) {
        const int32_t s = i / rows, row = i % rows;
        const Sequence at(block.first + s, axis);
        const char* o = Rows(p.o, at, axis).row(row);
        float delta = 0.f;
        for (int32_t chunk = t; chunk < p.D / 8; chunk += 4) {
            const uint4 x = load_16(o + 16 * chunk, row < axis.N);
            const uint4 y = *reinterpret_cast<const uint4*>(block.rows(3, s) + Pitch<kSteps>::place(row, chunk));
            const uint32_t ours[4] = {x.x, x.y, x.z, x.w}, theirs[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const float2 a = unpacked<T>(ours[w]), b = unpacked<T>(theirs[w]);
                delta += a.x * b.x + a.y * b.y;
            }
        }
        delta = sum_of_row(delta);
        if (t == 0) {
            const bool there = row < axis.N;
            block.floats(s)[row] = there ? load_one(p.lse + query_number(p, at, axis, row)) : kInfinity;
            block.floats(s)[rows + row] = delta;
        }
    }
}

// Products of a pair of operands with the rows of a pair of tensors, over channels: x = a rows^T, y = b others^T.
template <class T, int kSteps>
VIVIT_DEVICE void across_both(Pairs<1>& x, const Operand<kSteps>& a, const char* rows, Pairs<1>& y,
                              const Operand<kSteps>& b, const char* others, int32_t place) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        across_step<T>(x, a, rows, place, s);
        across_step<T>(y, b, others, place, s);
    }
}

// The share of 16 keys in dq of 16 queries. kWhole: no key of them is padding.
template <class T, int kSteps, bool kPlain, bool kWhole>
VIVIT_DEVICE void queries_step(RowSums<kSteps>& dq, const Operand<kSteps>& q, const char* d_outputs, const char* keys,
                               const char* values, const Places<kSteps>& places, const float (&lse)[2],
                               const float (&delta)[2], const Rules<kPlain>& rules, const Sequence& at,
                               int32_t first_row, int32_t first_key) {
    const int32_t g = lane_number() / 4, t = lane_number() % 4;
    Pairs<1> x, dp;
    const Operand<kSteps> d_o(d_outputs);  // read once more in each step, as v by keys_step
    across_both<T>(x, q, keys, dp, d_o, values, places.across);
    if (rules.drops()) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int n = i / 2, r = i % 2;
            const int64_t row = query_number(rules.p, at, rules.axis, first_row + g + 8 * r);
            const float2 keep = rules.dropout.factors(row, first_key + 8 * n + 2 * t);
            dp.of[0][n][2 * r] *= keep.x, dp.of[0][n][2 * r + 1] *= keep.y;
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float& y = x.of[0][i / 4][i % 4];
        const int32_t key = first_key + 8 * (i / 4) + 2 * t + i % 2;
        float weight = exp2_fast(rules.scores.of(y) - lse[i % 4 / 2]);
        if (!kPlain && !may_be_attended(rules.p, at, rules.axis, key)) weight = 0.f;
        if (kPlain && !kWhole && key >= rules.axis.N) weight = 0.f;
        y = weight * (dp.of[0][i / 4][i % 4] - delta[i % 4 / 2]) * rules.scores.slope(y);
    }
    uint32_t a[4];
    as_left_operand<T>(a, x.of[0]);
    along_rows<T>(dq, a, keys, places.along);
}

// dq of 16 queries.
template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void gradient_of_queries(const Block<kSteps, true>& block, int32_t s, int32_t first_row,
                                      const Rules<kPlain>& rules) {
    constexpr int32_t kBytes = Pitch<kSteps>::kBytes;
    const AttentionParams& p = rules.p;
    const Sequence at(block.first + s, rules.axis);
    const char *keys = block.rows(1, s), *values = block.rows(2, s);
    const Operand<kSteps> q(block.rows(0, s) + first_row * kBytes);
    const char* d_outputs = block.rows(3, s) + first_row * kBytes;
    const float* floats = block.floats(s) + first_row + lane_number() / 4;
    const float lse[2] = {floats[0], floats[8]}, delta[2] = {floats[block.layout.rows], floats[block.layout.rows + 8]};
    const Places<kSteps> places;
    RowSums<kSteps> dq;
    int32_t key = 0;
#pragma unroll 1
    for (; key + 16 <= rules.axis.N; key += 16) {
        queries_step<T, kSteps, kPlain, true>(dq, q, d_outputs, keys + key * kBytes, values + key * kBytes, places, lse,
                                              delta, rules, at, first_row, key);
    }
    if (key < rules.axis.N) {
        queries_step<T, kSteps, kPlain, false>(dq, q, d_outputs, keys + key * kBytes, values + key * kBytes, places,
                                               lse, delta, rules, at, first_row, key);
    }
    const Rows to(p.dq, at, rules.axis);
    if (!kPlain && p.cos != nullptr) {
        store_turned_rows<T>(p, to, dq, at, rules.axis, first_row, block.scratch());
    } else {
        store_rows<T>(p, to, first_row, rules.axis.N, dq, p.scale, p.scale);
    }
}

// The share of 16 queries in dk and dv of 16 keys, those of them that are asked for. floats: lse of the first query
// that the lane has, delta after `rows` more; may: whether keys g and g + 8 may be attended.
template <class T, int kSteps, bool kPlain, bool kDk, bool kDv>
VIVIT_DEVICE void keys_step(RowSums<kSteps>& dk, RowSums<kSteps>& dv, const Operand<kSteps>& k, const char* values,
                            const char* queries, const char* d_outputs, const float* floats, int32_t rows,
                            const Places<kSteps>& places, const bool (&may)[2], const Rules<kPlain>& rules,
                            const Sequence& at, int32_t first_row, int32_t first_key) {
    const int32_t g = lane_number() / 4, t = lane_number() % 4;
    Pairs<1> x, dp;
    if constexpr (kDk) {
        // v is read once more in each step: its registers are needed
        const Operand<kSteps> v(values);
        across_both<T>(x, k, queries, dp, v, d_outputs, places.across);
    } else {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) across_step<T>(x, k, queries, places.across, s);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float &y = x.of[0][i / 4][i % 4], &dy = dp.of[0][i / 4][i % 4];
        const int32_t place = 8 * (i / 4) + i % 2;
        float weight = exp2_fast(rules.scores.of(y) - floats[place]), keep = 1.f;
        if (!kPlain && !may[i % 4 / 2]) weight = 0.f;
        if (rules.drops()) {
            const int64_t row = query_number(rules.p, at, rules.axis, first_row + place + 2 * t);
            keep = rules.dropout.factor(row, first_key + g + 8 * (i % 4 / 2));
        }
        if (kDk) dy = weight * (dy * keep - floats[rows + place]) * rules.scores.slope(y);
        y = weight * keep;
    }
    uint32_t a[4];
    if (kDv) {
        as_left_operand<T>(a, x.of[0]);
        along_rows<T>(dv, a, d_outputs, places.along);
    }
    if (kDk) {
        as_left_operand<T>(a, dp.of[0]);
        along_rows<T>(dk, a, queries, places.along);
    }
}

// dk or dv of 16 keys, or both. Scores lie keys first, so that no product has to transpose them.
template <class T, int kSteps, bool kPlain, bool kDk, bool kDv>
VIVIT_DEVICE void gradients_of_keys(const Block<kSteps, true>& block, int32_t s, int32_t first_key,
                                    const Rules<kPlain>& rules) {
    constexpr int32_t kBytes = Pitch<kSteps>::kBytes;
    const AttentionParams& p = rules.p;
    const Sequence at(block.first + s, rules.axis);
    const int32_t g = lane_number() / 4, rows = block.layout.rows;
    const Operand<kSteps> k(block.rows(1, s) + first_key * kBytes);
    const char *values = block.rows(2, s) + first_key * kBytes, *queries = block.rows(0, s);
    const char* d_outputs = block.rows(3, s);
    const float* floats = block.floats(s) + 2 * (lane_number() % 4);
    const bool may[2] = {kPlain || may_be_attended(p, at, rules.axis, first_key + g),
                         kPlain || may_be_attended(p, at, rules.axis, first_key + g + 8)};
    const Places<kSteps> places;
    RowSums<kSteps> dk, dv;
#pragma unroll 1
    for (int32_t row = 0; row < rows; row += 16) {
        keys_step<T, kSteps, kPlain, kDk, kDv>(dk, dv, k, values, queries + row * kBytes, d_outputs + row * kBytes,
                                               floats + row, rows, places, may, rules, at, row, first_key);
    }
    if (kDv) store_rows<T>(p, Rows(p.dv, at, rules.axis), first_key, rules.axis.N, dv, 1.f, 1.f);
    if (!kDk) return;
    const Rows to(p.dk, at, rules.axis);
    if (!kPlain && p.cos != nullptr) {
        store_turned_rows<T>(p, to, dk, at, rules.axis, first_key, block.scratch());
    } else {
        store_rows<T>(p, to, first_key, rules.axis.N, dk, p.scale, p.scale);
    }
}

template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void resident_backward(const AttentionParams& p, const Axis& axis, int64_t number) {
    const Block<kSteps, true> block(axis, p.B, number);
    const int32_t sequences = block.sequences;
    for (int32_t s = 0; s < sequences; ++s) {
        block.copy(3, s, p.d_o, axis, p.D), block.copy(0, s, p.q, axis, p.D);
        block.copy(1, s, p.k, axis, p.D), block.copy(2, s, p.v, axis, p.D);
    }
    copies_commit();
    copies_wait<0>();
    block_barrier();
    load_statistics<T>(p, axis, block);
    block_barrier();
    if (!kPlain && p.cos != nullptr) block.template turn<T>(p, axis);
    const Rules<kPlain> rules(p, axis);
    const int32_t tiles = block.layout.rows / 16, all = sequences * tiles;
    for (int32_t i = block.thread() / 32; i < 2 * all; i += block.threads() / 32) {  // the longer ones first
        const int32_t s = i % all / tiles, first = i % tiles * 16;
        if (i < all) {
            // sums of both do not fit in registers where rows are long or options are many; then scores are made twice
            constexpr bool kBoth = kPlain ? kSteps <= 6 : kSteps <= 2;
            gradients_of_keys<T, kSteps, kPlain, kBoth, true>(block, s, first, rules);
            if (!kBoth) gradients_of_keys<T, kSteps, kPlain, true, false>(block, s, first, rules);
        } else {
            gradient_of_queries<T>(block, s, first, rules);
        }
    }
}

}  // namespace vivit::cuda
