// Forward of tubelet_embedding by Hopper's own instructions: tiles of 128 tubelets by 128 to 256 channels, in steps of
// 64 taps, by a block that stays on its multiprocessor.
//
//   each of two warpgroups       has 64 tubelets: pixels from memory to registers, to numbers of the products, and from
//                                there, never in shared memory, to its products with the ring's weight
//   one thread of the second     asks the copy engine for a step's part of the weight, [kColumns, 64], into a ring
//
// A step of a warpgroup; a product runs on its own from `start` to `wait`:
//
//   start this step's products      (behind those of the last step, if these still run)
//   wait for the last step's        its numbers may be overwritten, its weight may be replaced
//   numbers of the next step, of pixels that have arrived; ask for the pixels of the one after
//
// Why pixels stay in registers. Shared memory gives 128 bytes a cycle. Products of 64 rows read the weight at 64 of
// them, whatever their width. Of a step of 128 x 192 (768 cycles of products) the weight's arrival takes 192 cycles
// more, 576 in all; numbers that lay there, too, would take 128 to write and 128 to read: 832, more than the products.
// Of 128 x 256 1024 of 1024, instead of 768. And what each thread converts it uses itself: no barrier, no fence. The
// price is pairs instead of runs: a lane needs two neighbouring taps of every eight (PTX manual, wgmma, A fragments),
// as four lanes of a row read eight bytes of 16 that eight rows have side by side. The other half comes from the
// first-level cache an instruction later. Runs of 14 bytes cost no more than others.
//
// No GPU has timed it. `python -m bench cuda_model` counts, for 8 clips of ViViT-B/16x2 in uint8 on 132 multiprocessors
// at 1.7 GHz, 768 cycles a step of products, 720 of shared memory, 480 of instructions: at least 65 us. The
// second-level cache has 0.62 GB to give meanwhile, of which 0.46 are the weight: 71 us at 8.7 TB/s, what Triton's
// kernel of 64 x 256 asked of an H200's (tiles.py: 1.04 GB in 119 us), 112 us at 5.5.
//
// Why no clusters that share the weight, yet. A step asks the cache for 32 KB, 845 cycles at 8.7 TB/s and 1337 at 5.5;
// two blocks with one weight would ask for 20 KB each, 528 or 836, so that products bound the kernel at the one, and
// nearly at the other. But a stage then is empty when both blocks say so, each at the other's barrier, and the host
// simulator runs one block at a time: nothing here could show it right.
#pragma once

#include "tubelet_forward.cuh"
#include "tubelet_hopper_ring.cuh"

namespace vivit::cuda {

constexpr int32_t kGatherTile = 64 * kGatherGroups;  // tubelets
constexpr int32_t kPairsOfStep = kStep / 2;

struct HopperForwardParams {
    ForwardParams of;
    TensorMap weight;  // [E, pitch]; boxes of kColumns rows by 64 taps, zeros beyond both
    int32_t steps;     // an even number of them
    Divisor tiles_e;
    int32_t units;  // tiles
};

// Blocks that run at the same time share tubelets, as in tubelet_forward.
template <int kColumns>
struct GatherTile {
    int32_t first_m, first_e;

    VIVIT_DEVICE GatherTile(const HopperForwardParams& p, int32_t number) {
        const int32_t row = p.tiles_e.quotient(number);
        first_m = row * kGatherTile, first_e = (number - row * p.tiles_e.by) * kColumns;
    }
    VIVIT_DEVICE int32_t stages(const HopperForwardParams& p) const { return p.steps; }
    VIVIT_DEVICE void copy(const HopperForwardParams& p, char* to, PhaseBarrier* full, int32_t step) const {
        copy_box(to, p.weight, full, step * kStep, first_e);
    }
};

// Shared memory: a ring of the weight, and where every two taps lie in a tubelet.
template <int kColumns>
struct GatherMemory : RingMemory<kColumns == 256 ? 5 : 6, kColumns * kStep * 2> {
    static constexpr int32_t kBeyond = 2;  // steps that are looked up and of which no pixel is read
    static VIVIT_BOTH int64_t bytes(int64_t steps) {
        return GatherMemory::kRingBytes + (steps + kBeyond) * kPairsOfStep * 4;
    }

