// What each thread of a block knows to be done, where barriers join only some of them: vector clocks (Lamport 1978;
// Mattern 1989). A thread that arrives at a barrier tells all that it did and knows; who passes the barrier hears it.
//
// Counted are the parts of a thread's way between two barriers that it tells at, the barriers of each warp, each warp's
// waits for products, and the phases of each barrier that a copy completes (phases.h). None of it is kept before the
// first such barrier of a block: then barriers of all threads, and of a warp's, order everything (memory.h).
#pragma once

#include <cstdint>
#include <vector>

#include "machine.h"

namespace vivit::cuda::sim {

constexpr int kMostGroups = 8, kMostPhaseBarriers = 64;

using Knowledge = std::vector<uint32_t>;

// Something that was done, as others may know of it.
struct Event {
    enum class Kind : uint8_t { kNone, kThread, kWarp, kProducts, kPhase };
    Kind kind = Kind::kNone;
    int who = 0;  // thread, warp, warpgroup or barrier
    uint32_t number = 0;
};

Event event_of(int thread, int lanes, int warp_epoch);  // of what so many lanes do now
Event event_of_products(int group, uint32_t waits);
Event event_of_phase(int barrier, uint32_t phase);

void start_knowledge(int threads);  // of a block
void use_knowledge();
bool knowledge_counts();
// Whether all of the 1, 32 or 128 threads that the running one is of know of it; false where knowledge does not count.
bool is_known(const Event& event, int lanes);

void tell(Knowledge& heard);                 // all that the running thread knows and did
void hear(const Knowledge& heard);           // by the running thread
void share_knowledge(int first, int count);  // of these threads among each other
void learn_warp_epoch(int warp, int epoch);
void learn_phase(int barrier, uint32_t phase);  // by the running thread
// A warpgroup has waited for products: each thread knows it of its own warp.
void learn_wait_of_group(int group);
uint32_t waits_of_group(int group);

}  // namespace vivit::cuda::sim
