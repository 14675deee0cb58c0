// The video's gradient of tubelet_embedding by Hopper's own instructions, dout W: tiles of 128 tokens by 256 taps, in
// steps of 64 channels, by a block that stays on its multiprocessor.
//
//   each of two warpgroups       has 64 tokens: products of what lies in the ring, and their sums to the pixels
//   one thread of the second     asks the copy engine for a step: dout, [128, 64], and the weight, [64, 256]
//
// Nothing is gathered on the way in, so that both operands come by copies and lie in shared memory, the weight the
// other way round, which products of 16 bits take as it is. Pixels are written where they belong, as widely as they lie
// side by side, by one warpgroup while the other multiplies: one goes ahead (tubelet_hopper_ring.cuh).
//
// No GPU has timed it. `python -m bench cuda_model` counts for a step 1024 cycles of products, and of shared memory as
// many: 80 for each product of 64 tokens and 16 channels, 384 for what arrives. That is at least 65 us for 8 clips of
// ViViT-B/16x2 on 132 multiprocessors at 1.7 GHz, against 104 of the kernel of sm_80, if mma.sync reaches 62 % of
// wgmma's rate (tubelet_product.cuh). Pixels of float32 take 46 us of memory at 3.35 TB/s meanwhile.
#pragma once

#include "tubelet_hopper.cuh"
#include "tubelet_hopper_boxes.cuh"

namespace vivit::cuda {

constexpr int32_t kVideoTokens = 64 * kGatherGroups, kVideoTaps = 256;  // of a tile

struct HopperVideoParams {
    VideoGradientParams of;
    BoxedTokens d_out;
    TensorMap weight;  // [E, pitch]; boxes of 64 channels by 64 taps, zeros beyond
    int32_t steps;     // of 64 channels
    Divisor tiles_k;
    int32_t units;  // tiles
};

// Shared memory: a ring of both operands.
constexpr int32_t kVideoTokenBytes = kVideoTokens * kSlabRowBytes;  // dout, [128 tokens, 64 channels]
constexpr int32_t kVideoSlabBytes = kStep * kSlabRowBytes;          // of the weight, [64 channels, 64 taps]
constexpr int32_t kVideoSlabs = kVideoTaps / kSlab;
using VideoMemory = RingMemory<4, kVideoTokenBytes + kVideoSlabs * kVideoSlabBytes>;

// Blocks that run at the same time share tokens.
struct VideoTile {
    int32_t first, first_k;  // token, as they come in boxes, and tap

    VIVIT_DEVICE VideoTile(const HopperVideoParams& p, int32_t number) {
        const int32_t row = p.tiles_k.quotient(number);
        first = row * kVideoTokens, first_k = (number - row * p.tiles_k.by) * kVideoTaps;
    }
    VIVIT_DEVICE int32_t stages(const HopperVideoParams& p) const { return p.steps; }
    VIVIT_DEVICE void copy(const HopperVideoParams& p, char* to, PhaseBarrier* full, int32_t step) const {
        p.d_out.copy(to, full, first, kVideoTokens, step * kStep);
        for (int32_t slab = 0; slab < kVideoSlabs; ++slab) {
            copy_box(to + kVideoTokenBytes + slab * kVideoSlabBytes, p.weight, full, first_k + slab * kSlab,
                     step * kStep);
        }
    }
};

// 64 tokens of a tile on their way over the channels.
template <class T>
struct VideoProducts {
    const HopperVideoParams& p;
    int32_t group;
    GroupRing<VideoTile, HopperVideoParams, VideoMemory> ring;
    float sums[kVideoTaps / 8][4];

    VIVIT_DEVICE VideoProducts(const HopperVideoParams& params, const VideoMemory& shared, int32_t of_group)
        : p(params), group(of_group), ring(params, shared, of_group) {}

