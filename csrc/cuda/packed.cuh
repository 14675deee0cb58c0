// Attention of sequences of up to 16 tokens, a warp for 16 rows, everything in registers: one sequence, or two of up to
// 8 tokens. Nothing passes through shared memory: the sum over channels does not mind their order, so a lane takes 16
// bytes of a row as they lie and gives both operands of a product the same order; where a product wants an operand the
// other way round, its 8 x 8 blocks are transposed between lanes.
#pragma once

#include "rotary.cuh"
#include "scores.cuh"

namespace vivit::cuda {

// 16 rows of up to 32 kBlocks channels. Lane 4 g + t has of rows g and g + 8 the channels 32 block + 8 t + {0, ..., 7},
// two to a word. As blocks of 8 x 8, word w of row g holds columns 8 t + 2 w, + 1.
template <int kBlocks>
struct Tile {
    uint32_t word[kBlocks][2][4];
};

// Sums of a product whose columns are channels: of block and w the lane has rows g (first two) and g + 8, each with
// channels 32 block + 8 t + 2 w, + 1: those of a Tile.
template <int kBlocks>
struct Sums {
    float of[kBlocks][4][4] = {};
};

// What a lane has to know of its rows. kTwo, N <= 8: rows 0 to 7 are one sequence and rows 8 to 15 the next; else both
// halves are one, so that where they lie is computed once. Of rows g (r = 0) and g + 8 (r = 1); no arrays, which would
// be indexed in memory.
template <bool kTwo>
struct Lane {
    int32_t g, t;
    bool there_0, there_1;
    Sequence at_0, at_1;

    VIVIT_DEVICE Lane(uint32_t tile, const Axis& axis, uint32_t count)
        : g(static_cast<int32_t>(threadIdx.x) % 32 / 4),
          t(static_cast<int32_t>(threadIdx.x) % 4),
          there_0((kTwo ? 2 * tile : tile) < count),
          there_1(kTwo ? 2 * tile + 1 < count : there_0),
          at_0(there_0 ? (kTwo ? 2 * tile : tile) : 0, axis),
          at_1(kTwo ? Sequence(there_1 ? 2 * tile + 1 : 0, axis) : at_0) {}

    VIVIT_DEVICE bool there(int r) const { return r == 0 ? there_0 : there_1; }
    VIVIT_DEVICE Sequence at(int r) const { return r == 0 ? at_0 : at_1; }
    // Of row g + 8 r its token, whether there is one, and where it lies.
    VIVIT_DEVICE int32_t row(int r) const { return kTwo ? g : g + 8 * r; }
    VIVIT_DEVICE bool valid(int r, const Axis& axis) const { return there(r) && row(r) < axis.N; }
    VIVIT_DEVICE char* place(int r, const Grid& x, const Axis& axis) const {
        const Rows first(x, at_0, axis);
        return kTwo ? Rows(x, at(r), axis).row(g) : first.row(g) + (r == 0 ? 0 : 8 * first.step);
    }
    // The key of column 8 n + 2 t + c, as a token of its sequence, which is that of rows 8 n, ...
    VIVIT_DEVICE int32_t key(int n, int c) const { return kTwo ? 2 * t + c : 8 * n + 2 * t + c; }
};

template <class T, int kBlocks, bool kPlain, bool kTwo>
VIVIT_DEVICE Tile<kBlocks> load_tile(const AttentionParams& p, const Grid& x, const Lane<kTwo>& lane, const Axis& axis,
                                     bool turn) {
    Tile<kBlocks> tile;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const char* row = lane.place(r, x, axis);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            const int32_t chunk = 4 * b + lane.t;
            const bool valid = lane.valid(r, axis) && chunk < p.D / 8;
            uint4 found = load_16(row + 16 * chunk, valid);
            if (!kPlain && turn && valid && p.cos != nullptr) {
                found = turned_chunk<T>(p, lane.at(r).token(lane.row(r), axis, p.S), row, chunk, found);
            }
            tile.word[b][r][0] = found.x, tile.word[b][r][1] = found.y;
            tile.word[b][r][2] = found.z, tile.word[b][r][3] = found.w;
        }
    }
    return tile;
}