    int32_t* const places;  // [steps, 4 lanes, 8 pairs of taps]

    VIVIT_DEVICE GatherMemory() : places(reinterpret_cast<int32_t*>(this->behind())) {}

    // By all threads.
    VIVIT_DEVICE void write_table(const PixelPlaces& of, int32_t steps) const {
        const int32_t count = (steps + kBeyond) * kPairsOfStep;
        for (int32_t i = 4 * static_cast<int32_t>(threadIdx.x); i < count; i += 4 * kGatherThreads) {
            const int32_t step = i / kPairsOfStep, lane = i / 8 % 4, pair = i % 8;
            int32_t four[4];
            for (int32_t j = 0; j < 4; ++j) {
                four[j] = static_cast<int32_t>(of.tap(step * kStep + 8 * (pair + j) + 2 * lane));
            }
            write_places(places + i, four);
        }
    }
};

// x by an instruction, where a load is not to write to what a product still reads: nvcc 13.0 would then wait for each
// product. x 1 - 0, of every x.
template <class T>
VIVIT_DEVICE uint32_t unchanged(uint32_t x);
template <>
VIVIT_DEVICE uint32_t unchanged<Float16>(uint32_t x) {
    return multiply_add_pairs<Float16>(x, 0x3c003c00u, 0x80008000u);
}
template <>
VIVIT_DEVICE uint32_t unchanged<BFloat16>(uint32_t x) {
    return multiply_add_pairs<BFloat16>(x, 0x3f803f80u, 0x80008000u);
}

using StepNumbers = uint32_t[kStep / 16][4];  // a thread's part of [64 tubelets, 64 taps], 16 taps at a time

// A lane 4 g + t of warp w has of 64 tubelets 16 w + g and 16 w + g + 8, and of every eight taps of a step 2 t and the
// next.
template <class T, class Pixel>
struct GatheredPixels {
    static constexpr int kPairs = kStep / 8;
    const PixelPlaces& places;
    const Normalisation& normalisation;
    const int32_t* table;  // of the lane
    const char* tubelet[2];
    uint2 pair[2][kPairs];

    VIVIT_DEVICE GatheredPixels(const ForwardParams& p, const int32_t* in_tubelet)
        : places(p.places), normalisation(p.normalisation), table(in_tubelet + tile_lane() % 4 * kPairs) {}

    // The tubelets of a warpgroup from first_m on; those beyond the last are not stored.
    VIVIT_DEVICE void begin(int32_t first_m) {
        const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32 % 4, m = first_m + 16 * warp + tile_lane() / 4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            tubelet[r] = places.data + places.tubelet(min(m + 8 * r, places.tubelets - 1));
        }
    }
    VIVIT_DEVICE int32_t first_tap(int32_t step) const { return step * kStep + 2 * (tile_lane() % 4); }
    VIVIT_DEVICE void load(int32_t step) {
        const int32_t taps_left = places.taps - first_tap(step);
        int32_t place[4];
#pragma unroll
        for (int c = 0; c < kPairs; ++c) {
            if (c % 4 == 0) read_places(place, table + step * kPairsOfStep + c);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                pair[r][c] = {0u, 0u};
                if (8 * c < taps_left) pair[r][c] = load_neighbours<Pixel>(tubelet[r] + place[c % 4]);
            }
        }
    }
    VIVIT_DEVICE void convert(StepNumbers& numbers, int32_t step) const {
        if constexpr (sizeof(Pixel) > 1) {
            if (normalisation.applies) {
                normalise(numbers, step);
                return;
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * kPairs; ++i) {
            const uint2 x = pair[i % 2][i / 2];
            uint32_t& number = numbers[i / 4][i % 4];
            if constexpr (sizeof(Pixel) == 1) {
                number = centred<T>(x.x, 0);
            } else if constexpr (sizeof(Pixel) == 2) {
                number = unchanged<T>(x.x);
            } else {
                number = packed<T>(__uint_as_float(x.x), __uint_as_float(x.y));
            }
        }
    }
    VIVIT_DEVICE void normalise(StepNumbers& numbers, int32_t step) const {
#pragma unroll
        for (int c = 0; c < kPairs; ++c) {
            const PairAffine affine(places, normalisation, first_tap(step) + 8 * c);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const uint2 x = pair[r][c];
                float2 u;
                if constexpr (sizeof(Pixel) == 4) {
                    u = {__uint_as_float(x.x), __uint_as_float(x.y)};
                } else {
                    u = unpacked<T>(x.x);
                }
                numbers[c / 2][c % 2 * 2 + r] = affine.template number<T>(u);
            }
        }
    }
};

