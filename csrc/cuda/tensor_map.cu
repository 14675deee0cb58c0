// The driver makes maps of tensors. It is asked for by name when one is first wanted: a library linked to it would not
// load where there is none.
#include "tensor_map.h"

#if !defined(VIVIT_SIM)

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>

namespace vivit::cuda {
namespace {

static_assert(sizeof(CUtensorMap) == sizeof(TensorMap) && alignof(CUtensorMap) <= alignof(TensorMap));

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    constexpr unsigned kVersion = 12000;  // the first that has it
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kVersion, cudaEnableDefault, &result);
    if (error != cudaSuccess) cudaGetLastError();  // else the next launch would find it
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

// Makes the current device's context the thread's own, as its first launch would.
bool bind_context() {
    int device = 0;
    const bool bound = cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess;
    if (!bound) cudaGetLastError();
    return bound;
}

}  // namespace

bool make_tensor_map(TensorMap& map, const TensorShape& given) {
    static const Encode encode = find_encode();
    if (encode == nullptr || !is_copyable(given)) return false;
    const TensorShape x = with_strides(given);
    cuuint64_t sizes[kMostDimensions], strides[kMostDimensions];  // of the first dimension, none
    cuuint32_t box[kMostDimensions], steps[kMostDimensions];
    for (int i = 0; i < x.rank; ++i) {
        sizes[i] = static_cast<cuuint64_t>(x.sizes[i]);
        if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(x.strides[i]);
        box[i] = static_cast<cuuint32_t>(x.box[i]), steps[i] = 1;
    }
    const CUtensorMapDataType type = x.element_bytes == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                     : x.element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                                            : CU_TENSOR_MAP_DATA_TYPE_UINT32;
    const int row_bytes = x.box[0] * x.element_bytes;
    const CUtensorMapSwizzle swizzle = row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                       : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                         : CU_TENSOR_MAP_SWIZZLE_32B;
    CUtensorMap made;
    const auto make = [&] {
        return encode(&made, type, static_cast<cuuint32_t>(x.rank), const_cast<void*>(x.data), sizes, strides, box,
                      steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    };
    CUresult error = make();
    // A thread that has launched nothing yet, as autograd's when a backward begins here, has no context.
    if (error == CUDA_ERROR_INVALID_CONTEXT && bind_context()) error = make();
    if (error != CUDA_SUCCESS) return false;
    std::memcpy(&map, &made, sizeof map);
    return true;
}

}  // namespace vivit::cuda

#else

namespace vivit::cuda {

bool make_tensor_map(TensorMap& map, const TensorShape& shape) {
    if (!is_copyable(shape)) return false;
    map.shape = with_strides(shape);
    return true;
}

}  // namespace vivit::cuda

#endif
