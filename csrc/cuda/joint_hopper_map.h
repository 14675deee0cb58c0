// Tensors of joint attention as the copy engine knows them. Host code; torch-free.
#pragma once

#include "joint.h"
#include "tensor_map.h"

namespace vivit::cuda {

// The token grid in place: sizes (D, H, N, B), boxes of `rows` tokens of some channels; where D is less, zeros follow.
inline bool map_of(TensorMap& map, const Tokens& x, const JointParams& p, int32_t N, int32_t rows,
                   int32_t channels = 64) {
    TensorShape shape;
    shape.data = x.data, shape.element_bytes = 2, shape.rank = 4;
    const int64_t sizes[] = {p.D, p.H, N, p.B}, strides[] = {1, x.stride_h, x.stride_n, x.stride_b};
    const int32_t box[] = {channels, 1, rows, 1};
    for (int i = 0; i < 4; ++i) shape.sizes[i] = sizes[i], shape.strides[i] = 2 * strides[i], shape.box[i] = box[i];
    return make_tensor_map(map, shape);
}

}  // namespace vivit::cuda