// 64 tubelets of a tile on their way over the taps.
template <class T, class Pixel, int kColumns>
struct GatheredProducts {
    using Memory = GatherMemory<kColumns>;
    const HopperForwardParams& p;
    int32_t group;
    GroupRing<GatherTile<kColumns>, HopperForwardParams, Memory> ring;
    GatheredPixels<T, Pixel> pixels;
    float sums[kColumns / 8][4];

    VIVIT_DEVICE GatheredProducts(const HopperForwardParams& params, const Memory& shared, int32_t of_group)
        : p(params), group(of_group), ring(params, shared, of_group), pixels(params.of, shared.places) {}

    VIVIT_DEVICE void begin(int32_t number) {
        if (number >= p.units) return;
        pixels.begin(GatherTile<kColumns>(p, number).first_m + 64 * group);
        pixels.load(0);
    }
    // Products of `now`; meanwhile `next` becomes the numbers of the next step.
    VIVIT_DEVICE void multiply(StepNumbers& now, StepNumbers& next, int32_t step) {
        ring.wait();
        const uint64_t weight = descriptor(ring.stage());
        group_settle(now);
        group_begin();
#pragma unroll
        for (int s = 0; s < kStep / 16; ++s) {  // 16 taps further, 32 bytes in rows of the weight
            group_across_registers<T, kColumns>(sums, now[s], weight + 2 * s, step > 0 || s > 0);
        }
        group_commit();
        ring.let_other_begin();
        group_wait<1>();
        group_settle(next);
        if (step > 0) ring.release_last();
        ring.advance();
        pixels.convert(next, step + 1);
        pixels.load(step + 2);
    }
    // Of a tile whose first pixels are on their way.
    VIVIT_DEVICE void sum() {
        StepNumbers even, odd = {};
        pixels.convert(even, 0);
        pixels.load(1);
        group_settle(sums);
#pragma unroll 1
        for (int32_t step = 0; step < p.steps; step += 2) {
            multiply(even, odd, step);
            multiply(odd, even, step + 1);
        }
        group_wait<0>();
        group_settle(sums), group_settle(odd);
        ring.release_last();
    }
    VIVIT_DEVICE void store(int32_t number) const {
        const GatherTile<kColumns> at(p, number);
        const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32 % 4;
        const int32_t m = at.first_m + 64 * group + 16 * warp + tile_lane() / 4;
#pragma unroll
        for (int n = 0; n < kColumns / 8; n += 2) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                store_token<T>(p.of, m + 8 * r, at.first_e + 8 * n + traded_column(), traded(sums[n], sums[n + 1], r));
            }
        }
    }
};

template <class T, class Pixel, int kColumns>
__global__ void __launch_bounds__(kGatherThreads, 1)
    gathering_tubelet_forward(const __grid_constant__ HopperForwardParams p) {
#if defined(VIVIT_HOPPER) || defined(VIVIT_SIM)
    const GatherMemory<kColumns> memory;
    if (threadIdx.x == 0) memory.make_barriers(), prefetch_map(p.weight);
    memory.write_table(p.of.places, p.steps);
    block_barrier();
    const int32_t group = same_in_warp(static_cast<int32_t>(threadIdx.x) / 128);
    GatheredProducts<T, Pixel, kColumns> products(p, memory, group);
    const int32_t blocks = static_cast<int32_t>(gridDim.x);
    int32_t number = static_cast<int32_t>(blockIdx.x);
    products.begin(number);
    for (; number < p.units; number += blocks) {
        products.sum();
        products.begin(number + blocks);
        products.store(number);
    }
#endif
}

}  // namespace vivit::cuda
