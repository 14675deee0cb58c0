// Backward of tubelet_embedding, its two products. The weight's gradient is dout^T tubelets, [E, K] over M tokens, in
// `splits` parts of the tokens that are added up afterwards, in order; tubelets are gathered again. The video's
// gradient is dout W, [M, K] over E; every pixel belongs to one tubelet, so that it is written once, where it belongs.
#pragma once

#include "tubelet_forward.cuh"

namespace vivit::cuda {

// d_out's rows of tokens first to first + count - 1, as rows of a matrix.
struct GradientRows {
    const char* first;
    TokenPlaces tokens;
    int32_t count, width;

    VIVIT_DEVICE const char* row(int32_t m) const { return first + 2 * (tokens.row(m) * width); }
};

// ---- the weight's gradient ----

struct WeightGradientParams {
    PixelPlaces places;
    Normalisation normalisation;
    GradientRows d_out;
    float* parts = nullptr;  // [splits, E, pitch]
    int32_t pitch = 0, steps_of_part = 0;
    int32_t blocks_e = 0, blocks_k = 0;
};

// The tile of 128 taps of a step's 64 tubelets. A thread has the same chunk of taps at every step.
template <class T, class Pixel, bool kWide>
struct TubeletsAlong {
    using Place = TilePlace<Lies::kAlong>;
    const PixelPlaces& places;
    const Normalisation& normalisation;
    int32_t first;
    Taps<kWide> taps;
    PixelChunk<Pixel, kWide> chunk[Place::kTimes];

    VIVIT_DEVICE TubeletsAlong(const PixelPlaces& p, const Normalisation& n, int32_t first_m, int32_t first_k)
        : places(p), normalisation(n), first(first_m + Place::row()), taps(p, first_k + 8 * Place::chunk()) {}

    VIVIT_DEVICE void load(int32_t step) {
#pragma unroll
        for (int i = 0; i < Place::kTimes; ++i) {
            const int32_t m = first + step * kStep + i * Place::kRowsAtOnce;  // dout is zero beyond the last
            const char* tubelet = places.data + places.tubelet(min(m, places.tubelets - 1));
            load_chunk(chunk[i], places, tubelet, taps);
        }
    }
    VIVIT_DEVICE void store(char* tile) const {
        char* to = tile + Place::first();
#pragma unroll
        for (int i = 0; i < Place::kTimes; ++i) {
            store_16(to + i * Place::kNext, as_numbers<T>(chunk[i], places, normalisation, taps.k));
        }
    }
};

// The part slowest: blocks that run at the same time share their rows.
template <class T, class Pixel, bool kWide>
__global__ void __launch_bounds__(kTileThreads, sizeof(Pixel) == 1 && kWide ? 2 : 1)
    tubelet_weight_gradient(const __grid_constant__ WeightGradientParams p) {
    const int32_t block = static_cast<int32_t>(blockIdx.x);
    const int32_t first_k = block % p.blocks_k * kTile, first_e = block / p.blocks_k % p.blocks_e * kTile;
    const int32_t part = block / (p.blocks_k * p.blocks_e), first_m = part * p.steps_of_part * kStep;
    const int32_t left = (p.places.tubelets - first_m + kStep - 1) / kStep;
    TubeletsAlong<T, Pixel, kWide> tubelets(p.places, p.normalisation, first_m, first_k);
    const CopiedAlong<GradientRows> d_out{p.d_out, first_m, first_e};
    TileSums sums;
    sum_gathered<T, false, Lies::kAlong, Lies::kAlong>(sums, shared_memory(), tubelets, d_out,
                                                       left < p.steps_of_part ? left : p.steps_of_part);
    const int32_t E = p.d_out.width;
    for_fours(sums, [&](int32_t row, int32_t column, float4 sum) {
        const int32_t e = first_e + row, k = first_k + column;
        if (e >= E || k >= p.pitch) return;
        float* to = p.parts + (static_cast<int64_t>(part) * E + e) * p.pitch + k;
        store_16(to, {__float_as_uint(sum.x), __float_as_uint(sum.y), __float_as_uint(sum.z), __float_as_uint(sum.w)});
    });
}

// ---- the video's gradient ----

struct VideoGradientParams {
    PixelPlaces places;  // of the gradient
    Normalisation scales;
    GradientRows d_out;
    MatrixRows weight;  // [E, K]
    Element type = Element::kFloat32;
    int32_t blocks_k = 0;
};

template <class T>
VIVIT_DEVICE void store_pixel(char* to, Element type, float x) {
    if (type == Element::kFloat32) {
        store_4(to, __float_as_uint(x));
    } else {
        store_2(to, static_cast<uint16_t>(packed<T>(x, 0.f)));
    }
}

// Taps k to k + 3 of a tubelet, as widely as they lie side by side.
template <class T>
VIVIT_DEVICE void store_taps(const VideoGradientParams& p, char* tubelet, int32_t k, const float (&x)[4]) {
    const bool is_float = p.type == Element::kFloat32;
    const int32_t together = p.places.together;
    if (together >= 4) {
        char* to = tubelet + p.places.tap(k);
        if (is_float) {
            store_16(to, {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])});
        } else {
            store_four<T>(to, x[0], x[1], x[2], x[3]);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        if (k + i >= p.places.taps) return;
        char* to = tubelet + p.places.tap(k + i);
        if (together == 2 && is_float) {
            store_8(to, {__float_as_uint(x[i]), __float_as_uint(x[i + 1])});
        } else if (together == 2) {
            store_4(to, packed<T>(x[i], x[i + 1]));
        } else {
            store_pixel<T>(to, p.type, x[i]);
            if (k + i + 1 < p.places.taps) store_pixel<T>(tubelet + p.places.tap(k + i + 1), p.type, x[i + 1]);
        }
    }
}

template <class T>
VIVIT_DEVICE void store_pixels(const VideoGradientParams& p, char* tubelet, int32_t k, float4 sum) {
    float x[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (p.scales.applies && k + i < p.places.taps) x[i] *= p.scales.scale[p.places.channel(k + i)];
    }
    store_taps<T>(p, tubelet, k, x);
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, 2)
    tubelet_video_gradient(const __grid_constant__ VideoGradientParams p) {
    const int32_t first_m = static_cast<int32_t>(blockIdx.x) / p.blocks_k * kTile;
    const int32_t first_k = static_cast<int32_t>(blockIdx.x) % p.blocks_k * kTile;
    const CopiedAcross<GradientRows> d_out{p.d_out, first_m};
    const CopiedAlong<MatrixRows> weight{p.weight, 0, first_k};
    TileSums sums;
    sum_copied<T, Lies::kAcross, Lies::kAlong>(sums, shared_memory(), d_out, weight,
                                               (p.weight.count + kStep - 1) / kStep);
    for_fours(sums, [&](int32_t row, int32_t column, float4 sum) {
        const int32_t m = first_m + row, k = first_k + column;
        if (m >= p.places.tubelets || k >= p.places.taps) return;
        store_pixels<T>(p, p.places.data + p.places.tubelet(m), k, sum);
    });
}

}  // namespace vivit::cuda
