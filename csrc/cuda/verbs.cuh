// Instructions by name: what a warp does in one step, its fragment layouts as the PTX manual (9.7.14) has them. The
// host simulator compiles the kernels against twins of the same names (tests/cuda_sim/verbs.h).
#pragma once

#if defined(VIVIT_SIM)
#include "cuda_sim/verbs.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define VIVIT_DEVICE __device__ __forceinline__
#define VIVIT_BOTH __host__ __device__ constexpr  // also for the host, which chooses the launch

namespace vivit::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

// ---- numbers ----

// Two neighbours of 16 bits, the first in the low half, each rounded to nearest even.
template <class T>
VIVIT_DEVICE uint32_t packed(float first, float second);
template <>
VIVIT_DEVICE uint32_t packed<BFloat16>(float first, float second) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}
template <>
VIVIT_DEVICE uint32_t packed<Float16>(float first, float second) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

template <class T>
VIVIT_DEVICE float2 unpacked(uint32_t both);
template <>
VIVIT_DEVICE float2 unpacked<BFloat16>(uint32_t both) {
    return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
}
template <>
VIVIT_DEVICE float2 unpacked<Float16>(uint32_t both) {
    return __half22float2(*reinterpret_cast<const __half2*>(&both));
}

// 2^x with an error of 2 ulp, 0 for -inf; results below the normal range are 0.
VIVIT_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log2(x) for normal x, within 2^-22 where x is between 0.5 and 2, else within 2 ulp.
VIVIT_DEVICE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- a warp's matrices ----
// Lane 4 g + t of a warp, g = 0..7, t = 0..3. An 8 x 8 block of 16 bits: the lane has row g, columns 2 t and 2 t + 1.

// d += a b: a [16, 16] as four blocks (rows 0.. columns 0.., rows 8.. columns 0.., rows 0.. columns 8.., rows 8..
// columns 8..), b [16, 8] transposed as two blocks (b0 has b[2 t, 2 t + 1][g], b1 the same 8 rows further), d [16, 8]
// in float32 (rows g and g + 8, columns 2 t and 2 t + 1).
template <class T>
VIVIT_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
VIVIT_DEVICE void multiply_add<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
VIVIT_DEVICE void multiply_add<Float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The transpose of an 8 x 8 block.
VIVIT_DEVICE uint32_t transposed(uint32_t block) {
    uint32_t turned;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(block));
    return turned;
}

// Four blocks from shared memory: lanes 8 i to 8 i + 7 name the rows (16 bytes each, aligned) of block i.
VIVIT_DEVICE void load_blocks(uint32_t (&block)[4], const void* row) {
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(block[0]), "=r"(block[1]), "=r"(block[2]), "=r"(block[3])
                 : "r"(at));
}

// The same, each block transposed.
VIVIT_DEVICE void load_blocks_transposed(uint32_t (&block)[4], const void* row) {
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(block[0]), "=r"(block[1]), "=r"(block[2]), "=r"(block[3])
                 : "r"(at));
}

// The value of the lane whose number differs in `mask`'s bits; all lanes take part.
VIVIT_DEVICE float from_lane_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
VIVIT_DEVICE uint32_t from_lane_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
// A number that all lanes have, which the compiler then knows: what depends on it is computed once for the warp.
VIVIT_DEVICE int32_t same_in_warp(int32_t x) { return __shfl_sync(0xffffffffu, x, 0); }
// A bit for each lane: whether x is true there; all lanes take part.
VIVIT_DEVICE uint32_t lanes_where(bool x) { return __ballot_sync(0xffffffffu, x); }
VIVIT_DEVICE void warp_barrier() { __syncwarp(); }
VIVIT_DEVICE void block_barrier() { __syncthreads(); }

// ---- memory ----

