// The kernels, and how a call becomes one launch: the blocks of one axis, then those of the other.
#pragma once

#include "packed.cuh"
#include "resident.cuh"

namespace vivit::cuda {

constexpr int kPackedWarps = 4;

// Steps of 16 channels that kernels are compiled for: a head of 40 channels is run as one of 64.
VIVIT_BOTH int steps_of(int32_t D) { return D <= 32 ? 2 : D <= 64 ? 4 : D <= 80 ? 5 : D <= 96 ? 6 : D <= 128 ? 8 : 10; }
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

// What a block does that is number `block` of an axis. kResident: whether there are longer sequences than packed ones.
template <class T, int kSteps, bool kPlain, bool kResident>
VIVIT_DEVICE void run_forward(const AttentionParams& p, const Axis& axis, int64_t block) {
    if (!kResident || is_packed(axis.N)) {
        const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32, warps = static_cast<int32_t>(blockDim.x) / 32;
        packed_forward<T, blocks_of_32(kSteps), kPlain>(p, axis, block * warps + warp);
    } else {
        resident_forward<T, kSteps, kPlain>(p, axis, block);
    }
}

template <class T, int kSteps, bool kPlain, bool kResident>
VIVIT_DEVICE void run_backward(const AttentionParams& p, const Axis& axis, int64_t block) {
    if (!kResident || is_packed(axis.N)) {
        const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32, warps = static_cast<int32_t>(blockDim.x) / 32;
        char* scratch = shared_memory() + warp * packed_scratch_bytes(kSteps, true);
        packed_backward<T, blocks_of_32(kSteps), kPlain>(p, axis, block * warps + warp,
                                                         reinterpret_cast<float*>(scratch));
    } else {
        resident_backward<T, kSteps, kPlain>(p, axis, block);
    }
}

// Space comes first: where both axes are there its blocks are the longer ones.
template <class T, int kSteps, bool kPlain, bool kResident, bool kBackward>
VIVIT_DEVICE void run(const AttentionParams& p) {
    int64_t block = blockIdx.x;
    const int32_t warps = static_cast<int32_t>(blockDim.x) / 32;
    Axis axis = space_axis(p);
    const int64_t over_space = axis.heads > 0 ? blocks_of<kSteps, kBackward>(p, axis, warps) : 0;
    if (block >= over_space) block -= over_space, axis = time_axis(p);
    if (kBackward) {
        run_backward<T, kSteps, kPlain, kResident>(p, axis, block);
    } else {
        run_forward<T, kSteps, kPlain, kResident>(p, axis, block);
    }
}

template <class T, int kSteps, bool kPlain, bool kBackward>
__global__ void __launch_bounds__(32 * kPackedWarps) packed_attention(const AttentionParams p) {
    run<T, kSteps, kPlain, false, kBackward>(p);
}

// Two blocks to a multiprocessor, of which one copies while the other multiplies, where the registers allow it.
template <class T, int kSteps, bool kPlain, bool kBackward>
__global__ void __launch_bounds__(32 * kResidentWarps, kSteps <= 4 && kPlain ? 2 : 1)
    resident_attention(const AttentionParams p) {
    run<T, kSteps, kPlain, true, kBackward>(p);
}

// ---- launching ----

template <class T, int kSteps, bool kPlain, bool kBackward>
int launch_with(const AttentionParams& p, void* stream) {
    const bool rotary = p.cos != nullptr;
    const Axis axes[2] = {space_axis(p), time_axis(p)};
    int32_t warps = kPackedWarps, shared = 0;
    bool resident = false;
    for (const Axis& axis : axes) {
        if (axis.heads == 0 || is_packed(axis.N)) continue;
        const Layout<kSteps, kBackward> layout(axis.N);
        if (!resident) warps = layout.warps();  // of the first, space: a launch has one size of block
        shared = layout.bytes(warps, rotary) > shared ? layout.bytes(warps, rotary) : shared;
        resident = true;
    }
    int64_t blocks = 0;
    for (const Axis& axis : axes) {
        if (axis.heads == 0) continue;
        blocks += blocks_of<kSteps, kBackward>(p, axis, warps);
        const int32_t scratch = is_packed(axis.N) && kBackward ? warps * packed_scratch_bytes(kSteps, rotary) : 0;
        shared = scratch > shared ? scratch : shared;
    }
    const auto kernel =
        resident ? resident_attention<T, kSteps, kPlain, kBackward> : packed_attention<T, kSteps, kPlain, kBackward>;
    return launch(kernel, blocks, 32 * warps, shared, stream, p);
}

template <class T, int kSteps, bool kBackward>
int launch_steps(const AttentionParams& p, void* stream) {
    const bool plain = p.scale > 0.f && p.softcap == 0.f && p.mask == nullptr && p.seed == nullptr && p.cos == nullptr;
    return plain ? launch_with<T, kSteps, true, kBackward>(p, stream)
                 : launch_with<T, kSteps, false, kBackward>(p, stream);
}

template <class T, bool kBackward>
int launch_attention(const AttentionParams& p, void* stream) {
    switch (steps_of(p.D)) {
        case 2:
            return launch_steps<T, 2, kBackward>(p, stream);
        case 4:
            return launch_steps<T, 4, kBackward>(p, stream);
        case 5:
            return launch_steps<T, 5, kBackward>(p, stream);
        case 6:
            return launch_steps<T, 6, kBackward>(p, stream);
        case 8:
            return launch_steps<T, 8, kBackward>(p, stream);
        default:
            return launch_steps<T, 10, kBackward>(p, stream);
    }
}

}  // namespace vivit::cuda
