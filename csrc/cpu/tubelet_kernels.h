// Tubelet embedding: the entry points of one instruction set.
#pragma once

#include "steps.h"
#include "tubelet_backward.h"
#include "tubelet_forward.h"

namespace vivit::cpu::VIVIT_ISA {

extern const TubeletKernels kTubelets;
const TubeletKernels kTubelets = {StepsOf<TubeletForward, TubeletParams>::kWork,
                                  StepsOf<WeightGradient, TubeletParams>::kWork,
                                  StepsOf<VideoGradient, TubeletParams>::kWork};

}  // namespace vivit::cpu::VIVIT_ISA
