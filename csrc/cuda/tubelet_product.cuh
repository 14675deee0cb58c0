// The product that all directions of tubelet_embedding are: [128, 128] sums over steps of 64, by eight warps, of two
// tiles of 16 bits in shared memory, 16 KB each. Tiles come in rings: while a step is multiplied, later ones are on
// their way, pixels through registers, everything else by asynchronous copies.
#pragma once

#include "tubelet_verbs.cuh"

namespace vivit::cuda {

// On sm_90 the forward has a kernel of its own (tubelet_hopper.cuh) for most calls.
//
// Why 128 x 128: two blocks of it share a multiprocessor of sm_80, too (128 registers a thread, 81 KB each), so that
// one converts pixels while the other multiplies. No GPU has timed it. What follows is an estimate for ViViT-B/16x2, 8
// clips in uint8, on one H100 (132 multiprocessors, 1.755 GHz), from the machine code of nvcc 13.0. In the forward a
// warp issues 329 instructions a step, 64 of them products, in the weight's gradient 504. Two warps of a block share a
// scheduler, which issues one instruction a clock: 658 clocks a step, or 1008. Their 128 products take 512 clocks at
// the rate of wgmma, 830 at 62 % of it (an assumption of what mma.sync reaches). So the forward's 1176 blocks of 24
// steps, 8.9 for each multiprocessor, take 80 to 101 us, 90 to 113 with the last round half empty; the gradient's
// 28,224 steps 123 us, and its parts come on top. The L2 cache may be slower: the forward's steps ask it for 24 KB
// each, 0.69 GB in all, 126 us at an assumed 5.5 TB/s. A tile of 256 x 128 would ask for 0.46 GB.
constexpr int32_t kTile = 128, kStep = 64, kTileThreads = 256;
constexpr int32_t kTileBytes = kTile * kStep * 2;

// How a tile lies. kAcross: its 128 rows take part in the product as rows (or columns), 64 numbers that are summed over
// side by side. kAlong: 64 rows are summed over, 128 numbers of each take part. Chunks of 16 bytes lie so that the same
// chunk of eight neighbouring rows is in eight groups of banks.
enum class Lies { kAcross, kAlong };

template <Lies kLies>
struct TilePlace {
    static constexpr int32_t kChunks = kLies == Lies::kAcross ? kStep / 8 : kTile / 8;  // of a row
    static constexpr int32_t kRowsAtOnce = kTileThreads / kChunks;  // rows that all threads fill with a chunk each
    static constexpr int kTimes = 4;                                // and how often they do, for a tile

