// Which instruction set runs here, and the scratch memory of threads. Compiled for any processor of the platform.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "linear.h"

namespace vivit::cpu {

#define VIVIT_KERNELS_OF(isa)                 \
    namespace isa {                           \
    extern const AttentionKernels kAttention; \
    extern const TubeletKernels kTubelets;    \
    extern const LinearWork kLinear;          \
    }
VIVIT_KERNELS_OF(portable)
#if defined(__x86_64__)
VIVIT_KERNELS_OF(avx2)
VIVIT_KERNELS_OF(avx512)
VIVIT_KERNELS_OF(avx512_bf16)
namespace avx512_amx {
extern const AttentionKernels kAttention;
extern const LinearWork kLinear;
extern const TubeletWork kTubeletForward;
}  // namespace avx512_amx
#endif

namespace {

struct Kernels {
    const AttentionKernels* attention = nullptr;
    const TubeletKernels* tubelets = nullptr;
    const LinearWork* linear = nullptr;
};

#if defined(__x86_64__)
const TubeletKernels& amx_tubelets() {
    static const TubeletKernels kernels = {avx512_amx::kTubeletForward, avx512_bf16::kTubelets.weight_gradient,
                                           avx512_bf16::kTubelets.video_gradient};
    return kernels;
}
#endif

// Of an instruction set, none where it is not compiled in.
Kernels kernels_of(Isa isa) {
    switch (isa) {
        case Isa::kPortable:
            return {&portable::kAttention, &portable::kTubelets, &portable::kLinear};
#if defined(__x86_64__)
        case Isa::kAvx2:
            return {&avx2::kAttention, &avx2::kTubelets, &avx2::kLinear};
        case Isa::kAvx512:
            return {&avx512::kAttention, &avx512::kTubelets, &avx512::kLinear};
        case Isa::kAvx512Bf16:
            return {&avx512_bf16::kAttention, &avx512_bf16::kTubelets, &avx512_bf16::kLinear};
        case Isa::kAvx512Amx:
            if (avx512_amx::kAttention.name == nullptr) return {};  // the compiler had no AMX
            return {&avx512_amx::kAttention, &amx_tubelets(), &avx512_amx::kLinear};
#endif
        default:
            return {};
    }
}

// AMX in the processor, and the kernel's permission for the process to use it: without, its first instruction would end
// the process. Asked once; who has it already is told so again.
bool may_use_tiles() {
#if defined(__linux__) && defined(__x86_64__)
    static const bool may = [] {
        constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;   // of CPUID 7.0, EDX
        constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        unsigned a = 0, b = 0, c = 0, d = 0;
        if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
        if ((d & kBFloat16) == 0 || (d & kTile) == 0) return false;
        return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return may;
#else
    return false;
#endif
}

}  // namespace

const AttentionKernels* attention_kernels(Isa isa) { return kernels_of(isa).attention; }

const TubeletKernels* tubelet_kernels(Isa isa) { return kernels_of(isa).tubelets; }

const LinearWork* linear_kernels(Isa isa) { return kernels_of(isa).linear; }

Isa best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (!has_avx2) return Isa::kPortable;
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!has_avx512) return Isa::kAvx2;
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
    return attention_kernels(Isa::kAvx512Amx) != nullptr && may_use_tiles() ? Isa::kAvx512Amx : Isa::kAvx512Bf16;
#else
    return Isa::kPortable;
#endif
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
    const uintptr_t address = reinterpret_cast<uintptr_t>(data), end = address + static_cast<uintptr_t>(bytes);
    const uintptr_t first = (address + kLargePage - 1) / kLargePage * kLargePage, last = end / kLargePage * kLargePage;
    if (last > first) {
        madvise(static_cast<char*>(data) + (first - address), last - first, MADV_HUGEPAGE);  // no matter if refused
    }
#else
    (void)data, (void)bytes;
#endif
}

SharedMemory::SharedMemory(int64_t bytes) {
    const size_t rounded = static_cast<size_t>((bytes + 4095) / 4096 * 4096);
    data_ = std::aligned_alloc(64, rounded);
    if (data_ == nullptr) throw std::bad_alloc();
    expect_writes(data_, bytes);
    if (poisoned) std::memset(data_, 0xff, rounded);
}

SharedMemory::~SharedMemory() { std::free(data_); }

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
