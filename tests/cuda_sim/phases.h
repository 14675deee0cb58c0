// Barriers with phases, the copies of boxes that complete them, barriers of some warps, and registers that warps pass
// on. A copy is done when the schedule says, after whatever comes in between; its bytes are NaN until then.
//
// Found here: a barrier that was not made, or made without a fence and a block barrier before others use it; more
// arrivals in a phase than it was made for; a copy of more bytes than the phase expects; a wait that nobody ends (the
// account of the block says what is missing); a barrier whose words something else wrote to; warps that disagree about
// the number of threads of a barrier, or arrive twice; registers that cannot be had. What a wrong parity does shows in
// memory.h: someone reads what is not there yet, or writes what is still read.
#pragma once

#include <cstdint>

#include "machine.h"
#include "tensor_map.h"

namespace vivit::cuda::sim {

void start_phases(int threads);      // of a block
bool finish_a_box(uint64_t chosen);  // one of the copies on their way, if there is any
void finish_phases();                // at the end of a block

void init_phases(const Site& site, uint64_t* word, int arrivals);
void fence_phases(const Site& site);
void arrive_at_phase(const Site& site, uint64_t* word, int bytes);
void wait_for_phase(const Site& site, uint64_t* word, uint32_t parity);

void start_box(const Site& site, void* to, const TensorMap& map, uint64_t* word, const int32_t* first, int rank);

void meet_by_name(const Site& site, int number, int threads, bool waits);

void change_registers(const Site& site, int registers, bool grow);

}  // namespace vivit::cuda::sim
