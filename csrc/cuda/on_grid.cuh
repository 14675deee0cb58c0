// Where a sequence lies on the token grid, and its rows in memory.
#pragma once

#include "attention.h"
#include "verbs.cuh"

namespace vivit::cuda {

// One axis of a call: `heads` heads from first_head on attend over N tokens, in `groups` places of each clip.
struct Axis {
    bool over_time;
    int32_t first_head, heads, groups, N;

    VIVIT_BOTH int64_t sequences(int32_t B) const { return static_cast<int64_t>(B) * groups * heads; }
};

VIVIT_BOTH Axis time_axis(const AttentionParams& p) { return {true, 0, p.temporal_heads, p.S, p.T}; }
VIVIT_BOTH Axis space_axis(const AttentionParams& p) {
    return {false, p.temporal_heads, p.H - p.temporal_heads, p.T, p.S};
}

// One sequence: clip b, frame (or position, over time) g, head h. Heads are neighbours in memory, so they count
// fastest.
struct Sequence {
    int32_t b, g, h;

    VIVIT_DEVICE Sequence(int64_t number, const Axis& axis) {
        const uint32_t place = static_cast<uint32_t>(number) / static_cast<uint32_t>(axis.heads);
        h = axis.first_head + static_cast<int32_t>(static_cast<uint32_t>(number) - place * axis.heads);
        b = static_cast<int32_t>(place / static_cast<uint32_t>(axis.groups));
        g = static_cast<int32_t>(place - static_cast<uint32_t>(b) * axis.groups);
    }

    // Token i of the sequence as a token of the clip.
    VIVIT_DEVICE int64_t token(int32_t i, const Axis& axis, int32_t S) const {
        return axis.over_time ? static_cast<int64_t>(i) * S + g : static_cast<int64_t>(g) * S + i;
    }
};

// The rows of a sequence in one tensor, or some neighbours of them.
struct Rows {
    char* first;
    int64_t step;  // bytes from token to token

    VIVIT_DEVICE Rows(const Grid& x, const Sequence& at, const Axis& axis, int32_t element_bytes = 2) {
        const int64_t of_group = axis.over_time ? x.stride_s : x.stride_t;
        first = static_cast<char*>(x.data) + element_bytes * (at.b * x.stride_b + at.g * of_group + at.h * x.stride_h);
        step = element_bytes * (axis.over_time ? x.stride_t : x.stride_s);
    }

    VIVIT_DEVICE Rows(char* first_row, int64_t row_bytes) : first(first_row), step(row_bytes) {}

    VIVIT_DEVICE char* row(int32_t i) const { return first + i * step; }
};

// The number that dropout and saved statistics know a query by, in [B, H, T * S].
VIVIT_DEVICE int64_t query_number(const AttentionParams& p, const Sequence& at, const Axis& axis, int32_t i) {
    return (static_cast<int64_t>(at.b) * p.H + at.h) * p.T * p.S + at.token(i, axis, p.S);
}

VIVIT_DEVICE bool may_be_attended(const AttentionParams& p, const Sequence& at, const Axis& axis, int32_t i) {
    if (i >= axis.N) return false;
    return p.mask == nullptr || load_one(p.mask + static_cast<int64_t>(at.b) * p.T * p.S + at.token(i, axis, p.S));
}

}  // namespace vivit::cuda
