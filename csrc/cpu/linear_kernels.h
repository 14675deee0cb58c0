// Linear layers: the entry points of one instruction set.
#pragma once

#include "linear_in_vectors.h"
#include "steps.h"

namespace vivit::cpu::VIVIT_ISA {

extern const LinearWork kLinear;
const LinearWork kLinear = StepsOf<LinearInVectors, LinearParams>::kWork;

}  // namespace vivit::cpu::VIVIT_ISA
