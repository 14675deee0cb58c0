// Joint attention's backward for Hopper, as a part of the Python module: of every size, whatever the dispatch chooses.
#include "cuda/joint_hopper_backward.h"
#include "cuda_sim/calls.h"
#include "cuda_sim/tokens.h"

namespace vivit::cuda::sim {
namespace {

// False where the kernels of sm_80 are to run the call.
bool joint_hopper_backward(const std::vector<View>& qkv, const View& o, const View& d_o, const View& lse,
                           const View& delta, const std::vector<View>& gradients, int dtype, double scale,
                           double softcap, uint64_t seed, int arch) {
    Run run(seed, 227 << 10, arch);
    const auto size = [&](int i, int axis) { return static_cast<int32_t>(std::get<2>(qkv.at(i)).at(axis)); };
    JointParams p;
    p.B = size(0, 0), p.N_q = size(0, 1), p.H = size(0, 2), p.D = size(0, 3), p.N_k = size(1, 1);
    p.dtype = static_cast<DType>(dtype);
    p.q = tokens(run, "q", qkv.at(0), false), p.k = tokens(run, "k", qkv.at(1), false);
    p.v = tokens(run, "v", qkv.at(2), false), p.o = tokens(run, "o", o, false);
    p.d_o = tokens(run, "do", d_o, false);
    p.lse = static_cast<float*>(run.add("lse", lse, false));
    run.add("delta", delta, false);  // the second launch reads what the first wrote
    p.delta = static_cast<float*>(run.add("delta", delta, true));
    p.dq = tokens(run, "dq", gradients.at(0), true), p.dk = tokens(run, "dk", gradients.at(1), true);
    p.dv = tokens(run, "dv", gradients.at(2), true);
    p.scale = static_cast<float>(scale), p.softcap = static_cast<float>(softcap);
    if (!joint_hopper_backward_runs(p)) return false;
    run([&] { return launch_joint_hopper_backward(p, nullptr); });
    return true;
}

}  // namespace

void add_joint_hopper_backward(py::module_& m) { m.def("joint_hopper_backward", joint_hopper_backward); }

}  // namespace vivit::cuda::sim
