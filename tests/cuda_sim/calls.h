// What every part of the Python module does: tensors in CPU memory become the simulator's, a launch runs alone.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda_sim/machine.h"
#include "cuda_sim/memory.h"

namespace vivit::cuda::sim {

namespace py = pybind11;

// Address, bytes of an element, sizes, strides (in elements).
using View = std::tuple<uintptr_t, int, std::vector<int64_t>, std::vector<int64_t>>;
using MaybeView = std::optional<View>;

// One launch at a time: the simulated machine is one.
class Run {
  public:
    Run(uint64_t seed, int shared_bytes, int arch = 90) : alone_(machine_, std::defer_lock) {
        {
            const py::gil_scoped_release others_may_run;  // who has the machine may wait for Python
            alone_.lock();
        }
        schedule = {seed, shared_bytes, arch};
    }

    void* add(const char* name, const View& view, bool output) {
        const auto& [address, element, sizes, strides] = view;
        tensors_.push_back({name, reinterpret_cast<char*>(address), element, sizes, strides, output});
        return reinterpret_cast<void*>(address);
    }
    template <class T>
    T* add(const char* name, const MaybeView& view, bool output = false) {
        return view.has_value() ? static_cast<T*>(add(name, *view, output)) : nullptr;
    }

    template <class Launch>
    void operator()(Launch launch) {
        const py::gil_scoped_release others_may_run;
        register_tensors(tensors_);
        const int error = launch();
        if (error != 0) throw Failure("launch: cudaError_t " + std::to_string(error));
    }

  private:
    inline static std::mutex machine_;
    std::unique_lock<std::mutex> alone_;
    std::vector<Tensor> tensors_;
};

}  // namespace vivit::cuda::sim
