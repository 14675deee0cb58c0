// q and k with their rotary position embedding, for kernels whose rows the copy engine brings: nobody has these in
// registers on their way. A kernel that turned keys where they lie would do so again in each block that they pass, at
// 3,136 tokens 25 times; turned once they are read and written once more.
#pragma once

#include "joint.h"
#include "rotary.cuh"

namespace vivit::cuda {

constexpr int kTurnThreads = 256;

struct TurnParams {
    AttentionOptions options;
    int32_t N, H;
    int64_t chunks;  // of 8 channels, of one tensor
    Tokens from[2];
    char* to;  // [2, B, N, H, D]
};

// A chunk of q and the same one of k to each thread.
template <class T>
__global__ void __launch_bounds__(kTurnThreads) turned_rows(const TurnParams p) {
    const int64_t number = static_cast<int64_t>(blockIdx.x) * kTurnThreads + static_cast<int32_t>(threadIdx.x);
    if (number >= p.chunks) return;
    const int32_t per_row = p.options.D / 8;
    const int64_t rest = number / per_row;
    const int32_t chunk = static_cast<int32_t>(number - rest * per_row);
    const int64_t token = rest / p.H, h = rest - token * p.H, b = token / p.N, n = token - b * p.N;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const Tokens& x = p.from[i];
        const char* row = static_cast<const char*>(x.data) + 2 * (b * x.stride_b + n * x.stride_n + h * x.stride_h);
        const uint4 y = turned_chunk<T>(p.options, n, row, chunk, load_16(row + 16 * chunk, true));
        store_16(p.to + 16 * (i * p.chunks + number), y);
    }
}

// q and k of a call, turned: where they are put, and without its tables.
inline JointParams with_turned(const JointParams& given) {
    JointParams p = given;
    const int64_t H = p.H, D = p.D, N = p.N_q;
    char* const first = static_cast<char*>(given.turned);
    p.q = {first, N * H * D, H * D, D};
    p.k = {first + 2 * p.B * N * H * D, N * H * D, H * D, D};
    p.cos = nullptr, p.sin = nullptr;
    return p;
}

template <class T>
int launch_turn(const JointParams& p, void* stream) {
    TurnParams made;
    made.options = p, made.N = p.N_q, made.H = p.H;
    made.chunks = static_cast<int64_t>(p.B) * p.N_q * p.H * (p.D / 8);
    made.from[0] = p.q, made.from[1] = p.k, made.to = static_cast<char*>(p.turned);
    return launch(turned_rows<T>, (made.chunks + kTurnThreads - 1) / kTurnThreads, kTurnThreads, 0, stream, made);
}

}  // namespace vivit::cuda
