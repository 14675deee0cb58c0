// The weight's gradient of tubelet_embedding by Hopper's own instructions, dout^T tubelets: tiles of 256 taps by 128
// channels of a part of the tokens, in steps of 32 of them, by a block that stays on its multiprocessor.
//
//   each of two warpgroups       has 128 taps: pixels from memory to registers, to numbers of the products, and from
//                                there, never in shared memory, to its products with the ring's dout
//   one thread of the second     asks the copy engine for two steps' part of dout, [64, 128], into a ring
//
// A step of a warpgroup goes as in tubelet_hopper.cuh: start its products, wait for the last step's, make the numbers
// of the next of pixels that have arrived, ask for others.
//
// Why the taps are the rows of the product and stay in registers. What is summed over are tokens. Of dout a token's
// channels lie side by side, of pixels a tubelet's taps: either operand lies the wrong way round. Shared memory gives
// 16 bits the other way round, so that dout arrives as it is. Of registers a lane needs two tokens of one tap side by
// side: it has them, of two neighbours of one tubelet and the same two of the next, by one exchange of bytes or halves,
// which for bytes is the one that widens them anyway. Which tap is which row of a product is free: a lane's rows g and
// g + 8 of two products are four taps in a row, so that it stores 16 bytes of a part.
//
// Where tubelets begin each warp looks up for two steps, two a lane, and reads it back as it needs it. No class row
// takes part (tubelet_hopper_boxes.cuh): tokens that are not there are zero in dout.
//
// Parts differ by two steps at most; none is empty, for there are no more of them than pairs of steps. Blocks that run
// at the same time have the same part: they share its video and its dout, which memory then gives once. Sums over dout
// for bias, position and class row stay a kernel of their own (tubelet_parameters.cuh): a position is summed over
// clips, which no tile here sees together, and what it has read this kernel may find in the second-level cache.
//
// No GPU has timed it. `python -m bench cuda_model` counts, for a step in uint8, 512 cycles of products, 480 of shared
// memory (dout for the products 256, its arrival 64, pixels 128, where tubelets begin 32), 454 of instructions: at
// least 67 us for 8 clips of ViViT-B/16x2 on 132 multiprocessors at 1.7 GHz, 64 of which are products, and with what
// memory bounds beside it 91, 71 % of products alone. float32 is bounded by shared memory, 608 cycles. Of the
// second-level cache a step asks 16 KB in uint8, 24 in 16 bits: 7.2 TB/s, or 10.8, at that rate. At 8.7 TB/s (see
// tubelet_hopper.cuh) 16 bits take 635 cycles; two blocks of a cluster that share dout would ask for 20 KB.
#pragma once

#include "tubelet_hopper.cuh"
#include "tubelet_hopper_boxes.cuh"

namespace vivit::cuda {

constexpr int32_t kWeightChannels = 128, kWeightTaps = 128 * kGatherGroups;  // of a tile
constexpr int32_t kWeightStep = 32, kStepPair = 2 * kWeightStep;             // tokens
constexpr int32_t kWeightSlabBytes = kStepPair * kSlabRowBytes;              // of dout, [64 tokens, 64 channels]

struct HopperWeightsParams {
    WeightGradientParams of;
    BoxedTokens d_out;
    int32_t pairs, more;  // of steps: those of a part, and how many parts have one more
    Divisor tiles_k, tiles;
    int32_t units;  // tiles of all parts
};

// A tile of a part, the part slowest.
struct WeightUnit {
    int32_t part, first_k, first_e, first_pair, pairs;

    VIVIT_DEVICE WeightUnit(const HopperWeightsParams& p, int32_t number) {
        part = p.tiles.quotient(number);
        const int32_t tile = number - part * p.tiles.by, row = p.tiles_k.quotient(tile);
        first_k = (tile - row * p.tiles_k.by) * kWeightTaps, first_e = row * kWeightChannels;
        first_pair = part * p.pairs + min(part, p.more), pairs = p.pairs + (part < p.more ? 1 : 0);
    }
    VIVIT_DEVICE int32_t stages(const HopperWeightsParams&) const { return pairs; }
    VIVIT_DEVICE void copy(const HopperWeightsParams& p, char* to, PhaseBarrier* full, int32_t pair) const {
        for (int32_t slab = 0; slab < 2; ++slab) {
            p.d_out.copy(to + slab * kWeightSlabBytes, full, (first_pair + pair) * kStepPair, kStepPair,
                         first_e + slab * kSlab);
        }
    }
    // Of four.
    VIVIT_DEVICE int32_t first_tap_of_lane() const {
        return first_k + static_cast<int32_t>(threadIdx.x) / 32 * 32 + tile_lane() / 4 * 4;
    }
};

// Shared memory: a ring of dout, [2 slabs, 64 tokens, 64 channels], and where tubelets begin.
struct WeightMemory : RingMemory<8, 2 * kWeightSlabBytes> {
    static constexpr int32_t kBeginsOfWarp = 2 * kStepPair;
    static constexpr int32_t kBytes = kRingBytes + kGatherThreads / 32 * kBeginsOfWarp * 8;