// 0.f, once all rows of the tiles are there. A product that starts from it starts behind their loads, which are so
// asked for together. The compiler else asks for some, waits, multiplies and asks for more, to have fewer registers
// (nvcc 13.0, q, k and v of 16 x 64: 3 of 12 loads before the first product, 4 behind the softmax); but what all warps
// have asked for is what keeps memory busy (tiles.cuh). It does not know that no batch is negative.
template <class... Tiles>
VIVIT_DEVICE float zero_behind(const AttentionParams& p, const Tiles&... tiles) {
    uint32_t any = 0;
    const auto take = [&](const auto& tile) {
        for (const auto& block : tile.word) any |= block[0][0] | block[1][0];
    };
    (take(tiles), ...);
    return __uint_as_float(any & static_cast<uint32_t>(p.B >> 31));
}

// d [16, 16] = a b^T over channels, as two blocks of columns.
template <class T, int kBlocks>
VIVIT_DEVICE void across(float (&d)[2][4], const Tile<kBlocks>& a, const Tile<kBlocks>& b, float zero) {
#pragma unroll
    for (int i = 0; i < 8; ++i) d[i / 4][i % 4] = zero;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int w = 0; w < 4; w += 2) {
            const uint32_t rows[4] = {a.word[block][0][w], a.word[block][1][w], a.word[block][0][w + 1],
                                      a.word[block][1][w + 1]};
#pragma unroll
            for (int n = 0; n < 2; ++n) multiply_add<T>(d[n], rows, b.word[block][n][w], b.word[block][n][w + 1]);
        }
    }
}

// sums += a b, a [16, 16] as an operand, b the rows of a tile.
template <class T, int kBlocks>
VIVIT_DEVICE void along(Sums<kBlocks>& sums, const uint32_t (&a)[4], const Tile<kBlocks>& b) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            multiply_add<T>(sums.of[block][w], a, transposed(b.word[block][0][w]), transposed(b.word[block][1][w]));
        }
    }
}

// Of an operand [16, 16] its transpose.
VIVIT_DEVICE void turn_over(uint32_t (&a)[4]) {
    const uint32_t upper_right = a[2];
    a[2] = transposed(a[1]), a[1] = transposed(upper_right);
    a[0] = transposed(a[0]), a[3] = transposed(a[3]);
}

// The gradient of rows that were turned on load, turned back through a warp's scratch [16][32 kBlocks + 4] of floats.
template <class T, int kBlocks, bool kTwo>
VIVIT_DEVICE void store_turned_tile(const AttentionParams& p, const Grid& x, const Lane<kTwo>& lane, const Axis& axis,
                                    const Sums<kBlocks>& sums, float* scratch) {
    constexpr int kPitch = 32 * kBlocks + 4;
    warp_barrier();
#pragma unroll
    for (int i = 0; i < 16 * kBlocks; ++i) {
        const int b = i / 16, w = i / 4 % 4, e = i % 4;
        scratch[(lane.g + 8 * (e / 2)) * kPitch + 32 * b + 8 * lane.t + 2 * w + e % 2] = sums.of[b][w][e];
    }
    warp_barrier();
    store_turned_back<T>(p, scratch, kPitch, p.scale, [&](int32_t number) -> TurnedRow {
        const int r = number / 8;
        const int32_t row = kTwo ? number % 8 : number;
        const Sequence at = lane.at(r);
        return {lane.there(r) && row < axis.N, at.token(row, axis, p.S), Rows(x, at, axis).row(row)};
    });
}

template <class T, int kBlocks, bool kTwo>
VIVIT_DEVICE void store_tile(const AttentionParams& p, const Grid& x, const Lane<kTwo>& lane, const Axis& axis,
                             const Sums<kBlocks>& sums, const float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        char* row = lane.place(r, x, axis);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            const int32_t chunk = 4 * b + lane.t;
            if (!lane.valid(r, axis) || chunk >= p.D / 8) continue;
            uint32_t word[4];
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                word[w] = packed<T>(sums.of[b][w][2 * r] * factor[r], sums.of[b][w][2 * r + 1] * factor[r]);
            }
            store_16(row + 16 * chunk, {word[0], word[1], word[2], word[3]});
        }
    }
}

