// A launch over both axes: the blocks of one, then those of the other, and what each does.
#pragma once

#include "packed.cuh"
#include "resident.cuh"
#include "steps.cuh"

namespace vivit::cuda {

VIVIT_BOTH int blocks_of_32(int steps) { return (steps + 1) / 2; }

VIVIT_BOTH bool is_packed(int32_t N) { return N <= kPackedTokens; }

VIVIT_BOTH int64_t packed_tiles(int64_t sequences, int32_t N) { return N <= 8 ? (sequences + 1) / 2 : sequences; }

// Bytes that a warp of the packed regime takes to turn gradients back.
VIVIT_BOTH int32_t packed_scratch_bytes(int steps, bool rotary) {
    return rotary ? 16 * (32 * blocks_of_32(steps) + 4) * 4 : 0;
}

// Blocks of `warps` warps that an axis takes.
template <int kSteps, bool kBackward>
VIVIT_BOTH int64_t blocks_of(const AttentionParams& p, const Axis& axis, int32_t warps) {
    const int64_t sequences = axis.sequences(p.B);
    if (is_packed(axis.N)) return (packed_tiles(sequences, axis.N) + warps - 1) / warps;
    const int32_t per = Layout<kSteps, kBackward>(axis.N).per;
    return (sequences + per - 1) / per;
}

// Counts the blocks of both axes into p, which is what a kernel is told or a part of it. Returns their sum.
template <int kSteps, bool kBackward>
int64_t count_blocks(AttentionParams& p, int32_t warps) {
    const auto of = [&](const Axis& axis) { return axis.heads > 0 ? blocks_of<kSteps, kBackward>(p, axis, warps) : 0; };
    const int64_t in_space = of(space_axis(p)), in_time = of(time_axis(p));
    p.tiling.space_blocks = static_cast<uint32_t>(in_space), p.tiling.time_blocks = static_cast<uint32_t>(in_time);
    return in_space + in_time;
}

// What the block does with packed sequences; with longer ones, if the kernel has to do with such, longer(axis, walk).
// Space comes first: where both axes are there its blocks are the longer ones.
template <class T, int kSteps, bool kPlain, bool kBackward, bool kPackedAlone, class Longer>
VIVIT_DEVICE void on_its_axis(const AttentionParams& p, const Longer& longer) {
    const bool in_space = blockIdx.x < p.tiling.space_blocks;
    const uint32_t block = in_space ? blockIdx.x : blockIdx.x - p.tiling.space_blocks;
    const Walk walk = {block, in_space ? p.tiling.space_blocks : p.tiling.time_blocks, gridDim.x};
    const Axis axis = in_space ? space_axis(p) : time_axis(p);
    if (!kPackedAlone && !is_packed(axis.N)) return longer(axis, walk);
    const uint32_t warp = threadIdx.x / 32, tile = walk.first * (blockDim.x / 32) + warp;
    if constexpr (kBackward) {
        char* scratch = shared_memory() + warp * packed_scratch_bytes(kSteps, true);
        packed_backward<T, blocks_of_32(kSteps), kPlain>(p, axis, tile, reinterpret_cast<float*>(scratch));
    } else {
        packed_forward<T, blocks_of_32(kSteps), kPlain>(p, axis, tile);
    }
}

}  // namespace vivit::cuda
