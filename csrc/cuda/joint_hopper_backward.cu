// Joint attention's backward for Hopper: which calls it runs, and the launches of one.
#include "joint_hopper_backward.h"
#include "joint_hopper_backward_launch.cuh"
#include "joint_turn.cuh"

namespace vivit::cuda {

extern template int launch_hopper_backward_dtype<BFloat16, false>(const JointParams&, void*);
extern template int launch_hopper_backward_dtype<BFloat16, true>(const JointParams&, void*);
extern template int launch_hopper_backward_dtype<Float16, false>(const JointParams&, void*);
extern template int launch_hopper_backward_dtype<Float16, true>(const JointParams&, void*);

namespace {

// As the kernels of options get a call with tables of angles: q and k turned, and the tables, by which their gradients
// are turned back.
JointParams turned_both_ways(const JointParams& given) {
    JointParams p = with_turned(given);
    p.cos = given.cos, p.sin = given.sin;
    return p;
}

template <class T>
int launch_all(const JointParams& given, void* stream) {
    if (is_plain(given)) return launch_hopper_backward_dtype<T, true>(given, stream);
    if (given.cos == nullptr) return launch_hopper_backward_dtype<T, false>(given, stream);
    const int error = launch_turn<T>(given, stream);
    return error != 0 ? error : launch_hopper_backward_dtype<T, false>(turned_both_ways(given), stream);
}

}  // namespace

bool joint_hopper_backward_runs(const JointParams& given) {
    if (given.dtype == DType::kFloat32 || given.D < 16 || given.D > kMostBackwardChannels || given.D % 8 != 0)
        return false;
    if (given.N_q < kFewRows || given.N_k < kFewRows || !has_hopper_kernels()) return false;
    if (given.cos != nullptr && given.turned == nullptr) return false;
    const JointParams p = given.cos == nullptr ? given : turned_both_ways(given);
    return with_backward_steps(p.D, [&](auto steps) {
        using Chosen = ChosenBackward<decltype(steps)::value, true>;
        JointHopperBackward made;
        return prepare_backward<typename Chosen::Queries>(made, p, true) &&
               prepare_backward<typename Chosen::Keys>(made, p, false);
    });
}

int launch_joint_hopper_backward(const JointParams& p, void* stream) {
    return p.dtype == DType::kFloat16 ? launch_all<Float16>(p, stream) : launch_all<BFloat16>(p, stream);
}

}  // namespace vivit::cuda
