// The kernels of products of a warp, and how a call becomes one launch: of these or of Hopper's.
#pragma once

#include "by_axis.cuh"
#include "hopper.h"
#include "resident_forward.cuh"
#include "resident_short.cuh"
#include "tiles.cuh"
#include "verbs_hopper.cuh"

namespace vivit::cuda {

// At most, of a block of packed sequences alone. A warp has no need of the others: fewer are given back sooner where
// one of them waits, more have neighbouring heads side by side, at 4 of 64 channels 512 bytes of each token.
constexpr int kPackedWarps = 4;

template <class T, int kSteps, bool kPlain, bool kBackward>
__global__ void __launch_bounds__(32 * kPackedWarps, kBackward ? 1 : 0) packed_attention(const AttentionParams p) {
    on_its_axis<T, kSteps, kPlain, kBackward, true>(p, [](const Axis&, const Walk&) {});
}

// Two blocks to a multiprocessor, of which one copies while the other multiplies, where the registers allow it; else
// copies are stages ahead (tiles.cuh).
template <class T, int kSteps, bool kPlain, bool kBackward>
__global__ void __launch_bounds__(32 * kResidentWarps, kBlocksAtATime<kSteps, kPlain, kBackward>)
    resident_attention(const AttentionParams p) {
    on_its_axis<T, kSteps, kPlain, kBackward, false>(p, [&](const Axis& axis, const Walk& walk) {
        if constexpr (kBackward) {
            resident_backward<T, kSteps, kPlain>(p, axis, walk);
        } else {
            resident_forward<T, kSteps, kPlain>(p, axis, walk);
        }
    });
}

// ---- launching ----

template <class T, int kSteps, bool kPlain, bool kBackward>
int launch_packed(AttentionParams p, void* stream) {
    const int32_t warps = p.tiling.packed_warps > 0 ? p.tiling.packed_warps : kPackedWarps;
    if (warps > kPackedWarps) return 1;  // cudaErrorInvalidValue: the kernel is not compiled for such a block
    const int32_t scratch = kBackward ? warps * packed_scratch_bytes(kSteps, p.cos != nullptr) : 0;
    const int64_t blocks = count_blocks<kSteps, kBackward>(p, warps);
    return launch(packed_attention<T, kSteps, kPlain, kBackward>, blocks, 32 * warps, scratch, stream, p);
}

template <class T, int kSteps, bool kPlain, bool kBackward>
int launch_resident(AttentionParams p, void* stream) {
    // blocks of two kinds lie side by side, too: one copies while another computes
    const bool staged = kStaged<kSteps, kPlain, kBackward> && (p.temporal_heads == 0 || p.temporal_heads == p.H);
    const bool rotary = p.cos != nullptr;
    int32_t& stages = p.tiling.stages;
    if (!staged) stages = 1;
    if (stages > kMostStages) return 1;  // cudaErrorInvalidValue
    int32_t warps = 0, shared = 0;
    int64_t most_blocks = std::numeric_limits<int32_t>::max();
    for (const Axis& axis : {space_axis(p), time_axis(p)}) {
        if (axis.heads == 0 || is_packed(axis.N)) continue;
        const Layout<kSteps, kBackward> layout(axis.N);
        const int32_t most = most_shared_bytes();
        if (warps == 0) warps = layout.warps();  // of the first, space: a launch has one size of block
        if (stages == 0) stages = stages_of(layout, rotary, most);
        if (stages > 1) most_blocks = blocks_in_stages(layout, rotary, most, stages, current_multiprocessors());
        if (layout.bytes(rotary, stages) > shared) shared = layout.bytes(rotary, stages);
    }
    const int32_t scratch = kBackward ? warps * packed_scratch_bytes(kSteps, rotary) : 0;  // used by packed sequences
    const int64_t blocks = count_blocks<kSteps, kBackward>(p, warps);
    return launch(resident_attention<T, kSteps, kPlain, kBackward>, blocks < most_blocks ? blocks : most_blocks,
                  32 * warps, scratch > shared ? scratch : shared, stream, p);
}

// Whether no sequence is longer than what registers hold.
inline bool is_packed_alone(const AttentionParams& p) {
    return (p.temporal_heads == 0 || is_packed(p.T)) && (p.temporal_heads == p.H || is_packed(p.S));
}

template <class T, int kSteps, bool kPlain, bool kBackward>
int launch_steps(const AttentionParams& p, void* stream) {
    return is_packed_alone(p) ? launch_packed<T, kSteps, kPlain, kBackward>(p, stream)
                              : launch_resident<T, kSteps, kPlain, kBackward>(p, stream);
}

template <class T, int kSteps, bool kBackward>
int launch_steps(const AttentionParams& p, void* stream) {
    return is_plain(p) ? launch_steps<T, kSteps, true, kBackward>(p, stream)
                       : launch_steps<T, kSteps, false, kBackward>(p, stream);
}

template <class T, bool kBackward>
int launch_attention(const AttentionParams& p, void* stream) {
    const int found = launch_hopper<T, kBackward>(p, stream);
    if (found != kLeftToWarps) return found;
    return with_steps(p.D, [&](auto steps) { return launch_steps<T, steps, kBackward>(p, stream); });
}

}  // namespace vivit::cuda