// From products of queries and keys: x becomes 2^(score - largest of the row), 0 where the query may not attend; over:
// of rows g and g + 8 one over the row's sum, 0 where it may attend to nothing.
template <bool kPlain, bool kTwo>
VIVIT_DEVICE void weigh(const AttentionParams& p, float (&x)[2][4], float (&over)[2], const Lane<kTwo>& lane,
                        const Axis& axis, const Scores<kPlain>& scores) {
    bool allowed[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int n = i / 2, c = i % 2, s = kTwo ? n : 0;
        allowed[n][c] =
            lane.there(s) && (kPlain ? lane.key(n, c) < axis.N : may_be_attended(p, lane.at(n), axis, lane.key(n, c)));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float most = -kInfinity, sum = 0.f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int n = i / 2, c = i % 2;
            const bool may = allowed[n][c] && (!kTwo || n == r);
            x[n][2 * r + c] = may ? scores.of(x[n][2 * r + c]) : -kInfinity;
            most = fmaxf(most, x[n][2 * r + c]);
        }
        most = largest_of_row(most);
        most = most == -kInfinity ? 0.f : most;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& y = x[i / 2][2 * r + i % 2];
            y = exp2_fast(y - most);
            sum += y;
        }
        sum = sum_of_row(sum);
        over[r] = sum > 0.f ? 1.f / sum : 0.f;
    }
}

// Of each pair of the lane what dropout multiplies its probability by.
template <bool kTwo>
VIVIT_DEVICE void dropped(const AttentionParams& p, float (&keep)[2][4], const Lane<kTwo>& lane, const Axis& axis,
                          const Dropout& dropout) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int n = i / 2, r = i % 2;
        const float2 both = dropout.factors(query_number(p, lane.at(r), axis, lane.row(r)), lane.key(n, 0));
        keep[n][2 * r] = both.x, keep[n][2 * r + 1] = both.y;
    }
}

template <class T, int kBlocks, bool kPlain, bool kTwo>
VIVIT_DEVICE void packed_forward(const AttentionParams& p, const Axis& axis, uint32_t tile) {
    const Lane<kTwo> lane(tile, axis, static_cast<uint32_t>(axis.sequences(p.B)));
    if (!lane.there(0)) return;  // a whole warp, or none of it
    const Tile<kBlocks> q = load_tile<T, kBlocks, kPlain>(p, p.q, lane, axis, true);
    const Tile<kBlocks> k = load_tile<T, kBlocks, kPlain>(p, p.k, lane, axis, true);
    const Tile<kBlocks> v = load_tile<T, kBlocks, kPlain>(p, p.v, lane, axis, false);
    const float zero = zero_behind(p, q, k, v);
    float x[2][4], over[2];
    across<T>(x, q, k, zero);
    weigh(p, x, over, lane, axis, Scores<kPlain>(p));
    if (!kPlain && p.seed != nullptr) {
        float keep[2][4];
        dropped(p, keep, lane, axis, Dropout(p));
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i / 4][i % 4] *= keep[i / 4][i % 4];
    }
    uint32_t weights[4];
    as_operand<T>(weights, x[0], x[1]);
    Sums<kBlocks> o;
    along<T>(o, weights, v);
    store_tile<T>(p, p.o, lane, axis, o, over);
}

