// The video's gradient of tubelet_embedding by Hopper's own instructions, dout W: tiles of 128 tokens by 256 taps, in
// steps of 64 channels, by a block that stays on its multiprocessor.
//
//   each of two warpgroups       has 64 tokens: products of what lies in the ring, and their sums to the pixels
//   one thread of the second     asks the copy engine for a step: dout, [128, 64], and the weight, [64, 256]
//
// Nothing is gathered on the way in, so that both operands come by copies and lie in shared memory, the weight the
// other way round, which products of 16 bits take as it is. Pixels are written where they belong, as widely as they lie
// side by side, by one warpgroup while the other multiplies: one goes ahead, as in tubelet_hopper.cuh.
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
    int32_t tiles;
};

// Blocks that run at the same time share tokens.
struct VideoTile {
    int32_t first, first_k;  // token, as they come in boxes, and tap

    VIVIT_DEVICE VideoTile(const HopperVideoParams& p, int32_t number) {
        const int32_t row = p.tiles_k.quotient(number);
        first = row * kVideoTokens, first_k = (number - row * p.tiles_k.by) * kVideoTaps;
    }
};

// Shared memory: stages of both operands, and barriers.
struct VideoMemory {
    static constexpr int32_t kTokenBytes = kVideoTokens * kSlabRowBytes;  // dout, [128 tokens, 64 channels]
    static constexpr int32_t kSlabBytes = kStep * kSlabRowBytes;          // of the weight, [64 channels, 64 taps]
    static constexpr int32_t kSlabs = kVideoTaps / kSlab, kStageBytes = kTokenBytes + kSlabs * kSlabBytes;
    static constexpr int32_t kStages = 4;
    static constexpr int32_t kBytes = kStages * (kStageBytes + 16);

    char* stages;
    PhaseBarrier *full, *empty;

    VIVIT_DEVICE VideoMemory()
        : stages(shared_memory()),
          full(reinterpret_cast<PhaseBarrier*>(stages + kStages * kStageBytes)),
          empty(full + kStages) {}

    // By one thread.
    VIVIT_DEVICE void make_barriers() const {
        for (int32_t i = 0; i < kStages; ++i) phase_init(full + i, 1), phase_init(empty + i, 4 * kGatherGroups);
        phase_fence();
    }
};

// What one thread asks the copy engine for, in the order in which it is multiplied.
struct VideoCopies {
    using Memory = VideoMemory;
    const HopperVideoParams& p;
    const Memory& memory;
    int32_t number;
    int32_t step = 0;
    GatherRing<Memory::kStages> ring;

    VIVIT_DEVICE VideoCopies(const HopperVideoParams& params, const Memory& shared)
        : p(params), memory(shared), number(static_cast<int32_t>(blockIdx.x)) {}

    VIVIT_DEVICE void next() {
        if (number >= p.tiles) return;
        const VideoTile tile(p, number);
        PhaseBarrier* const full = memory.full + ring.stage;
        char* const stage = memory.stages + ring.stage * Memory::kStageBytes;
        phase_wait(memory.empty + ring.stage, ring.parity ^ 1);
        phase_expect(full, Memory::kStageBytes);
        p.d_out.copy(stage, full, tile.first, kVideoTokens, step * kStep);
        for (int32_t slab = 0; slab < Memory::kSlabs; ++slab) {
            copy_box(stage + Memory::kTokenBytes + slab * Memory::kSlabBytes, p.weight, full,
                     tile.first_k + slab * kSlab, step * kStep);
        }
        ring.advance();
        if (++step < p.steps) return;
        step = 0, number += static_cast<int32_t>(gridDim.x);
    }
};

// 64 tokens of a tile on their way over the channels.
template <class T>
struct VideoProducts {
    using Memory = VideoMemory;
    const HopperVideoParams& p;
    const Memory& memory;
    int32_t group, ahead;  // steps left before the other warpgroup may begin
    bool copies;           // whether this thread asks for operands
    VideoCopies operands;
    GatherRing<Memory::kStages> ring;
    float sums[kVideoTaps / 8][4];

