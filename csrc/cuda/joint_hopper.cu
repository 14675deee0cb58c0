// Joint attention's forward for Hopper: which calls it runs, and the launches of one.
#include "joint_hopper_launch.cuh"
#include "joint_turn.cuh"

namespace vivit::cuda {

extern template int launch_hopper_dtype<BFloat16, false>(const JointParams&, void*);
extern template int launch_hopper_dtype<BFloat16, true>(const JointParams&, void*);
extern template int launch_hopper_dtype<Float16, false>(const JointParams&, void*);
extern template int launch_hopper_dtype<Float16, true>(const JointParams&, void*);

namespace {

template <class T>
int launch_either(const JointParams& p, bool plain, void* stream) {
    return plain ? launch_hopper_dtype<T, true>(p, stream) : launch_hopper_dtype<T, false>(p, stream);
}

}  // namespace

bool joint_hopper_runs(const JointParams& given) {
    if (given.dtype == DType::kFloat32 || given.D < 16 || given.D > 160 || given.D % 8 != 0) return false;
    if (given.N_q < 1 || given.N_k < 1 || !has_hopper_kernels()) return false;
    if (given.cos != nullptr && given.turned == nullptr) return false;
    const JointParams p = given.cos == nullptr ? given : with_turned(given);
    return with_steps(p.D, [&](auto steps) {
        JointHopperParams made;
        return prepare<typename ChosenVariant<steps, true>::Type>(made, p);
    });
}

int launch_joint_hopper(const JointParams& given, void* stream) {
    JointParams p = given;
    if (given.cos != nullptr) {
        const int error =
            given.dtype == DType::kFloat16 ? launch_turn<Float16>(given, stream) : launch_turn<BFloat16>(given, stream);
        if (error != 0) return error;
        p = with_turned(given);
    }
    const bool plain = p.scale > 0.f && p.softcap == 0.f && p.mask == nullptr && p.seed == nullptr;
    return p.dtype == DType::kFloat16 ? launch_either<Float16>(p, plain, stream)
                                      : launch_either<BFloat16>(p, plain, stream);
}

#if defined(VIVIT_SIM)
// Variants that are not chosen, for the tests: they are to be as right.
template <int kGroups, int kPolynomial, int kSlack>
int launch_other(const JointParams& p) {
    using Variant = HopperVariant<4, 128, true, kGroups, kPolynomial, kSlack>;
    return p.dtype == DType::kFloat16 ? launch_hopper_variant<Float16, Variant>(p, nullptr)
                                      : launch_hopper_variant<BFloat16, Variant>(p, nullptr);
}

int launch_joint_hopper_variant(const JointParams& p, int groups, int polynomial, int slack) {
    if (p.D <= 32 || p.D > 64) return 1;
    if (groups == 2 && polynomial == 0 && slack == 0) return launch_other<2, 0, 0>(p);
    if (groups == 3 && polynomial == 2 && slack == 8) return launch_other<3, 2, 8>(p);
    if (groups == 2 && polynomial == 8 && slack == 8) return launch_other<2, 8, 8>(p);
    return 1;
}
#endif

}  // namespace vivit::cuda
