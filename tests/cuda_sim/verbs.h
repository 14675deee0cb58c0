// The verbs of csrc/cuda/verbs.cuh on a CPU: the same names, the same results, and a check of everything that hardware
// would not complain of (machine.h, memory.h). Fragment layouts: PTX manual 9.7.14, derived again below; no code is
// shared with the device's.
#pragma once

#include "builtins.h"
#include "groups.h"
#include "machine.h"
#include "memory.h"

#define VIVIT_DEVICE inline
#define VIVIT_BOTH constexpr

// The caller's file and line as two arguments that nobody writes.
#define VIVIT_SIM_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace vivit::cuda {

// ---- numbers ----

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

namespace sim {

inline uint16_t rounded(float x, BFloat16) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline uint16_t rounded(float x, Float16) {
    const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
    const uint32_t sign = (bits >> 16) & 0x8000u;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above: infinite
    if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, to which the addition rounds, ties to even
        const uint32_t sum = __float_as_uint(__uint_as_float(magnitude) + 0.5f);
        return static_cast<uint16_t>(sign | (sum - 0x3f000000u));
    }
    const uint32_t shifted = magnitude - 0x38000000u;  // exponents of 15 instead of 127
    return static_cast<uint16_t>(sign | ((shifted + 0xfffu + ((shifted >> 13) & 1u)) >> 13));
}

inline float widened(uint16_t bits, BFloat16) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

inline float widened(uint16_t bits, Float16) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    if (magnitude < 0x400u) {
        const float x = static_cast<float>(magnitude) * 0x1p-24f;
        return sign ? -x : x;
    }
    return __uint_as_float(sign | ((magnitude << 13) + 0x38000000u));
}

}  // namespace sim

template <class T>
uint32_t packed(float first, float second) {
    return sim::rounded(first, T()) | static_cast<uint32_t>(sim::rounded(second, T())) << 16;
}

template <class T>
float2 unpacked(uint32_t both) {
    return {sim::widened(static_cast<uint16_t>(both), T()), sim::widened(static_cast<uint16_t>(both >> 16), T())};
}

// Subnormal numbers are zeros of their sign, in x and in the result.
inline float exp2_fast(float x) {
    const float y = std::exp2(std::fpclassify(x) == FP_SUBNORMAL ? 0.f : x);
    return y < 0x1p-126f ? 0.f : y;
}

inline float log2_fast(float x) { return std::log2(std::fpclassify(x) == FP_SUBNORMAL ? 0.f : x); }

// ---- a warp's matrices ----

namespace sim {

// The numbers of a warp's registers as rows: lane l holds in a block of 8 x 8 row l / 4, columns 2 (l % 4) and the
// next.
template <class T>
void place_block(float* matrix, int stride, uint32_t both, int lane, bool turned) {
    const int row = lane / 4, column = 2 * (lane % 4);
    const float2 x = unpacked<T>(both);
    const int step = turned ? stride : 1;
    float* at = turned ? matrix + column * stride + row : matrix + row * stride + column;
    at[0] = x.x, at[step] = x.y;
}

template <class T>
struct MultiplyAdd {
    float* d;
    const uint32_t* a;
    uint32_t b0, b1;

    static void work(const Site&, void* const* lanes) {
        float a[16][16], b[16][8], d[16][8];
        for (int lane = 0; lane < kLanes; ++lane) {
            const auto& mine = *static_cast<const MultiplyAdd*>(lanes[lane]);
            for (int i = 0; i < 4; ++i) place_block<T>(&a[i % 2 * 8][i / 2 * 8], 16, mine.a[i], lane, false);
            place_block<T>(&b[0][0], 8, mine.b0, lane, true);
            place_block<T>(&b[8][0], 8, mine.b1, lane, true);
            for (int i = 0; i < 4; ++i) d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = mine.d[i];
        }
        // Products of 16 bits are exact in float32. The manual leaves the order of the sum open: here k rises, from d.
        for (int m = 0; m < 16; ++m)
            for (int k = 0; k < 16; ++k)
                for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
        for (int lane = 0; lane < kLanes; ++lane) {
            float* mine = static_cast<const MultiplyAdd*>(lanes[lane])->d;
            for (int i = 0; i < 4; ++i) mine[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
        }
    }
};

inline uint16_t half_of(uint32_t both, int i) { return static_cast<uint16_t>(both >> (16 * i)); }

inline void turn_block(const Site&, void* const* lanes) {
    uint16_t block[8][8];
    for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < 2; ++i)
            block[lane / 4][lane % 4 * 2 + i] = half_of(*static_cast<const uint32_t*>(lanes[lane]), i);
    for (int lane = 0; lane < kLanes; ++lane) {
        const int row = lane / 4, column = lane % 4 * 2;
        *static_cast<uint32_t*>(lanes[lane]) = block[column][row] | static_cast<uint32_t>(block[column + 1][row]) << 16;
    }
}

struct LoadBlocks {
    uint32_t* block;
    const void* row;

