// What the verbs may touch: the tensors of a launch, row by row, and the block's shared memory. Each verb that reads or
// writes says so here first; what hardware would do wrong, or only sometimes right, is a Failure (machine.h).
//
// Global memory: an access lies within one row of a tensor, aligned to its size; inputs are only read, outputs only
// written, and each number once. Shared memory: within the size that the launch named, aligned, and ordered: of two
// accesses to the same 16 bytes of which one writes, by different threads, a barrier lies between (a warp barrier
// is enough within a warp, a block barrier otherwise; mma, ldmatrix and shuffles order nothing). Shared memory starts
// as NaN, and what an asynchronous copy will write is NaN, and may not be read, until its thread has waited for it.
// What a product of a warpgroup reads was fenced by its writers before the barrier between, and is left alone until the
// product was waited for. Who read or wrote what a box is copied over has fenced that, too, before the barrier between.
// Where a block uses barriers of other kinds, knowledge.h says what they order.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "machine.h"

namespace vivit::cuda::sim {

// ---- global memory ----

// Sizes and strides are in elements; the last dimension has neighbours side by side.
struct Tensor {
    std::string name;
    char* data = nullptr;
    int element = 0;  // bytes
    std::vector<int64_t> sizes, strides;
    bool output = false;
};

// Instead of those registered before.
void register_tensors(const std::vector<Tensor>& tensors);

void check_global(const Site& site, const void* at, int bytes, bool writes);
bool is_shared(const void* at);

// ---- shared memory ----

void start_shared_memory(int bytes);
void check_around_shared_memory();
char* shared_memory();

// 16 bytes, for all lanes of the warp, or (lanes = 1) for the running thread alone.
void read_shared(const Site& site, const void* at, int lanes = kLanes);
void write_shared(const Site& site, const void* at);

// As products of a warpgroup know it (groups.h): by an address of the block's memory, not of the process's.
uint32_t shared_address(const void* at);
const void* shared_at(uint32_t address);
int shared_offset(uint32_t address);  // from the start of what the launch named

// 16 bytes that a product reads from its start until it has been waited for. Their writer has fenced them since it
// wrote, and passed a block barrier since.
void start_group_read(const Site& site, uint32_t address);
void end_group_read(const Site& product, uint32_t address);
void fence_accesses(const Site& site);  // of the running thread, its reads and its writes

// ---- copies of boxes (phases.h) ----

// 16 bytes on their way, of the running thread; once there, known to those who know of the phase of that barrier.
void start_box_chunk(const Site& site, void* to);
void finish_box_chunk(void* to, const void* from, int barrier, uint32_t phase);  // from: zeros where null

// ---- asynchronous copies of the running thread ----

void start_copy(const Site& site, void* to_shared, const void* from, bool valid);
void commit_copies();
void wait_for_copies(int later_groups);
void finish_copies();  // at the end of a thread

}  // namespace vivit::cuda::sim
