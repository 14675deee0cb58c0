// Attention of float32 rows by plain multiply-adds, of any sequence of which shared memory holds two tensors. A warp
// takes 8 rows at a time and has their scores with all others in shared memory: exact softmax, and a backward that
// needs neither o nor lse. Products are made in tiles of 4 x 4 numbers a lane, so that 8 reads of 16 bytes feed 64
// multiply-adds; where there are fewer tiles than lanes, several lanes share a tile's sum.
#pragma once

#include "rotary.cuh"
#include "scores.cuh"
#include "verbs_tf32.cuh"

namespace vivit::cuda {

constexpr int kTileRows = 8;             // of a warp at a time
constexpr int kFloat32Warps = 16;        // of a block, at most: 128 registers a thread
constexpr int kSharingWarps = 8;         // of one that several sequences share, of which two fit a multiprocessor,
constexpr int kSharingBytes = 80 << 10;  // also by what they take

// What a block has in shared memory, in floats. Of each of `per` sequences, padded to `rows` rows, two tensors (k and
// v; then, for the gradients of keys, q and do) and kStatistics numbers of each token. Of each warp 8 rows (of q and
// do, then of k and v) and their products with the others, one matrix of a forward and two of a backward. Rows lie an
// odd number of 16 bytes apart: the same chunk of eight neighbouring rows is in eight different groups of banks.
template <bool kBackward>
struct FloatLayout {
    static constexpr int32_t kTiles = kBackward ? 2 : 1, kStatistics = kBackward ? 4 : 2;
    int32_t rows, pitch, score_pitch, per;

    VIVIT_BOTH FloatLayout(int32_t N, int32_t D)
        : rows((N + 3) / 4 * 4), pitch(D + 4), score_pitch(4 * (rows / 4 | 1)), per(1) {
        if (tiles() < kSharingWarps) per = kSharingWarps / tiles();
        while (per > 1 && bytes(warps()) > kSharingBytes) --per;
    }

    VIVIT_BOTH int32_t tiles() const { return (rows + kTileRows - 1) / kTileRows; }  // of a sequence
    VIVIT_BOTH int32_t of_sequence() const { return 2 * rows * pitch + kStatistics * rows; }
    VIVIT_BOTH int32_t of_warp() const { return kTiles * kTileRows * (pitch + score_pitch); }
    VIVIT_BOTH int32_t bytes(int32_t warps) const { return 4 * (per * of_sequence() + warps * of_warp()); }
    VIVIT_BOTH int32_t least_bytes() const { return bytes(1); }
    VIVIT_BOTH int64_t blocks(int64_t sequences) const { return (sequences + per - 1) / per; }

    // Of the numbers of warps that need the fewest rounds for the block's tiles, the smallest.
    VIVIT_BOTH int32_t warps() const {
        const int32_t rounds = (per * tiles() + kFloat32Warps - 1) / kFloat32Warps;
        return (per * tiles() + rounds - 1) / rounds;
    }
};

// What is kept of each token: of a key what is added to its scores, of a query one over its sum of 2^(score - most),
// and for the gradients of keys also most, its largest score, and delta, the sum of its probabilities times dP.
enum Statistic : int32_t { kBias, kOver, kMost, kDelta };

// A block: its sequences, what a thread of it does, and where things lie in shared memory. kTf32: whose products it
// takes, those of multiply-adds below or those of tf32_rows.cuh.
template <bool kBackward, bool kTf32>
struct FloatBlock {
    const AttentionParams& p;
    const Axis& axis;
    FloatLayout<kBackward> layout;
    Scores<false> scores;
    Dropout dropout;
    int64_t first;  // number of its first sequence
    int32_t sequences, warp, lane;
    float* memory;

    VIVIT_DEVICE FloatBlock(const AttentionParams& params, const Axis& of, int64_t block)
        : p(params),
          axis(of),
          layout(of.N, params.D),
          scores(params),
          dropout(params),
          first(block * layout.per),
          warp(static_cast<int32_t>(threadIdx.x) / 32),
          lane(lane_number()),
          memory(reinterpret_cast<float*>(shared_memory())) {
        const int64_t left = axis.sequences(p.B) - first;
        sequences = static_cast<int32_t>(left < layout.per ? left : layout.per);
    }

