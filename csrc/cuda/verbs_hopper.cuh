// What runs on its own on Hopper (sm_90a), by name: barriers with phases, copies of boxes of a tensor, barriers of some
// of a block's warps, registers that warps pass on. PTX manual: mbarrier (9.7.13.15), tensor copies (9.7.9.25), bar,
// setmaxnreg. The host simulator has twins of the same names (tests/cuda_sim/verbs_hopper.h).
#pragma once

#include "tensor_map.h"
#include "verbs.cuh"

#if defined(VIVIT_SIM)
#include "cuda_sim/verbs_hopper.h"
#else

namespace vivit::cuda {

// ---- barriers with phases ----
// In shared memory. Phase 0, 1, ...: each is over when as many arrivals came as the barrier was made for, and all bytes
// that they announced; the next begins by itself. One waits for a phase by its parity, number % 2: a wait for the
// parity 1 of a new barrier, of a phase before the first, is over at once.

struct alignas(8) PhaseBarrier {
    uint64_t word;
};

VIVIT_DEVICE uint32_t address_of(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

VIVIT_DEVICE void phase_init(PhaseBarrier* barrier, int32_t arrivals) {
#if defined(VIVIT_HOPPER)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(barrier)), "r"(arrivals) : "memory");
#endif
}
// In the thread that made barriers, before the block barrier behind which others, and copies, use them.
VIVIT_DEVICE void phase_fence() {
#if defined(VIVIT_HOPPER)
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// What the thread did before is done for who waits for the phase.
VIVIT_DEVICE void phase_arrive(PhaseBarrier* barrier) {
#if defined(VIVIT_HOPPER)
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(barrier)) : "memory");
#endif
}
// The same, and the phase is not over before copies have brought so many bytes more.
VIVIT_DEVICE void phase_expect(PhaseBarrier* barrier, int32_t bytes) {
#if defined(VIVIT_HOPPER)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(barrier)), "r"(bytes)
                 : "memory");
#endif
}
VIVIT_DEVICE void phase_wait(PhaseBarrier* barrier, uint32_t parity) {
#if defined(VIVIT_HOPPER)
    asm volatile(
        "{\n.reg .pred over;\nlook:\nmbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
        "@over bra done;\nbra look;\ndone:\n}" ::"r"(address_of(barrier)),
        "r"(parity)
        : "memory");
#endif
}

// ---- copies of boxes ----