    template <bool kTransposed>
    static void work(const Site& site, void* const* lanes) {
        for (int i = 0; i < 4; ++i) {
            uint16_t block[8][8];
            for (int row = 0; row < 8; ++row) {
                const void* from = static_cast<const LoadBlocks*>(lanes[8 * i + row])->row;
                read_shared(site, from);
                std::memcpy(block[row], from, 16);
            }
            for (int lane = 0; lane < kLanes; ++lane) {
                const int g = lane / 4, t = lane % 4 * 2;
                const uint32_t first = kTransposed ? block[t][g] : block[g][t];
                const uint32_t second = kTransposed ? block[t + 1][g] : block[g][t + 1];
                static_cast<const LoadBlocks*>(lanes[lane])->block[i] = first | second << 16;
            }
        }
    }
};

template <class T>
struct FromLane {
    T x, result;
    int mask;

    static void work(const Site& site, void* const* lanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            auto& mine = *static_cast<FromLane*>(lanes[lane]);
            if (mine.mask < 0 || mine.mask >= kLanes) fail(site, "mask " + std::to_string(mine.mask));
            mine.result = static_cast<const FromLane*>(lanes[lane ^ mine.mask])->x;
        }
    }
};

struct SameInWarp {
    int32_t x, result;

    static void work(const Site& site, void* const* lanes) {
        const int32_t first = static_cast<const SameInWarp*>(lanes[0])->x;
        for (int lane = 0; lane < kLanes; ++lane) {
            auto& mine = *static_cast<SameInWarp*>(lanes[lane]);
            if (mine.x != first) fail(site, "lane " + std::to_string(lane) + " has another number than lane 0");
            mine.result = first;
        }
    }
};

struct LanesWhere {
    bool x;
    uint32_t result;

    static void work(const Site&, void* const* lanes) {
        uint32_t found = 0;
        for (int lane = 0; lane < kLanes; ++lane) {
            if (static_cast<const LanesWhere*>(lanes[lane])->x) found |= 1u << lane;
        }
        for (int lane = 0; lane < kLanes; ++lane) static_cast<LanesWhere*>(lanes[lane])->result = found;
    }
};

}  // namespace sim

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, VIVIT_SIM_CALLER) {
    sim::MultiplyAdd<T> mine{d, a, b0, b1};
    sim::together({"multiply_add", file, line}, &mine, sim::MultiplyAdd<T>::work);
}

inline uint32_t transposed(uint32_t block, VIVIT_SIM_CALLER) {
    sim::together({"transposed", file, line}, &block, sim::turn_block);
    return block;
}

inline void load_blocks(uint32_t (&block)[4], const void* row, VIVIT_SIM_CALLER) {
    sim::LoadBlocks mine{block, row};
    sim::together({"load_blocks", file, line}, &mine, sim::LoadBlocks::work<false>);
}

inline void load_blocks_transposed(uint32_t (&block)[4], const void* row, VIVIT_SIM_CALLER) {
    sim::LoadBlocks mine{block, row};
    sim::together({"load_blocks_transposed", file, line}, &mine, sim::LoadBlocks::work<true>);
}

inline float from_lane_xor(float x, int mask, VIVIT_SIM_CALLER) {
    sim::FromLane<float> mine{x, 0.f, mask};
    sim::together({"from_lane_xor", file, line}, &mine, sim::FromLane<float>::work);
    return mine.result;
}
inline uint32_t from_lane_xor(uint32_t x, int mask, VIVIT_SIM_CALLER) {
    sim::FromLane<uint32_t> mine{x, 0u, mask};
    sim::together({"from_lane_xor", file, line}, &mine, sim::FromLane<uint32_t>::work);
    return mine.result;
}

inline int32_t same_in_warp(int32_t x, VIVIT_SIM_CALLER) {
    sim::SameInWarp mine{x, 0};
    sim::together({"same_in_warp", file, line}, &mine, sim::SameInWarp::work);
    return mine.result;
}

inline uint32_t lanes_where(bool x, VIVIT_SIM_CALLER) {
    sim::LanesWhere mine{x, 0};
    sim::together({"lanes_where", file, line}, &mine, sim::LanesWhere::work);
    return mine.result;
}

