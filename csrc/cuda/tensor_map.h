// A tensor in place, as Hopper's copies of boxes know it. Host code; torch-free.
//
// The token grid needs no copy for it: q of packed projections [B, N, 3, H, D] is a tensor of the sizes (D, H, N, B)
// with the strides that it has there, k the same one, H D numbers on; of [B, T, S, 3, H, D], (D, H, S, T, B). A box of
// rows of such a tensor is 64 of D, 1 of H, the rows of N.
#pragma once

#include <cstdint>

namespace vivit::cuda {

constexpr int kMostDimensions = 5;

// Neighbours first: sizes[0] numbers side by side, strides[i] bytes from one to the next along dimension i > 0.
struct TensorShape {
    const void* data = nullptr;
    int32_t element_bytes = 2;
    int32_t rank = 0;
    int64_t sizes[kMostDimensions] = {};
    int64_t strides[kMostDimensions] = {};
    int32_t box[kMostDimensions] = {};  // how much of each dimension one copy brings, its rows 128, 64 or 32 bytes
};

// Where there is only one along a dimension its stride means nothing; a valid one is put in its place.
inline TensorShape with_strides(TensorShape x) {
    for (int i = 1; i < x.rank; ++i) {
        const int64_t span = i == 1 ? x.sizes[0] * x.element_bytes : x.strides[i - 1] * x.sizes[i - 1];
        if (x.sizes[i] == 1) x.strides[i] = (span + 15) / 16 * 16;
    }
    return x;
}

// Whether the copy engine takes it (CUDA driver API, cuTensorMapEncodeTiled): data and strides multiples of 16 bytes,
// sizes up to 2^32, strides below 2^40, up to 256 of a box along a dimension. Nobody is to fail where it does not: the
// launcher then takes a kernel that copies in another way.
inline bool is_copyable(const TensorShape& given) {
    const TensorShape x = with_strides(given);
    const auto within = [](int64_t n, int64_t first, int64_t last) { return n >= first && n <= last; };
    if (x.rank < 1 || x.rank > kMostDimensions || reinterpret_cast<uintptr_t>(x.data) % 16 != 0) return false;
    if (x.element_bytes != 1 && x.element_bytes != 2 && x.element_bytes != 4) return false;
    const int row_bytes = x.box[0] * x.element_bytes;
    if (row_bytes != 128 && row_bytes != 64 && row_bytes != 32) return false;
    for (int i = 0; i < x.rank; ++i) {
        if (!within(x.sizes[i], 1, int64_t(1) << 32) || !within(x.box[i], 1, 256)) return false;
        if (i > 0 && (x.strides[i] % 16 != 0 || !within(x.strides[i], 16, (int64_t(1) << 40) - 1))) return false;
    }
    return true;
}

#if defined(VIVIT_SIM)
struct TensorMap {
    TensorShape shape;
};
#else
struct alignas(128) TensorMap {  // CUtensorMap of cuda.h, which asks for 64 or 128
    uint64_t words[16];
};
#endif

// False where it is not copyable, or there is no driver to make the map.
bool make_tensor_map(TensorMap& map, const TensorShape& shape);

}  // namespace vivit::cuda
