// Memory of one thread cut into aligned pieces: laid out once without memory to learn its size, once with.
#pragma once

#include "attention.h"
#include "vector.h"

namespace vivit::cpu::VIVIT_ISA {

class Carver {
  public:
    explicit Carver(void* memory = nullptr) : at_(static_cast<char*>(memory)) {}

    template <class T>
    T* take(int64_t count) {
        T* piece = reinterpret_cast<T*>(at_ + used_);
        used_ += round_up<int64_t>(count * static_cast<int64_t>(sizeof(T)), 64);
        return at_ == nullptr ? nullptr : piece;
    }
    int64_t used() const { return used_; }

  private:
    char* at_;
    int64_t used_ = 0;
};

// Fills in `pieces` (by its lay_out(Carver&)) from the thread's scratch memory.
template <class Pieces>
void carve(Pieces& pieces) {
    Carver size;
    pieces.lay_out(size);
    Carver memory(thread_scratch(size.used()));
    pieces.lay_out(memory);
}

// The queries of a sequence in blocks of whole vectors, as even as can be: 13 vectors of 196 tokens are 4, 3, 3 and 3.
struct QueryBlocks {
    int64_t step, steps, blocks;

    QueryBlocks(int64_t N, int64_t most_lanes, int64_t least_lanes = kLanes)
        : step(least_lanes > kLanes ? least_lanes : kLanes),
          steps((N + step - 1) / step),
          blocks((steps * step + most_lanes - 1) / most_lanes) {}
    int64_t first(int64_t block) const { return steps * block / blocks * step; }
    int64_t lanes(int64_t block) const { return first(block + 1) - first(block); }
};

}  // namespace vivit::cpu::VIVIT_ISA