inline void warp_barrier(VIVIT_SIM_CALLER) {
    sim::together({"warp_barrier", file, line}, nullptr,
                  [](const sim::Site&, void* const*) { sim::pass_warp_barrier(); });
}

inline void block_barrier(VIVIT_SIM_CALLER) { sim::wait_for_block({"block_barrier", file, line}); }

// ---- memory ----

inline uint4 load_16(const void* from, bool valid, VIVIT_SIM_CALLER) {
    uint4 x = {0u, 0u, 0u, 0u};
    if (valid) {
        sim::check_global({"load_16", file, line}, from, 16, false);
        std::memcpy(&x, from, 16);
    }
    return x;
}

inline void store_16(void* to, uint4 x, VIVIT_SIM_CALLER) {
    const sim::Site site = {"store_16", file, line};
    sim::is_shared(to) ? sim::write_shared(site, to) : sim::check_global(site, to, 16, true);
    std::memcpy(to, &x, 16);
}

template <class T>
T load_one(const T* from, VIVIT_SIM_CALLER) {
    sim::check_global({"load_one", file, line}, from, sizeof(T), false);
    return *from;
}

inline void store_8(void* to, uint2 x, VIVIT_SIM_CALLER) {
    sim::check_global({"store_8", file, line}, to, 8, true);
    std::memcpy(to, &x, 8);
}

inline void store_one(float* to, float x, VIVIT_SIM_CALLER) {
    sim::check_global({"store_one", file, line}, to, 4, true);
    *to = x;
}

inline void read_four(float (&x)[4], const float* from, VIVIT_SIM_CALLER) {
    sim::read_shared({"read_four", file, line}, from, 1);
    std::memcpy(x, from, 16);
}
inline void write_four(float* to, const float (&x)[4], VIVIT_SIM_CALLER) {
    sim::write_shared({"write_four", file, line}, to);
    std::memcpy(to, x, 16);
}

inline void copy_16(void* to_shared, const void* from, bool valid, VIVIT_SIM_CALLER) {
    sim::start_copy({"copy_16", file, line}, to_shared, from, valid);
}
inline void copies_commit() { sim::commit_copies(); }
template <int kLater>
void copies_wait() {
    sim::wait_for_copies(kLater);
}

inline char* shared_memory() { return sim::shared_memory(); }

// ---- a warpgroup's matrices ----

inline void group_begin(VIVIT_SIM_CALLER) { sim::begin_products({"group_begin", file, line}); }
inline void group_commit(VIVIT_SIM_CALLER) { sim::commit_products({"group_commit", file, line}); }
template <int kLater>
void group_wait(VIVIT_SIM_CALLER) {
    sim::wait_for_products({"group_wait", file, line}, kLater);
}
// What a compiler must not move; here everything stays where it is written.
template <class T, int kCount>
void group_settle(T (&)[kCount][4]) {}
inline void group_fence(VIVIT_SIM_CALLER) { sim::fence_accesses({"group_fence", file, line}); }

inline uint64_t descriptor(const void* operand, VIVIT_SIM_CALLER) {
    return sim::describe_operand({"descriptor", file, line}, operand);
}

template <class T, int kColumns>
void group_across_step(float (&x)[kColumns / 8][4], uint64_t a, uint64_t b, bool keep, VIVIT_SIM_CALLER) {
    static_assert((kColumns >= 64 && kColumns <= 256 && kColumns % 16 == 0) || kColumns == 48 || kColumns == 32 ||
                  kColumns == 16);
    sim::Product mine{x[0],     nullptr, a,    b,
                      kColumns, false,   keep, [](uint16_t bits) { return sim::widened(bits, T()); }};
    sim::start_product({"group_across_step", file, line}, mine);
}

template <class T>
void group_along(float (&x)[8][4], const uint32_t (&a)[4], uint64_t b, VIVIT_SIM_CALLER) {
    sim::Product mine{x[0], a, 0, b, 64, true, true, [](uint16_t bits) { return sim::widened(bits, T()); }};
    sim::start_product({"group_along", file, line}, mine);
}

// ---- launching ----

template <class Params>
int launch(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, void*, const Params& params) {
    struct Call {
        void (*kernel)(Params);
        const Params& params;
    } call{kernel, params};
    const auto run = [](const void* data) {
        const Call& mine = *static_cast<const Call*>(data);
        mine.kernel(mine.params);
    };
    return sim::launch_blocks(run, &call, blocks, threads, shared_bytes);
}

inline int current_arch() { return sim::schedule.arch; }
inline bool has_hopper_kernels() { return current_arch() == 90; }
inline int most_shared_bytes() { return sim::schedule.most_shared_bytes; }

}  // namespace vivit::cuda
