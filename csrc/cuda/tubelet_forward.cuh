// Forward of tubelet_embedding: tokens = unit (tubelets W^T) + row + position, [M, E] over K taps, tubelets gathered
// from the video itself, tokens and class rows written once.
#pragma once

#include "tubelet_pixels.cuh"
#include "tubelet_product.cuh"

namespace vivit::cuda {

// Rows of tokens among those of out: behind each class row, if there are any.
struct TokenPlaces {
    Divisor group;       // tokens of a clip, or of a frame where each has a class row
    int32_t before = 0;  // class rows before a group's tokens: 1 or 0

    VIVIT_DEVICE int64_t row(int32_t m) const { return m + (group.quotient(m) + int64_t{1}) * before; }
    // Its number in its group.
    VIVIT_DEVICE int32_t number(int32_t m) const { return m - group.quotient(m) * group.by; }
};

struct ForwardParams {
    PixelPlaces places;
    Normalisation normalisation;
    TokenPlaces tokens;
    MatrixRows weight;  // [E, K], in the order of the taps
    float unit = 1.f;   // of the products
    const float* row = nullptr;
    Table position, class_token;
    char* out = nullptr;
    int32_t E = 0, blocks_e = 0;
};

// Four neighbours from `column` on of a row of a table; zeros where there is none.
template <class T>
VIVIT_DEVICE float4 four_of(const Table& table, int64_t row, int32_t column) {
    if (table.data == nullptr) return {0.f, 0.f, 0.f, 0.f};
    const int64_t at = row * table.stride + column;
    if (table.is_float) {
        const uint4 x = load_16(static_cast<const float*>(table.data) + at, true);
        return {__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)};
    }
    const uint2 x = load_one(reinterpret_cast<const uint2*>(static_cast<const char*>(table.data) + 2 * at));
    const float2 low = unpacked<T>(x.x), high = unpacked<T>(x.y);
    return {low.x, low.y, high.x, high.y};
}

template <class T>
VIVIT_DEVICE void store_four(char* to, float x, float y, float z, float w) {
    store_8(to, {packed<T>(x, y), packed<T>(z, w)});
}

// The tile of 128 tubelets from `first` on. A thread has the same four of them at every step, and one chunk of taps.
// Where they begin is computed once, two by a thread, and kept in shared memory: in registers it would be too much.
template <class T, class Pixel, bool kWide>
struct TubeletsAcross {
    using Place = TilePlace<Lies::kAcross>;
    const PixelPlaces& places;
    const Normalisation& normalisation;
    int64_t* begins;  // [kTile]
    PixelChunk<Pixel, kWide> chunk[Place::kTimes];
    int32_t k = 0;

    VIVIT_DEVICE TubeletsAcross(const PixelPlaces& p, const Normalisation& n, int32_t first, int64_t* memory)
        : places(p), normalisation(n), begins(memory) {
        const int32_t i = 2 * static_cast<int32_t>(threadIdx.x), last = p.tubelets - 1, m = first + i;
        // those beyond the last are not stored
        if (i < kTile) write_offsets(begins + i, p.tubelet(min(m, last)), p.tubelet(min(m + 1, last)));
        block_barrier();
    }
    VIVIT_DEVICE void load(int32_t step) {
        k = step * kStep + 8 * Place::chunk();
        const Taps<kWide> taps(places, k);
#pragma unroll
        for (int i = 0; i < Place::kTimes; ++i) {
            const int64_t tubelet = read_offset(begins + Place::row() + i * Place::kRowsAtOnce);
            load_chunk(chunk[i], places, places.data + tubelet, taps);
        }
    }
    VIVIT_DEVICE void store(char* tile) const {
        char* to = tile + Place::first();
#pragma unroll
        for (int i = 0; i < Place::kTimes; ++i) {
            store_16(to + i * Place::kNext, as_numbers<T>(chunk[i], places, normalisation, k));
        }
    }
};

// Channels e to e + 3 of tubelet m's token, and of a class row with the first of its group.
template <class T>
VIVIT_DEVICE void store_token(const ForwardParams& p, int32_t m, int32_t e, float4 sum) {
    if (m >= p.places.tubelets || e >= p.E) return;
    const int32_t number = p.tokens.number(m);
    const float4 added = four_of<T>({const_cast<float*>(p.row), 0, true}, 0, e);
    const float4 position = four_of<T>(p.position, number + p.tokens.before, e);
    char* to = p.out + 2 * (p.tokens.row(m) * p.E + e);
    store_four<T>(to, sum.x * p.unit + added.x + position.x, sum.y * p.unit + added.y + position.y,
                  sum.z * p.unit + added.z + position.z, sum.w * p.unit + added.w + position.w);
    if (p.tokens.before == 0 || number > 0) return;
    const float4 x = four_of<T>(p.class_token, 0, e), y = four_of<T>(p.position, 0, e);
    store_four<T>(to - int64_t{2} * p.E, x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
}

// Blocks beside each other share their tubelets: the video is read from memory once, the weight stays in the L2 cache.
template <class T, class Pixel, bool kWide>
__global__ void __launch_bounds__(kTileThreads, sizeof(Pixel) == 1 && kWide ? 2 : 1)
    tubelet_forward(const __grid_constant__ ForwardParams p) {
    const int32_t first_m = static_cast<int32_t>(blockIdx.x) / p.blocks_e * kTile;
    const int32_t first_e = static_cast<int32_t>(blockIdx.x) % p.blocks_e * kTile;
    TubeletsAcross<T, Pixel, kWide> tubelets(p.places, p.normalisation, first_m,
                                             reinterpret_cast<int64_t*>(shared_memory() + kGatheredBytes));
    const CopiedAcross<MatrixRows> weight{p.weight, first_e};
    TileSums sums;
    sum_gathered<T, true, Lies::kAcross, Lies::kAcross>(sums, shared_memory(), tubelets, weight,
                                                        (p.places.taps + kStep - 1) / kStep);
    for_fours(sums, [&](int32_t row, int32_t column, float4 sum) {
        store_token<T>(p, first_m + row, first_e + column, sum);
    });
}

constexpr int32_t kForwardBytes = kGatheredBytes + 8 * kTile;  // two blocks fill sm_80's shared memory

}  // namespace vivit::cuda
