// Where a tubelet's pixels lie, and what a pixel counts as in a product.
//
// Row m of the products is a tubelet (b, t, row, column), the column fastest; tap k is one of its pixels, (c, f, y, x)
// with x fastest. Taps of a row of pixels are a run: neighbours in memory. Of channels-last video a pixel's channels
// are in the run, too (the run is C times as long, and there is one channel).
#pragma once

#include "tubelet.h"
#include "tubelet_verbs.cuh"

namespace vivit::cuda {

// x / by for 0 <= x < 2^31 by a multiplication (Granlund and Montgomery 1994, figure 4.1).
struct Divisor {
    int32_t by = 1, shift = 0;
    uint32_t factor = 1;

    Divisor() = default;
    explicit Divisor(int32_t n) : by(n) {
        while ((int64_t{1} << shift) < n) ++shift;
        const uint64_t more = (uint64_t{1} << shift) - static_cast<uint64_t>(n);
        factor = static_cast<uint32_t>((more << 32) / static_cast<uint64_t>(n) + 1);
    }
    VIVIT_DEVICE int32_t quotient(int32_t x) const {
        const uint32_t n = static_cast<uint32_t>(x);
        return static_cast<int32_t>((__umulhi(n, factor) + n) >> shift);
    }
};

struct PixelPlaces {
    char* data = nullptr;
    int32_t tubelets = 0, taps = 0;                                 // M, K
    Divisor columns, rows, frames;                                  // of a clip's grid of tubelets
    int64_t step_b = 0, step_t = 0, step_row = 0, step_column = 0;  // bytes from a tubelet to the next
    Divisor run, tall, deep;                                        // taps of a run, runs of a frame, frames
    int64_t step_c = 0, step_f = 0, step_y = 0, step_x = 0;         // bytes from a tap to the next
    Divisor per_channel, channels;                                  // taps of a channel; channels in a run
    int32_t together = 1;  // taps that always lie side by side, the first at a multiple of their size: 8, 4, 2 or 1

    // The first pixel of tubelet m: bytes from data.
    VIVIT_DEVICE int64_t tubelet(int32_t m) const {
        const int32_t line = columns.quotient(m), column = m - line * columns.by;
        const int32_t frame = rows.quotient(line), row = line - frame * rows.by;
        const int32_t b = frames.quotient(frame), t = frame - b * frames.by;
        return b * step_b + t * step_t + row * step_row + column * step_column;
    }
    // Tap k: bytes from the first pixel of its tubelet.
    VIVIT_DEVICE int64_t tap(int32_t k) const {
        const int32_t line = run.quotient(k), x = k - line * run.by;
        const int32_t frame = tall.quotient(line), y = line - frame * tall.by;
        const int32_t c = deep.quotient(frame), f = frame - c * deep.by;
        return c * step_c + f * step_f + y * step_y + x * step_x;
    }
    VIVIT_DEVICE int32_t channel(int32_t k) const {
        return channels.by > 1 ? k - channels.quotient(k) * channels.by : per_channel.quotient(k);
    }
};

// Floating-point pixels u enter a product as scale u + shift, rounded: applied later, to the products, a mean would
// cost digits.
struct Normalisation {
    bool applies = false;
    float scale[kMostChannels] = {}, shift[kMostChannels] = {};
};

// Taps k to k + 7 of any tubelet, where the first of every kPart lie. kWide: all eight side by side.
template <bool kWide>
struct Taps {
    static constexpr int kPart = kWide ? 8 : 2;
    int32_t k;
    int64_t offset[8 / kPart];

