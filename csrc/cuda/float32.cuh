// Attention of float32 rows: exact softmax of 8 queries at a time, and a backward that needs neither o nor lse.
#pragma once

#include "tf32_rows.cuh"

namespace vivit::cuda {

// The same into rows from, ... of x, times factor(row).
template <bool kBackward, bool kTf32, class Factor>
VIVIT_DEVICE void store_along(const FloatBlock<kBackward, kTf32>& block, const Grid& x, int32_t s, int32_t from,
                              const float* weights, const float* others, const Factor& factor) {
    const Rows to(x, block.at(s), block.axis, 4);
    along(block, weights, others, [&](int32_t row, int32_t chunk, float (&sum)[4]) {
        if (from + row >= block.axis.N) return;
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] *= factor(row);
        store_numbers<float>(to.row(from + row) + 16 * chunk, sum);
    });
}

// The gradient of rows from, ... of q or k, turned back where they were turned: through the tile that they came by.
template <bool kTf32>
VIVIT_DEVICE void store_gradient(const FloatBlock<true, kTf32>& block, const Grid& x, int32_t s, int32_t from,
                                 const float* others) {
    const AttentionParams& p = block.p;
    if (p.cos == nullptr) {
        store_along(block, x, s, from, block.products(1), others, [&](int32_t) { return p.scale; });
        return;
    }
    const int32_t pitch = block.layout.pitch;
    float* tile = block.tile(0);
    along(block, block.products(1), others,
          [&](int32_t row, int32_t chunk, float (&sum)[4]) { write_four(tile + row * pitch + 4 * chunk, sum); });
    warp_barrier();
    const Sequence at = block.at(s);
    const Rows to(x, at, block.axis, 4);
    store_turned_back<float, kTileRows>(p, tile, pitch, p.scale, [&](int32_t row) -> TurnedRow {
        return {from + row < block.axis.N, at.token(from + row, block.axis, p.S), to.row(from + row)};
    });
}

// From products of queries from, ... with all keys, and of a backward of do with all v: weights 2^(score - most) that
// dropout has been at, to be divided by their sum; of a backward dS over the scale. Lane 8 c + r has of row r chunks c,
// c + 4, ... of keys.
template <bool kBackward, bool kTf32>
VIVIT_DEVICE void weigh_keys(const FloatBlock<kBackward, kTf32>& block, int32_t s, int32_t from) {
    const FloatLayout<kBackward>& layout = block.layout;
    const AttentionParams& p = block.p;
    const int32_t row = from + block.lane % 8, begin = block.lane / 8 * 4;
    const int64_t number = query_number(p, block.at(s), block.axis, row);
    const float* bias = block.statistic(kBias, s);
    float* products = block.products(0) + block.lane % 8 * layout.score_pitch;
    float* d_weights = products + (kBackward ? kTileRows * layout.score_pitch : 0);
    float most = -kInfinity, total = 0.f, delta = 0.f;
    float x[4], b[4], dp[4];
    for (int32_t key = begin; key < layout.rows; key += 16) {
        read_four(x, products + key), read_four(b, bias + key);
#pragma unroll
        for (int i = 0; i < 4; ++i) most = fmaxf(most, block.scores.of(x[i]) + b[i]);
    }
    most = fmaxf(most, from_lane_xor(most, 8));
    most = fmaxf(most, from_lane_xor(most, 16));
    most = most == -kInfinity ? 0.f : most;
    const auto kept = [&](int32_t key, float (&keep)[4]) {
        const uint4 words = block.dropout.words(number, static_cast<uint32_t>(key) / 4);
        keep[0] = block.dropout.factor(words.x), keep[1] = block.dropout.factor(words.y);
        keep[2] = block.dropout.factor(words.z), keep[3] = block.dropout.factor(words.w);
    };
    for (int32_t key = begin; key < layout.rows; key += 16) {
        float keep[4] = {1.f, 1.f, 1.f, 1.f};
        if (block.dropout.on) kept(key, keep);
        read_four(x, products + key), read_four(b, bias + key);
        if (kBackward) read_four(dp, d_weights + key);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float weight = exp2_fast(block.scores.of(x[i]) + b[i] - most);
            total += weight;
            if (kBackward) {
                dp[i] *= keep[i], delta += weight * dp[i];
            } else {
                x[i] = block.operand(weight * keep[i]);
            }
        }
        write_four(kBackward ? d_weights + key : products + key, kBackward ? dp : x);
    }