    VIVIT_DEVICE VideoProducts(const HopperVideoParams& params, const Memory& shared, int32_t of_group)
        : p(params),
          memory(shared),
          group(of_group),
          ahead(of_group == 0 ? kAhead : 0),
          copies(threadIdx.x == 128),
          operands(params, shared) {
        if (copies) {
            prefetch_map(p.d_out.map), prefetch_map(p.weight);
            for (int32_t i = 0; i < Memory::kStages; ++i) operands.next();
        }
        if (group > 0) named_wait(1, kGatherThreads);
    }

    VIVIT_DEVICE void multiply(int32_t step) {
        phase_wait(memory.full + ring.stage, ring.parity);
        const char* const stage = memory.stages + ring.stage * Memory::kStageBytes;
        const uint64_t tokens = descriptor(stage + group * (64 * kSlabRowBytes));
        const uint64_t weight = slabs_descriptor(stage + Memory::kTokenBytes, Memory::kSlabBytes);
        group_begin();
#pragma unroll
        for (int s = 0; s < kStep / 16;
             ++s) {  // 16 channels further, 32 bytes in rows of tokens, 16 rows of the weight
            group_along_shared<T, kVideoTaps>(sums, tokens + 2 * s, weight + s * (16 * kSlabRowBytes >> 4),
                                              step > 0 || s > 0);
        }
        group_commit();
        if (ahead > 0) {
            --ahead;
            if (ahead == 0) named_arrive(1, kGatherThreads);
        }
        group_wait<1>();
        if (step > 0) release();
        ring.advance();
    }
    // Says, for a warp, that it is done with the last stage, and asks for more.
    VIVIT_DEVICE void release() {
        const int32_t last = ring.stage == 0 ? Memory::kStages - 1 : ring.stage - 1;
        if (tile_lane() == 0) phase_arrive(memory.empty + last);
        if (copies) operands.next();
    }
    VIVIT_DEVICE void sum() {
        group_settle(sums);
#pragma unroll 1
        for (int32_t step = 0; step < p.steps; ++step) multiply(step);
        group_wait<0>();
        group_settle(sums);
        release();
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
    if (threadIdx.x == 0) memory.make_barriers();
    block_barrier();
    const int32_t group = same_in_warp(static_cast<int32_t>(threadIdx.x) / 128);
    VideoProducts<T> products(p, memory, group);
    for (int32_t number = static_cast<int32_t>(blockIdx.x); number < p.tiles;
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
    if (!has_hopper_kernels() || p.d_out.width < 2 * kStep || VideoMemory::kBytes > most_shared_bytes()) return false;
    const int64_t tokens = plan_boxes(plan.params.d_out, p.d_out, p.places.tubelets, kVideoTokens);
    const int64_t tiles_k = (int64_t{p.places.taps} + kVideoTaps - 1) / kVideoTaps;
    const int64_t tiles = (tokens + kVideoTokens - 1) / kVideoTokens * tiles_k;
    TensorShape weight;
    weight.data = p.weight.first, weight.rank = 2;
    weight.sizes[0] = p.weight.width, weight.sizes[1] = p.weight.count, weight.strides[1] = p.weight.step;
    weight.box[0] = kSlab, weight.box[1] = kStep;
    if (tokens == 0 || tiles > INT32_MAX / 2 || !make_tensor_map(plan.params.weight, weight)) return false;
    plan.params.of = p, plan.params.steps = (p.d_out.width + kStep - 1) / kStep;
    plan.params.tiles_k = Divisor(static_cast<int32_t>(tiles_k)), plan.params.tiles = static_cast<int32_t>(tiles);
    const int32_t multiprocessors = current_multiprocessors();
    plan.blocks = tiles < multiprocessors ? plan.params.tiles : multiprocessors;
    return true;
}

template <class T>
int launch_hopper_video(const HopperVideo& plan, void* stream) {
    return launch(scattering_video_gradient<T>, plan.blocks, kGatherThreads, VideoMemory::kBytes, stream, plan.params);
}

}  // namespace vivit::cuda
