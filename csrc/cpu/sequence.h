// One sequence of the token grid: the rows that one head sees along one axis, wherever they lie.
#pragma once

#include "attention.h"
#include "vector.h"

namespace vivit::cpu::VIVIT_ISA {

template <class E>
struct Rows {
    E* data = nullptr;  // of row 0
    int64_t stride = 0;

    VIVIT_INLINE E* row(int64_t i) const { return data + i * stride; }
};

template <class E>
struct Sequence {
    int64_t N = 0, N_k = 0;  // queries, keys
    Rows<E> q, k, v, o, d_o, dq, dk, dv;
    const bool* mask = nullptr;  // of key 0
    int64_t mask_stride = 0;
    int64_t token = 0, token_stride = 0;  // of query 0 in its clip: row of the rotary tables
    int64_t first_row = 0;  // (b * H + h) * T * S: with the token, the row of dropout and of the statistics
};

template <class E>
VIVIT_INLINE Rows<E> rows_of(const Grid& x, int64_t b, int64_t t, int64_t s, int64_t h, int64_t stride) {
    if (x.data == nullptr) return {};
    return {static_cast<E*>(x.data) + b * x.stride_b + t * x.stride_t + s * x.stride_s + h * x.stride_h, stride};
}

// Sequences along an axis are named (b, across, h): across is the position s along time, the frame t within frames.
struct AxisSize {
    int64_t across, first_head, heads, N, N_k;
};

inline AxisSize size_of(const AttentionParams& p, Axis axis) {
    if (axis == Axis::kTime) return {p.S, 0, p.temporal_heads, p.T, p.T};
    return {p.T, p.temporal_heads, p.H - p.temporal_heads, p.S, p.S_k};
}

template <class E>
Sequence<E> sequence_of(const AttentionParams& p, Axis axis, int64_t b, int64_t across, int64_t h) {
    const bool time = axis == Axis::kTime;
    const int64_t t = time ? 0 : across, s = time ? across : 0;
    const auto rows = [&](const Grid& x) { return rows_of<E>(x, b, t, s, h, time ? x.stride_t : x.stride_s); };
    Sequence<E> one;
    one.N = time ? p.T : p.S, one.N_k = time ? p.T : p.S_k;
    one.q = rows(p.q), one.k = rows(p.k), one.v = rows(p.v), one.o = rows(p.o);
    one.d_o = rows(p.d_o), one.dq = rows(p.dq), one.dk = rows(p.dk), one.dv = rows(p.dv);
    if (p.mask != nullptr) one.mask = p.mask + b * p.T * p.S_k + t * p.S_k + s;
    one.mask_stride = time ? p.S_k : 1;
    one.token = t * p.S + s, one.token_stride = time ? p.S : 1;
    one.first_row = (b * p.H + h) * p.T * p.S;
    return one;
}

}  // namespace vivit::cpu::VIVIT_ISA