// dq, dk and dv of a tile's sequences from q, k, v and do alone; o once more where o_again is there.
template <class T, int kBlocks, bool kPlain, bool kTwo>
VIVIT_DEVICE void packed_backward(const AttentionParams& p, const Axis& axis, uint32_t tile, float* scratch) {
    const Lane<kTwo> lane(tile, axis, static_cast<uint32_t>(axis.sequences(p.B)));
    if (!lane.there(0)) return;
    const Tile<kBlocks> q = load_tile<T, kBlocks, kPlain>(p, p.q, lane, axis, true);
    const Tile<kBlocks> k = load_tile<T, kBlocks, kPlain>(p, p.k, lane, axis, true);
    const Tile<kBlocks> v = load_tile<T, kBlocks, kPlain>(p, p.v, lane, axis, false);
    const Tile<kBlocks> d_o = load_tile<T, kBlocks, kPlain>(p, p.d_o, lane, axis, false);
    const float zero = zero_behind(p, q, k, v, d_o);
    const Scores<kPlain> scores(p);
    float weight[2][4], slope[2][4], dp[2][4], over[2];
    across<T>(weight, q, k, zero);
#pragma unroll
    for (int i = 0; i < 8; ++i) slope[i / 4][i % 4] = scores.slope(weight[i / 4][i % 4]);
    weigh(p, weight, over, lane, axis, scores);
    across<T>(dp, d_o, v, zero);
    float kept[2][4], delta[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        weight[i / 4][i % 4] *= over[i % 4 / 2];
        kept[i / 4][i % 4] = weight[i / 4][i % 4];
    }
    if (!kPlain && p.seed != nullptr) {
        float keep[2][4];
        dropped(p, keep, lane, axis, Dropout(p));
#pragma unroll
        for (int i = 0; i < 8; ++i) kept[i / 4][i % 4] *= keep[i / 4][i % 4], dp[i / 4][i % 4] *= keep[i / 4][i % 4];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) delta[i % 4 / 2] += weight[i / 4][i % 4] * dp[i / 4][i % 4];
#pragma unroll
    for (int r = 0; r < 2; ++r) delta[r] = sum_of_row(delta[r]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        dp[i / 4][i % 4] = weight[i / 4][i % 4] * (dp[i / 4][i % 4] - delta[i % 4 / 2]) * slope[i / 4][i % 4];
    }
    const float once[2] = {1.f, 1.f}, scale[2] = {p.scale, p.scale};
    const bool turn = !kPlain && p.cos != nullptr;
    uint32_t weights[4], ds[4];
    as_operand<T>(weights, kept[0], kept[1]);
    as_operand<T>(ds, dp[0], dp[1]);
    if (p.o_again.data != nullptr) {
        Sums<kBlocks> o;
        along<T>(o, weights, v);
        store_tile<T>(p, p.o_again, lane, axis, o, once);
    }
    turn_over(weights);
    {
        Sums<kBlocks> dv;
        along<T>(dv, weights, d_o);
        store_tile<T>(p, p.dv, lane, axis, dv, once);
    }
    {
        Sums<kBlocks> dq;
        along<T>(dq, ds, k);
        turn ? store_turned_tile<T>(p, p.dq, lane, axis, dq, scratch) : store_tile<T>(p, p.dq, lane, axis, dq, scale);
    }
    turn_over(ds);
    Sums<kBlocks> dk;
    along<T>(dk, ds, q);
    turn ? store_turned_tile<T>(p, p.dk, lane, axis, dk, scratch) : store_tile<T>(p, p.dk, lane, axis, dk, scale);
}

// Tile number `tile` of an axis.
template <class T, int kBlocks, bool kPlain>
VIVIT_DEVICE void packed_forward(const AttentionParams& p, const Axis& axis, uint32_t tile) {
    if (axis.N <= 8) return packed_forward<T, kBlocks, kPlain, true>(p, axis, tile);
    packed_forward<T, kBlocks, kPlain, false>(p, axis, tile);
}

template <class T, int kBlocks, bool kPlain>
VIVIT_DEVICE void packed_backward(const AttentionParams& p, const Axis& axis, uint32_t tile, float* scratch) {
    if (axis.N <= 8) return packed_backward<T, kBlocks, kPlain, true>(p, axis, tile, scratch);
    packed_backward<T, kBlocks, kPlain, false>(p, axis, tile, scratch);
}

}  // namespace vivit::cuda
