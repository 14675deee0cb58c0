// Which instruction set runs here, and the scratch memory of threads. Compiled for any processor of the platform.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "attention.h"

namespace vivit::cpu {

namespace portable {
extern const AttentionKernels kAttention;
}
#if defined(__x86_64__)
namespace avx2 {
extern const AttentionKernels kAttention;
}
namespace avx512 {
extern const AttentionKernels kAttention;
}
namespace avx512_bf16 {
extern const AttentionKernels kAttention;
}
#endif

Isa best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (!has_avx2) return Isa::kPortable;
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!has_avx512) return Isa::kAvx2;
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
    return Isa::kPortable;
#endif
}

const AttentionKernels* attention_kernels(Isa isa) {
    switch (isa) {
        case Isa::kPortable:
            return &portable::kAttention;
#if defined(__x86_64__)
        case Isa::kAvx2:
            return &avx2::kAttention;
        case Isa::kAvx512:
            return &avx512::kAttention;
        case Isa::kAvx512Bf16:
            return &avx512_bf16::kAttention;
#endif
        default:
            return nullptr;
    }
}

namespace {

struct Scratch {
    void* data = nullptr;
    int64_t bytes = 0;
    ~Scratch() { std::free(data); }
};

std::atomic<bool> poisoned{false};

}  // namespace

void poison_scratch(bool on) { poisoned = on; }

void expect_writes(void* data, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t kLargePage = uintptr_t{1} << 21;
    // whole large pages within the memory only, so that it does not grow
    const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kLargePage - 1) / kLargePage * kLargePage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kLargePage * kLargePage;
    if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // no matter if it is refused
#else
    (void)data, (void)bytes;
#endif
}

void* thread_scratch(int64_t bytes) {
    thread_local Scratch scratch;
    if (scratch.bytes < bytes) {
        const int64_t rounded = (bytes + 4095) / 4096 * 4096;
        std::free(scratch.data);
        scratch.data = std::aligned_alloc(64, static_cast<size_t>(rounded));
        scratch.bytes = scratch.data == nullptr ? 0 : rounded;
        if (scratch.data == nullptr) throw std::bad_alloc();
    }
    if (poisoned) std::memset(scratch.data, 0xff, static_cast<size_t>(scratch.bytes));
    return scratch.data;
}

}  // namespace vivit::cpu
