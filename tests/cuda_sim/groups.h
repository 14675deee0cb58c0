// Products of four neighbouring warps, which run on their own (wgmma). They are done at the latest moment that hardware
// may take: when their group is waited for. Until then their sums are NaN, and a change of what they read or write ends
// the run, as do a product that nobody commits, waits for or says to begin, one that some of the 128 threads ask for in
// another way, and an operand that is not laid out as the product takes it, or not written through to it (memory.h).
#pragma once

#include <cstdint>

#include "machine.h"

namespace vivit::cuda::sim {

// A product as one thread asks for it: d [64, columns] (+)= a b, over 16. a: 64 rows of channels, in registers or at
// its descriptor. b: 16 rows of `columns` channels (along), or `columns` rows of channels, transposed.
struct Product {
    float* d;
    const uint32_t* registers;  // of a, or null
    uint64_t a, b;              // descriptors
    int columns;
    bool along, keep;
    float (*widen)(uint16_t);
};

// slab_bytes: from 64 channels of a row to the next 64; 0 where rows have no more.
uint64_t describe_operand(const Site& site, const void* operand, uint32_t row_bytes = 128, uint32_t slab_bytes = 0);

// Where a multiple of 16 bytes of rows of 128, 64 or 32 bytes lies: its bits from 4 on, of the chunk's number in the
// row, are those xor the bits from 7 on (PTX manual, swizzling modes).
uint32_t swizzled_address(uint32_t plain, uint32_t row_bytes);

extern int64_t products_of_launch;  // that a warpgroup has asked for in the last launch

void start_groups(int threads);
void begin_products(const Site& site);
void start_product(const Site& site, Product& mine);
void commit_products(const Site& site);
void wait_for_products(const Site& site, int later_groups);
void finish_products();  // at the end of a thread

}  // namespace vivit::cuda::sim