    VIVIT_DEVICE void multiply(int32_t step) {
        ring.wait();
        const uint64_t tokens = descriptor(ring.stage() + group * (64 * kSlabRowBytes));
        const uint64_t weight = slabs_descriptor(ring.stage() + kVideoTokenBytes, kVideoSlabBytes);
        group_begin();
#pragma unroll
        for (int s = 0; s < kStep / 16; ++s) {  // 16 channels, 32 bytes in rows of tokens, 16 rows of the weight
            group_along_shared<T, kVideoTaps>(sums, tokens + 2 * s, weight + s * (16 * kSlabRowBytes >> 4),
                                              step > 0 || s > 0);
        }
        group_commit();
        ring.let_other_begin();
        group_wait<1>();
        if (step > 0) ring.release_last();
        ring.advance();
    }
    VIVIT_DEVICE void sum() {
        group_settle(sums);
#pragma unroll 1
        for (int32_t step = 0; step < p.steps; ++step) multiply(step);
        group_wait<0>();
        group_settle(sums);
        ring.release_last();
    }
    VIVIT_DEVICE void store(int32_t number) const {
        const VideoTile tile(p, number);
        const PixelPlaces& places = p.of.places;
        const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32 % 4;
        const int32_t first = tile.first + 64 * group + 16 * warp + tile_lane() / 4;
        char* tubelet[2];
        bool there[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            tubelet[r] = places.data + places.tubelet(p.d_out.tubelet(first + 8 * r));
            there[r] = p.d_out.is_there(first + 8 * r);
        }
#pragma unroll
        for (int n = 0; n < kVideoTaps / 8; n += 2) {
            const int32_t k = tile.first_k + 8 * n + traded_column();
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float4 sum = traded(sums[n], sums[n + 1], r);
                if (there[r] && k < places.taps) store_pixels<T>(p.of, tubelet[r], k, sum);
            }
        }
    }
};

template <class T>
__global__ void __launch_bounds__(kGatherThreads, 1)
    scattering_video_gradient(const __grid_constant__ HopperVideoParams p) {
#if defined(VIVIT_HOPPER) || defined(VIVIT_SIM)
    const VideoMemory memory;
    if (threadIdx.x == 0) memory.make_barriers(), prefetch_map(p.d_out.map), prefetch_map(p.weight);
    block_barrier();
    const int32_t group = same_in_warp(static_cast<int32_t>(threadIdx.x) / 128);
    VideoProducts<T> products(p, memory, group);
    for (int32_t number = static_cast<int32_t>(blockIdx.x); number < p.units;
         number += static_cast<int32_t>(gridDim.x)) {
        products.sum();
        products.store(number);
    }
#endif
}

// ---- which calls it runs, and the launch ----

struct HopperVideo {
    HopperVideoParams params;
    int32_t blocks;
};

// False where the kernel of sm_80 runs the call: GPUs other than sm_90, fewer channels than two steps.
inline bool plan_hopper_video(HopperVideo& plan, const VideoGradientParams& p) {
    if (!has_hopper_kernels() || p.d_out.width < 2 * kStep || VideoMemory::kRingBytes > most_shared_bytes())
        return false;
    const int64_t tokens = plan_boxes(plan.params.d_out, p.d_out, p.places.tubelets, kVideoTokens);
    const int64_t tiles_k = (int64_t{p.places.taps} + kVideoTaps - 1) / kVideoTaps;
    const int64_t tiles = (tokens + kVideoTokens - 1) / kVideoTokens * tiles_k;
    TensorShape weight;
    weight.data = p.weight.first, weight.rank = 2;
    weight.sizes[0] = p.weight.width, weight.sizes[1] = p.weight.count, weight.strides[1] = p.weight.step;
    weight.box[0] = kSlab, weight.box[1] = kStep;
    if (tokens == 0 || tiles > INT32_MAX / 2 || !make_tensor_map(plan.params.weight, weight)) return false;
    plan.params.of = p, plan.params.steps = (p.d_out.width + kStep - 1) / kStep;
    plan.params.tiles_k = Divisor(static_cast<int32_t>(tiles_k)), plan.params.units = static_cast<int32_t>(tiles);
    const int32_t multiprocessors = current_multiprocessors();
    plan.blocks = tiles < multiprocessors ? plan.params.units : multiprocessors;
    return true;
}

template <class T>
int launch_hopper_video(const HopperVideo& plan, void* stream) {
    return launch(scattering_video_gradient<T>, plan.blocks, kGatherThreads, VideoMemory::kRingBytes, stream,
                  plan.params);
}

}  // namespace vivit::cuda
