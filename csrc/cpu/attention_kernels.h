// PLACEHOLDER while the kernels are written: entry points that do nothing.
#include "attention.h"
namespace vivit::cpu::VIVIT_ISA {
static int64_t none(const AttentionParams&, Axis) { return 0; }
static void nothing(const AttentionParams&, Axis, int64_t, int64_t) {}
extern const AttentionKernels kAttention;
const AttentionKernels kAttention = {"placeholder", none, nothing, none, nothing};
}