// 16 bytes of global memory that nobody writes during the kernel; zeros, without an access, where not valid.
VIVIT_DEVICE uint4 load_16(const void* from, bool valid) {
    uint4 x = {0u, 0u, 0u, 0u};
    if (valid) x = __ldg(static_cast<const uint4*>(from));
    return x;
}
VIVIT_DEVICE void store_16(void* to, uint4 x) { *static_cast<uint4*>(to) = x; }
// One number of global memory that nobody writes during the kernel.
template <class T>
VIVIT_DEVICE T load_one(const T* from) {
    return __ldg(from);
}
template <>
VIVIT_DEVICE bool load_one<bool>(const bool* from) {
    return __ldg(reinterpret_cast<const unsigned char*>(from)) != 0;
}
template <>
VIVIT_DEVICE int64_t load_one<int64_t>(const int64_t* from) {
    return static_cast<int64_t>(__ldg(reinterpret_cast<const long long*>(from)));
}
VIVIT_DEVICE void store_8(void* to, uint2 x) { *static_cast<uint2*>(to) = x; }
VIVIT_DEVICE void store_one(float* to, float x) { *to = x; }

// Four neighbours, 16 bytes, in shared memory.
VIVIT_DEVICE void read_four(float (&x)[4], const float* from) {
    const float4 all = *reinterpret_cast<const float4*>(from);
    x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
}
VIVIT_DEVICE void write_four(float* to, const float (&x)[4]) {
    *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]};
}