    VIVIT_DEVICE Sequence at(int32_t s) const { return Sequence(first + s, axis); }
    VIVIT_DEVICE float* others(int32_t tensor, int32_t s) const {
        return memory + s * layout.of_sequence() + tensor * layout.rows * layout.pitch;
    }
    VIVIT_DEVICE float* statistic(Statistic which, int32_t s) const { return others(2, s) + which * layout.rows; }
    VIVIT_DEVICE float* tile(int32_t tensor) const {
        return memory + layout.per * layout.of_sequence() + warp * layout.of_warp() + tensor * kTileRows * layout.pitch;
    }
    VIVIT_DEVICE float* products(int32_t number) const {
        return tile(layout.kTiles) + number * kTileRows * layout.score_pitch;
    }

    // A number as products take it.
    static VIVIT_DEVICE float operand(float x) { return kTf32 ? __uint_as_float(as_tf32(x)) : x; }

    // `count` rows of a sequence from row `from` on, on their way to shared memory, zeros beyond its end.
    VIVIT_DEVICE void copy(float* to, const Grid& x, int32_t s, int32_t from, int32_t count, int32_t thread,
                           int32_t threads) const {
        const Rows rows(x, at(s), axis, 4);
        const int32_t chunks = p.D / 4;
        for (int32_t i = thread; i < count * chunks; i += threads) {
            const int32_t row = i / chunks, chunk = i % chunks;
            const bool valid = from + row < axis.N;
            copy_16(to + row * layout.pitch + 4 * chunk, valid ? rows.row(from + row) + 16 * chunk : rows.first, valid);
        }
    }

    // Rows rounded where they lie, once they are there.
    VIVIT_DEVICE void round(float* rows, int32_t count, int32_t thread, int32_t threads) const {
        const int32_t chunks = p.D / 4;
        for (int32_t i = thread; i < count * chunks; i += threads) {
            float *place = rows + i / chunks * layout.pitch + 4 * (i % chunks), x[4];
            read_four(x, place);
#pragma unroll
            for (int j = 0; j < 4; ++j) x[j] = operand(x[j]);
            write_four(place, x);
        }
    }

    // Rows of q or k turned, if they are, and rounded, if they are, where they lie, once they are there.
    VIVIT_DEVICE void turn(float* rows, int32_t s, int32_t from, int32_t count, int32_t thread, int32_t threads) const {
        if (kTf32 && p.cos == nullptr) return round(rows, count, thread, threads);
        const int32_t half = p.D / 2, fours = half / 4;
        const Sequence sequence = at(s);
        for (int32_t i = thread; i < count * fours; i += threads) {
            const int32_t row = i / fours, e = i % fours * 4;
            if (from + row >= axis.N) continue;
            float *place = rows + row * layout.pitch + e, x[4], y[4];
            read_four(x, place), read_four(y, place + half);
            const int64_t angle = angles_of(p, sequence.token(from + row, axis, p.S)) + e;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float partner = y[j];
                y[j] = operand(turned(p, angle + j, partner, x[j], 1.f));
                x[j] = operand(turned(p, angle + j, x[j], partner, -1.f));
            }
            write_four(place, x), write_four(place + half, y);
        }
    }

    // The whole of two tensors, the first of them turned, for all warps.
    VIVIT_DEVICE void load_others(const Grid& a, const Grid& b) const {
        const int32_t thread = static_cast<int32_t>(threadIdx.x), threads = static_cast<int32_t>(blockDim.x);
        for (int32_t s = 0; s < sequences; ++s) {
            copy(others(0, s), a, s, 0, layout.rows, thread, threads);
            copy(others(1, s), b, s, 0, layout.rows, thread, threads);
        }
        copies_commit();
        copies_wait<0>();
        block_barrier();
        if (!kTf32 && p.cos == nullptr) return;
        for (int32_t s = 0; s < sequences; ++s) {
            turn(others(0, s), s, 0, layout.rows, thread, threads);
            if (kTf32) round(others(1, s), layout.rows, thread, threads);
        }
        block_barrier();
    }

