// Instructions by name that only joint attention's backward on Hopper needs; as verbs_hopper.cuh.
#pragma once

#include "verbs_hopper.cuh"

#if defined(VIVIT_HOPPER) && !defined(VIVIT_SIM)

namespace vivit::cuda {

// group_across_step of 48 columns.
#define VIVIT_24(x) VIVIT_16(x), VIVIT_FOUR(x, 4), VIVIT_FOUR(x, 5)
#define VIVIT_NAMES_24 VIVIT_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
VIVIT_ACROSS(BFloat16, "bf16", 48, 24, "%24", "%25", "%26")
VIVIT_ACROSS(Float16, "f16", 48, 24, "%24", "%25", "%26")

}  // namespace vivit::cuda

#endif
