// The verbs of csrc/cuda/tubelet_hopper_verbs.cuh on a CPU.
#pragma once

#include "groups.h"
#include "verbs_hopper.h"

namespace vivit::cuda {

inline void write_places(int32_t* to, const int32_t (&four)[4], VIVIT_SIM_CALLER) {
    sim::write_shared({"write_places", file, line}, to);
    std::memcpy(to, four, 16);
}
inline void read_places(int32_t (&four)[4], const int32_t* from, VIVIT_SIM_CALLER) {
    sim::read_shared({"read_places", file, line}, from, 1);
    std::memcpy(four, from, 16);
}

inline void read_offsets(int64_t (&two)[2], const int64_t* from, VIVIT_SIM_CALLER) {
    sim::read_shared({"read_offsets", file, line}, from, 1);
    std::memcpy(two, from, 16);
}

inline uint64_t slabs_descriptor(const void* operand, int32_t slab_bytes, VIVIT_SIM_CALLER) {
    return sim::describe_operand({"slabs_descriptor", file, line}, operand, 128, static_cast<uint32_t>(slab_bytes));
}

template <class T, int kColumns>
void group_across_registers(float (&x)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b, bool keep,
                            VIVIT_SIM_CALLER) {
    static_assert(kColumns == 256 || kColumns == 192 || kColumns == 128);
    sim::Product mine{x[0], a, 0, b, kColumns, false, keep, [](uint16_t bits) { return sim::widened(bits, T()); }};
    sim::start_product({"group_across_registers", file, line}, mine);
}

template <class T, int kColumns>
void group_along_registers(float (&x)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b, bool keep,
                           VIVIT_SIM_CALLER) {
    static_assert(kColumns == 128);
    sim::Product mine{x[0], a, 0, b, kColumns, true, keep, [](uint16_t bits) { return sim::widened(bits, T()); }};
    sim::start_product({"group_along_registers", file, line}, mine);
}

template <class T, int kColumns>
void group_along_shared(float (&x)[kColumns / 8][4], uint64_t a, uint64_t b, bool keep, VIVIT_SIM_CALLER) {
    static_assert(kColumns == 256);
    sim::Product mine{x[0], nullptr, a, b, kColumns, true, keep, [](uint16_t bits) { return sim::widened(bits, T()); }};
    sim::start_product({"group_along_shared", file, line}, mine);
}

}  // namespace vivit::cuda
