// What the bindings of all CUDA kernels need for a launch, without the headers of PyTorch or CUDA.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <string>

namespace vivit::cuda {

// The stream that PyTorch runs on now, a cudaStream_t; or why it cannot be named. libtorch_cuda.so is in the process
// wherever a CUDA tensor is. It is not linked: this library also serves a PyTorch without it; and the stable ABI has a
// stream's handle only from 2.13 on.
inline const char* find_current_stream(int32_t device, void** stream) {
    using Find = int32_t (*)(int32_t, void**);
    static const Find find = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        void* symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
        return reinterpret_cast<Find>(symbol);
    }();
    if (find == nullptr) return "this PyTorch has no CUDA\n  -> install one with CUDA";
    return find(device, stream) == 0 ? nullptr : "PyTorch does not name its current stream";
}

// cudaError_t's that say what to do; numbers, because this file is compiled without CUDA's headers.
constexpr int kInvalidValue = 1, kOutOfMemory = 2, kInvalidConfiguration = 9, kInsufficientDriver = 35;
constexpr int kNoKernelImage = 209, kOutOfResources = 701, kUnsupportedPtx = 222;

inline std::string why_not(int error) {
    switch (error) {
        case kNoKernelImage:
            return "the native library was not compiled for this GPU\n"
                   "  -> build it again, without TORCH_CUDA_ARCH_LIST or with this GPU in it";
        case kInsufficientDriver:
        case kUnsupportedPtx:
            return "the driver is older than the CUDA that compiled the native library\n"
                   "  -> a newer driver, or build the library with an older CUDA";
        case kOutOfMemory:
            return "the GPU has no memory left to load the kernel\n  -> a smaller batch";
        case kInvalidValue:
        case kInvalidConfiguration:
        case kOutOfResources:
            return "the launch asks for more than this GPU has\n  -> use backend='triton' or 'torch' for such a call";
        default:
            return "the GPU reports a failure, perhaps of an earlier kernel\n"
                   "  -> run with CUDA_LAUNCH_BLOCKING=1 to see which one; or use backend='triton' or 'torch'";
    }
}

}  // namespace vivit::cuda
