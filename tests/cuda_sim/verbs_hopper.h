// The verbs of csrc/cuda/verbs_hopper.cuh on a CPU (phases.h).
#pragma once

#include "builtins.h"
#include "phases.h"
#include "verbs.h"

namespace vivit::cuda {

struct alignas(8) PhaseBarrier {
    uint64_t word;
};

inline void phase_init(PhaseBarrier* barrier, int32_t arrivals, VIVIT_SIM_CALLER) {
    sim::init_phases({"phase_init", file, line}, &barrier->word, arrivals);
}
inline void phase_fence(VIVIT_SIM_CALLER) { sim::fence_phases({"phase_fence", file, line}); }
inline void phase_arrive(PhaseBarrier* barrier, VIVIT_SIM_CALLER) {
    sim::arrive_at_phase({"phase_arrive", file, line}, &barrier->word, 0);
}
inline void phase_expect(PhaseBarrier* barrier, int32_t bytes, VIVIT_SIM_CALLER) {
    sim::arrive_at_phase({"phase_expect", file, line}, &barrier->word, bytes);
}
inline void phase_wait(PhaseBarrier* barrier, uint32_t parity, VIVIT_SIM_CALLER) {
    sim::wait_for_phase({"phase_wait", file, line}, &barrier->word, parity);
}

inline void prefetch_map(const TensorMap&) {}

inline void copy_box(void* to, const TensorMap& map, PhaseBarrier* barrier, int32_t c0, int32_t c1, VIVIT_SIM_CALLER) {
    const int32_t first[] = {c0, c1};
    sim::start_box({"copy_box", file, line}, to, map, &barrier->word, first, 2);
}
inline void copy_box(void* to, const TensorMap& map, PhaseBarrier* barrier, int32_t c0, int32_t c1, int32_t c2,
                     VIVIT_SIM_CALLER) {
    const int32_t first[] = {c0, c1, c2};
    sim::start_box({"copy_box", file, line}, to, map, &barrier->word, first, 3);
}
inline void copy_box(void* to, const TensorMap& map, PhaseBarrier* barrier, int32_t c0, int32_t c1, int32_t c2,
                     int32_t c3, VIVIT_SIM_CALLER) {
    const int32_t first[] = {c0, c1, c2, c3};
    sim::start_box({"copy_box", file, line}, to, map, &barrier->word, first, 4);
}
inline void copy_box(void* to, const TensorMap& map, PhaseBarrier* barrier, int32_t c0, int32_t c1, int32_t c2,
                     int32_t c3, int32_t c4, VIVIT_SIM_CALLER) {
    const int32_t first[] = {c0, c1, c2, c3, c4};
    sim::start_box({"copy_box", file, line}, to, map, &barrier->word, first, 5);
}

template <int kRowBytes>
uint64_t narrow_descriptor(const void* operand, VIVIT_SIM_CALLER) {
    static_assert(kRowBytes == 64 || kRowBytes == 32);
    return sim::describe_operand({"narrow_descriptor", file, line}, operand, kRowBytes);
}

template <class T, int kColumns>
void group_along_step(float (&x)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b, VIVIT_SIM_CALLER) {
    static_assert(kColumns == 64 || kColumns == 32 || kColumns == 16);
    sim::Product mine{x[0], a, 0, b, kColumns, true, true, [](uint16_t bits) { return sim::widened(bits, T()); }};
    sim::start_product({"group_along_step", file, line}, mine);
}

template <class T, int kColumns>
void group_across_step(float (&x)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b, bool keep, VIVIT_SIM_CALLER) {
    static_assert(kColumns == 64);
    sim::Product mine{x[0], a, 0, b, kColumns, false, keep, [](uint16_t bits) { return sim::widened(bits, T()); }};
    sim::start_product({"group_across_step", file, line}, mine);
}

inline void named_wait(int32_t number, int32_t threads, VIVIT_SIM_CALLER) {
    sim::meet_by_name({"named_wait", file, line}, number, threads, true);
}
inline void named_arrive(int32_t number, int32_t threads, VIVIT_SIM_CALLER) {
    sim::meet_by_name({"named_arrive", file, line}, number, threads, false);
}

template <int kRegisters>
void registers_shrink(VIVIT_SIM_CALLER) {
    sim::change_registers({"registers_shrink", file, line}, kRegisters, false);
}
template <int kRegisters>
void registers_grow(VIVIT_SIM_CALLER) {
    sim::change_registers({"registers_grow", file, line}, kRegisters, true);
}

namespace sim {

inline void find_any(const Site&, void* const* lanes) {
    bool any = false;
    for (int i = 0; i < kLanes; ++i) any = any || *static_cast<const bool*>(lanes[i]);
    for (int i = 0; i < kLanes; ++i) *static_cast<bool*>(lanes[i]) = any;
}

}  // namespace sim

inline bool any_in_warp(bool holds, VIVIT_SIM_CALLER) {
    sim::together({"any_in_warp", file, line}, &holds, sim::find_any);
    return holds;
}

inline float larger_or_nan(float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : std::fmax(x, y); }

inline void compute_first(float x, VIVIT_SIM_CALLER) {
    if (x < 0.f) sim::fail({"compute_first", file, line}, "a negative number: the block would be ended");
}

inline int current_multiprocessors() { return sim::schedule.multiprocessors; }

}  // namespace vivit::cuda
