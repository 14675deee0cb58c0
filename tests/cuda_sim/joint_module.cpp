// The part of the Python module cuda_sim for joint attention: its launchers on tensors in CPU memory.
#include <tuple>
#include <utility>

#include "cuda/joint.h"
#include "cuda_sim/calls.h"
#include "cuda_sim/options.h"
#include "cuda_sim/tokens.h"

namespace vivit::cuda::sim {

namespace {

// What both directions share, by name.
struct JointCall {
    View q, k, v;
    MaybeView lse, mask, cos, sin, seed, turned;
    int dtype;
    double scale, softcap, dropout_p;
    uint64_t schedule_seed;
    int shared_bytes, arch;
};

JointParams params_of(const JointCall& call, Run& run, bool writes_lse) {
    const auto size = [](const View& x, int i) { return static_cast<int32_t>(std::get<2>(x).at(i)); };
    JointParams p;
    p.B = size(call.q, 0), p.N_q = size(call.q, 1), p.H = size(call.q, 2), p.D = size(call.q, 3);
    p.N_k = size(call.k, 1);
    p.q = tokens(run, "q", call.q), p.k = tokens(run, "k", call.k), p.v = tokens(run, "v", call.v);
    sim::set_options(p, call, run, writes_lse);
    run.add<char>("turned", call.turned, false);  // one launch reads what another wrote
    p.turned = run.add<char>("turned", call.turned, true);
    return p;
}

void joint_forward(const JointCall& call, const View& o) {
    Run run(call.schedule_seed, call.shared_bytes, call.arch);
    JointParams p = params_of(call, run, true);
    p.o = tokens(run, "o", o, true);
    run([&] { return launch_joint_forward(p, nullptr); });
}

void joint_backward(const JointCall& call, const View& o, const View& d_o, const View& delta, const View& dq,
                    const View& dk, const View& dv) {
    Run run(call.schedule_seed, call.shared_bytes, call.arch);
    JointParams p = params_of(call, run, false);
    p.o = tokens(run, "o", o), p.d_o = tokens(run, "do", d_o);
    run.add("delta", delta, false);  // the second launch reads what the first wrote
    p.delta = static_cast<float*>(run.add("delta", delta, true));
    p.dq = tokens(run, "dq", dq, true), p.dk = tokens(run, "dk", dk, true), p.dv = tokens(run, "dv", dv, true);
    run([&] { return launch_joint_backward(p, nullptr); });
}

}  // namespace

void add_joint(py::module_& m) {
    py::class_<JointCall>(m, "JointCall", py::module_local())
        .def(py::init([](View q, View k, View v, MaybeView lse, MaybeView mask, MaybeView cos, MaybeView sin,
                         MaybeView seed, MaybeView turned, int dtype, double scale, double softcap, double dropout_p,
                         uint64_t schedule_seed, int shared_bytes, int arch) {
                 return JointCall{std::move(q),      std::move(k),   std::move(v),   std::move(lse),
                                  std::move(mask),   std::move(cos), std::move(sin), std::move(seed),
                                  std::move(turned), dtype,          scale,          softcap,
                                  dropout_p,         schedule_seed,  shared_bytes,   arch};
             }),
             py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("lse"), py::arg("mask"), py::arg("cos"),
             py::arg("sin"), py::arg("seed"), py::arg("turned"), py::arg("dtype"), py::arg("scale"), py::arg("softcap"),
             py::arg("dropout_p"), py::arg("schedule_seed"), py::arg("shared_bytes"), py::arg("arch"));
    m.def("joint_forward", joint_forward);
    m.def("joint_backward", joint_backward);
}

}  // namespace vivit::cuda::sim