    static VIVIT_DEVICE int32_t of(int32_t row, int32_t chunk) { return row * 16 * kChunks + 16 * (chunk ^ (row % 8)); }
    // The chunk of this thread, the first of its rows, and where that is; its next rows are kRowsAtOnce further, a
    // multiple of eight, so that the way is the same.
    static VIVIT_DEVICE int32_t chunk() { return static_cast<int32_t>(threadIdx.x) % kChunks; }
    static VIVIT_DEVICE int32_t row() { return static_cast<int32_t>(threadIdx.x) / kChunks; }
    static VIVIT_DEVICE int32_t first() { return of(row(), chunk()); }
    static constexpr int32_t kNext = kRowsAtOnce * 16 * kChunks;
};

// Of the 128 x 128 sums a warp's 64 x 32: [64 rows in sixteens][32 columns in eights].
struct TileSums {
    float of[4][4][4] = {};
};
VIVIT_DEVICE int32_t tile_lane() { return static_cast<int32_t>(threadIdx.x) % 32; }
VIVIT_DEVICE int32_t row_of_warp() { return static_cast<int32_t>(threadIdx.x) / 32 % 2 * 64; }
VIVIT_DEVICE int32_t column_of_warp() { return static_cast<int32_t>(threadIdx.x) / 64 * 32; }

// Four 8 x 8 blocks of a tile: 16 of its rows (or columns) from `first` on, 16 of what is summed over, number s of the
// step. As the left operand of multiply_add they come as (first 8 rows, first 8 summed), (last, first), (first, last),
// (last, last); as the right one, of two times eight columns, the middle two change places.
template <Lies kLies, bool kLeft>
VIVIT_DEVICE void load_operand(uint32_t (&blocks)[4], const char* tile, int32_t first, int s) {
    const int32_t lane = tile_lane(), low = lane / 8 % 2, high = lane / 16;  // lanes name the rows of blocks in turn
    const int32_t further = kLeft ? low : high, summed = kLeft ? high : low;
    if constexpr (kLies == Lies::kAcross) {
        load_blocks(blocks, tile + TilePlace<kLies>::of(first + 8 * further + lane % 8, 2 * s + summed));
    } else {
        const int32_t row = 16 * s + 8 * summed + lane % 8;
        load_blocks_transposed(blocks, tile + TilePlace<kLies>::of(row, first / 8 + further));
    }
}

// sums += left right, over one step.
template <class T, Lies kLeft, Lies kRight>
VIVIT_DEVICE void multiply_tiles(TileSums& sums, const char* left, const char* right) {
#pragma unroll
    for (int s = 0; s < kStep / 16; ++s) {
        uint32_t a[4][4], b[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) load_operand<kLeft, true>(a[i], left, row_of_warp() + 16 * i, s);
#pragma unroll
        for (int j = 0; j < 2; ++j) load_operand<kRight, false>(b[j], right, column_of_warp() + 16 * j, s);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j)
                multiply_add<T>(sums.of[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
}

// ---- tiles on their way ----

constexpr int kCopiedTiles = 3, kGatheredTiles = 2;

// Tiles that are copied: a ring of three, of which two may be on their way.
struct CopiedRing {
    char* memory;
    int32_t now = 0;

    VIVIT_DEVICE char* current() const { return memory + now * kTileBytes; }
    VIVIT_DEVICE char* after_next() const { return memory + (now + 2) % kCopiedTiles * kTileBytes; }
    VIVIT_DEVICE void advance() { now = (now + 1) % kCopiedTiles; }
};

// sums += left right over `steps`, of which one operand is gathered and the other copied.
// gathered: load(step) takes the pixels of a step into registers, store(tile) turns them into a tile of kGathered;
// copied: start(step, tile) starts copies of a tile of kCopied.
template <class T, bool kGatheredLeft, Lies kGathered, Lies kCopied, class Gathered, class Copied>
VIVIT_DEVICE void sum_gathered(TileSums& sums, char* memory, Gathered& gathered, const Copied& copied, int32_t steps) {
    char* const pixels = memory;  // two tiles: one is read while the other is written
    CopiedRing others{memory + kGatheredTiles * kTileBytes};
    gathered.load(0);
    copied.start(0, others.memory);
    copies_commit();
    if (steps > 1) copied.start(1, others.memory + kTileBytes);
    copies_commit();
    gathered.store(pixels);
#pragma unroll 1
    for (int32_t step = 0; step < steps; ++step) {
        copies_wait<1>();
        block_barrier();  // this step's tiles are there, and nobody reads those of the step before any more
        if (step + 1 < steps) gathered.load(step + 1);
        if (step + 2 < steps) copied.start(step + 2, others.after_next());
        copies_commit();
        const char* tile = pixels + step % 2 * kTileBytes;
        if constexpr (kGatheredLeft) {
            multiply_tiles<T, kGathered, kCopied>(sums, tile, others.current());
        } else {
            multiply_tiles<T, kCopied, kGathered>(sums, others.current(), tile);
        }
        if (step + 1 < steps) gathered.store(pixels + (step + 1) % 2 * kTileBytes);
        others.advance();
    }
}
constexpr int32_t kGatheredBytes = (kGatheredTiles + kCopiedTiles) * kTileBytes;

// sums += left right over `steps`, both copied.
template <class T, Lies kLeft, Lies kRight, class Left, class Right>
VIVIT_DEVICE void sum_copied(TileSums& sums, char* memory, const Left& left, const Right& right, int32_t steps) {
    CopiedRing lefts{memory}, rights{memory + kCopiedTiles * kTileBytes};
    left.start(0, lefts.memory), right.start(0, rights.memory);
    copies_commit();
    if (steps > 1) left.start(1, lefts.memory + kTileBytes), right.start(1, rights.memory + kTileBytes);
    copies_commit();
#pragma unroll 1
    for (int32_t step = 0; step < steps; ++step) {
        copies_wait<1>();
        block_barrier();
        if (step + 2 < steps) left.start(step + 2, lefts.after_next()), right.start(step + 2, rights.after_next());
        copies_commit();
        multiply_tiles<T, kLeft, kRight>(sums, lefts.current(), rights.current());
        lefts.advance(), rights.advance();
    }
}
constexpr int32_t kCopiedBytes = 2 * kCopiedTiles * kTileBytes;

// Rows of numbers of 16 bits: `count` of them, of `width` numbers, a multiple of eight. What is beyond becomes zeros.
struct MatrixRows {
    const char* first;
    int64_t step;  // bytes from a row to the next
    int32_t count, width;

    VIVIT_DEVICE const char* row(int32_t i) const { return first + i * step; }
};

// A thread's chunks of a tile: rows from `row` on, numbers from `column` on.
template <Lies kLies, class Rows>
VIVIT_DEVICE void start_tile(const Rows& rows, int32_t row, int32_t column, char* tile) {
    using Place = TilePlace<kLies>;
    const int32_t mine = computed_anew(row + Place::row()), at = column + 8 * Place::chunk();
    char* to = tile + Place::first();
#pragma unroll
    for (int i = 0; i < Place::kTimes; ++i) {
        const int32_t number = mine + i * Place::kRowsAtOnce;
        const bool valid = at < rows.width && number < rows.count;
        copy_16(to + i * Place::kNext, valid ? rows.row(number) + 2 * at : rows.first, valid);
    }
}

// 128 rows from `row` on, which take part as they are; a step is 64 of their numbers.
template <class Rows>
struct CopiedAcross {
    const Rows& rows;
    int32_t row;

    VIVIT_DEVICE void start(int32_t step, char* tile) const {
        start_tile<Lies::kAcross>(rows, row, step * kStep, tile);
    }
};

// 128 numbers from `column` on of all rows, of which a step is 64, from `row` on.
template <class Rows>
struct CopiedAlong {
    const Rows& rows;
    int32_t row, column;

    VIVIT_DEVICE void start(int32_t step, char* tile) const {
        start_tile<Lies::kAlong>(rows, row + step * kStep, column, tile);
    }
};

// ---- sums ----

// Of a lane's pairs of sums in two neighbouring blocks of eight columns, four sums in a row: neighbouring lanes trade.
// Of 16 bits then four lanes store 32 bytes, a whole sector of memory.
VIVIT_DEVICE float4 traded(const float (&left)[4], const float (&right)[4], int r) {
    const bool odd = tile_lane() % 2 != 0;
    const float x = from_lane_xor(odd ? left[2 * r] : right[2 * r], 1);
    const float y = from_lane_xor(odd ? left[2 * r + 1] : right[2 * r + 1], 1);
    if (odd) return {x, y, right[2 * r], right[2 * r + 1]};
    return {left[2 * r], left[2 * r + 1], x, y};
}
// Where they are among the 16 columns of the two blocks.
VIVIT_DEVICE int32_t traded_column() { return tile_lane() % 2 * 8 + tile_lane() % 4 / 2 * 4; }

// Calls store(row, column, four): four neighbouring sums of a row, for all of the tile's.
template <class Store>
VIVIT_DEVICE void for_fours(const TileSums& sums, Store store) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int32_t row = row_of_warp() + 16 * (i / 2) + 8 * (i % 2) + tile_lane() / 4;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float4 four = traded(sums.of[i / 2][2 * j], sums.of[i / 2][2 * j + 1], i % 2);
            store(row, column_of_warp() + 16 * j + traded_column(), four);
        }
    }
}

}  // namespace vivit::cuda
