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

// The box whose first element has these coordinates (the neighbours' first), to shared memory: rows of 128 bytes one
// behind the other from a multiple of 1024 bytes on, swizzled as products of a warpgroup take them; zeros for what
// lies outside of the tensor. All of the box's bytes, zeros too, count in the current phase of the barrier, which is
// to expect them. One thread asks; no fence is needed before products.
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
// behind the wait, where nothing is left to overlap with it (nvcc 13.0, read from its machine code); over a branch that
// depends on the arithmetic it does not move the wait.
VIVIT_DEVICE void compute_first(float x) {
    if (x < 0.f) __trap();
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