    int64_t* const begins;  // of the warp

    VIVIT_DEVICE WeightMemory()
        : begins(reinterpret_cast<int64_t*>(behind()) + static_cast<int32_t>(threadIdx.x) / 32 * kBeginsOfWarp) {}
};

// A lane 4 g + t of warp w of the block has of 16 tokens 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, of a tile's taps
// 32 w + 4 g to 32 w + 4 g + 3: two pairs, row g and g + 8 of two products. Taps beyond the last are read as the first,
// and their sums by nobody.
template <class T, class Pixel>
struct PixelsOfTaps {
    // Steps that pixels are asked for ahead; of float32 there are no registers for two.
    static constexpr int kSets = sizeof(Pixel) == 4 ? 1 : 2;
    using Set = uint2[2][4][2];  // [16 tokens][token][pair]
    const HopperWeightsParams& p;
    int64_t* const begins;
    int32_t first = 0;  // token of the part, as they come in boxes
    int32_t first_tap = 0;
    const char* tap[2];
    Set set[kSets];

    VIVIT_DEVICE PixelsOfTaps(const HopperWeightsParams& params, const WeightMemory& memory)
        : p(params), begins(memory.begins) {}

    VIVIT_DEVICE void begin(const WeightUnit& unit) {
        first_tap = unit.first_tap_of_lane();
#pragma unroll
        for (int j = 0; j < 2; ++j) tap[j] = p.of.places.data + p.of.places.tap(tap_of(j));
        first = unit.first_pair * kStepPair;
        warp_barrier();
        look_ahead(0);
        load<false>(0);
        if constexpr (kSets == 2) load<true>(1);
    }
    VIVIT_DEVICE int32_t tap_of(int pair) const {
        const int32_t k = first_tap + 2 * pair;
        return k < p.of.places.taps ? k : 0;
    }
    // Writes where the tubelets of two steps begin.
    VIVIT_DEVICE void look_ahead(int32_t pair) const {
        const int32_t at = first + pair * kStepPair + 2 * tile_lane();
        int64_t* const to = begins + pair % 2 * kStepPair + 2 * tile_lane();
        write_offsets(to, p.of.places.tubelet(p.d_out.tubelet(at)), p.of.places.tubelet(p.d_out.tubelet(at + 1)));
    }
    template <bool kOdd>
    VIVIT_DEVICE void load(int32_t step) {
        if constexpr (!kOdd) {
            warp_barrier();  // what was looked up is there, and what lay in the other place has been read
            look_ahead(step / 2 + 1);
        }
        const int64_t* from = begins + step / 2 % 2 * kStepPair + (kOdd ? kWeightStep : 0);
        Set& to = set[kOdd ? kSets - 1 : 0];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int64_t two[2];
            read_offsets(two, from + 8 * i + 2 * (tile_lane() % 4));
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                to[i / 2][i % 2 * 2 + n / 2][n % 2] = load_neighbours<Pixel>(tap[n % 2] + two[n / 2]);
            }
        }
    }
    // Of two tubelets x and y their first taps of a pair, and their others.
    VIVIT_DEVICE void pair_up(uint32_t& first_ones, uint32_t& others, uint2 x, uint2 y) const {
        if constexpr (sizeof(Pixel) == 1) {  // the bytes above are zero
            first_ones = less_128<T>(select_bytes(x.x, y.x, 0x2420) | (kAboveByte<T> & 0xff00ff00u));
            others = less_128<T>(select_bytes(x.x, y.x, 0x2521) | (kAboveByte<T> & 0xff00ff00u));
        } else if constexpr (sizeof(Pixel) == 2) {
            first_ones = select_bytes(x.x, y.x, 0x5410), others = select_bytes(x.x, y.x, 0x7632);
        } else {
            first_ones = packed<T>(__uint_as_float(x.x), __uint_as_float(y.x));
            others = packed<T>(__uint_as_float(x.y), __uint_as_float(y.y));
        }
    }
    VIVIT_DEVICE void normalise(uint32_t& first_ones, uint32_t& others, uint2 x, uint2 y, const PairAffine& of) const {
        float2 u, v;
        if constexpr (sizeof(Pixel) == 4) {
            u = {__uint_as_float(x.x), __uint_as_float(x.y)}, v = {__uint_as_float(y.x), __uint_as_float(y.y)};
        } else {
            u = unpacked<T>(x.x), v = unpacked<T>(y.x);
        }
        first_ones = packed<T>(u.x * of.scale.x + of.shift.x, v.x * of.scale.x + of.shift.x);
        others = packed<T>(u.y * of.scale.y + of.shift.y, v.y * of.scale.y + of.shift.y);
    }
    template <bool kOdd>
    VIVIT_DEVICE void convert(StepNumbers& numbers) const {
        const Set& from = set[kOdd ? kSets - 1 : 0];
        if constexpr (sizeof(Pixel) > 1) {
            if (p.of.normalisation.applies) {
#pragma unroll
                for (int pair = 0; pair < 2; ++pair) {
                    const PairAffine affine(p.of.places, p.of.normalisation, tap_of(pair));
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const uint2(&tokens)[4][2] = from[i / 2];
                        uint32_t (&to)[4] = numbers[i / 2 * 2 + pair];
                        normalise(to[i % 2 * 2], to[i % 2 * 2 + 1], tokens[i % 2 * 2][pair],
                                  tokens[i % 2 * 2 + 1][pair], affine);
                    }
                }
                return;
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint2(&tokens)[4][2] = from[i / 4];
            uint32_t (&to)[4] = numbers[i / 4 * 2 + i % 2];
            const int two = i / 2 % 2 * 2;
            pair_up(to[two], to[two + 1], tokens[two][i % 2], tokens[two + 1][i % 2]);
        }
    }
};

