// Attention of sequences that fit in shared memory whole, forward and backward: a block for one sequence, or for
// several short ones; a warp takes 16 rows at a time and goes over the other rows in steps of 16.
//
// The backward reads o and the forward's lse, and goes over each sequence twice in one launch: by keys for dk and dv (4
// products), by queries for dq (3). Recomputing costs two products more than keeping dS would, but every gradient is
// summed in registers and written once, without atomics.
#pragma once

#include "shared_rows.cuh"

namespace vivit::cuda {

constexpr int kResidentWarps = 8;  // at most

// What a block of the resident regime has in shared memory: of `per` sequences, each padded to `rows` rows, q, k and v
// and for a backward do; then floats of each row: of a forward what is added to the scores of a key, of a backward lse
// and delta; then of each warp what turning gradients back takes.
template <int kSteps, bool kBackward>
struct Layout {
    static constexpr int32_t kTensors = kBackward ? 4 : 3, kFloats = kBackward ? 2 : 1;
    int32_t rows, per;

    VIVIT_BOTH explicit Layout(int32_t N) : rows((N + 15) / 16 * 16), per(rows > 64 ? 1 : 128 / rows) {}

    VIVIT_BOTH int32_t tensor_bytes() const { return rows * Pitch<kSteps>::kBytes; }
    VIVIT_BOTH int32_t before_scratch() const { return per * (kTensors * tensor_bytes() + 4 * kFloats * rows); }
    VIVIT_BOTH int32_t bytes(int32_t warps, bool rotary) const {
        return before_scratch() + (kBackward && rotary ? warps * scratch_bytes() : 0);
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

// Keys in steps of kGroups sixteens, so that the sums are rescaled once in a step.
template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void attend(const AttentionParams& p, const Axis& axis, const Block<kSteps, false>& block, int32_t s,
                         int32_t first_row, const Scores<kPlain>& scores, const Dropout& dropout) {
    constexpr int kGroups = 4;
    const Sequence at(block.first + s, axis);
    const char *keys = block.rows(1, s), *values = block.rows(2, s);
    const float* bias = block.floats(s);
    const int32_t g = block.thread() % 32 / 4, t = block.thread() % 4;
    const Operand<kSteps> q(block.rows(0, s), first_row);
    RowSums<kSteps> o;
    float most[2] = {-kInfinity, -kInfinity}, total[2] = {0.f, 0.f};
#pragma unroll 1
    for (int32_t start = 0; start < block.layout.rows; start += 16 * kGroups) {
        float x[kGroups][2][4];
        float highest[2] = {-kInfinity, -kInfinity};
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
            const int32_t first_key = start + 16 * j;
            if (first_key >= block.layout.rows) continue;
            across_rows<T>(x[j], q, keys, first_key);
            const bool whole = kPlain && first_key + 16 <= axis.N;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int n = i / 4, e = i % 4;
                x[j][n][e] = scores.of(x[j][n][e]);
                if (!whole) x[j][n][e] += bias[first_key + 8 * n + 2 * t + e % 2];
                highest[e / 2] = fmaxf(highest[e / 2], x[j][n][e]);
            }
        }
        float base[2], shrink[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            highest[r] = fmaxf(most[r], largest_of_row(highest[r]));
            base[r] = highest[r] == -kInfinity ? 0.f : highest[r];
            shrink[r] = exp2_fast(most[r] - base[r]);
            most[r] = highest[r], total[r] *= shrink[r];
        }
#pragma unroll
        for (int i = 0; i < 8 * kSteps; ++i) o.of[i / 4][i % 4] *= shrink[i % 4 / 2];
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
            const int32_t first_key = start + 16 * j;
            if (first_key >= block.layout.rows) continue;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float& y = x[j][i / 4][i % 4];
                y = exp2_fast(y - base[i % 4 / 2]);
                total[i % 4 / 2] += y;
            }
            if (!kPlain && dropout.on) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int n = i / 2, r = i % 2;
                    const int64_t row = query_number(p, at, axis, first_row + g + 8 * r);
                    const float2 keep = dropout.factors(row, first_key + 8 * n + 2 * t);
                    x[j][n][2 * r] *= keep.x, x[j][n][2 * r + 1] *= keep.y;
                }
            }
            uint32_t weights[4];
            as_left_operand<T>(weights, x[j]);
            along_rows<T>(o, weights, values, first_key);
        }
    }
    float over[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int32_t row = first_row + g + 8 * r;
        total[r] = sum_of_row(total[r]);
        over[r] = total[r] > 0.f ? 1.f / total[r] : 0.f;
        if (p.lse != nullptr && t == 0 && row < axis.N) {
            store_one(p.lse + query_number(p, at, axis, row), total[r] > 0.f ? most[r] + log2f(total[r]) : kInfinity);
        }
    }
    store_rows<T>(p, Rows(p.o, at, axis), first_row, axis.N, o, over);
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
    const Scores<kPlain> scores(p);
    const Dropout dropout(p);
    const int32_t tiles = rows / 16;
    for (int32_t i = block.thread() / 32; i < sequences * tiles; i += block.threads() / 32) {
        attend<T, kSteps, kPlain>(p, axis, block, i / tiles, i % tiles * 16, scores, dropout);
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

// dq of 16 queries.
template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void gradient_of_queries(const AttentionParams& p, const Axis& axis, const Block<kSteps, true>& block,
                                      int32_t s, int32_t first_row, const Scores<kPlain>& scores,
                                      const Dropout& dropout) {
    const Sequence at(block.first + s, axis);
    const char *keys = block.rows(1, s), *values = block.rows(2, s);
    const int32_t g = block.thread() % 32 / 4, t = block.thread() % 4;
    const Operand<kSteps> q(block.rows(0, s), first_row), d_o(block.rows(3, s), first_row);
    const float* lse = block.floats(s) + first_row + g;
    const float most[2] = {lse[0], lse[8]}, delta[2] = {lse[block.layout.rows], lse[block.layout.rows + 8]};
    RowSums<kSteps> dq;
#pragma unroll 1
    for (int32_t first_key = 0; first_key < block.layout.rows; first_key += 16) {
        float x[2][4], dp[2][4];
        across_rows<T>(x, q, keys, first_key);
        across_rows<T>(dp, d_o, values, first_key);
        if (!kPlain && dropout.on) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int n = i / 2, r = i % 2;
                const int64_t row = query_number(p, at, axis, first_row + g + 8 * r);
                const float2 keep = dropout.factors(row, first_key + 8 * n + 2 * t);
                dp[n][2 * r] *= keep.x, dp[n][2 * r + 1] *= keep.y;
            }
        }
        const bool whole = kPlain && first_key + 16 <= axis.N;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int n = i / 4, e = i % 4;
            const int32_t key = first_key + 8 * n + 2 * t + e % 2;
            float weight = exp2_fast(scores.of(x[n][e]) - most[e / 2]);
            if (!whole && !(kPlain ? key < axis.N : may_be_attended(p, at, axis, key))) weight = 0.f;
            x[n][e] = weight * (dp[n][e] - delta[e / 2]) * scores.slope(x[n][e]);
        }
        uint32_t a[4];
        as_left_operand<T>(a, x);
        along_rows<T>(dq, a, keys, first_key);
    }
    const float once[2] = {1.f, 1.f};
    if (!kPlain && p.cos != nullptr) turn_rows_back(p, dq, at, axis, first_row, block.scratch());
    store_rows<T>(p, Rows(p.dq, at, axis), first_row, axis.N, dq, once);
}

