// What tubelet_embedding does around its products: before a forward it reads the weight once, for the row that is added
// to every token, and for a copy in another order of taps; after a backward's product it adds up parts. Small kernels,
// their names begin with what they are about.
#pragma once

#include "tubelet_forward.cuh"

namespace vivit::cuda {

constexpr int32_t kRowThreads = 128, kRowWarps = kRowThreads / 32;

template <class T>
VIVIT_DEVICE float number_at(const void* numbers, int64_t at) {
    return unpacked<T>(load_one(static_cast<const uint16_t*>(numbers) + at)).x;
}

template <class T>
VIVIT_DEVICE void store_number(const Table& table, int64_t at, float x) {
    if (table.is_float) {
        store_one(static_cast<float*>(table.data) + at, x);
    } else {
        store_2(static_cast<char*>(table.data) + 2 * at, static_cast<uint16_t>(packed<T>(x, 0.f)));
    }
}

// ---- before the forward ----

struct PrepareParams {
    const void* weight = nullptr;  // [E, K]
    Table bias;
    float* row = nullptr;     // [E] or none
    char* operand = nullptr;  // [E, pitch] or none
    int32_t E = 0, K = 0, pitch = 0;
    Divisor per_channel, channels;  // taps of a channel; channels that are the fastest in the operand's order, or 1
    float scale[kMostChannels] = {}, shift[kMostChannels] = {};
};

// A warp takes a row of the weight: row = bias + W shift, in float32, operand = W scale in the order of the taps.
template <class T>
__global__ void __launch_bounds__(kRowThreads) parameter_row(const __grid_constant__ PrepareParams p) {
    const int32_t e = static_cast<int32_t>(blockIdx.x) * kRowWarps + static_cast<int32_t>(threadIdx.x) / 32;
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
    if (e >= p.E) return;
    float sum = 0.f;
    for (int32_t k = lane; k < p.pitch; k += 32) {
        float w = 0.f;
        if (k < p.K) {
            const int32_t tap = p.channels.quotient(k);
            const int32_t c = p.channels.by > 1 ? k - tap * p.channels.by : p.per_channel.quotient(k);
            const int32_t from = p.channels.by > 1 ? c * p.per_channel.by + tap : k;
            w = number_at<T>(p.weight, static_cast<int64_t>(e) * p.K + from);
            sum += w * p.shift[c];
            w *= p.scale[c];
        }
        char* to = p.operand + 2 * (static_cast<int64_t>(e) * p.pitch + k);
        if (p.operand != nullptr) store_2(to, static_cast<uint16_t>(packed<T>(w, 0.f)));
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += from_lane_xor(sum, mask);
    if (p.row == nullptr || lane > 0) return;
    if (p.bias.data != nullptr && p.bias.is_float) sum += load_one(static_cast<const float*>(p.bias.data) + e);
    if (p.bias.data != nullptr && !p.bias.is_float) sum += number_at<T>(p.bias.data, e);
    store_one(p.row + e, sum);
}

// ---- after the backward's product ----

struct RowSumsParams {
    const char* d_out = nullptr;  // [groups, rows, E]
    int32_t groups = 0, rows = 0, E = 0, before = 0;
    int32_t rows_of_strip = 0, blocks_e = 0;
    Table d_position, d_class;  // or none
    float* strips = nullptr;    // [strip_count, E] or none
};

constexpr int32_t kSumsWidth = 256;  // channels of a block, eight a lane

template <class T>
VIVIT_DEVICE void store_eight(const Table& table, int64_t row, int32_t column, const float (&x)[8]) {
    if (table.data == nullptr) return;
    const int64_t at = row * table.stride + column;
    if (table.is_float) {
        float* to = static_cast<float*>(table.data) + at;
        for (int i = 0; i < 8; i += 4) {
            store_16(to + i, {__float_as_uint(x[i]), __float_as_uint(x[i + 1]), __float_as_uint(x[i + 2]),
                              __float_as_uint(x[i + 3])});
        }
    } else {
        store_16(static_cast<char*>(table.data) + 2 * at,
                 {packed<T>(x[0], x[1]), packed<T>(x[2], x[3]), packed<T>(x[4], x[5]), packed<T>(x[6], x[7])});
    }
}

// A block takes a strip of rows, a warp every fourth of them: the sum over clips (or frames) is the gradient of its
// position, the sum of these sums the strip's part of what bias and weight want.
template <class T>
__global__ void __launch_bounds__(kRowThreads) parameter_sums(const __grid_constant__ RowSumsParams p) {
    const int32_t strip = static_cast<int32_t>(blockIdx.x) / p.blocks_e;
    const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32, lane = static_cast<int32_t>(threadIdx.x) % 32;
    const int32_t e = static_cast<int32_t>(blockIdx.x) % p.blocks_e * kSumsWidth + 8 * lane;
    const bool there = e < p.E;
    const int32_t first = strip * p.rows_of_strip;
    const int32_t end = first + p.rows_of_strip < p.rows ? first + p.rows_of_strip : p.rows;
    float tokens[8] = {};
    for (int32_t n = first + warp; n < end; n += kRowWarps) {
        float sum[8] = {};
#pragma unroll 4
        for (int32_t g = 0; g < p.groups; ++g) {
            const uint4 x = load_16(p.d_out + 2 * ((static_cast<int64_t>(g) * p.rows + n) * p.E + e), there);
            const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 pair = unpacked<T>(words[i]);
                sum[2 * i] += pair.x, sum[2 * i + 1] += pair.y;
            }
        }
        if (there) store_eight<T>(p.d_position, n, e, sum);
        if (there && n < p.before) store_eight<T>(p.d_class, 0, e, sum);
        if (n < p.before) continue;
#pragma unroll
        for (int i = 0; i < 8; ++i) tokens[i] += sum[i];
    }
    if (p.strips == nullptr) return;
    float* of_warps = reinterpret_cast<float*>(shared_memory());  // [kRowWarps][kSumsWidth]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float four[4] = {tokens[4 * half], tokens[4 * half + 1], tokens[4 * half + 2], tokens[4 * half + 3]};
        write_four(of_warps + warp * kSumsWidth + 8 * lane + 4 * half, four);
    }
    block_barrier();
    if (warp > 0 || !there) return;
    float total[8] = {};
#pragma unroll
    for (int i = 0; i < 2 * kRowWarps; ++i) {
        float four[4];
        read_four(four, of_warps + i / 2 * kSumsWidth + 8 * lane + i % 2 * 4);
#pragma unroll
        for (int j = 0; j < 4; ++j) total[i % 2 * 4 + j] += four[j];
    }
    store_eight<T>({p.strips, p.E, true}, strip, e, total);
}
constexpr int32_t kSumsBytes = kRowWarps * kSumsWidth * 4;

