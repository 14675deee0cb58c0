// Fibres: functions with a stack each, of which one runs at a time and says itself when another may.
#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace vivit::cuda::sim {

#if defined(__x86_64__)
using Context = void*;  // the stack pointer; what a function must keep lies on the stack
#else
using Context = ucontext_t;
#endif

// Leaves the running context in `from` and goes on where `to` was left.
void change(Context& from, Context& to);

// Stacks that are used again. Below each lies a page that nobody may touch: an overflow ends the process there, rather
// than change a neighbour's numbers.
class Stacks {
  public:
    Stacks() = default;
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;
    ~Stacks();

    void reserve(size_t count);
    // A context that starts `entry` on stack i. `entry` must never return.
    void start(Context& context, size_t i, void (*entry)());

  private:
    std::vector<char*> stacks_;
};

}  // namespace vivit::cuda::sim