// dk and dv of 16 keys. Scores lie keys first, so that no product has to transpose them.
template <class T, int kSteps, bool kPlain>
VIVIT_DEVICE void gradients_of_keys(const AttentionParams& p, const Axis& axis, const Block<kSteps, true>& block,
                                    int32_t s, int32_t first_key, const Scores<kPlain>& scores,
                                    const Dropout& dropout) {
    const Sequence at(block.first + s, axis);
    const char *queries = block.rows(0, s), *d_outputs = block.rows(3, s);
    const int32_t g = block.thread() % 32 / 4, t = block.thread() % 4;
    const Operand<kSteps> k(block.rows(1, s), first_key), v(block.rows(2, s), first_key);
    const float *lse = block.floats(s), *delta = lse + block.layout.rows;
    const bool may[2] = {kPlain || may_be_attended(p, at, axis, first_key + g),
                         kPlain || may_be_attended(p, at, axis, first_key + g + 8)};
    RowSums<kSteps> dk, dv;
#pragma unroll 1
    for (int32_t first_row = 0; first_row < block.layout.rows; first_row += 16) {
        float x[2][4], dp[2][4], keep[2][4];
        across_rows<T>(x, k, queries, first_row);
        across_rows<T>(dp, v, d_outputs, first_row);
        if (!kPlain && dropout.on) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int n = i / 4, e = i % 4;
                const int64_t row = query_number(p, at, axis, first_row + 8 * n + 2 * t + e % 2);
                keep[n][e] = dropout.factor(row, first_key + g + 8 * (e / 2));
                dp[n][e] *= keep[n][e];
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int n = i / 4, e = i % 4;
            const int32_t row = first_row + 8 * n + 2 * t + e % 2;
            float weight = exp2_fast(scores.of(x[n][e]) - lse[row]);
            if (!kPlain && !may[e / 2]) weight = 0.f;
            const float ds = weight * (dp[n][e] - delta[row]) * scores.slope(x[n][e]);
            dp[n][e] = ds;
            x[n][e] = !kPlain && dropout.on ? weight * keep[n][e] : weight;
        }
        uint32_t a[4];
        as_left_operand<T>(a, x);
        along_rows<T>(dv, a, d_outputs, first_row);
        as_left_operand<T>(a, dp);
        along_rows<T>(dk, a, queries, first_row);
    }
    const float once[2] = {1.f, 1.f};
    store_rows<T>(p, Rows(p.dv, at, axis), first_key, axis.N, dv, once);
    if (!kPlain && p.cos != nullptr) turn_rows_back(p, dk, at, axis, first_key, block.scratch());
    store_rows<T>(p, Rows(p.dk, at, axis), first_key, axis.N, dk, once);
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
    const Scores<kPlain> scores(p);
    const Dropout dropout(p);
    const int32_t tiles = block.layout.rows / 16, all = sequences * tiles;
    for (int32_t i = block.thread() / 32; i < 2 * all; i += block.threads() / 32) {  // the longer ones first
        const int32_t s = i % all / tiles, first = i % tiles * 16;
        if (i < all) {
            gradients_of_keys<T, kSteps, kPlain>(p, axis, block, s, first, scores, dropout);
        } else {
            gradient_of_queries<T, kSteps, kPlain>(p, axis, block, s, first, scores, dropout);
        }
    }
}

}  // namespace vivit::cuda