    // Rows from, ..., from + 7 of one tensor, turned, and of a backward of another, for this warp.
    VIVIT_DEVICE void load_tile(const Grid& a, const Grid& b, int32_t s, int32_t from) const {
        warp_barrier();  // the tile before was read
        copy(tile(0), a, s, from, kTileRows, lane, 32);
        if (kBackward) copy(tile(1), b, s, from, kTileRows, lane, 32);
        copies_commit();
        copies_wait<0>();
        warp_barrier();
        if (!kTf32 && p.cos == nullptr) return;
        turn(tile(0), s, from, kTileRows, lane, 32);
        if (kTf32 && kBackward) round(tile(1), kTileRows, lane, 32);
        warp_barrier();
    }
};

// Which of `items` tiles of 4 x 4 a lane works at: one of `width` at a time, of whose sum it has one share of `shares`.
struct Share {
    int32_t width, place, share, shares;

    VIVIT_DEVICE explicit Share(int32_t items) : width(32) {
        while (width / 2 >= items) width /= 2;
        place = lane_number() % width, share = lane_number() / width, shares = 32 / width;
    }

    // The sum of all shares, for each of their lanes.
    VIVIT_DEVICE void add_up(float (&sum)[4][4]) const {
        for (int32_t mask = width; mask < 32; mask *= 2) {
#pragma unroll
            for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] += from_lane_xor(sum[i / 4][i % 4], mask);
        }
    }
};

// Products of the 8 rows of a tile with all rows of a tensor: to[i][j] = sum over channels of tile[i] others[j]. Of a
// tile of 4 x 4 the columns lie `groups` apart, so that neighbouring lanes read neighbouring rows.
template <bool kBackward>
VIVIT_DEVICE void across(const FloatBlock<kBackward, false>& block, float* to, const float* tile, const float* others) {
    const FloatLayout<kBackward>& layout = block.layout;
    const int32_t groups = layout.rows / 4, items = kTileRows / 4 * groups, chunks = block.p.D / 4;
    const Share mine(items);
    for (int32_t first = 0; first < items; first += mine.width) {
        const bool there = first + mine.place < items;
        const int32_t item = there ? first + mine.place : 0, row = item % 2 * 4, column = item / 2;
        const float *a = tile + row * layout.pitch, *b = others + column * layout.pitch;
        float sum[4][4] = {};
#pragma unroll 2
        for (int32_t chunk = mine.share; chunk < chunks; chunk += mine.shares) {
            float x[4][4], y[4][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                read_four(x[i], a + i * layout.pitch + 4 * chunk);
                read_four(y[i], b + i * groups * layout.pitch + 4 * chunk);
            }
#pragma unroll
            for (int i = 0; i < 64; ++i) sum[i / 4 % 4][i % 4] += x[i / 4 % 4][i / 16] * y[i % 4][i / 16];
        }
        mine.add_up(sum);
        if (!there || mine.share != 0) continue;
#pragma unroll
        for (int i = 0; i < 16; ++i)
            to[(row + i / 4) * layout.score_pitch + column + i % 4 * groups] = sum[i / 4][i % 4];
    }
}

// sink(row, chunk, sums): of a tile's 8 rows, 4 channels at a time, the sum over the other rows of weights[row][other]
// others[other].
template <bool kBackward, class Sink>
VIVIT_DEVICE void along(const FloatBlock<kBackward, false>& block, const float* weights, const float* others,
                        const Sink& sink) {
    const FloatLayout<kBackward>& layout = block.layout;
    const int32_t items = kTileRows / 4 * (block.p.D / 4);
    const Share mine(items);
    for (int32_t first = 0; first < items; first += mine.width) {
        const bool there = first + mine.place < items;
        const int32_t item = there ? first + mine.place : 0, row = item % 2 * 4, chunk = item / 2;
        const float *a = weights + row * layout.score_pitch, *b = others + 4 * chunk;
        float sum[4][4] = {};
#pragma unroll 2
        for (int32_t other = 4 * mine.share; other < layout.rows; other += 4 * mine.shares) {
            float x[4][4], y[4][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                read_four(x[i], a + i * layout.score_pitch + other);
                read_four(y[i], b + (other + i) * layout.pitch);
            }
#pragma unroll
            for (int i = 0; i < 64; ++i) sum[i / 4 % 4][i % 4] += x[i / 4 % 4][i / 16] * y[i / 16][i % 4];
        }
        mine.add_up(sum);
        if (!there || mine.share != 0) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) sink(row + i, chunk, sum[i]);
    }
}

}  // namespace vivit::cuda