struct FinishParams {
    const float* parts = nullptr;   // [splits, E, pitch]
    const float* strips = nullptr;  // [strip_count, E] or none
    int32_t splits = 0, strip_count = 0, E = 0, K = 0, pitch = 0;
    Divisor per_channel, channels;
    float scale[kMostChannels] = {}, shift[kMostChannels] = {};  // of what a tap counted as in the product
    Table d_weight, d_bias;                                      // [E, K], [1, E], or none
};

constexpr int32_t kFinishThreads = 256;

// A block takes a row e: d_bias = sum of d_out, d_weight = scale (sum of the parts) + shift d_bias.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) parameter_gradients(const __grid_constant__ FinishParams p) {
    const int32_t e = static_cast<int32_t>(blockIdx.x), thread = static_cast<int32_t>(threadIdx.x);
    float of_rows = 0.f;
    for (int32_t strip = thread % 32; strip < p.strip_count; strip += 32) {
        of_rows += load_one(p.strips + static_cast<int64_t>(strip) * p.E + e);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) of_rows += from_lane_xor(of_rows, mask);
    if (thread == 0 && p.d_bias.data != nullptr) store_number<T>(p.d_bias, e, of_rows);
    if (p.d_weight.data == nullptr) return;
    const int64_t part = static_cast<int64_t>(p.E) * p.pitch;
    for (int32_t k = thread; k < p.K; k += kFinishThreads) {
        const int32_t c = p.per_channel.quotient(k), tap = k - c * p.per_channel.by;
        const float* from = p.parts + static_cast<int64_t>(e) * p.pitch + tap * p.channels.by +
                            (p.channels.by > 1 ? c : c * p.per_channel.by);
        float sum = 0.f;
#pragma unroll 8
        for (int32_t i = 0; i < p.splits; ++i) sum += load_one(from + i * part);
        store_number<T>(p.d_weight, static_cast<int64_t>(e) * p.K + k, sum * p.scale[c] + p.shift[c] * of_rows);
    }
}

}  // namespace vivit::cuda
