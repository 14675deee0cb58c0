// How the launchers cut a call, for tests of the rule itself.
#include "cuda/steps.cuh"
#include "cuda/tiles.cuh"
#include "cuda_sim/calls.h"

namespace vivit::cuda::sim {

void add_tiles(pybind11::module_& m) {
    m.def("stages_of", [](int N, int D, bool backward, bool rotary, int most) {
        return with_steps(D, [&](auto steps) {
            return backward ? vivit::cuda::stages_of(Layout<steps, true>(N), rotary, most)
                            : vivit::cuda::stages_of(Layout<steps, false>(N), rotary, most);
        });
    });
}

}  // namespace vivit::cuda::sim
