// Instructions by name that only tubelets on Hopper need; as verbs_hopper.cuh, with twins in
// tests/cuda_sim/tubelet_hopper_verbs.h.
#pragma once

#include "tubelet_verbs.cuh"
#include "verbs_hopper.cuh"

#if defined(VIVIT_SIM)
#include "cuda_sim/tubelet_hopper_verbs.h"
#else

namespace vivit::cuda {

// Places in shared memory, four at a time.
VIVIT_DEVICE void write_places(int32_t* to, const int32_t (&four)[4]) {
    *reinterpret_cast<int4*>(to) = {four[0], four[1], four[2], four[3]};
}
VIVIT_DEVICE void read_places(int32_t (&four)[4], const int32_t* from) {
    const int4 all = *reinterpret_cast<const int4*>(from);
    four[0] = all.x, four[1] = all.y, four[2] = all.z, four[3] = all.w;
}

VIVIT_DEVICE void read_offsets(int64_t (&two)[2], const int64_t* from) {
    const longlong2 both = *reinterpret_cast<const longlong2*>(from);
    two[0] = both.x, two[1] = both.y;
}

// As descriptor, of rows of 128 channels: 64 of each, and so many bytes further the other 64 (PTX manual, leading
// dimension byte offset of a transposed operand).
VIVIT_DEVICE uint64_t slabs_descriptor(const void* operand, int32_t slab_bytes) {
    constexpr uint64_t kLeading = 0x3fff;
    return (descriptor(operand) & ~(kLeading << 16)) | static_cast<uint64_t>(slab_bytes >> 4) << 16;
}

// x [64, columns] (+)= a b^T over 16 numbers: a in registers, as of a warp's multiply_add; b `columns` rows at their
// descriptor. keep: += instead of =.
template <class T, int kColumns>
VIVIT_DEVICE void group_across_registers(float (&x)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b, bool keep);
// x [64, columns] (+)= a b: b 16 rows of `columns` channels, at the descriptor of their slabs. x has 128 columns.
template <class T, int kColumns>
VIVIT_DEVICE void group_along_registers(float (&x)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b, bool keep);
// The same, a 64 rows of 16 channels at their descriptor, x of 256 columns.
template <class T, int kColumns>
VIVIT_DEVICE void group_along_shared(float (&x)[kColumns / 8][4], uint64_t a, uint64_t b, bool keep);

#if defined(VIVIT_HOPPER)
#define VIVIT_FOURS_16(x, n)                                                                                  \
    VIVIT_FOUR(x, n), VIVIT_FOUR(x, n + 1), VIVIT_FOUR(x, n + 2), VIVIT_FOUR(x, n + 3), VIVIT_FOUR(x, n + 4), \
        VIVIT_FOUR(x, n + 5), VIVIT_FOUR(x, n + 6), VIVIT_FOUR(x, n + 7)
#define VIVIT_SUMS_128(x) VIVIT_FOURS_16(x, 0), VIVIT_FOURS_16(x, 8)
#define VIVIT_SUMS_192(x) VIVIT_SUMS_128(x), VIVIT_FOURS_16(x, 16)
#define VIVIT_SUMS_256(x) VIVIT_SUMS_192(x), VIVIT_FOURS_16(x, 24)
#define VIVIT_NAMED_128 VIVIT_NAMES_64
#define VIVIT_NAMED_192                                                                                      \
    VIVIT_NAMED_128                                                                                          \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
    "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define VIVIT_NAMED_256                                                                                          \
    VIVIT_NAMED_192                                                                                              \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
    "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define VIVIT_REGISTERS(verb, turned, Type, name, columns, a_places, b_place, keep_place)                              \
    template <>                                                                                                        \
    VIVIT_DEVICE void verb<Type, columns>(float (&x)[columns / 8][4], const uint32_t (&a)[4], uint64_t b, bool keep) { \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " keep_place                                                    \
                     ", 0;\n"                                                                                          \
                     "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name "." name " {" VIVIT_NAMED_##columns  \
                     "}, {" a_places "}, " b_place ", p, 1, 1, " turned ";\n}"                                         \
                     : VIVIT_SUMS_##columns(x)                                                                         \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(keep)));               \
    }
#define VIVIT_REGISTERS_128(verb, turned, Type, name) \
    VIVIT_REGISTERS(verb, turned, Type, name, 128, "%64, %65, %66, %67", "%68", "%69")
#define VIVIT_ALONG_SHARED(Type, name)                                                                      \
    template <>                                                                                             \
    VIVIT_DEVICE void group_along_shared<Type, 256>(float (&x)[32][4], uint64_t a, uint64_t b, bool keep) { \
        asm volatile(                                                                                       \
            "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                   \
            "wgmma.mma_async.sync.aligned.m64n256k16.f32." name "." name " {" VIVIT_NAMED_256               \
            "}, %128, %129, p, 1, 1, 0, 1;\n}"                                                              \
            : VIVIT_SUMS_256(x)                                                                             \
            : "l"(a), "l"(b), "r"(static_cast<int>(keep)));                                                 \
    }
#define VIVIT_REGISTERS_OF(Type, name)                                                                      \
    VIVIT_REGISTERS(group_across_registers, "0", Type, name, 256, "%128, %129, %130, %131", "%132", "%133") \
    VIVIT_REGISTERS(group_across_registers, "0", Type, name, 192, "%96, %97, %98, %99", "%100", "%101")     \
    VIVIT_REGISTERS_128(group_across_registers, "0", Type, name)                                            \
    VIVIT_REGISTERS_128(group_along_registers, "1", Type, name)                                             \
    VIVIT_ALONG_SHARED(Type, name)
VIVIT_REGISTERS_OF(BFloat16, "bf16")
VIVIT_REGISTERS_OF(Float16, "f16")
#else  // never launched there
template <class T, int kColumns>
VIVIT_DEVICE void group_across_registers(float (&)[kColumns / 8][4], const uint32_t (&)[4], uint64_t, bool) {}
template <class T, int kColumns>
VIVIT_DEVICE void group_along_registers(float (&)[kColumns / 8][4], const uint32_t (&)[4], uint64_t, bool) {}
template <class T, int kColumns>
VIVIT_DEVICE void group_along_shared(float (&)[kColumns / 8][4], uint64_t, uint64_t, bool) {}
#endif

}  // namespace vivit::cuda

#endif  // VIVIT_SIM
