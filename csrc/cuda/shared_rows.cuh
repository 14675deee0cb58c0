// Rows of a sequence in shared memory, and products that take them from there.
#pragma once

#include "rotary.cuh"
#include "scores.cuh"

namespace vivit::cuda {

// kSteps of 16 channels hold a row. Chunks of 16 bytes lie so that the same chunk of eight neighbouring rows is in
// eight different groups of banks: at an odd pitch, or where that of a power of two would do, in an order that depends
// on the row.
template <int kSteps>
struct Pitch {
    static constexpr bool kSwizzled = kSteps == 2 || kSteps == 4 || kSteps == 8;
    static constexpr int kChunks = 2 * kSteps + (kSwizzled ? 0 : 1);
    static constexpr int kBytes = 16 * kChunks;

    static VIVIT_DEVICE int32_t place(int32_t row, int32_t chunk) {
        if (kSteps == 2) return row * kBytes + 16 * (chunk ^ (row / 2 % 4));
        if (kSwizzled) return row * kBytes + 16 * (chunk ^ (row % 8));
        return row * kBytes + 16 * chunk;
    }

    // The place of a chunk 2 s further than the (first or second) one at `place`, in the same row.
    static VIVIT_DEVICE int32_t further(int32_t place, int s) { return kSwizzled ? place ^ (32 * s) : place + 32 * s; }
};

// A copy of N rows on its way to shared memory, padded with zeros to whole sixteens and to kSteps: by threads thread,
// thread + threads, ... of a block.
template <int kSteps>
VIVIT_DEVICE void copy_rows(char* to, const Rows& from, int32_t N, int32_t padded, int32_t D, int32_t thread,
                            int32_t threads) {
    for (int32_t i = thread; i < padded * 2 * kSteps; i += threads) {
        const int32_t row = i / (2 * kSteps), chunk = i % (2 * kSteps);
        const bool valid = row < N && chunk < D / 8;
        copy_16(to + Pitch<kSteps>::place(row, chunk), valid ? from.row(row) + 16 * chunk : from.first, valid);
    }
}

// `count` rows of q or k turned where they lie in shared memory, once all of them are there. place(row, chunk): where 8
// channels are; token(row): of the clip.
template <class T, class Place, class Token>
VIVIT_DEVICE void turn_rows(const AttentionOptions& p, int32_t count, int32_t thread, int32_t threads,
                            const Place& place, const Token& token) {
    const int32_t pairs = p.D / 4;  // of two neighbours and their two partners
    for (int32_t i = thread; i < count * pairs; i += threads) {
        const int32_t row = i / pairs, e = i % pairs * 2, far = e + p.D / 2;
        uint32_t& first = *reinterpret_cast<uint32_t*>(place(row, e / 8) + e % 8 * 2);
        uint32_t& second = *reinterpret_cast<uint32_t*>(place(row, far / 8) + far % 8 * 2);
        const float2 x = unpacked<T>(first), y = unpacked<T>(second);
        const int64_t angle = angles_of(p, token(row)) + e;
        first = packed<T>(turned(p, angle, x.x, y.x, -1.f), turned(p, angle + 1, x.y, y.y, -1.f));
        second = packed<T>(turned(p, angle, y.x, x.x, 1.f), turned(p, angle + 1, y.y, x.y, 1.f));
    }
}
template <class T, int kSteps, class Token>
VIVIT_DEVICE void turn_rows(const AttentionOptions& p, char* rows, int32_t count, int32_t thread, int32_t threads,
                            const Token& token) {
    turn_rows<T>(
        p, count, thread, threads, [&](int32_t row, int32_t chunk) { return rows + Pitch<kSteps>::place(row, chunk); },
        token);
}

// 16 rows as the left operand of a product over channels: for each 16 channels four blocks.
template <int kSteps>
struct Operand {
    uint32_t of[kSteps][4];

    Operand() = default;
    VIVIT_DEVICE explicit Operand(const char* rows) {
        const int32_t at = Pitch<kSteps>::place(lane_number() % 16, lane_number() / 16);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) load_blocks(of[s], rows + Pitch<kSteps>::further(at, s));
    }
};

// Where a lane finds its part of 16 rows that are the right operand: of a product over channels blocks of rows 0..
// columns 0.., rows 0.. columns 8.., rows 8.. columns 0.., rows 8.. columns 8..; of one over rows the middle two change
// places. The first of the rows is a multiple of 8, so that this does not depend on it.
template <int kSteps>
struct Places {
    int32_t across, along;

