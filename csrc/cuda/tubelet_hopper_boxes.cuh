// dout as Hopper's copy engine brings it, for both products of the backward of tubelet_embedding: its tokens without
// class rows, in boxes.
//
// Tokens are in groups, those of a clip, or of a frame with a class row of its own; without class rows all are one
// group. A box has 64 of them, 32 or 16, the largest that a group fills, 16 where none does; what of it is beyond the
// last token of its group is zero. So tokens are counted as they come in boxes: `at` is one that may not be there.
#pragma once

#include "tubelet_backward.cuh"
#include "tubelet_hopper_verbs.cuh"

namespace vivit::cuda {

constexpr int32_t kSlab = 64, kSlabRowBytes = 2 * kSlab;  // numbers of a row of shared memory

struct BoxedTokens {
    TensorMap map;     // [groups, tokens of a group, E]; boxes of `rows` tokens by 64 channels, zeros beyond
    int32_t tokens;    // of a group
    int32_t rows;      // of a box
    Divisor in_boxes;  // tokens of a group's boxes
    int32_t tubelets;  // of all groups

    // Its tubelet; of a token that is not there, one that is.
    VIVIT_DEVICE int32_t tubelet(int32_t at) const {
        const int32_t group = in_boxes.quotient(at), number = at - group * in_boxes.by;
        return min(group * tokens + min(number, tokens - 1), tubelets - 1);
    }
    VIVIT_DEVICE bool is_there(int32_t at) const {
        const int32_t group = in_boxes.quotient(at), number = at - group * in_boxes.by;
        return number < tokens && group * tokens + number < tubelets;
    }
    // Asks for `count` tokens from `at` on, 64 channels from e on.
    VIVIT_DEVICE void copy(char* to, PhaseBarrier* full, int32_t at, int32_t count, int32_t e) const {
        for (int32_t row = 0; row < count; row += rows) {
            const int32_t group = in_boxes.quotient(at + row);
            copy_box(to + row * kSlabRowBytes, map, full, e, at + row - group * in_boxes.by, group);
        }
    }
};

// The number of tokens in boxes, or 0 where the copy engine does not take them. spare: how many more are counted.
inline int64_t plan_boxes(BoxedTokens& boxes, const GradientRows& d_out, int32_t tubelets, int64_t spare) {
    const int32_t before = d_out.tokens.before;
    const int64_t tokens = before == 0 ? tubelets : d_out.tokens.group.by, groups = tubelets / tokens;
    const int32_t rows = before == 0 || tokens % 64 == 0 ? 64 : tokens % 32 == 0 ? 32 : 16;
    const int64_t in_boxes = (tokens + rows - 1) / rows * rows, row_bytes = int64_t{2} * d_out.width;
    TensorShape shape;
    shape.data = d_out.first + before * row_bytes, shape.rank = 3;
    shape.sizes[0] = d_out.width, shape.sizes[1] = tokens, shape.sizes[2] = groups;
    shape.strides[1] = row_bytes, shape.strides[2] = (tokens + before) * row_bytes;
    shape.box[0] = kSlab, shape.box[1] = rows, shape.box[2] = 1;
    if (groups * in_boxes + spare > INT32_MAX || !make_tensor_map(boxes.map, shape)) return 0;
    boxes.tokens = static_cast<int32_t>(tokens), boxes.rows = rows;
    boxes.in_boxes = Divisor(static_cast<int32_t>(in_boxes)), boxes.tubelets = tubelets;
    return groups * in_boxes;
}

}  // namespace vivit::cuda
