// Joint attention's forward for Hopper, as a part of the Python module: every variant, whatever the dispatch chooses.
#include <cmath>

#include "cuda/joint_hopper.h"
#include "cuda/joint_hopper_softmax.cuh"
#include "cuda_sim/calls.h"
#include "cuda_sim/groups.h"
#include "cuda_sim/tokens.h"

namespace vivit::cuda {

int launch_joint_hopper_variant(const JointParams& params, int groups, int polynomial, int slack);

namespace sim {
namespace {

// False where another kernel is to run the call. variant: (groups, polynomial, slack), or none for what is chosen.
bool joint_hopper(const View& q, const View& k, const View& v, const View& o, const MaybeView& lse, int dtype,
                  double scale, double softcap, const std::vector<int>& variant, uint64_t seed, int arch) {
    Run run(seed, 227 << 10, arch);
    const auto size = [](const View& x, int i) { return static_cast<int32_t>(std::get<2>(x).at(i)); };
    JointParams p;
    p.B = size(q, 0), p.N_q = size(q, 1), p.H = size(q, 2), p.D = size(q, 3), p.N_k = size(k, 1);
    p.dtype = static_cast<DType>(dtype);
    p.q = tokens(run, "q", q, false), p.k = tokens(run, "k", k, false), p.v = tokens(run, "v", v, false);
    p.o = tokens(run, "o", o, true);
    p.lse = run.add<float>("lse", lse, true);
    p.scale = static_cast<float>(scale), p.softcap = static_cast<float>(softcap);
    if (!joint_hopper_runs(p)) return false;
    run([&] {
        if (variant.empty()) return launch_joint_hopper(p, nullptr);
        return launch_joint_hopper_variant(p, variant.at(0), variant.at(1), variant.at(2));
    });
    return true;
}

// The largest relative error of exp2_polynomial over every `step`th float32 whose bits lie from first to last.
double worst_exponential(uint32_t first, uint32_t last, uint32_t step) {
    const py::gil_scoped_release others_may_run;
    double worst = 0;
    for (uint64_t bits = first; bits <= last; bits += step) {
        const float x = __uint_as_float(static_cast<uint32_t>(bits));
        const double right = std::exp2(static_cast<double>(x));
        worst = std::max(worst, std::abs(exp2_polynomial(x) - right) / right);
    }
    return worst;
}

}  // namespace

void add_joint_hopper(py::module_& m) {
    m.def("joint_hopper", joint_hopper);
    m.def("worst_exponential", worst_exponential);
    m.def("exp2_polynomial", [](float x) { return exp2_polynomial(x); });
    m.def("swizzled_address", swizzled_address);
}

}  // namespace sim
}  // namespace vivit::cuda