#pragma unroll
    for (int mask = 8; mask < 32; mask *= 2) total += from_lane_xor(total, mask), delta += from_lane_xor(delta, mask);
    const float over = total > 0.f ? 1.f / total : 0.f;
    delta *= over;
    const bool mine = block.lane < 8 && row < layout.rows;
    if (mine) block.statistic(kOver, s)[row] = row < block.axis.N ? over : 0.f;
    if (!kBackward) {
        if (p.lse != nullptr && mine && row < block.axis.N) {
            store_one(p.lse + number, total > 0.f ? most + log2_fast(total) : kInfinity);
        }
        return;
    }
    if (mine) block.statistic(kMost, s)[row] = most, block.statistic(kDelta, s)[row] = delta;
    for (int32_t key = begin; key < layout.rows; key += 16) {
        read_four(x, products + key), read_four(b, bias + key), read_four(dp, d_weights + key);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float weight = exp2_fast(block.scores.of(x[i]) + b[i] - most) * over;
            dp[i] = block.operand(weight * (dp[i] - delta) * block.scores.slope(x[i]));
            x[i] = weight;
        }
        write_four(d_weights + key, dp);
        if (p.o_again.data == nullptr) continue;
        float keep[4] = {1.f, 1.f, 1.f, 1.f};
        if (block.dropout.on) kept(key, keep);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = block.operand(x[i] * keep[i]);
        write_four(products + key, x);
    }
}

// The same of keys from, ... with all queries, whose statistics are there: probabilities that dropout has been at, and
// dS over the scale. Sums over channels are those of weigh_keys, in the same order, so that both have the same bits.
template <bool kTf32>
VIVIT_DEVICE void weigh_queries(const FloatBlock<true, kTf32>& block, int32_t s, int32_t from) {
    const FloatLayout<true>& layout = block.layout;
    const int32_t key = from + block.lane % 8;
    const Sequence at = block.at(s);
    const float bias = key < block.axis.N ? block.statistic(kBias, s)[key] : -kInfinity;
    float* products = block.products(0) + block.lane % 8 * layout.score_pitch;
    float* d_weights = products + kTileRows * layout.score_pitch;
    for (int32_t query = block.lane / 8 * 4; query < layout.rows; query += 16) {
        float x[4], dp[4], most[4], over[4], delta[4];
        read_four(x, products + query), read_four(dp, d_weights + query);
        read_four(most, block.statistic(kMost, s) + query), read_four(over, block.statistic(kOver, s) + query);
        read_four(delta, block.statistic(kDelta, s) + query);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float weight = exp2_fast(block.scores.of(x[i]) + bias - most[i]) * over[i];
            float keep = 1.f;
            if (block.dropout.on) {
                keep = block.dropout.factor(query_number(block.p, at, block.axis, query + i), key);
            }
            dp[i] = block.operand(weight * (dp[i] * keep - delta[i]) * block.scores.slope(x[i]));
            x[i] = block.operand(weight * keep);
        }
        write_four(products + query, x), write_four(d_weights + query, dp);
    }
}

// o of the queries from, ...; of a backward their dq, and o once more where o_again is there.
template <bool kBackward, bool kTf32>
VIVIT_DEVICE void attend(const FloatBlock<kBackward, kTf32>& block, int32_t s, int32_t from) {
    const AttentionParams& p = block.p;
    block.load_tile(p.q, p.d_o, s, from);
    across(block, block.products(0), block.tile(0), block.others(0, s));
    if (kBackward) across(block, block.products(1), block.tile(1), block.others(1, s));
    warp_barrier();
    weigh_keys(block, s, from);
    warp_barrier();
    if constexpr (kBackward) {
        if (p.o_again.data != nullptr) {
            store_along(block, p.o_again, s, from, block.products(0), block.others(1, s), [](int32_t) { return 1.f; });
        }
        store_gradient(block, p.dq, s, from, block.others(0, s));
    } else {
        const float* over = block.statistic(kOver, s) + from;
        store_along(block, p.o, s, from, block.products(0), block.others(1, s), [&](int32_t row) { return over[row]; });
    }
}

