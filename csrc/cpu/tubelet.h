// What a caller of the CPU tubelet embedding fills in, and what an instruction set has to offer. Torch-free.
#pragma once

#include "attention.h"

namespace vivit::cpu {

enum class Pixel : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kUInt8 = 3 };

// A video cut into tubelets, [B, T, rows, columns] of K taps each: a tap's place is a sum over four loops, the slowest
// first, and the place in a run of neighbours. Strides in elements.
struct Tubelets {
    void* data = nullptr;
    const void* end = nullptr;  // behind the last pixel: what a vector may read up to
    Pixel pixel = Pixel::kFloat32;
    int64_t size[4] = {}, stride[4] = {};  // B, T, rows, columns
    int64_t loops[4] = {1, 1, 1, 1}, loop_stride[4] = {};
    int64_t run = 1;
};

// Rows of all tokens, in groups of so many; the elements of a row are neighbours.
struct TokenRows {
    void* data = nullptr;
    int64_t group = 1, stride_group = 0, stride = 0;
};

constexpr int64_t kTapsBehind = 16;  // floats that arrays [K] have behind their last: a vector may read them

struct TubeletParams {
    int64_t tokens = 0, K = 0, E = 0;
    DType dtype = DType::kFloat32;  // of weight and tokens
    Tubelets video;                 // uint8 counts as 128 less
    const void* weight = nullptr;   // [E, K]
    TokenRows rows;                 // tokens out, or their gradient
    void* shared = nullptr;         // memory of `shared_bytes` of the call
    // A pixel of tap k counts as pixel_scale[k] * u + pixel_shift[k], rounded; none: as u.
    const float* pixel_scale = nullptr;
    const float* pixel_shift = nullptr;
    // What is still to be done to the products: factor and the taps' weights times scale, weights times shift added.
    float factor = 1.f;
    const float* scale = nullptr;
    const float* shift = nullptr;
    // Forward: what is added to a token.
    const float* bias = nullptr;     // [E]
    const void* position = nullptr;  // [rows.group, E]
    int64_t position_stride = 0;
    bool position_is_float = false;  // else of `dtype`
    // Backward.
    void* dweight = nullptr;  // [E, K]
    float* sums = nullptr;    // [E]: of all tokens' gradients
};

// Two steps of work, the second when all of the first is done; the units of a step are independent of each other and of
// how they are shared out.
template <class Params>
struct TwoSteps {
    int64_t (*shared_bytes)(const Params&);
    int64_t (*units[2])(const Params&);
    void (*run[2])(const Params&, int64_t first, int64_t end);
};
using TubeletWork = TwoSteps<TubeletParams>;

struct TubeletKernels {
    TubeletWork forward, weight_gradient, video_gradient;
};

// Of an instruction set, or null where it is not compiled in.
const TubeletKernels* tubelet_kernels(Isa isa);

// 64-byte aligned memory that the threads of one call share; its content is undefined. Throws std::bad_alloc.
class SharedMemory {
  public:
    explicit SharedMemory(int64_t bytes);
    ~SharedMemory();
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;
    SharedMemory(SharedMemory&&) = delete;
    SharedMemory& operator=(SharedMemory&&) = delete;
    void* data() const { return data_; }

  private:
    void* data_;
};

}  // namespace vivit::cpu