// 16 bytes from global to shared memory without waiting, zeros where not valid: there after copies_wait<n>, n the
// number of later groups that may be on their way, and then a barrier for other threads.
VIVIT_DEVICE void copy_16(void* to_shared, const void* from, bool valid) {
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
VIVIT_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLater>
VIVIT_DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

// The block's shared memory, of the size that its launch names, aligned to 1024 bytes.
VIVIT_DEVICE char* shared_memory() {
    extern __shared__ __align__(1024) char memory[];
    return memory;
}

// ---- a warpgroup's matrices (sm_90a) ----
// Four neighbouring warps, warp w with rows 16 w to 16 w + 15 of 64, each row as for a warp above. Operands in shared
// memory are rows of 64 channels, 128 bytes, the first at a multiple of 1024 bytes, with chunk c of 16 bytes of row r
// at place c xor (r mod 8). Products run on their own until group_wait: until then nobody may touch what they read or
// write.

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VIVIT_HOPPER 1
#endif

// Says that registers and shared memory are ready for the products that follow.
VIVIT_DEVICE void group_begin() {
#if defined(VIVIT_HOPPER)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
VIVIT_DEVICE void group_commit() {
#if defined(VIVIT_HOPPER)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int kLater>
VIVIT_DEVICE void group_wait() {
#if defined(VIVIT_HOPPER)
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLater) : "memory");
#endif
}
// Between these registers' last use before products and the products, and between group_wait and their next use: the
// compiler, which does not know that products run on, moves nothing across.
template <int kCount>
VIVIT_DEVICE void group_settle(float (&x)[kCount][4]) {
#pragma unroll
    for (int i = 0; i < 4 * kCount; ++i) asm volatile("" : "+f"(x[i / 4][i % 4])::"memory");
}
template <int kCount>
VIVIT_DEVICE void group_settle(uint32_t (&a)[kCount][4]) {
#pragma unroll
    for (int i = 0; i < 4 * kCount; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}
// In each thread that wrote shared memory which such products read, before the barrier between; and in each that read
// or wrote what a box (verbs_hopper.cuh) is then copied over.
VIVIT_DEVICE void group_fence() {
#if defined(VIVIT_HOPPER)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// How the products know an operand in shared memory: its address, 1024 bytes from eight rows to the next eight,
// swizzled by 128 bytes (PTX manual, matrix descriptors of wgmma).
VIVIT_DEVICE uint64_t descriptor(const void* operand) {
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(operand));
    return (static_cast<uint64_t>(1) << 62) | (static_cast<uint64_t>(1024 >> 4) << 32) |
           (static_cast<uint64_t>(1) << 16) | ((at & 0x3ffff) >> 4);
}

// x [64, columns] (+)= a b^T over 16 channels: a 64 rows and b `columns` rows at their descriptors. keep: += instead of
// =.
template <class T, int kColumns>
VIVIT_DEVICE void group_across_step(float (&x)[kColumns / 8][4], uint64_t a, uint64_t b, bool keep);
// x [64, 64] += a b over 16 rows: a in registers, b at its descriptor, 64 channels.
template <class T>
VIVIT_DEVICE void group_along(float (&x)[8][4], const uint32_t (&a)[4], uint64_t b);

#if defined(VIVIT_HOPPER)
#define VIVIT_FOUR(x, n) "+f"(x[n][0]), "+f"(x[n][1]), "+f"(x[n][2]), "+f"(x[n][3])
#define VIVIT_8(x) VIVIT_FOUR(x, 0), VIVIT_FOUR(x, 1)
#define VIVIT_16(x) VIVIT_8(x), VIVIT_FOUR(x, 2), VIVIT_FOUR(x, 3)
#define VIVIT_32(x) VIVIT_16(x), VIVIT_FOUR(x, 4), VIVIT_FOUR(x, 5), VIVIT_FOUR(x, 6), VIVIT_FOUR(x, 7)
#define VIVIT_64(x)                                                                                           \
    VIVIT_32(x), VIVIT_FOUR(x, 8), VIVIT_FOUR(x, 9), VIVIT_FOUR(x, 10), VIVIT_FOUR(x, 11), VIVIT_FOUR(x, 12), \
        VIVIT_FOUR(x, 13), VIVIT_FOUR(x, 14), VIVIT_FOUR(x, 15)
#define VIVIT_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define VIVIT_NAMES_16 VIVIT_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define VIVIT_NAMES_32 VIVIT_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define VIVIT_NAMES_64                                                                                  \
    VIVIT_NAMES_32                                                                                      \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
    "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define VIVIT_ACROSS(Type, name, columns, count, a_place, b_place, keep_place)                                      \
    template <>                                                                                                     \
    VIVIT_DEVICE void group_across_step<Type, columns>(float (&x)[columns / 8][4], uint64_t a, uint64_t b,          \
                                                       bool keep) {                                                 \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " keep_place                                                 \
                     ", 0;\n"                                                                                       \
                     "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name "." name " {" VIVIT_NAMES_##count \
                     "}, " a_place ", " b_place ", p, 1, 1, 0, 0;\n}"                                               \
                     : VIVIT_##count(x)                                                                             \
                     : "l"(a), "l"(b), "r"(static_cast<int>(keep)));                                                \
    }
#define VIVIT_ALONG(Type, name)                                                                      \
    template <>                                                                                      \
    VIVIT_DEVICE void group_along<Type>(float (&x)[8][4], const uint32_t (&a)[4], uint64_t b) {      \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " {" VIVIT_NAMES_32 \
                     "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                     \
                     : VIVIT_32(x)                                                                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                          \
    }
#define VIVIT_GROUP(Type, name)                            \
    VIVIT_ACROSS(Type, name, 128, 64, "%64", "%65", "%66") \
    VIVIT_ACROSS(Type, name, 64, 32, "%32", "%33", "%34")  \
    VIVIT_ACROSS(Type, name, 32, 16, "%16", "%17", "%18")  \
    VIVIT_ACROSS(Type, name, 16, 8, "%8", "%9", "%10")     \
    VIVIT_ALONG(Type, name)
VIVIT_GROUP(BFloat16, "bf16")
VIVIT_GROUP(Float16, "f16")
#else  // never launched there
template <class T, int kColumns>
VIVIT_DEVICE void group_across_step(float (&)[kColumns / 8][4], uint64_t, uint64_t, bool) {}
template <class T>
VIVIT_DEVICE void group_along(float (&)[8][4], const uint32_t (&)[4], uint64_t) {}
#endif

// ---- launching ----

// The most shared memory that a block of the current device may have.
inline int most_shared_bytes() {
    int device = 0, bytes = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes;
}

// kernel<<<blocks, threads, shared_bytes, stream>>>(params); the error of the launch.
template <class Params>
int launch(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, void* stream, const Params& params) {
    if (shared_bytes > 48 << 10) {
        // All that there is, each time: another thread may be about to launch the same kernel with more than this call.
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes());
        if (error != cudaSuccess) {
            cudaGetLastError();  // else the next launch would find it
            return error;
        }
    }
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
    return cudaGetLastError();
}

// Of the current device, 90 for sm_90.
inline int current_arch() {
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return 10 * major + minor;
}

// Whether kernels that are for sm_90a alone run on the current device: elsewhere, and in PTX of an older architecture
// that the driver compiles for it, they are empty. csrc/build.py says whether their machine code is in the library.
inline bool has_hopper_kernels() {
#if defined(VIVIT_SM90A)
    return current_arch() == 90;
#else
    return false;
#endif
}

}  // namespace vivit::cuda

#endif  // VIVIT_SIM