// What the copy engine knows of a tensor: tensor_map.h makes it. A kernel has it in its parameters, which are then
// __grid_constant__.
VIVIT_DEVICE void prefetch_map(const TensorMap& map) {
#if defined(VIVIT_HOPPER)
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// The box whose first element has these coordinates (the neighbours' first), to shared memory: rows of 128, 64 or 32
// bytes, as the map says, one behind the other from a multiple of eight of them on, swizzled as products of a warpgroup
// take them; zeros for what lies outside of the tensor. All of the box's bytes, zeros too, count in the current phase
// of the barrier, which is to expect them. One thread asks; no fence is needed before products. Before a box comes
// where threads read or wrote by themselves, each of them has fenced that (group_fence).
VIVIT_DEVICE void copy_box(void* to, const TensorMap& map, PhaseBarrier* barrier, int32_t c0, int32_t c1) {
#if defined(VIVIT_HOPPER)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(address_of(to)),
        "l"(&map), "r"(address_of(barrier)), "r"(c0), "r"(c1)
        : "memory");
#endif
}
VIVIT_DEVICE void copy_box(void* to, const TensorMap& map, PhaseBarrier* barrier, int32_t c0, int32_t c1, int32_t c2) {
#if defined(VIVIT_HOPPER)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(address_of(to)),
        "l"(&map), "r"(address_of(barrier)), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
#endif
}
VIVIT_DEVICE void copy_box(void* to, const TensorMap& map, PhaseBarrier* barrier, int32_t c0, int32_t c1, int32_t c2,
                           int32_t c3) {
#if defined(VIVIT_HOPPER)
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(address_of(to)),
        "l"(&map), "r"(address_of(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
#endif
}
VIVIT_DEVICE void copy_box(void* to, const TensorMap& map, PhaseBarrier* barrier, int32_t c0, int32_t c1, int32_t c2,
                           int32_t c3, int32_t c4) {
#if defined(VIVIT_HOPPER)
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(address_of(to)),
        "l"(&map), "r"(address_of(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
#endif
}

// ---- products of more shapes ----

// An operand in rows of 64 or 32 bytes instead of 128, from a multiple of eight rows on: chunk c of 16 bytes of row r
// at place c xor (r / 2 mod 4), or c xor (r / 4 mod 2) (PTX manual, matrix descriptors of wgmma, and the swizzles of
// tensor copies). A head of 80 channels is so 64 in wide rows and 16 in narrow ones: neither memory nor products are
// padded.
template <int kRowBytes>
VIVIT_DEVICE uint64_t narrow_descriptor(const void* operand) {
    static_assert(kRowBytes == 64 || kRowBytes == 32);
    constexpr uint64_t kSwizzle = kRowBytes == 64 ? 2 : 3, kEightRows = 8 * kRowBytes;
    return kSwizzle << 62 | (kEightRows >> 4) << 32 | static_cast<uint64_t>(1) << 16 |
           ((address_of(operand) & 0x3ffff) >> 4);
}

// x [64, columns] += a b over 16 rows: a in registers, b at its descriptor, rows of 64, 32 or 16 channels.
template <class T, int kColumns>
VIVIT_DEVICE void group_along_step(float (&x)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b);

#if defined(VIVIT_HOPPER)
#define VIVIT_40(x) VIVIT_32(x), VIVIT_FOUR(x, 8), VIVIT_FOUR(x, 9)
#define VIVIT_48(x) VIVIT_40(x), VIVIT_FOUR(x, 10), VIVIT_FOUR(x, 11)
#define VIVIT_56(x) VIVIT_48(x), VIVIT_FOUR(x, 12), VIVIT_FOUR(x, 13)
#define VIVIT_88(x)                                                                                             \
    VIVIT_64(x), VIVIT_FOUR(x, 16), VIVIT_FOUR(x, 17), VIVIT_FOUR(x, 18), VIVIT_FOUR(x, 19), VIVIT_FOUR(x, 20), \
        VIVIT_FOUR(x, 21)
#define VIVIT_NAMES_40 VIVIT_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define VIVIT_NAMES_48 VIVIT_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define VIVIT_NAMES_56 VIVIT_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define VIVIT_NAMES_88                                                                        \
    VIVIT_NAMES_64                                                                            \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
    "%81, %82, %83, %84, %85, %86, %87"
#define VIVIT_ALONG_STEP(Type, name, columns, count, places, b_place)                                               \
    template <>                                                                                                     \
    VIVIT_DEVICE void group_along_step<Type, columns>(float (&x)[columns / 8][4], const uint32_t (&a)[4],           \
                                                      uint64_t b) {                                                 \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name "." name " {" VIVIT_NAMES_##count \
                     "}, {" places "}, " b_place ", 1, 1, 1, 1;"                                                    \
                     : VIVIT_##count(x)                                                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                         \
    }
#define VIVIT_MORE_OF_GROUP(Type, name)                               \
    VIVIT_ACROSS(Type, name, 176, 88, "%88", "%89", "%90")            \
    VIVIT_ACROSS(Type, name, 112, 56, "%56", "%57", "%58")            \
    VIVIT_ACROSS(Type, name, 96, 48, "%48", "%49", "%50")             \
    VIVIT_ACROSS(Type, name, 80, 40, "%40", "%41", "%42")             \
    VIVIT_ALONG_STEP(Type, name, 64, 32, "%32, %33, %34, %35", "%36") \
    VIVIT_ALONG_STEP(Type, name, 32, 16, "%16, %17, %18, %19", "%20") \
    VIVIT_ALONG_STEP(Type, name, 16, 8, "%8, %9, %10, %11", "%12")
VIVIT_MORE_OF_GROUP(BFloat16, "bf16")
VIVIT_MORE_OF_GROUP(Float16, "f16")
#else  // never launched there
template <class T, int kColumns>
VIVIT_DEVICE void group_along_step(float (&)[kColumns / 8][4], const uint32_t (&)[4], uint64_t) {}
#endif

// ---- products ----

// As group_across_step of verbs.cuh, a in registers: [64, 16], four blocks in each warp. Shared memory is then read for
// b alone. x has 64 columns.
template <class T, int kColumns>
VIVIT_DEVICE void group_across_step(float (&x)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b, bool keep);

#if defined(VIVIT_HOPPER)
#define VIVIT_ACROSS_FROM_REGISTERS(Type, name)                                                                      \
    template <>                                                                                                      \
    VIVIT_DEVICE void group_across_step<Type, 64>(float (&x)[8][4], const uint32_t (&a)[4], uint64_t b, bool keep) { \
        asm volatile(                                                                                                \
            "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                             \
            "wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " {" VIVIT_NAMES_32                          \
            "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"                                                           \
            : VIVIT_32(x)                                                                                            \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(keep)));                      \
    }
VIVIT_ACROSS_FROM_REGISTERS(BFloat16, "bf16")
VIVIT_ACROSS_FROM_REGISTERS(Float16, "f16")
#else
template <class T, int kColumns>
VIVIT_DEVICE void group_across_step(float (&)[kColumns / 8][4], const uint32_t (&)[4], uint64_t, bool) {}
#endif

// ---- warps among themselves ----

// Barriers 1 to 15, of `threads` threads in whole warps: those that wait, and those that arrive and go on. Then the
// barrier is as new.
VIVIT_DEVICE void named_wait(int32_t number, int32_t threads) {
#if defined(VIVIT_HOPPER)
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
#endif
}
VIVIT_DEVICE void named_arrive(int32_t number, int32_t threads) {
#if defined(VIVIT_HOPPER)
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
#endif
}

// Registers of each thread from here on, a multiple of 8 from 24 to 256, said by all warps of a warpgroup. A launch
// gives all the same, the most that the block's size allows: who needs fewer gives them back, who needs more waits for
// them.
template <int kRegisters>
VIVIT_DEVICE void registers_shrink() {
#if defined(VIVIT_HOPPER)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
VIVIT_DEVICE void registers_grow() {
#if defined(VIVIT_HOPPER)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// Whether it holds in any lane.
VIVIT_DEVICE bool any_in_warp(bool holds) { return __any_sync(0xffffffffu, holds) != 0; }

// The larger one, NaN if one is.
VIVIT_DEVICE float larger_or_nan(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

// Goes on when x, which is at least 0, has been computed. The compiler takes arithmetic that no product's wait concerns
// behind the wait, where nothing is left to overlap with it (nvcc 13.0, read from its machine code); over a pause that
// depends on the arithmetic it does not move the wait. Not a trap: with a way out of the kernel there, nvcc keeps to
// the registers that the launch gives, whatever setmaxnreg says, and a product that needs more waits for the other.
VIVIT_DEVICE void compute_first(float x) {
    if (x < 0.f) asm volatile("nanosleep.u32 1;" ::: "memory");
}

// ---- launching ----

// Of the current device.
inline int current_multiprocessors() {
    int device = 0, count = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

}  // namespace vivit::cuda

#endif  // VIVIT_SIM
