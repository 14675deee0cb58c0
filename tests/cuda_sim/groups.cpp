#include "groups.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <list>
#include <utility>
#include <vector>

#include "knowledge.h"
#include "memory.h"

namespace vivit::cuda::sim {

int64_t products_of_launch = 0;

namespace {

// A signalling NaN: arithmetic makes another one of it, a copy does not.
constexpr uint32_t kOnItsWay = 0x7fa5a5a5u;
constexpr int kRows = 64, kDepth = 16, kChunk = 16;  // chunk: bytes

// ---- descriptors (PTX manual, matrix descriptors of wgmma) ----

constexpr uint64_t kAddressBits = 0x3fff;

// All but the address: one step along a row, so many bytes from eight rows to the next, swizzled by a row's bytes.
constexpr uint64_t layout_of(uint32_t row_bytes) {
    const uint64_t swizzle = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
    return swizzle << 62 | uint64_t(8 * row_bytes >> 4) << 32 | uint64_t(1) << 16;
}

constexpr uint64_t kLeadingBits = uint64_t(0x3fff) << 16;

// Bytes of a row, as a descriptor says, and from 64 channels of a wider row to the next; 0 where it has no more.
struct Layout {
    uint32_t row_bytes, slab_bytes;

    Layout(const Site& site, uint64_t descriptor) {
        const uint64_t leading = (descriptor & kLeadingBits) >> 16,
                       without = descriptor & ~(kAddressBits | kLeadingBits);
        for (const uint32_t bytes : {128u, 64u, 32u}) {
            row_bytes = bytes, slab_bytes = leading == 1 ? 0 : static_cast<uint32_t>(leading) << 4;
            const bool slabs = slab_bytes == 0 || (bytes == 128 && slab_bytes % 1024 == 0);
            if (slabs && without == (layout_of(bytes) & ~kLeadingBits)) return;
        }
        fail(site,
             "a descriptor of another layout than rows of 128, 64 or 32 bytes, swizzled: its address ran over, or it "
             "was not made by descriptor(), narrow_descriptor() or slabs_descriptor()");
    }
};

// Where chunk `chunk` of row `row` lies of an operand that starts at `start`.
uint32_t chunk_address(uint32_t start, uint32_t row_bytes, int row, int chunk) {
    return swizzled_address(start + row * row_bytes + chunk * kChunk, row_bytes);
}

// An operand in shared memory, as it was when the product started.
struct Operand {
    std::vector<uint32_t> chunks;  // addresses
    std::vector<uint16_t> numbers;

    Operand(const Site& site, uint64_t descriptor, int rows, int chunks_of_row) {
        const Layout layout(site, descriptor);
        const uint32_t row_bytes = layout.row_bytes, eight_rows = 8 * row_bytes;
        const uint32_t start = static_cast<uint32_t>(descriptor & kAddressBits) << 4, in_eight = start % eight_rows;
        if (in_eight >= row_bytes)
            fail(site, "an operand starts at row " + std::to_string(in_eight / row_bytes) +
                           " of eight: the swizzle takes a multiple of " + std::to_string(eight_rows) +
                           " bytes, and the channels within its row");
        const int in_slab = layout.slab_bytes == 0 ? chunks_of_row : static_cast<int>(row_bytes) / kChunk;
        if (in_eight % (in_slab * kChunk) != 0)
            fail(site, "an operand starts " + std::to_string(in_eight) + " bytes within a row, not at a step of " +
                           std::to_string(in_slab * kChunk));
        if (in_eight + in_slab * kChunk > row_bytes || chunks_of_row % in_slab != 0)
            fail(site, "an operand of " + std::to_string(8 * chunks_of_row) + " channels in rows of " +
                           std::to_string(row_bytes) + " bytes");
        for (int row = 0; row < rows; ++row)
            for (int chunk = 0; chunk < chunks_of_row; ++chunk)
                chunks.push_back(
                    chunk_address(start + chunk / in_slab * layout.slab_bytes, row_bytes, row, chunk % in_slab));
        for (const uint32_t at : chunks) start_group_read(site, at);
        numbers = now();
    }

