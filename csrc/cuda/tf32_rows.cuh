// Products of float32 rows by tensor cores, of numbers rounded to tf32: for who allows that. What is multiplied lies in
// shared memory as float32_rows.cuh has it, rounded when it came there, and all but the products is the same. A warp's
// 8 rows are the 8 columns of a product of 16 x 8 x 8; 5 reads of 16 bytes a lane feed what 16 reads and 128
// multiply-adds do there.
//
// The sum does not mind the order of what it adds, so that a lane reads four channels of a row at a time, or two rows
// that are neighbours, and gives both operands the same order.
#pragma once

#include "float32_rows.cuh"

namespace vivit::cuda {

// Row or column g of a product as a row in memory. At an odd number of 16 bytes from row to row, eight lanes that read
// four chunks of two rows find them in eight different groups of banks if the rows are four apart.
VIVIT_DEVICE int32_t spread(int32_t g) { return g / 2 + g % 2 * 4; }

// Four neighbours as operands; zeros where they are not there.
VIVIT_DEVICE void read_operands(uint32_t (&x)[4], const float* from, bool there) {
    float found[4];
    read_four(found, from);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = there ? __float_as_uint(found[i]) : 0u;
}

// As across of float32_rows.cuh. Of 32 rows of the tensor at a time, 16 channels: lane 4 g + t has four of them.
template <bool kBackward>
VIVIT_DEVICE void across(const FloatBlock<kBackward, true>& block, float* to, const float* tile, const float* others) {
    const FloatLayout<kBackward>& layout = block.layout;
    const int32_t g = block.lane / 4, t = block.lane % 4, D = block.p.D, last = layout.rows - 1;
    const float* mine = tile + spread(g) * layout.pitch;
    for (int32_t first = 0; first < layout.rows; first += 32) {
        const float* rows[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int32_t row = first + 8 * i + spread(g);
            rows[i] = others + (row < last ? row : last) * layout.pitch;
        }
        float sum[2][4] = {};
        const auto step = [&](int32_t channel, bool there) {
            uint32_t x[4], y[4][4];
            read_operands(x, mine + channel, there);
#pragma unroll
            for (int i = 0; i < 4; ++i) read_operands(y[i], rows[i] + channel, there);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int half = i % 2, j = i / 2 * 2;
                const uint32_t a[4] = {y[2 * half][j], y[2 * half + 1][j], y[2 * half][j + 1], y[2 * half + 1][j + 1]};
                multiply_add_tf32(sum[half], a, x[j], x[j + 1]);
            }
        };
#pragma unroll 2
        for (int32_t channel = 0; channel + 16 <= D; channel += 16) step(channel + 4 * t, true);
        if (D % 16 != 0) step(D - 8 + 4 * (t % 2), t < 2);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int32_t row = first + i / 2 * 8 + spread(g);
            if (row < layout.rows) to[spread(2 * t + i % 2) * layout.score_pitch + row] = sum[i / 4][i % 4];
        }
    }
}

// As along of float32_rows.cuh. Of 32 channels at a time, 8 rows of the tensor: lane 4 g + t has rows 2 t and 2 t + 1
// of these, four channels of each, and of the sums those channels of rows 2 t and 2 t + 1 of the tile.
template <bool kBackward, class Sink>
VIVIT_DEVICE void along(const FloatBlock<kBackward, true>& block, const float* weights, const float* others,
                        const Sink& sink) {
    const FloatLayout<kBackward>& layout = block.layout;
    const int32_t g = block.lane / 4, t = block.lane % 4, chunks = block.p.D / 4, rows = layout.rows;
    const float* mine = weights + g * layout.score_pitch;
    for (int32_t first = 0; first < chunks; first += 8) {
        const int32_t chunk = first + g < chunks ? first + g : chunks - 1;
        float sum[2][4] = {};  // of channels 0 and 1 of the four, then of 2 and 3
        const auto step = [&](int32_t other, bool there) {
            uint32_t y[2][4], x[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                read_operands(y[i], others + (other + i) * layout.pitch + 4 * chunk, there);
                x[i] = there ? __float_as_uint(mine[other + i]) : 0u;
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint32_t a[4] = {y[0][2 * j], y[0][2 * j + 1], y[1][2 * j], y[1][2 * j + 1]};
                multiply_add_tf32(sum[j], a, x[0], x[1]);
            }
        };
#pragma unroll 1  // two steps at a time do not fit registers (sm_80)
        for (int32_t other = 0; other + 8 <= rows; other += 8) step(other + 2 * t, true);
        if (rows % 8 != 0) step(rows - 4 + 2 * (t % 2), t < 2);  // rows are a multiple of 4
        if (first + g >= chunks) continue;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float four[4] = {sum[0][r], sum[0][r + 2], sum[1][r], sum[1][r + 2]};
            sink(2 * t + r, first + g, four);
        }
    }
}

}  // namespace vivit::cuda
