#include "fibres.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace vivit::cuda::sim {
namespace {

constexpr size_t kPage = 1 << 16;  // the largest page that Linux has on processors where this runs
constexpr size_t kStack = 4 * kPage;

}  // namespace

#if defined(__x86_64__)

// swapcontext asks the system for the signal mask at every switch; this is what the calling convention asks for: six
// registers and the stack pointer (rounding modes stay what they are).
extern "C" void vivit_sim_change(void** from, void* to);
asm(R"(
    .text
    .type vivit_sim_change, @function
vivit_sim_change:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size vivit_sim_change, . - vivit_sim_change
)");

void change(Context& from, Context& to) { vivit_sim_change(&from, to); }

void Stacks::start(Context& context, size_t i, void (*entry)()) {
    // Six registers and, at a multiple of 16, the address that `ret` takes: a function finds the stack so.
    void** top = reinterpret_cast<void**>(stacks_[i] + kPage + kStack) - 4;
    *top = reinterpret_cast<void*>(entry);
    for (int j = 1; j <= 6; ++j) top[-j] = nullptr;
    context = top - 6;
}

#else

void change(Context& from, Context& to) { swapcontext(&from, &to); }

void Stacks::start(Context& context, size_t i, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stacks_[i] + kPage;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}

#endif

void Stacks::reserve(size_t count) {
    while (stacks_.size() < count) {
        void* memory = mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        mprotect(memory, kPage, PROT_NONE);
        stacks_.push_back(static_cast<char*>(memory));
    }
}

Stacks::~Stacks() {
    for (char* stack : stacks_) munmap(stack, kPage + kStack);
}

}  // namespace vivit::cuda::sim
