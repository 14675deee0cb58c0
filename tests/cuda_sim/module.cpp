// The Python module cuda_sim: the launchers of csrc/cuda, and the simulator's own examples, on tensors in CPU memory.
// A Failure becomes a RuntimeError. tests/cuda_simulator.py makes it and calls it.
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/attention.h"
#include "cuda_sim/calls.h"
#include "cuda_sim/examples.cuh"
#include "cuda_sim/group_examples.cuh"
#include "cuda_sim/options.h"

namespace vivit::cuda::sim {

void add_copies(pybind11::module_& m);                 // copies_module.cpp
void add_joint(pybind11::module_& m);                  // joint_module.cpp
void add_joint_hopper(pybind11::module_& m);           // joint_hopper_module.cpp
void add_joint_hopper_backward(pybind11::module_& m);  // joint_hopper_backward_module.cpp
void add_tiles(pybind11::module_& m);                  // tiles_module.cpp

}  // namespace vivit::cuda::sim

void define_tubelet(pybind11::module_& m);  // tubelet_module.cpp

namespace {

namespace py = pybind11;
using namespace vivit::cuda;

using sim::MaybeView;
using sim::Run;
using sim::View;

Grid grid(Run& run, const char* name, const View& view, bool output = false) {
    const auto& strides = std::get<3>(view);
    return {run.add(name, view, output), strides[0], strides[1], strides[2], strides[3]};
}

// What both directions share, by name.
struct Call {
    View q, k, v;
    MaybeView lse, mask, cos, sin, seed;
    int dtype, temporal_heads;
    double scale, softcap, dropout_p;
    uint64_t schedule_seed;
    int shared_bytes, arch, packed_warps, stages;
    bool tf32;
};

AttentionParams params_of(const Call& call, Run& run, bool writes_lse) {
    const auto& sizes = std::get<2>(call.q);
    AttentionParams p;
    const auto size = [&](int i) { return static_cast<int32_t>(sizes.at(i)); };
    p.B = size(0), p.T = size(1), p.S = size(2), p.H = size(3), p.D = size(4);
    p.temporal_heads = call.temporal_heads, p.tf32 = call.tf32;
    p.tiling.packed_warps = call.packed_warps, p.tiling.stages = call.stages;
    p.q = grid(run, "q", call.q), p.k = grid(run, "k", call.k), p.v = grid(run, "v", call.v);
    sim::set_options(p, call, run, writes_lse);
    return p;
}

void attention_forward(const Call& call, const View& o) {
    Run run(call.schedule_seed, call.shared_bytes, call.arch);
    AttentionParams p = params_of(call, run, true);
    p.o = grid(run, "o", o, true);
    run([&] { return launch_forward(p, nullptr); });
}

void attention_backward(const Call& call, const MaybeView& o, const View& d_o, const View& dq, const View& dk,
                        const View& dv, const MaybeView& o_again) {
    Run run(call.schedule_seed, call.shared_bytes, call.arch);
    AttentionParams p = params_of(call, run, false);
    if (o.has_value()) p.o = grid(run, "o", *o);
    if (o_again.has_value()) p.o_again = grid(run, "o_again", *o_again, true);
    p.d_o = grid(run, "do", d_o);
    p.dq = grid(run, "dq", dq, true), p.dk = grid(run, "dk", dk, true), p.dv = grid(run, "dv", dv, true);
    run([&] { return launch_backward(p, nullptr); });
}

// ---- examples ----

void one_verb(int verb, bool half, const View& in, const View& out, int mask) {
    Run run(0, 1 << 10);
    const examples::VerbParams p = {static_cast<examples::Verb>(verb),
                                    static_cast<const uint32_t*>(run.add("in", in, false)),
                                    static_cast<uint32_t*>(run.add("out", out, true)), mask};
    run([&] {
        return launch(half ? examples::one_verb<Float16> : examples::one_verb<BFloat16>, 1, 32, 512, nullptr, p);
    });
}

void product(int fault, bool half, const View& a, const View& b, const View& c, uint64_t seed) {
    Run run(seed, 227 << 10);
    const examples::ProductParams p = {static_cast<const uint16_t*>(run.add("a", a, false)),
                                       static_cast<const uint16_t*>(run.add("b", b, false)),
                                       static_cast<float*>(run.add("c", c, true)),
                                       static_cast<int32_t>(std::get<2>(a).at(1)), static_cast<examples::Fault>(fault)};
    const auto kernel = half ? examples::product<Float16> : examples::product<BFloat16>;
    run([&] { return launch(kernel, 1, 32 * examples::kProductWarps, examples::kProductBytes, nullptr, p); });
}

template <class T>
auto group_kernel(int columns) {
    return columns == 128  ? examples::group_products<T, 128>
           : columns == 64 ? examples::group_products<T, 64>
           : columns == 32 ? examples::group_products<T, 32>
                           : examples::group_products<T, 16>;
}

// `threads` of a block, of which each 128 take other rows of a and w. first: of the rows of a and of b.
void group_products(int fault, bool half, const View& a, const View& b, const View& w, const View& start, const View& c,
                    const View& d, std::pair<int, int> first, bool by_address, int threads, uint64_t seed, int arch) {
    Run run(seed, 227 << 10, arch);
    const examples::GroupParams p = {static_cast<const uint16_t*>(run.add("a", a, false)),
                                     static_cast<const uint16_t*>(run.add("b", b, false)),
                                     static_cast<const uint16_t*>(run.add("w", w, false)),
                                     static_cast<const float*>(run.add("start", start, false)),
                                     static_cast<float*>(run.add("c", c, true)),
                                     static_cast<float*>(run.add("d", d, true)),
                                     first.first,
                                     first.second,
                                     by_address,
                                     static_cast<examples::GroupFault>(fault)};
    const int columns = static_cast<int>(std::get<2>(c).at(1));
    const auto kernel = half ? group_kernel<Float16>(columns) : group_kernel<BFloat16>(columns);
    run([&] { return launch(kernel, 1, threads, examples::kGroupBytes, nullptr, p); });
}

void softmax(int fault, const View& x, const View& y, uint64_t seed, int shared_bytes) {
    Run run(seed, shared_bytes);
    const int32_t rows = static_cast<int32_t>(std::get<2>(x).at(0));
    const examples::SoftmaxParams p = {static_cast<const float*>(run.add("x", x, false)),
                                       static_cast<float*>(run.add("y", y, true)), rows,
                                       static_cast<examples::Fault>(fault)};
    const int64_t blocks = (rows + examples::kSoftmaxRows - 1) / examples::kSoftmaxRows;
    run([&] {
        return launch(examples::softmax, blocks, 32 * examples::kSoftmaxRows, examples::kSoftmaxBytes, nullptr, p);
    });
}

}  // namespace