    std::vector<uint16_t> now() const {
        std::vector<uint16_t> found(chunks.size() * kChunk / 2);
        for (size_t i = 0; i < chunks.size(); ++i) std::memcpy(&found[i * kChunk / 2], shared_at(chunks[i]), kChunk);
        return found;
    }

    void end(const Site& site, const Site& product) const {
        const std::vector<uint16_t> found = now();
        for (size_t i = 0; i < found.size(); ++i) {
            if (found[i] == numbers[i]) continue;
            const uint32_t at = chunks[i * 2 / kChunk];
            fail(site, "byte " + std::to_string(shared_offset(at)) + " of shared memory was written while " +
                           describe(product) + " read it");
        }
        for (const uint32_t at : chunks) end_group_read(product, at);
    }
};

// ---- what a warpgroup has under way ----

// The registers that products sum in, [64, columns], and the sums so far, which nobody sees yet.
struct Sums {
    std::array<float*, kGroupLanes> registers;
    int columns, products = 0;  // on their way
    std::vector<float> value;

    int words() const { return columns / 2; }
};

// Registers that products of the block have added to, as they were at the last group_begin.
struct Known {
    std::array<float*, kGroupLanes> registers;
    int words;
    std::vector<float> value;

    void remember() {
        value.resize(kGroupLanes * words);
        for (int thread = 0; thread < kGroupLanes; ++thread)
            std::memcpy(&value[thread * words], registers[thread], 4 * words);
    }
};

struct Started {
    Site site;
    Product product;
    std::vector<Operand> operands;
    std::array<const uint32_t*, kGroupLanes> registers;  // of a
    std::vector<uint32_t> in_registers;                  // as they were
    Sums* sums;
};

using Batch = std::vector<Started>;

struct Warpgroup {
    bool begun = false;
    int begun_in = 0;  // epoch of the block
    Batch started;
    std::vector<Batch> committed;
    std::list<Sums> sums;
    std::vector<Known> known;
};

std::vector<Warpgroup> groups;

Warpgroup& mine() { return groups[thread_index() / kGroupLanes]; }

// Row and column of register i of a thread's part of [64, columns].
int row_of(int thread, int i) { return thread / kLanes * 16 + thread % kLanes / 4 + i % 4 / 2 * 8; }
int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

std::string name_of(int thread) {
    return "thread " + std::to_string(thread_index() / kGroupLanes * kGroupLanes + thread);
}

const Product& of(void* const* threads, int i) { return *static_cast<const Product*>(threads[i]); }

bool is_on_its_way(const float* x) {
    uint32_t bits;
    std::memcpy(&bits, x, 4);
    return bits == kOnItsWay;
}

void expect_untouched(const Site& site, const Sums& sums, const Site& product) {
    for (int thread = 0; thread < kGroupLanes; ++thread)
        for (int i = 0; i < sums.words(); ++i) {
            if (is_on_its_way(sums.registers[thread] + i)) continue;
            fail(site, "registers that " + describe(product) + " sums in were written before it was waited for, by " +
                           name_of(thread));
        }
}

void expect_alike(const Site& site, void* const* threads) {
    const Product& first = of(threads, 0);
    for (int i = 1; i < kGroupLanes; ++i) {
        const Product& x = of(threads, i);
        if (x.a == first.a && x.b == first.b && x.keep == first.keep) continue;
        fail(site, name_of(0) + " and " + name_of(i) + " name different descriptors, or only one " +
                       "of them keeps its sums");
    }
}

// Registers that a product adds to are the same as at group_begin, where they are known: an address that was handed out
// before is one that the compiler has written to by then.
void expect_as_begun(const Site& site, Warpgroup& group, void* const* threads) {
    const int words = of(threads, 0).columns / 2;
    for (const Known& known : group.known) {
        if (known.registers[0] != of(threads, 0).d || known.words != words) continue;
        for (int thread = 0; thread < kGroupLanes; ++thread) {
            if (std::memcmp(&known.value[thread * words], known.registers[thread], 4 * words) == 0) continue;
            fail(site, "registers that it adds to were written after group_begin, by " + name_of(thread));
        }
        return;
    }
    Known& known = group.known.emplace_back();
    known.words = words;
    for (int thread = 0; thread < kGroupLanes; ++thread) known.registers[thread] = of(threads, thread).d;
}

// The sums that a product adds to: those of products before it, or registers that were free.
Sums& sums_of(const Site& site, Warpgroup& group, void* const* threads) {
    const Product& first = of(threads, 0);
    for (Sums& sums : group.sums) {
        const float *from = sums.registers[0], *to = from + sums.words();
        if (first.d == from && first.columns == sums.columns) {
            expect_untouched(site, sums, site);
            return sums;
        }
        if (first.d < to && from < first.d + first.columns / 2)
            fail(site, "sums in registers of a product of another shape that was not waited for");
    }
    if (first.keep) expect_as_begun(site, group, threads);
    Sums& sums = group.sums.emplace_back();
    sums.columns = first.columns;
    sums.value.resize(kRows * sums.columns);
    for (int thread = 0; thread < kGroupLanes; ++thread) {
        sums.registers[thread] = of(threads, thread).d;
        for (int i = 0; i < sums.words(); ++i) {
            float* x = sums.registers[thread] + i;
            if (first.keep) sums.value[row_of(thread, i) * sums.columns + column_of(thread, i)] = *x;
            std::memcpy(x, &kOnItsWay, 4);
        }
    }
    return sums;
}

void start(const Site& site, void* const* threads) {
    Warpgroup& group = mine();
    expect_alike(site, threads);
    if (!group.begun || group.begun_in != block_epoch())
        fail(site, "no group_begin since the last group_wait or barrier");
    Started x{site, of(threads, 0), {}, {}, {}, nullptr};
    if (x.product.registers != nullptr) {
        for (int thread = 0; thread < kGroupLanes; ++thread) {
            x.registers[thread] = of(threads, thread).registers;
            x.in_registers.insert(x.in_registers.end(), x.registers[thread], x.registers[thread] + 4);
        }
    } else {
        x.operands.emplace_back(site, x.product.a, kRows, kDepth / 8);
    }
    if (x.product.along) {
        x.operands.emplace_back(site, x.product.b, kDepth, x.product.columns / 8);
    } else {
        x.operands.emplace_back(site, x.product.b, x.product.columns, kDepth / 8);
    }
    x.sums = &sums_of(site, group, threads);
    ++x.sums->products;
    ++products_of_launch;
    group.started.push_back(std::move(x));
}

// a [64, 16] and b [16, columns] as float32.
std::pair<std::vector<float>, std::vector<float>> widened(const Started& x) {
    const int columns = x.product.columns;
    std::vector<float> a(kRows * kDepth), b(kDepth * columns);
    if (x.product.registers != nullptr) {
        // as of a warp's mma: blocks rows 0.. columns 0.., rows 8.. columns 0.., rows 0.. columns 8.., rows 8..
        for (int thread = 0; thread < kGroupLanes; ++thread)
            for (int i = 0; i < 8; ++i) {
                const int row = thread / kLanes * 16 + thread % kLanes / 4 + i / 2 % 2 * 8;
                const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
                const uint32_t word = x.in_registers[thread * 4 + i / 2];
                a[row * kDepth + column] = x.product.widen(static_cast<uint16_t>(word >> (16 * (i % 2))));
            }
    } else {
        const auto& rows = x.operands.front().numbers;
        std::transform(rows.begin(), rows.end(), a.begin(), x.product.widen);
    }
    const auto& right = x.operands.back().numbers;
    if (x.product.along) {
        std::transform(right.begin(), right.end(), b.begin(), x.product.widen);
    } else {
        for (int n = 0; n < columns; ++n)
            for (int k = 0; k < kDepth; ++k) b[k * columns + n] = x.product.widen(right[n * kDepth + k]);
    }
    return {std::move(a), std::move(b)};
}

void finish(const Site& site, Started& x) {
    for (const Operand& operand : x.operands) operand.end(site, x.site);
    for (size_t i = 0; i < x.in_registers.size(); ++i) {
        if (x.registers[i / 4][i % 4] == x.in_registers[i]) continue;
        fail(site, "registers that " + describe(x.site) + " reads were written before it was waited for, by " +
                       name_of(static_cast<int>(i) / 4));
    }
    Sums& sums = *x.sums;
    const int columns = sums.columns;
    const auto [a, b] = widened(x);
    if (!x.product.keep) std::fill(sums.value.begin(), sums.value.end(), 0.f);
    // Products of 16 bits are exact in float32. The manual leaves the order of the sum open: here k rises.
    for (int m = 0; m < kRows; ++m)
        for (int k = 0; k < kDepth; ++k) {
            float* d = &sums.value[m * columns];
            const float factor = a[m * kDepth + k], *row = &b[k * columns];
            for (int n = 0; n < columns; ++n) d[n] += factor * row[n];
        }
    if (--sums.products > 0) return;
    expect_untouched(site, sums, x.site);
    for (int thread = 0; thread < kGroupLanes; ++thread)
        for (int i = 0; i < sums.words(); ++i)
            sums.registers[thread][i] = sums.value[row_of(thread, i) * columns + column_of(thread, i)];
    mine().sums.remove_if([&](const Sums& each) { return &each == &sums; });
}

}  // namespace

uint32_t swizzled_address(uint32_t plain, uint32_t row_bytes) {
    const uint32_t chunks = row_bytes / kChunk;  // 8, 4 or 2
    return plain ^ ((plain >> 7 & (chunks - 1)) << 4);
}

uint64_t describe_operand(const Site& site, const void* operand, uint32_t row_bytes, uint32_t slab_bytes) {
    if (!is_shared(operand)) fail(site, "not an address of the block's shared memory");
    const uint64_t leading = slab_bytes == 0 ? 1 : slab_bytes >> 4;
    return (layout_of(row_bytes) & ~kLeadingBits) | leading << 16 | shared_address(operand) >> 4;
}

void start_groups(int threads) { groups = std::vector<Warpgroup>((threads + kGroupLanes - 1) / kGroupLanes); }

void begin_products(const Site& site) {
    together_in_group(site, nullptr, [](const Site&, void* const*) {
        mine().begun = true;
        mine().begun_in = block_epoch();
        for (Known& known : mine().known) known.remember();
    });
}

void start_product(const Site& site, Product& product) { together_in_group(site, &product, start); }

void commit_products(const Site& site) {
    together_in_group(site, nullptr, [](const Site&, void* const*) {
        mine().committed.push_back(std::move(mine().started));
        mine().started.clear();
    });
}

void wait_for_products(const Site& site, int later_groups) {
    together_in_group(site, &later_groups, [](const Site& where, void* const* threads) {
        Warpgroup& group = mine();
        if (!group.started.empty())
            fail(where, describe(group.started[0].site) + " was not committed, so that nobody waits for it");
        learn_wait_of_group(thread_index() / kGroupLanes);
        const int done = std::max(0, static_cast<int>(group.committed.size()) - *static_cast<int*>(threads[0]));
        for (int i = 0; i < done; ++i)
            for (Started& x : group.committed[i]) finish(where, x);
        group.committed.erase(group.committed.begin(), group.committed.begin() + done);
        group.begun = false;
    });
}

void finish_products() {
    const Warpgroup& group = mine();
    const Batch* left = group.started.empty() ? nullptr : &group.started;
    for (const Batch& batch : group.committed)
        if (!batch.empty()) left = &batch;
    if (left != nullptr)
        fail({"return", "", 0}, "the thread ends before " + describe(left->front().site) + " was waited for");
}

}  // namespace vivit::cuda::sim
