// Tensors of joint attention as the copy engine knows them. Host code; torch-free.
#pragma once

#include "joint.h"
#include "joint_hopper_slabs.cuh"
#include "tensor_map.h"

namespace vivit::cuda {

// The token grid in place: sizes (D, H, N, B), boxes of `rows` tokens of some channels; where D is less, zeros follow.
inline bool map_of(TensorMap& map, const Tokens& x, const JointParams& p, int32_t N, int32_t rows, int32_t channels) {
    TensorShape shape;
    shape.data = x.data, shape.element_bytes = 2, shape.rank = 4;
    const int64_t sizes[] = {p.D, p.H, N, p.B}, strides[] = {1, x.stride_h, x.stride_n, x.stride_b};
    const int32_t box[] = {channels, 1, rows, 1};
    for (int i = 0; i < 4; ++i) shape.sizes[i] = sizes[i], shape.strides[i] = 2 * strides[i], shape.box[i] = box[i];
    return make_tensor_map(map, shape);
}

// Boxes of `rows` tokens of a slab's channels.
template <int kSteps>
bool slab_maps(SlabMaps& maps, const Tokens& x, const JointParams& p, int32_t N, int32_t rows) {
    const auto slab_map = [&](TensorMap& map, int32_t channels) {
        return channels == 0 || map_of(map, x, p, N, rows, channels);
    };
    using Rows = Slabs<kSteps>;
    return slab_map(maps.wide, Rows::kWide > 0 ? 64 : 0) && slab_map(maps.tail, 16 * Rows::kTail);
}

}  // namespace vivit::cuda
