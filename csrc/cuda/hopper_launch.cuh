// The kernels of hopper_forward.cuh and hopper_backward.cuh, and which calls they are launched for.
#pragma once

#include "by_axis.cuh"
#include "hopper.h"
#include "hopper_backward.cuh"
#include "hopper_forward.cuh"

namespace vivit::cuda {

// Blocks that share a multiprocessor, by the registers of a thread: 128 for two, of which one copies while the other
// multiplies, 255 for one.
template <int kSteps, bool kPlain, bool kBackward>
constexpr int kHopperBlocks = kPlain && kSteps <= (kBackward ? 4 : 5) ? 2 : 1;

// Sums of dk and dv of 160 channels are 160 registers; beside what options take a backward has no room for them (nvcc
// 13.0: 255 registers and 40 bytes of local memory).
template <int kSteps, bool kPlain, bool kBackward>
constexpr bool kHopperRuns = kSteps <= 8 || kPlain || !kBackward;

template <class T, int kSteps, bool kPlain, bool kBackward>
__global__ void __launch_bounds__(kHopperThreads, kHopperBlocks<kSteps, kPlain, kBackward>)
    hopper_attention(const __grid_constant__ HopperCall<kSteps> call) {
#if defined(VIVIT_SIM) || defined(VIVIT_HOPPER)  // elsewhere it is never launched
    on_its_axis<T, kSteps, kPlain, kBackward, false>(call.p, [&](const Axis& axis, const Walk& walk) {
        const RowMaps<kSteps>& maps = axis.over_time ? call.over_time : call.over_space;
        if constexpr (kBackward) {
            hopper_backward<T, kSteps, kPlain>(call.p, maps, axis, walk.first);
        } else {
            hopper_forward<T, kSteps, kPlain>(call.p, maps, axis, walk.first);
        }
    });
#endif
}

// Bytes of a block, 0 where no sequence is for such products or one is for other kernels.
template <int kSteps, bool kBackward>
int32_t hopper_bytes(const AttentionParams& p) {
    int32_t most = 0;
    for (const Axis& axis : {space_axis(p), time_axis(p)}) {
        if (axis.heads == 0 || is_packed(axis.N)) continue;
        const int32_t bytes = SlicedLayout<kSteps, kBackward>(axis.N).bytes(p.cos != nullptr);
        if (axis.N <= kGroupRows || bytes > most_shared_bytes()) return 0;
        most = bytes > most ? bytes : most;
    }
    return most;
}

// False where the copy engine does not take a tensor, as one that is broadcast. Of smaller heads than the kernel's
// zeros follow.
template <int kSteps>
bool make_maps(HopperCall<kSteps>& call, bool backward) {
    using Rows = Slices<kSteps>;
    const AttentionParams& p = call.p;
    const Grid* tensors[] = {&p.q, &p.k, &p.v, &p.d_o};
    for (const Axis& axis : {space_axis(p), time_axis(p)}) {
        if (axis.heads == 0 || is_packed(axis.N)) continue;
        RowMaps<kSteps>& maps = axis.over_time ? call.over_time : call.over_space;
        const int32_t box = box_rows((axis.N + 15) / 16 * 16);
        for (int i = 0; i < (backward ? 4 : 3) * maps.kKinds; ++i) {
            const Grid& x = *tensors[i / maps.kKinds];
            const bool narrow = Rows::kNarrow > 0 && i % maps.kKinds == maps.kKinds - 1;
            const int32_t channels = narrow ? 16 * Rows::kNarrow : 64;
            const TensorShape shape = {x.data,
                                       2,
                                       5,
                                       {p.D, p.H, p.S, p.T, p.B},
                                       {2, 2 * x.stride_h, 2 * x.stride_s, 2 * x.stride_t, 2 * x.stride_b},
                                       {channels, 1, axis.over_time ? 1 : box, axis.over_time ? box : 1, 1}};
            if (!make_tensor_map(maps.of[i / maps.kKinds][i % maps.kKinds], shape)) return false;
        }
    }
    return true;
}

template <class T, int kSteps, bool kPlain, bool kBackward>
int launch_hopper_steps(const AttentionParams& p, void* stream) {
    if constexpr (kHopperRuns<kSteps, kPlain, kBackward>) {
        const int32_t bytes = hopper_bytes<kSteps, kBackward>(p), warps = kHopperThreads / 32;
        HopperCall<kSteps> call = {p, {}, {}};
        if (bytes == 0 || !make_maps(call, kBackward)) return kLeftToWarps;
        const int32_t scratch = kBackward ? warps * packed_scratch_bytes(kSteps, p.cos != nullptr) : 0;
        const int64_t blocks = count_blocks<kSteps, kBackward>(call.p, warps);
        return launch(hopper_attention<T, kSteps, kPlain, kBackward>, blocks, kHopperThreads,
                      scratch > bytes ? scratch : bytes, stream, call);
    }
    return kLeftToWarps;
}

template <class T, bool kBackward>
int launch_hopper(const AttentionParams& p, void* stream) {
    if (!has_hopper_kernels()) return kLeftToWarps;
    return with_steps(p.D, [&](auto steps) -> int {
        return is_plain(p) ? launch_hopper_steps<T, steps, true, kBackward>(p, stream)
                           : launch_hopper_steps<T, steps, false, kBackward>(p, stream);
    });
}

}  // namespace vivit::cuda
