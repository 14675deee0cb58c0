// The kernels, and how a call becomes one launch: the blocks of one axis, then those of the other.
#pragma once

#include "hopper.cuh"
#include "packed.cuh"
#include "steps.cuh"
#include "tiles.cuh"

namespace vivit::cuda {

// At most, of a block of packed sequences alone. A warp has no need of the others: fewer are given back sooner where
// one of them waits, more have neighbouring heads side by side, at 4 of 64 channels 512 bytes of each token.
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

// What a block does whose walk over the blocks of an axis this is: of those of one block but for the resident regime.
template <class T, int kSteps, bool kPlain, Kind kKind>
VIVIT_DEVICE void run_forward(const AttentionParams& p, const RowMaps* maps, const Axis& axis, const Walk& walk) {
    if (kKind == Kind::kPacked || is_packed(axis.N)) {
        const uint32_t warp = threadIdx.x / 32, warps = blockDim.x / 32;
        packed_forward<T, blocks_of_32(kSteps), kPlain>(p, axis, walk.first * warps + warp);
    } else if constexpr (kKind == Kind::kHopper) {
        hopper_forward<T, kPlain>(p, *maps, axis, walk.first);
    } else {
        resident_forward<T, kSteps, kPlain>(p, axis, walk);
    }
}

template <class T, int kSteps, bool kPlain, Kind kKind>
VIVIT_DEVICE void run_backward(const AttentionParams& p, const RowMaps* maps, const Axis& axis, const Walk& walk) {
    if (kKind == Kind::kPacked || is_packed(axis.N)) {
        const uint32_t warp = threadIdx.x / 32, warps = blockDim.x / 32;
        char* scratch = shared_memory() + warp * packed_scratch_bytes(kSteps, true);
        packed_backward<T, blocks_of_32(kSteps), kPlain>(p, axis, walk.first * warps + warp,
                                                         reinterpret_cast<float*>(scratch));
    } else if constexpr (kKind == Kind::kHopper) {
        hopper_backward<T, kPlain>(p, *maps, axis, walk.first);
    } else {
        resident_backward<T, kSteps, kPlain>(p, axis, walk);
    }
}

// Space comes first: where both axes are there its blocks are the longer ones. Maps of both axes are there for Hopper.
template <class T, int kSteps, bool kPlain, Kind kKind, bool kBackward>
VIVIT_DEVICE void run(const AttentionParams& p, const RowMaps* over_space = nullptr,
                      const RowMaps* over_time = nullptr) {
    const bool in_space = blockIdx.x < p.tiling.space_blocks;
    const uint32_t block = in_space ? blockIdx.x : blockIdx.x - p.tiling.space_blocks;
    const Walk walk = {block, in_space ? p.tiling.space_blocks : p.tiling.time_blocks, gridDim.x};
    const Axis axis = in_space ? space_axis(p) : time_axis(p);
    const RowMaps* maps = in_space ? over_space : over_time;
    if (kBackward) {
        run_backward<T, kSteps, kPlain, kKind>(p, maps, axis, walk);
    } else {
        run_forward<T, kSteps, kPlain, kKind>(p, maps, axis, walk);
    }
}

template <class T, int kSteps, bool kPlain, bool kBackward>
__global__ void __launch_bounds__(32 * kPackedWarps, kBackward ? 1 : 0) packed_attention(const AttentionParams p) {
    run<T, kSteps, kPlain, Kind::kPacked, kBackward>(p);
}

// Two blocks to a multiprocessor, of which one copies while the other multiplies, where the registers allow it; else
// copies are stages ahead (tiles.cuh).
template <class T, int kSteps, bool kPlain, bool kBackward>
__global__ void __launch_bounds__(32 * kResidentWarps, kBlocksAtATime<kSteps, kPlain, kBackward>)
    resident_attention(const AttentionParams p) {
    run<T, kSteps, kPlain, Kind::kResident, kBackward>(p);
}

template <class T, bool kPlain, bool kBackward>
__global__ void __launch_bounds__(kHopperThreads, kPlain ? 2 : 1)
    hopper_attention(const __grid_constant__ HopperCall call) {
#if defined(VIVIT_SIM) || defined(VIVIT_HOPPER)  // elsewhere it is never launched
    run<T, 4, kPlain, Kind::kHopper, kBackward>(call.p, &call.over_space, &call.over_time);
#endif
}

// ---- launching ----

// Counts the blocks of both axes into p, which is what a kernel is told or a part of it. Returns their sum.
template <int kSteps, bool kBackward>
int64_t count_blocks(AttentionParams& p, int32_t warps) {
    const auto of = [&](const Axis& axis) { return axis.heads > 0 ? blocks_of<kSteps, kBackward>(p, axis, warps) : 0; };
    const int64_t in_space = of(space_axis(p)), in_time = of(time_axis(p));
    p.tiling.space_blocks = static_cast<uint32_t>(in_space), p.tiling.time_blocks = static_cast<uint32_t>(in_time);
    return in_space + in_time;
}

// Whether Hopper's kernel runs such a call: every sequence is packed or long enough for tiles of 64 rows.
inline bool is_for_hopper(const AttentionParams& p, bool backward) {
    if (steps_of(p.D) != 4 || !has_hopper_kernels()) return false;
    bool any = false;
    for (const Axis& axis : {space_axis(p), time_axis(p)}) {
        if (axis.heads == 0 || is_packed(axis.N)) continue;
        const int32_t bytes = hopper_bytes(axis.N, backward, p.cos != nullptr);
        if (axis.N <= kGroupRows || bytes > most_shared_bytes()) return false;
        any = true;
    }
    return any;
}

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

// False where the copy engine does not take a tensor, as one that is broadcast: another kernel does. Of smaller heads
// than 64 channels zeros follow.
inline bool make_maps(HopperCall& call, bool backward) {
    const AttentionParams& p = call.p;
    const Grid* tensors[] = {&p.q, &p.k, &p.v, &p.d_o};
    for (const Axis& axis : {space_axis(p), time_axis(p)}) {
        if (axis.heads == 0 || is_packed(axis.N)) continue;
        const int32_t box = box_rows((axis.N + 15) / 16 * 16);
        for (int i = 0; i < (backward ? 4 : 3); ++i) {
            const Grid& x = *tensors[i];
            const TensorShape shape = {x.data,
                                       2,
                                       5,
                                       {p.D, p.H, p.S, p.T, p.B},
                                       {2, 2 * x.stride_h, 2 * x.stride_s, 2 * x.stride_t, 2 * x.stride_b},
                                       {64, 1, axis.over_time ? 1 : box, axis.over_time ? box : 1, 1}};
            TensorMap& map = (axis.over_time ? call.over_time : call.over_space).of[i];
            if (!make_tensor_map(map, shape)) return false;
        }
    }
    return true;
}

template <class T, bool kPlain, bool kBackward>
int launch_hopper(HopperCall& call, void* stream) {
    AttentionParams& p = call.p;
    const bool rotary = p.cos != nullptr;
    const int32_t longest = p.temporal_heads == p.H || p.T > p.S ? p.T : p.S;
    const int32_t bytes = hopper_bytes(p.temporal_heads == 0 ? p.S : longest, kBackward, rotary);
    const int32_t warps = kHopperThreads / 32, scratch = kBackward ? warps * packed_scratch_bytes(4, rotary) : 0;
    const int64_t blocks = count_blocks<4, kBackward>(p, warps);
    return launch(hopper_attention<T, kPlain, kBackward>, blocks, 32 * warps, scratch > bytes ? scratch : bytes, stream,
                  call);
}

template <class T, int kSteps, bool kPlain, bool kBackward>
int launch_steps(const AttentionParams& p, void* stream) {
    if constexpr (kSteps == 4) {
        HopperCall call = {p, {}, {}};
        if (is_for_hopper(p, kBackward) && make_maps(call, kBackward)) {
            return launch_hopper<T, kPlain, kBackward>(call, stream);
        }
    }
    return is_packed_alone(p) ? launch_packed<T, kSteps, kPlain, kBackward>(p, stream)
                              : launch_resident<T, kSteps, kPlain, kBackward>(p, stream);
}

template <class T, int kSteps, bool kBackward>
int launch_steps(const AttentionParams& p, void* stream) {
    const bool plain = p.scale > 0.f && p.softcap == 0.f && p.mask == nullptr && p.seed == nullptr && p.cos == nullptr;
    return plain ? launch_steps<T, kSteps, true, kBackward>(p, stream)
                 : launch_steps<T, kSteps, false, kBackward>(p, stream);
}

template <class T, bool kBackward>
int launch_attention(const AttentionParams& p, void* stream) {
    return with_steps(p.D, [&](auto steps) { return launch_steps<T, steps, kBackward>(p, stream); });
}

}  // namespace vivit::cuda
