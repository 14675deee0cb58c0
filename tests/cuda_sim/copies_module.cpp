// The simulator's examples of copies of boxes, as a part of the Python module.
#include <algorithm>
#include <vector>

#include "cuda_sim/calls.h"
#include "cuda_sim/copy_examples.cuh"

namespace vivit::cuda::sim {
namespace {

// A tensor as PyTorch sees it, neighbours last: the dimension `rows` of it goes by in boxes of `box`, of the others
// one.
TensorShape shape_of(const View& view, int rows, int box) {
    const auto& [address, element, sizes, strides] = view;
    TensorShape x;
    x.data = reinterpret_cast<const void*>(address);
    x.element_bytes = element;
    x.rank = static_cast<int32_t>(sizes.size());
    for (int i = 0; i < std::min(x.rank, kMostDimensions); ++i) {
        x.sizes[i] = sizes[x.rank - 1 - i], x.strides[i] = strides[x.rank - 1 - i] * element, x.box[i] = 1;
    }
    x.box[0] = 128 / element;
    if (rows > 0) x.box[rows] = box;
    return x;
}

// False where a tensor cannot be copied in boxes. rows: which dimension has them, counted from the neighbours, which
// are 0.
bool one_box(int fault, const View& x, const View& out, int rows, const std::vector<int>& first, int before,
             uint64_t seed) {
    Run run(seed, 227 << 10);
    const int count = static_cast<int>(std::get<2>(out).at(0));
    examples::BoxParams p;
    if (!make_tensor_map(p.map, shape_of(x, rows, count))) return false;
    run.add("x", x, false);
    p.out = static_cast<uint16_t*>(run.add("out", out, true));
    p.rank = static_cast<int32_t>(first.size()), p.rows = count;
    std::copy(first.begin(), first.end(), p.first);
    p.before = before, p.fault = static_cast<examples::CopyFault>(fault);
    run([&] { return launch(examples::one_box, 1, 64, examples::kBoxShared, nullptr, p); });
    return true;
}

void streamed(int fault, bool half, const View& x, const View& c, int clip, int head, uint64_t seed) {
    Run run(seed, 227 << 10);
    examples::StreamParams p;
    if (!make_tensor_map(p.rows, shape_of(x, 2, examples::kStreamRows))) throw Failure("not copyable");
    run.add("x", x, false);
    p.c = static_cast<float*>(run.add("c", c, true));
    p.boxes = static_cast<int32_t>(std::get<2>(c).at(1)), p.head = head, p.clip = clip;
    p.fault = static_cast<examples::CopyFault>(fault);
    const auto kernel = half ? examples::streamed<Float16> : examples::streamed<BFloat16>;
    run([&] { return launch(kernel, 1, examples::kStreamThreads, examples::kStreamShared, nullptr, p); });
}

}  // namespace

void add_copies(py::module_& m) {
    m.def("one_box", one_box);
    m.def("streamed", streamed);
}

}  // namespace vivit::cuda::sim