    VIVIT_DEVICE Places()
        : across(Pitch<kSteps>::place(lane_number() % 8 + lane_number() / 16 * 8, lane_number() / 8 % 2)),
          along(Pitch<kSteps>::place(lane_number() % 16, lane_number() / 16)) {}
};

template <int kGroups>
struct Pairs {
    float of[kGroups][2][4] = {};  // [16, 16 kGroups], sixteen columns as two blocks of sums

    VIVIT_DEVICE float (&blocks())[2 * kGroups][4] { return reinterpret_cast<float (&)[2 * kGroups][4]>(of); }
};

// d += a b^T over 16 channels, number s of the steps, b of 16 kGroups rows. Of all groups one step after the other:
// products of one accumulator have to wait for each other.
template <class T, int kSteps, int kGroups>
VIVIT_DEVICE void across_step(Pairs<kGroups>& d, const Operand<kSteps>& a, const char* rows, int32_t place, int s) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
        uint32_t b[4];
        load_blocks(b, rows + Pitch<kSteps>::further(place, s) + 16 * j * Pitch<kSteps>::kBytes);
        multiply_add<T>(d.of[j][0], a.of[s], b[0], b[1]);
        multiply_add<T>(d.of[j][1], a.of[s], b[2], b[3]);
    }
}

// Sums [16, channels] of a product: of n the lane has rows g (first two) and g + 8, channels 8 n + 2 t, + 1.
template <int kSteps>
struct RowSums {
    float of[2 * kSteps][4] = {};
};

// sums += a b, a [16, 16] an operand, b 16 rows.
template <class T, int kSteps>
VIVIT_DEVICE void along_rows(RowSums<kSteps>& sums, const uint32_t (&a)[4], const char* rows, int32_t place) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        uint32_t b[4];
        load_blocks_transposed(b, rows + Pitch<kSteps>::further(place, s));
        multiply_add<T>(sums.of[2 * s], a, b[0], b[1]);
        multiply_add<T>(sums.of[2 * s + 1], a, b[2], b[3]);
    }
}

// Rows first + g and first + g + 8 of N, times a factor each. Neighbouring lanes change words so that each has 8 bytes
// in a row and four of them 32, a whole sector of memory.
template <class T, int kSteps>
VIVIT_DEVICE void store_rows(const AttentionOptions& p, const Rows& to, int32_t first, int32_t N,
                             const RowSums<kSteps>& sums, float factor_0, float factor_1) {
    const int32_t g = lane_number() / 4, t = lane_number() % 4;
    const bool odd = t % 2 != 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int32_t row = first + g + 8 * r;
        const float factor = r == 0 ? factor_0 : factor_1;
        char* at = to.row(row) + 8 * (t / 2) + (odd ? 16 : 0);
#pragma unroll
        for (int n = 0; n < 2 * kSteps; n += 2) {
            const uint32_t left = packed<T>(sums.of[n][2 * r] * factor, sums.of[n][2 * r + 1] * factor);
            const uint32_t right = packed<T>(sums.of[n + 1][2 * r] * factor, sums.of[n + 1][2 * r + 1] * factor);
            const uint32_t other = from_lane_xor(odd ? left : right, 1);
            const uint2 both = {odd ? other : left, odd ? right : other};
            if (row < N && n + (odd ? 1 : 0) < p.D / 8) store_8(at + 16 * n, both);
        }
    }
}

// Floats of a warp's scratch for turning 16 rows back: rows of 16 kSteps, apart by banks.
template <int kSteps>
constexpr int kTurnedPitch = 16 * kSteps + 4;

// The gradient of rows first, ... of N that were turned, turned back through a warp's scratch [16][kTurnedPitch].
// token(row): of the clip.
template <class T, int kSteps, class Token>
VIVIT_DEVICE void store_turned_rows(const AttentionOptions& p, const Rows& to, int32_t first, int32_t N,
                                    const RowSums<kSteps>& sums, float* scratch, const Token& token) {
    constexpr int kPitch = kTurnedPitch<kSteps>;
    const int32_t g = lane_number() / 4, t = lane_number() % 4;
    warp_barrier();
#pragma unroll
    for (int i = 0; i < 8 * kSteps; ++i) {
        scratch[(g + 8 * (i % 4 / 2)) * kPitch + 8 * (i / 4) + 2 * t + i % 2] = sums.of[i / 4][i % 4];
    }
    warp_barrier();
    store_turned_back<T>(p, scratch, kPitch, p.scale, [&](int32_t number) -> TurnedRow {
        const int32_t row = first + number;
        return {row < N, token(row), to.row(row)};
    });
}

}  // namespace vivit::cuda
