// Products of float32 by tensor cores, by name: operands have ten bits behind the point, sums are float32. PTX manual,
// 9.7.14: mma.m16n8k8 with .tf32. The host simulator has twins of the same names (tests/cuda_sim/verbs_tf32.h).
#pragma once

#include "verbs.cuh"

#if defined(VIVIT_SIM)
#include "cuda_sim/verbs_tf32.h"
#else

namespace vivit::cuda {

// The nearest number of ten bits, of two the one further from 0. Without it the product would cut the other bits off.
VIVIT_DEVICE uint32_t as_tf32(float x) {
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
    return rounded;
}

// d += a b: a [16, 8] (of lane 4 g + t rows g and g + 8, column t, then the same of column t + 4), b [8, 8] (rows t and
// t + 4, column g), d [16, 8] (rows g and g + 8, columns 2 t and 2 t + 1).
VIVIT_DEVICE void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace vivit::cuda

#endif  // VIVIT_SIM
