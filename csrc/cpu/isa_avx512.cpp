// The CPU kernels for one instruction set; the build compiles this file with its flags.
#define VIVIT_ISA avx512
#include "attention_kernels.h"
#include "linear_kernels.h"
#include "tubelet_kernels.h"