// 128 taps of a tile on their way over the tokens.
template <class T, class Pixel>
struct WeightProducts {
    static constexpr uint64_t kNextTokens = 16 * kSlabRowBytes >> 4;  // of a product, in a descriptor
    const HopperWeightsParams& p;
    GroupRing<WeightUnit, HopperWeightsParams, WeightMemory> ring;
    PixelsOfTaps<T, Pixel> pixels;
    float sums[2][kWeightChannels / 8][4];  // of a pair of every four taps each

    VIVIT_DEVICE WeightProducts(const HopperWeightsParams& params, const WeightMemory& shared, int32_t group)
        : p(params), ring(params, shared, group), pixels(params, shared) {}

    VIVIT_DEVICE void begin(int32_t number) {
        if (number < p.units) pixels.begin(WeightUnit(p, number));
    }
    // Products of `now`; meanwhile `next` becomes the numbers of the next step.
    template <bool kOdd>
    VIVIT_DEVICE void multiply(StepNumbers& now, StepNumbers& next, int32_t step) {
        constexpr int kSets = PixelsOfTaps<T, Pixel>::kSets;
        if constexpr (!kOdd) ring.wait();
        const uint64_t d_out = slabs_descriptor(ring.stage(), kWeightSlabBytes) + (kOdd ? 2 * kNextTokens : 0);
        group_settle(now);
        group_begin();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            group_along_registers<T, kWeightChannels>(sums[i % 2], now[i], d_out + i / 2 * kNextTokens,
                                                      step > 0 || i / 2 > 0);
        }
        group_commit();
        ring.let_other_begin();
        group_wait<1>();
        group_settle(next);
        if constexpr (kOdd) {
            ring.advance();
        } else if (step > 0) {
            ring.release_last();
        }
        pixels.template convert<!kOdd>(next);
        pixels.template load<(kOdd + 1 + kSets) % 2 == 1>(step + 1 + kSets);
    }
    // Of a unit whose first pixels are on their way.
    VIVIT_DEVICE void sum(int32_t steps) {
        constexpr int kSets = PixelsOfTaps<T, Pixel>::kSets;
        StepNumbers even, odd = {};
        pixels.template convert<false>(even);
        pixels.template load<kSets % 2 == 1>(kSets);
        group_settle(sums[0]), group_settle(sums[1]);
#pragma unroll 1
        for (int32_t step = 0; step < steps; step += 2) {
            multiply<false>(even, odd, step);
            multiply<true>(odd, even, step + 1);
        }
        group_wait<0>();
        group_settle(sums[0]), group_settle(sums[1]), group_settle(odd);
        ring.release_last();
    }
    VIVIT_DEVICE void store(const WeightUnit& unit) const {
        const int32_t k = unit.first_tap_of_lane(), E = p.of.d_out.width;
        if (k >= p.of.pitch) return;
#pragma unroll
        for (int n = 0; n < kWeightChannels / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int32_t e = unit.first_e + 8 * n + tile_lane() % 4 * 2 + i;
                if (e >= E) continue;
                float* to = p.of.parts + (static_cast<int64_t>(unit.part) * E + e) * p.of.pitch + k;
                store_16(to, {__float_as_uint(sums[0][n][i]), __float_as_uint(sums[0][n][i + 2]),
                              __float_as_uint(sums[1][n][i]), __float_as_uint(sums[1][n][i + 2])});
            }
        }
    }
};

template <class T, class Pixel>
__global__ void __launch_bounds__(kGatherThreads, 1)
    gathering_weight_gradient(const __grid_constant__ HopperWeightsParams p) {
#if defined(VIVIT_HOPPER) || defined(VIVIT_SIM)
    const WeightMemory memory;
    if (threadIdx.x == 0) memory.make_barriers(), prefetch_map(p.d_out.map);
    block_barrier();
    const int32_t group = same_in_warp(static_cast<int32_t>(threadIdx.x) / 128);
    WeightProducts<T, Pixel> products(p, memory, group);
    const int32_t blocks = static_cast<int32_t>(gridDim.x);
    int32_t number = static_cast<int32_t>(blockIdx.x);
    products.begin(number);
    for (; number < p.units; number += blocks) {
        const WeightUnit unit(p, number);
        products.sum(2 * unit.pairs);
        products.begin(number + blocks);
        products.store(unit);
    }
#endif
}

}  // namespace vivit::cuda
