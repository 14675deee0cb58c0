// The kernels, and how a call becomes one launch: the blocks of one axis, then those of the other.
#pragma once

#include "hopper.cuh"
#include "packed.cuh"
#include "steps.cuh"

namespace vivit::cuda {

constexpr int kPackedWarps = 4;

VIVIT_BOTH int blocks_of_32(int steps) { return (steps + 1) / 2; }

VIVIT_BOTH bool is_packed(int32_t N) { return N <= kPackedTokens; }

VIVIT_BOTH int64_t packed_tiles(int64_t sequences, int32_t N) { return N <= 8 ? (sequences + 1) / 2 : sequences; }

// Bytes that a warp of the packed regime takes to turn gradients back.
VIVIT_BOTH int32_t packed_scratch_bytes(int steps, bool rotary) {
    return rotary ? 16 * (32 * blocks_of_32(steps) + 4) * 4 : 0;
}

// What a launch is compiled for: sequences of up to 16 tokens alone, or also longer ones, by the products of one warp
// or by Hopper's, of four.
enum class Kind { kPacked, kResident, kHopper };

// Blocks of `warps` warps that an axis takes.
template <int kSteps, bool kBackward>
VIVIT_BOTH int64_t blocks_of(const AttentionParams& p, const Axis& axis, int32_t warps) {
    const int64_t sequences = axis.sequences(p.B);
    if (is_packed(axis.N)) return (packed_tiles(sequences, axis.N) + warps - 1) / warps;
    const int32_t per = Layout<kSteps, kBackward>(axis.N).per;
    return (sequences + per - 1) / per;
}

// What a block does that is number `block` of an axis.
template <class T, int kSteps, bool kPlain, Kind kKind>
VIVIT_DEVICE void run_forward(const AttentionParams& p, const Axis& axis, int64_t block) {
    if (kKind == Kind::kPacked || is_packed(axis.N)) {
        const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32, warps = static_cast<int32_t>(blockDim.x) / 32;
        packed_forward<T, blocks_of_32(kSteps), kPlain>(p, axis, block * warps + warp);
    } else if constexpr (kKind == Kind::kHopper) {
        hopper_forward<T>(p, axis, block);
    } else {
        resident_forward<T, kSteps, kPlain>(p, axis, block);
    }
}

template <class T, int kSteps, bool kPlain, Kind kKind>
VIVIT_DEVICE void run_backward(const AttentionParams& p, const Axis& axis, int64_t block) {
    if (kKind == Kind::kPacked || is_packed(axis.N)) {
        const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32, warps = static_cast<int32_t>(blockDim.x) / 32;
        char* scratch = shared_memory() + warp * packed_scratch_bytes(kSteps, true);
        packed_backward<T, blocks_of_32(kSteps), kPlain>(p, axis, block * warps + warp,
                                                         reinterpret_cast<float*>(scratch));
    } else if constexpr (kKind == Kind::kHopper) {
        hopper_backward<T>(p, axis, block);
    } else {
        resident_backward<T, kSteps, kPlain>(p, axis, block);
    }
}

// Space comes first: where both axes are there its blocks are the longer ones.
template <class T, int kSteps, bool kPlain, Kind kKind, bool kBackward>
VIVIT_DEVICE void run(const AttentionParams& p) {
    int64_t block = blockIdx.x;
    const int32_t warps = static_cast<int32_t>(blockDim.x) / 32;
    Axis axis = space_axis(p);
    const int64_t over_space = axis.heads > 0 ? blocks_of<kSteps, kBackward>(p, axis, warps) : 0;
    if (block >= over_space) block -= over_space, axis = time_axis(p);
    if (kBackward) {
        run_backward<T, kSteps, kPlain, kKind>(p, axis, block);
    } else {
        run_forward<T, kSteps, kPlain, kKind>(p, axis, block);
    }
}

template <class T, int kSteps, bool kPlain, bool kBackward>
__global__ void __launch_bounds__(32 * kPackedWarps, kBackward ? 1 : 0) packed_attention(const AttentionParams p) {
    run<T, kSteps, kPlain, Kind::kPacked, kBackward>(p);
}

// Two blocks to a multiprocessor, of which one copies while the other multiplies, where the registers allow it.
template <class T, int kSteps, bool kPlain, bool kBackward>
__global__ void __launch_bounds__(32 * kResidentWarps, kSteps <= 4 && kPlain && !kBackward ? 2 : 1)
    resident_attention(const AttentionParams p) {
    run<T, kSteps, kPlain, Kind::kResident, kBackward>(p);
}

template <class T, bool kBackward>
__global__ void __launch_bounds__(kHopperThreads, 2) hopper_attention(const AttentionParams p) {
    run<T, 4, true, Kind::kHopper, kBackward>(p);
}

// ---- launching ----

// A kernel over the blocks of both axes.
template <int kSteps, bool kBackward>
int launch_over(void (*kernel)(AttentionParams), const AttentionParams& p, int32_t warps, int32_t shared_bytes,
                void* stream) {
    int64_t blocks = 0;
    for (const Axis& axis : {space_axis(p), time_axis(p)}) {
        if (axis.heads > 0) blocks += blocks_of<kSteps, kBackward>(p, axis, warps);
    }
    return launch(kernel, blocks, 32 * warps, shared_bytes, stream, p);
}

// Whether Hopper's kernel runs such a call: every sequence is packed or long enough for tiles of 64 rows.
inline bool is_for_hopper(const AttentionParams& p, bool backward) {
    if (p.D != 64 || current_arch() != 90) return false;
    bool any = false;
    for (const Axis& axis : {space_axis(p), time_axis(p)}) {
        if (axis.heads == 0 || is_packed(axis.N)) continue;
        if (axis.N <= kGroupRows || hopper_bytes(axis.N, backward) > most_shared_bytes()) return false;
        any = true;
    }
    return any;
}

template <class T, int kSteps, bool kPlain, bool kBackward>
int launch_with(const AttentionParams& p, void* stream) {
    const bool rotary = p.cos != nullptr;
    int32_t warps = kPackedWarps, shared = 0;
    bool resident = false;
    for (const Axis& axis : {space_axis(p), time_axis(p)}) {
        if (axis.heads == 0 || is_packed(axis.N)) continue;
        const Layout<kSteps, kBackward> layout(axis.N);
        if (!resident) warps = layout.warps();  // of the first, space: a launch has one size of block
        shared = layout.bytes(rotary) > shared ? layout.bytes(rotary) : shared;
        resident = true;
    }
    const int32_t scratch = kBackward ? warps * packed_scratch_bytes(kSteps, rotary) : 0;  // used by packed sequences
    shared = scratch > shared ? scratch : shared;
    const auto kernel =
        resident ? resident_attention<T, kSteps, kPlain, kBackward> : packed_attention<T, kSteps, kPlain, kBackward>;
    return launch_over<kSteps, kBackward>(kernel, p, warps, shared, stream);
}

template <class T, int kSteps, bool kBackward>
int launch_steps(const AttentionParams& p, void* stream) {
    const bool plain = p.scale > 0.f && p.softcap == 0.f && p.mask == nullptr && p.seed == nullptr && p.cos == nullptr;
    if (!plain) return launch_with<T, kSteps, false, kBackward>(p, stream);
    if constexpr (kSteps == 4) {
        if (is_for_hopper(p, kBackward)) {
            const int32_t longest = p.temporal_heads == p.H || p.T > p.S ? p.T : p.S;
            const int32_t N = p.temporal_heads == 0 ? p.S : longest;
            return launch_over<4, kBackward>(hopper_attention<T, kBackward>, p, kHopperThreads / 32,
                                             hopper_bytes(N, kBackward), stream);
        }
    }
    return launch_with<T, kSteps, true, kBackward>(p, stream);
}

template <class T, bool kBackward>
int launch_attention(const AttentionParams& p, void* stream) {
    return with_steps(p.D, [&](auto steps) { return launch_steps<T, steps, kBackward>(p, stream); });
}

}  // namespace vivit::cuda
