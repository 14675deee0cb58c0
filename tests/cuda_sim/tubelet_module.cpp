// The launchers of csrc/cuda/tubelet.h on tensors in CPU memory.
#include <algorithm>
#include <utility>
#include <vector>

#include "cuda/tubelet.h"
#include "cuda_sim/calls.h"

namespace {

namespace py = pybind11;
using namespace vivit::cuda;

using sim::MaybeView;
using sim::Run;
using sim::View;

// What all launches of a call share. affine: scale and shift by channel.
struct TubeletCall {
    View video, weight;  // [B, C, F, Y, X], [E, C, f, y, x]
    bool per_frame, has_class;
    std::pair<std::vector<double>, std::vector<double>> affine;
    std::pair<int, int> types;  // Element of the video, of the products
    uint64_t schedule_seed;
    int shared_bytes, arch;

    Run run() const { return Run(schedule_seed, shared_bytes, arch); }

    TubeletParams params() const {
        TubeletParams p;
        const auto& [at, element, sizes, strides] = video;
        const auto& of = std::get<2>(weight);
        const auto size = [](int64_t n) { return static_cast<int32_t>(n); };
        p.E = size(of[0]), p.C = size(of[1]), p.f = size(of[2]), p.y = size(of[3]), p.x = size(of[4]);
        p.B = size(sizes[0]), p.T = size(sizes[2] / p.f);
        p.rows = size(sizes[3] / p.y), p.columns = size(sizes[4] / p.x);
        p.dtype = static_cast<Element>(types.second);
        p.video = {reinterpret_cast<void*>(at),
                   static_cast<Element>(types.first),
                   strides[0],
                   strides[1],
                   strides[2],
                   strides[3],
                   strides[4]};
        for (int c = 0; c < p.C; ++c) p.scale[c] = affine.first[c], p.shift[c] = affine.second[c];
        p.per_frame = per_frame, p.has_class = has_class;
        p.weight = reinterpret_cast<const void*>(std::get<0>(weight));
        return p;
    }
};

Table table(Run& run, const char* name, const MaybeView& view, bool output = false) {
    if (!view.has_value()) return {};
    return {run.add(name, *view, output), std::get<3>(*view)[0], std::get<1>(*view) == 4};
}

// The video as its pixels lie: dimensions from the widest stride to the narrowest, so that neighbours are a row.
View in_memory(const View& video) {
    auto [at, element, sizes, strides] = video;
    std::vector<int> order = {0, 1, 2, 3, 4};
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return strides[a] > strides[b]; });
    std::vector<int64_t> n, step;
    for (const int i : order) n.push_back(sizes[i]), step.push_back(strides[i]);
    for (size_t i = n.size() - 1; i > 0 && step.back() == 1; --i) {  // channels of a pixel and pixels of a row are one
        if (step[i - 1] != n.back()) break;
        n[i - 1] *= n[i], step[i - 1] = 1;
        n.pop_back(), step.pop_back();
    }
    return {at, element, n, step};
}

void prepare(const TubeletCall& call, const MaybeView& bias, const MaybeView& row, const MaybeView& operand,
             bool backward) {
    Run run = call.run();
    TubeletParams p = call.params();
    run.add("weight", call.weight, false);
    p.bias = table(run, "bias", bias);
    p.row = run.add<float>("row", row, true);
    p.operand = run.add<void>("operand", operand, true);
    run([&] { return launch_tubelet_prepare(p, backward, nullptr); });
}

void forward(const TubeletCall& call, const View& operand, const MaybeView& row, const MaybeView& position,
             const MaybeView& class_token, const View& out) {
    Run run = call.run();
    TubeletParams p = call.params();
    run.add("video", in_memory(call.video), false);
    p.operand = run.add("operand", operand, false);
    p.row = run.add<float>("row", row);
    p.position = table(run, "position", position), p.class_token = table(run, "class token", class_token);
    p.out = run.add("out", out, true);
    run([&] { return launch_tubelet_forward(p, nullptr); });
}

void row_sums(const TubeletCall& call, const View& d_out, const MaybeView& d_position, const MaybeView& d_class,
              const MaybeView& strips) {
    Run run = call.run();
    TubeletParams p = call.params();
    p.d_out = run.add("do", d_out, false);
    p.d_position = table(run, "dposition", d_position, true), p.d_class = table(run, "dclass", d_class, true);
    p.strips = run.add<float>("strips", strips, true);
    p.strip_count = strips.has_value() ? static_cast<int32_t>(std::get<2>(*strips)[0]) : 1;
    run([&] { return launch_tubelet_row_sums(p, nullptr); });
}

void weight_gradient(const TubeletCall& call, const View& d_out, const View& parts) {
    Run run = call.run();
    TubeletParams p = call.params();
    run.add("video", in_memory(call.video), false);
    p.d_out = run.add("do", d_out, false);
    p.parts = static_cast<float*>(run.add("parts", parts, true));
    p.splits = static_cast<int32_t>(std::get<2>(parts)[0]);
    run([&] { return launch_tubelet_weight_gradient(p, nullptr); });
}

void finish(const TubeletCall& call, const MaybeView& parts, const MaybeView& strips, const MaybeView& d_weight,
            const MaybeView& d_bias) {
    Run run = call.run();
    TubeletParams p = call.params();
    p.parts = run.add<float>("parts", parts), p.strips = run.add<float>("strips", strips);
    p.splits = parts.has_value() ? static_cast<int32_t>(std::get<2>(*parts)[0]) : 0;
    p.strip_count = strips.has_value() ? static_cast<int32_t>(std::get<2>(*strips)[0]) : 0;
    p.d_weight = run.add<void>("dweight", d_weight, true);
    p.d_bias = table(run, "dbias", d_bias, true);
    run([&] { return launch_tubelet_finish(p, nullptr); });
}

void video_gradient(const TubeletCall& call, const View& d_out, const View& operand, const View& d_video) {
    Run run = call.run();
    TubeletParams p = call.params();
    p.d_out = run.add("do", d_out, false), p.operand = run.add("operand", operand, false);
    p.d_video = run.add("dvideo", d_video, true);
    const auto& strides = std::get<3>(d_video);
    p.d_video_b = strides[0], p.d_video_c = strides[1], p.d_video_f = strides[2], p.d_video_y = strides[3];
    run([&] { return launch_tubelet_video_gradient(p, nullptr); });
}

}  // namespace

void define_tubelet(py::module_& m) {
    py::class_<TubeletCall>(m, "TubeletCall", py::module_local())
        .def(py::init([](View video, View weight, bool per_frame, bool has_class,
                         std::pair<std::vector<double>, std::vector<double>> affine, std::pair<int, int> types,
                         uint64_t schedule_seed, int shared_bytes, int arch) {
                 return TubeletCall{std::move(video), std::move(weight), per_frame, has_class, std::move(affine), types,
                                    schedule_seed,    shared_bytes,      arch};
             }),
             py::kw_only(), py::arg("video"), py::arg("weight"), py::arg("per_frame"), py::arg("has_class"),
             py::arg("affine"), py::arg("types"), py::arg("schedule_seed"), py::arg("shared_bytes"), py::arg("arch"));
    m.def("tubelet_prepare", prepare);
    m.def("tubelet_forward", forward);
    m.def("tubelet_row_sums", row_sums);
    m.def("tubelet_weight_gradient", weight_gradient);
    m.def("tubelet_finish", finish);
    m.def("tubelet_video_gradient", video_gradient);
    m.def("tubelet_needs_operand",
          [](const TubeletCall& call, bool backward) { return needs_operand(call.params(), backward); });
}