PYBIND11_MODULE(cuda_sim, m) {
    py::class_<Call>(m, "Call", py::module_local())
        .def(py::init([](View q, View k, View v, MaybeView lse, MaybeView mask, MaybeView cos, MaybeView sin,
                         MaybeView seed, int dtype, int temporal_heads, double scale, double softcap, double dropout_p,
                         uint64_t schedule_seed, int shared_bytes, int arch, int packed_warps, int stages, bool tf32) {
                 return Call{std::move(q),
                             std::move(k),
                             std::move(v),
                             std::move(lse),
                             std::move(mask),
                             std::move(cos),
                             std::move(sin),
                             std::move(seed),
                             dtype,
                             temporal_heads,
                             scale,
                             softcap,
                             dropout_p,
                             schedule_seed,
                             shared_bytes,
                             arch,
                             packed_warps,
                             stages,
                             tf32};
             }),
             py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("lse"), py::arg("mask"), py::arg("cos"),
             py::arg("sin"), py::arg("seed"), py::arg("dtype"), py::arg("temporal_heads"), py::arg("scale"),
             py::arg("softcap"), py::arg("dropout_p"), py::arg("schedule_seed"), py::arg("shared_bytes"),
             py::arg("arch"), py::arg("packed_warps") = 0, py::arg("stages") = 0, py::arg("tf32") = false);
    m.def("attention_forward", attention_forward);
    m.def("attention_backward", attention_backward);
    m.def("regime_of", [](int N, int D, int dtype, bool backward, bool rotary, int shared_bytes) {
        return static_cast<int>(regime_of(N, D, static_cast<DType>(dtype), backward, rotary, shared_bytes));
    });
    m.def("keeps_output", [](int T, int S, int H, int temporal_heads, int dtype) {
        return keeps_output(T, S, H, temporal_heads, static_cast<DType>(dtype));
    });
    define_tubelet(m);
    sim::add_joint(m);
    m.def("products_of_launch", [] { return sim::products_of_launch; });
    m.def("one_verb", one_verb);
    m.def("product", product);
    m.def("group_products", group_products);
    m.def("softmax", softmax);
    sim::add_copies(m);
    sim::add_tiles(m);
    sim::add_joint_hopper(m);
    sim::add_joint_hopper_backward(m);
}
