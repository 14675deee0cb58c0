// Where the rows lie that a block of joint attention keeps, in any tensor of the call.
#pragma once

#include "joint.h"
#include "on_grid.cuh"

namespace vivit::cuda {

// Of one clip and head the rows from `first` on. Heads are neighbours in memory, but pieces of the same head count
// fastest: the blocks that run at a time then read the same rows, which the second-level cache has.
struct JointPlace {
    int32_t b, h, first;

    // Piece `number` of a call whose heads have N rows, `rows` to a piece.
    VIVIT_DEVICE JointPlace(const JointParams& p, uint32_t number, int32_t N, int32_t rows) {
        const uint32_t per = static_cast<uint32_t>(N + rows - 1) / static_cast<uint32_t>(rows);
        const uint32_t sequence = number / per;
        first = static_cast<int32_t>(number - sequence * per) * rows;
        b = static_cast<int32_t>(sequence / static_cast<uint32_t>(p.H));
        h = static_cast<int32_t>(sequence - static_cast<uint32_t>(b) * p.H);
    }

    // All rows of the clip and head in a tensor.
    VIVIT_DEVICE Rows rows(const Tokens& x) const {
        return {static_cast<char*>(x.data) + 2 * (b * x.stride_b + h * x.stride_h), 2 * x.stride_n};
    }
    // The number that dropout and saved statistics know a query by, in [B, H, N_q].
    VIVIT_DEVICE int64_t query_number(const JointParams& p, int32_t i) const {
        return (static_cast<int64_t>(b) * p.H + h) * p.N_q + i;
    }
};

}  // namespace vivit::cuda