// dk and dv of the keys from, ....
template <bool kTf32>
VIVIT_DEVICE void gradients_of_keys(const FloatBlock<true, kTf32>& block, int32_t s, int32_t from) {
    block.load_tile(block.p.k, block.p.v, s, from);
    across(block, block.products(0), block.tile(0), block.others(0, s));
    across(block, block.products(1), block.tile(1), block.others(1, s));
    warp_barrier();
    weigh_queries(block, s, from);
    warp_barrier();
    store_along(block, block.p.dv, s, from, block.products(0), block.others(1, s), [](int32_t) { return 1.f; });
    store_gradient(block, block.p.dk, s, from, block.others(0, s));
}

template <bool kBackward, bool kTf32>
VIVIT_DEVICE void float32_block(const AttentionParams& p, const Axis& axis, int64_t number) {
    const FloatBlock<kBackward, kTf32> block(p, axis, number);
    const int32_t tiles = block.layout.tiles(), all = block.sequences * tiles, rows = block.layout.rows;
    const int32_t warps = static_cast<int32_t>(blockDim.x) / 32;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < block.sequences * rows; i += 32 * warps) {
        const int32_t s = i / rows, key = i % rows;
        block.statistic(kBias, s)[key] = may_be_attended(p, block.at(s), axis, key) ? 0.f : -kInfinity;
    }
    block.load_others(p.k, p.v);
    for (int32_t i = block.warp; i < all; i += warps) attend(block, i / tiles, i % tiles * kTileRows);
    if constexpr (kBackward) {
        block_barrier();
        block.load_others(p.q, p.d_o);
        for (int32_t i = block.warp; i < all; i += warps) gradients_of_keys(block, i / tiles, i % tiles * kTileRows);
    }
}

// Space comes first, as with the kernels of 16 bits.
template <bool kBackward, bool kTf32>
VIVIT_DEVICE void float32_on_its_axis(const AttentionParams& p) {
    int64_t block = blockIdx.x;
    Axis axis = space_axis(p);
    const int64_t over_space = axis.heads > 0 ? FloatLayout<kBackward>(axis.N, p.D).blocks(axis.sequences(p.B)) : 0;
    if (block >= over_space) block -= over_space, axis = time_axis(p);
    float32_block<kBackward, kTf32>(p, axis, block);
}

template <bool kBackward>
__global__ void __launch_bounds__(32 * kFloat32Warps) float32_attention(const AttentionParams p) {
    float32_on_its_axis<kBackward, false>(p);
}
template <bool kBackward>
__global__ void __launch_bounds__(32 * kFloat32Warps) tf32_attention(const AttentionParams p) {
    float32_on_its_axis<kBackward, true>(p);
}

// As many warps as the longer axis has work for and shared memory holds.
template <bool kBackward>
int launch_float32(const AttentionParams& p, void* stream) {
    int64_t blocks = 0;
    int32_t warps = 1, bytes = 0;
    const auto each = [&](const auto& visit) {
        for (const Axis& axis : {space_axis(p), time_axis(p)}) {
            if (axis.heads > 0) visit(FloatLayout<kBackward>(axis.N, p.D), axis);
        }
    };
    each([&](const FloatLayout<kBackward>& layout, const Axis& axis) {
        blocks += layout.blocks(axis.sequences(p.B));
        warps = layout.warps() > warps ? layout.warps() : warps;
    });
    for (++warps; warps > 1 && (bytes == 0 || bytes > most_shared_bytes());) {
        --warps, bytes = 0;
        each([&](const FloatLayout<kBackward>& layout, const Axis&) {
            bytes = layout.bytes(warps) > bytes ? layout.bytes(warps) : bytes;
        });
    }
    const auto kernel = p.tf32 ? tf32_attention<kBackward> : float32_attention<kBackward>;
    return launch(kernel, blocks, 32 * warps, bytes, stream, p);
}

}  // namespace vivit::cuda
