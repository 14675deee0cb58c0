// One block of threads at a time on the CPU, a fibre for each thread. A thread runs until it reaches a verb that waits
// for others; then the next one of its warp, and when a whole warp has come as far as it can, any warp that can go on,
// by a seeded choice. What hardware leaves undefined ends the run with a Failure that names threads and verbs.
//
// What runs on its own, copies of boxes (phases.h), goes on at any moment with a seed, and with 0 when nobody else can.
//
// Undefined, and found here: lanes of a warp, or warps of a warpgroup, at different verbs or at different lines, a
// barrier that some threads never reach, threads that ended before one (memory.h: accesses; groups.h: products).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace vivit::cuda::sim {

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A verb and where a kernel calls it.
struct Site {
    const char* verb = "";
    const char* file = "";
    int line = 0;
};

constexpr int kLanes = 32, kGroupLanes = 128;

// ---- what verbs are made of; called by a running thread ----

[[noreturn]] void fail(const Site& site, const std::string& what);

// Waits for the other lanes, whose calls must have the same site; the last one calls work(arguments of each lane).
void together(const Site& site, void* arguments, void (*work)(const Site& site, void* const* arguments));
// The same for the four warps of a warpgroup, the first of them a multiple of four; only where sm_90a's words are
// known.
void together_in_group(const Site& site, void* arguments, void (*work)(const Site& site, void* const* arguments));
void wait_for_block(const Site& site);

// Waits until somebody wakes those who wait for `what`; the caller looks then whether its wish is fulfilled. say: what
// it is, for the account of a block in which nobody can go on.
void wait_for(const Site& site, const void* what, std::string (*say)(const void* what));
void wake(const void* what);

int thread_index();
int block_threads();
int block_epoch();  // block barriers passed
int warp_epoch();   // warp or block barriers passed by this thread's warp
void pass_warp_barrier();

// ---- launching ----

struct Schedule {
    uint64_t seed = 0;  // 0: threads and blocks in order, warps taking turns
    int most_shared_bytes = 227 << 10;
    int arch = 90;
    int multiprocessors = 3;  // fewer than a launch has work for: blocks then take several pieces of it
};

extern Schedule schedule;

// As cudaLaunchKernel: its error for a launch that is out of bounds. Throws Failure.
int launch_blocks(void (*call)(const void*), const void* call_data, int64_t blocks, int threads, int shared_bytes);

std::string describe(const Site& site);

}  // namespace vivit::cuda::sim
