// Which kernel of a product runs a call, and in how many blocks.
#pragma once

#include "tubelet_backward.cuh"

namespace vivit::cuda {

inline int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

// Pixels are bytes, float32 or numbers of the products; kWide: every eight taps lie side by side.
template <class T, bool kWide>
auto forward_kernel(Element type) {
    return type == Element::kUint8     ? tubelet_forward<T, uint8_t, kWide>
           : type == Element::kFloat32 ? tubelet_forward<T, float, kWide>
                                       : tubelet_forward<T, T, kWide>;
}

template <class T>
int launch_forward_products(const ForwardParams& p, Element type, void* stream) {
    const auto kernel = p.places.together == 8 ? forward_kernel<T, true>(type) : forward_kernel<T, false>(type);
    return launch(kernel, tiles_of(p.places.tubelets) * p.blocks_e, kTileThreads, kForwardBytes, stream, p);
}

template <class T, bool kWide>
auto weight_kernel(Element type) {
    return type == Element::kUint8     ? tubelet_weight_gradient<T, uint8_t, kWide>
           : type == Element::kFloat32 ? tubelet_weight_gradient<T, float, kWide>
                                       : tubelet_weight_gradient<T, T, kWide>;
}

template <class T>
int launch_weight_products(const WeightGradientParams& p, Element type, int32_t splits, void* stream) {
    const auto kernel = p.places.together == 8 ? weight_kernel<T, true>(type) : weight_kernel<T, false>(type);
    return launch(kernel, int64_t{splits} * p.blocks_e * p.blocks_k, kTileThreads, kGatheredBytes, stream, p);
}

template <class T>
int launch_video_products(const VideoGradientParams& p, void* stream) {
    return launch(tubelet_video_gradient<T>, tiles_of(p.places.tubelets) * p.blocks_k, kTileThreads, kCopiedBytes,
                  stream, p);
}

}  // namespace vivit::cuda