    VIVIT_DEVICE Taps(const PixelPlaces& places, int32_t first) : k(first) {
#pragma unroll
        for (int i = 0; i < 8 / kPart; ++i) offset[i] = places.tap(k + i * kPart);
    }
};

// Eight taps of a tubelet as they come: of bytes four to a word, or where runs are not of eights two.
template <class Pixel, bool kWide>
struct PixelChunk {
    static constexpr int kWords = sizeof(Pixel) == 1 ? (kWide ? 2 : 4) : 2 * sizeof(Pixel);
    uint32_t of[kWords];
};

// Loads of one number; Bits: an unsigned integer of its size.
template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<1> {
    using Type = uint8_t;
};
template <>
struct BitsOf<2> {
    using Type = uint16_t;
};
template <>
struct BitsOf<4> {
    using Type = uint32_t;
};

// Two taps that lie side by side, of 16 bits or bytes in one word.
template <class Pixel>
VIVIT_DEVICE uint2 load_neighbours(const char* from) {
    uint2 pair = {0u, 0u};
    if constexpr (sizeof(Pixel) == 4) pair = load_one(reinterpret_cast<const uint2*>(from));
    if constexpr (sizeof(Pixel) == 2) pair.x = load_one(reinterpret_cast<const uint32_t*>(from));
    if constexpr (sizeof(Pixel) == 1) pair.x = load_one(reinterpret_cast<const uint16_t*>(from));
    return pair;
}

// Taps k and k + 1, the first at `first`; zeros for those beyond the last. Runs of odd length, and pixels anywhere, are
// read one by one.
template <class Pixel>
VIVIT_DEVICE uint2 load_pair(const PixelPlaces& places, const char* tubelet, int64_t first, int32_t k) {
    using Bits = typename BitsOf<sizeof(Pixel)>::Type;
    if (k >= places.taps) return {0u, 0u};
    const char* from = tubelet + first;
    if (places.together > 1) return load_neighbours<Pixel>(from);
    const uint32_t one = load_one(reinterpret_cast<const Bits*>(from));
    uint32_t other = 0;
    if (k + 1 < places.taps) other = load_one(reinterpret_cast<const Bits*>(tubelet + places.tap(k + 1)));
    if constexpr (sizeof(Pixel) == 4) return {one, other};
    return {one | other << (8 * sizeof(Pixel) % 32), 0u};
}

template <class Pixel, bool kWide>
VIVIT_DEVICE void load_chunk(PixelChunk<Pixel, kWide>& chunk, const PixelPlaces& places, const char* tubelet,
                             const Taps<kWide>& taps) {
    if constexpr (!kWide) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint2 pair = load_pair<Pixel>(places, tubelet, taps.offset[i], taps.k + 2 * i);
            if constexpr (sizeof(Pixel) == 4) {
                chunk.of[2 * i] = pair.x, chunk.of[2 * i + 1] = pair.y;
            } else {
                chunk.of[i] = pair.x;
            }
        }
    } else if constexpr (sizeof(Pixel) == 1) {
        uint2 x = {0u, 0u};
        if (taps.k < places.taps) x = load_one(reinterpret_cast<const uint2*>(tubelet + taps.offset[0]));
        chunk.of[0] = x.x, chunk.of[1] = x.y;
    } else {
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(Pixel)) / 2; ++i) {
            const uint4 x = load_16(tubelet + taps.offset[0] + 16 * i, taps.k < places.taps);
            chunk.of[4 * i] = x.x, chunk.of[4 * i + 1] = x.y, chunk.of[4 * i + 2] = x.z, chunk.of[4 * i + 3] = x.w;
        }
    }
}

// The bytes u that are 2 half and 2 half + 1 of a word as u - 128 in float16, (u - 128) / 64 in bfloat16, both exact,
// in two instructions. A byte becomes the last digits of a number of which all others are known, and a subtraction
// leaves it: in float16, whose numbers from 2^10 on are whole, of 1024. bfloat16 has room for 7 of the 8 bits there,
// but all 8 are a number below the normal ones, u 2^-133: times 2^127, less 2.
template <class T>
constexpr uint32_t kAboveByte = 0;  // what a byte's number has above it, four times
template <>
constexpr uint32_t kAboveByte<Float16> = 0x64646464u;
// Of two numbers that are so made.
template <class T>
VIVIT_DEVICE uint32_t less_128(uint32_t numbers);
template <>
VIVIT_DEVICE uint32_t less_128<Float16>(uint32_t numbers) {
    constexpr uint32_t kOne = 0x3c003c00u, kMinus1152 = 0xe480e480u;
    return multiply_add_pairs<Float16>(numbers, kOne, kMinus1152);
}
template <>
VIVIT_DEVICE uint32_t less_128<BFloat16>(uint32_t numbers) {
    constexpr uint32_t k2To127 = 0x7f007f00u, kMinus2 = 0xc000c000u;
    return multiply_add_pairs<BFloat16>(numbers, k2To127, kMinus2);
}
template <class T>
VIVIT_DEVICE uint32_t centred(uint32_t word, int half) {
    return less_128<T>(select_bytes(word, kAboveByte<T>, half == 0 ? 0x4140 : 0x4342));
}
// What the products of such pixels still have to be multiplied by.
template <class T>
constexpr double kCentredUnit = 1.0;
template <>
constexpr double kCentredUnit<BFloat16> = 64.0;

// How floating-point taps k and k + 1 enter a product.
struct PairAffine {
    float2 scale = {1.f, 1.f}, shift = {0.f, 0.f};

    VIVIT_DEVICE PairAffine(const PixelPlaces& places, const Normalisation& n, int32_t k) {
        if (!n.applies || k >= places.taps) return;
        const int32_t c = places.channel(k), d = k + 1 < places.taps ? places.channel(k + 1) : c;
        scale = {n.scale[c], n.scale[d]}, shift = {n.shift[c], n.shift[d]};
    }
    template <class T>
    VIVIT_DEVICE uint32_t number(float2 u) const {
        return packed<T>(u.x * scale.x + shift.x, u.y * scale.y + shift.y);
    }
};

// Taps of a chunk as numbers of the products, two to a word.
template <class T, class Pixel, bool kWide>
VIVIT_DEVICE uint4 as_numbers(const PixelChunk<Pixel, kWide>& chunk, const PixelPlaces& places, const Normalisation& n,
                              int32_t k) {
    uint32_t pair[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(Pixel) == 1) {
            pair[i] = kWide ? centred<T>(chunk.of[i / 2], i % 2) : centred<T>(chunk.of[i], 0);
        } else {
            float2 u;
            if constexpr (sizeof(Pixel) == 4) {
                u = {__uint_as_float(chunk.of[2 * i]), __uint_as_float(chunk.of[2 * i + 1])};
            } else {
                u = unpacked<T>(chunk.of[i]);
            }
            pair[i] = n.applies ? PairAffine(places, n, k + 2 * i).template number<T>(u) : packed<T>(u.x, u.y);
        }
    }
    return {pair[0], pair[1], pair[2], pair[3]};
}

}  // namespace vivit::cuda
