#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <new>
#include <numeric>

#include "groups.h"
#include "knowledge.h"

namespace vivit::cuda::sim {
namespace {

// NaN as any type of 16 or 32 bits: words of what nobody wrote, bytes of what lies around shared memory.
constexpr uint16_t kPoison = 0x7fff;
constexpr char kGuard = '\xff';
constexpr int kCell = 16;
constexpr uint32_t kFirstAddress = 1024;  // of shared memory: before it lies what the system takes, on sm_90
constexpr size_t kMostShared = 256 << 10, kMargin = 64 << 10;

// ---- global memory ----

struct Dimension {
    int64_t stride, size;
};

struct Registered {
    Tensor tensor;
    std::vector<Dimension> outer;  // of rows, in bytes, the widest first
    int64_t row, span;             // bytes
    std::vector<bool> written;     // by element of the span
};

std::vector<Registered> tensors;

// Where in its row byte `offset` of the span lies; the strides of a view nest.
int64_t within_row(const Registered& x, int64_t offset) {
    for (const Dimension& d : x.outer) offset -= std::min(offset / d.stride, d.size - 1) * d.stride;
    return offset;
}

std::string place(const Registered& x, const char* at) {
    const int64_t offset = at - x.tensor.data;
    const std::string name = x.tensor.name;
    if (offset < 0) return std::to_string(-offset) + " bytes before " + name;
    if (offset >= x.span) return std::to_string(offset - x.span) + " bytes behind the end of " + name;
    const int64_t column = within_row(x, offset);
    const std::string in = "byte " + std::to_string(offset) + " of " + name;
    return column < x.row ? in : in + ", " + std::to_string(column - x.row) + " bytes behind the end of a row";
}

std::string nearest(const char* at) {
    const Registered* best = nullptr;
    int64_t distance = INT64_MAX;
    for (const Registered& x : tensors) {
        const int64_t away =
            at < x.tensor.data ? x.tensor.data - at : std::max<int64_t>(at - x.tensor.data - x.span, 0);
        if (away < distance) best = &x, distance = away;
    }
    return best ? place(*best, at) : "no tensor is there";
}

// ---- shared memory ----

// By whom and when a cell of 16 bytes was last touched.
struct Touch {
    int thread = -1, block = -1, warp = -1;  // epochs of the block and of the thread's warp
    int lanes = 1;                           // 32: by all of the warp, 128: of the warpgroup
    Site site;
    Event event;  // as others know of it
};

struct Cell {
    Touch written, read, read_by_another_warp, fenced;  // fenced: since it was written
    int products = 0;                                   // on their way that read it
    Site product;
    int copying = -1;  // thread
    Site copy;
    std::array<uint32_t, kMostGroups> products_read = {};  // waits of each warpgroup, at the last product that read it
    std::vector<int> unfenced_readers;                     // threads that read it, and did not fence that since
    Touch read_fenced;                                     // by the last of those that did
};

char* memory = nullptr;
char* base = nullptr;
int shared_bytes = 0;
std::vector<Cell> cells;

struct Copy {
    char* to;
    const void* from;
    bool valid;
};

struct Copies {
    std::vector<Copy> started;
    std::vector<std::vector<Copy>> committed;
};

std::vector<Copies> copies;
std::vector<std::vector<int>> unfenced, unfenced_reads;  // cells, by who wrote them, and by who read them

void poison(char* at, size_t bytes) {
    uint16_t* words = reinterpret_cast<uint16_t*>(at);
    std::fill(words, words + bytes / 2, kPoison);
}

bool is_guard(const char* at) { return *at == kGuard && std::memcmp(at, at + 1, kMargin - 1) == 0; }

Touch now(const Site& site, int lanes = 1) {
    const int thread = thread_index();
    return {thread, block_epoch(), warp_epoch(), lanes, site, event_of(thread, lanes, warp_epoch())};
}

// Whether a barrier lies between an earlier touch and this one, or one thread alone did both.
bool ordered(const Touch& earlier, int lanes) {
    if (is_known(earlier.event, lanes)) return true;
    if (earlier.event.kind == Event::Kind::kPhase) return false;
    lanes = std::max(lanes, earlier.lanes);
    if (earlier.block != block_epoch()) return true;
    if (earlier.thread == thread_index() && lanes == 1) return true;
    return lanes <= kLanes && earlier.thread / kLanes == thread_index() / kLanes && earlier.warp != warp_epoch();
}

void expect_ordered(const Site& site, const Touch& earlier, const char* did, size_t cell, int lanes = 1) {
    if (ordered(earlier, lanes)) return;
    if (earlier.event.kind == Event::Kind::kPhase)
        fail(site, "byte " + std::to_string(cell * kCell) + " of shared memory was " + did + " by " +
                       describe(earlier.site) + ", whose phase the thread has not waited for");
    fail(site, "byte " + std::to_string(cell * kCell) + " of shared memory was " + did + " by thread " +
                   std::to_string(earlier.thread) + " at " + describe(earlier.site) + ", and no barrier lies between");
}

void check_shared(const Site& site, const void* at) {
    const char* from = static_cast<const char*>(at);
    if (!is_shared(at) || !is_shared(from + kCell - 1))
        fail(site, "not in the " + std::to_string(shared_bytes) + " bytes of shared memory: 16 bytes, " +
                       std::to_string(from - base) + " from its start");
    if ((from - base) % kCell != 0)
        fail(site, "byte " + std::to_string(from - base) + " of shared memory is not a multiple of 16");
}

Cell& cell_of(const void* at) { return cells[(static_cast<const char*>(at) - base) / kCell]; }

void expect_no_copy(const Site& site, const Cell& cell, size_t index) {
    if (cell.copying < 0) return;
    fail(site, "byte " + std::to_string(index * kCell) + " of shared memory is still being copied to by thread " +
                   std::to_string(cell.copying) + " at " + describe(cell.copy));
}

// Whether the running thread knows that products of all warpgroups are done with it.
void expect_products_done(const Site& site, const Cell& cell, size_t index) {
    for (int group = 0; group < kMostGroups; ++group) {
        const uint32_t waits = cell.products_read[group];
        if (waits == 0 || !knowledge_counts() || is_known(event_of_products(group, waits), 1)) continue;
        fail(site, "byte " + std::to_string(index * kCell) + " of shared memory was read by products of warpgroup " +
                       std::to_string(group) + ", and the thread does not know that they are done");
    }
}

void set_written(const Site& site, Cell& cell) {
    cell.written = now(site);
    cell.fenced = Touch();
    unfenced[thread_index()].push_back(static_cast<int>(&cell - cells.data()));
}

// Kept where the block has barriers with phases, which copies of boxes need. Of a warp's read, which its lanes do
// together, each is to fence: one of them is asked.
void set_unfenced_read(Cell& cell, int lanes) {
    if (!knowledge_counts()) return;
    const int index = static_cast<int>(&cell - cells.data());
    const int reader = lanes == 1 ? thread_index() : thread_index() / kLanes * kLanes + index % kLanes;
    std::vector<int>& readers = cell.unfenced_readers;
    if (std::find(readers.begin(), readers.end(), reader) != readers.end()) return;
    readers.push_back(reader);
    unfenced_reads[reader].push_back(index);
}

// Copies of boxes and products of warpgroups see memory on a way of their own (PTX manual, proxies): of what threads
// did to it before a copy over it barriers alone say nothing. written, fenced: as the cell had them then.
void expect_fenced(const Site& site, const Cell& cell, const Touch& written, const Touch& fenced) {
    const size_t index = &cell - cells.data();
    const auto missing = [&](const char* did, int thread, const Touch& touch) {
        fail(site, "byte " + std::to_string(index * kCell) + " of shared memory was " + did + " by thread " +
                       std::to_string(thread) + " at " + describe(touch.site) +
                       ", which did not reach group_fence since");
    };
    if (!cell.unfenced_readers.empty()) missing("read", cell.unfenced_readers[0], cell.read);
    if (written.thread >= 0 && fenced.thread < 0) missing("written", written.thread, written);
    expect_ordered(site, cell.read_fenced, "fenced", index);
    expect_ordered(site, fenced, "fenced", index);
}

void set_read(const Site& site, Cell& cell, int lanes) {
    const bool another_warp = cell.read.block == block_epoch() && cell.read.thread / kLanes != thread_index() / kLanes;
    if (another_warp) cell.read_by_another_warp = cell.read;
    const bool by_others = cell.read.thread != thread_index() || cell.read.lanes > 1;  // of this warp
    if (by_others && !another_warp && !ordered(cell.read, kLanes)) lanes = std::max(lanes, kLanes);
    cell.read = now(site, lanes);
}

void write_cell(const Site& site, const void* at) {
    Cell& cell = cell_of(at);
    const size_t index = &cell - cells.data();
    expect_no_copy(site, cell, index);
    if (cell.products > 0)
        fail(site, "byte " + std::to_string(index * kCell) + " of shared memory is being read by " +
                       describe(cell.product) + ", which was not waited for");
    expect_ordered(site, cell.written, "written", index);
    expect_ordered(site, cell.read, "read", index);
    expect_ordered(site, cell.read_by_another_warp, "read", index);
    expect_products_done(site, cell, index);
    cell.products_read = {};
    set_written(site, cell);
}

}  // namespace

void register_tensors(const std::vector<Tensor>& given) {
    tensors.clear();
    for (const Tensor& tensor : given) {
        Registered x{tensor, {}, tensor.element, 0, {}};
        int64_t last = 0;
        for (size_t i = 0; i < tensor.sizes.size(); ++i) {
            const int64_t size = tensor.sizes[i], stride = tensor.strides[i] * tensor.element;
            last += (size - 1) * stride;
            if (i + 1 == tensor.sizes.size()) {
                x.row = size * tensor.element;
            } else if (size > 1 && stride > 0) {
                x.outer.push_back({stride, size});
            }
        }
        std::sort(x.outer.begin(), x.outer.end(), [](auto a, auto b) { return a.stride > b.stride; });
        x.span = last + tensor.element;
        if (tensor.output) x.written.resize(x.span / tensor.element);
        tensors.push_back(x);
    }
}

bool is_shared(const void* at) {
    const char* byte = static_cast<const char*>(at);
    return memory != nullptr && byte >= base && byte < base + shared_bytes;
}

void check_global(const Site& site, const void* at, int bytes, bool writes) {
    const char* from = static_cast<const char*>(at);
    const char* does = writes ? "writes " : "reads ";
    if (is_shared(at)) fail(site, "address is in shared memory, at byte " + std::to_string(from - base));
    if (reinterpret_cast<uintptr_t>(at) % bytes != 0)
        fail(site, "address is not a multiple of " + std::to_string(bytes) + ": " + nearest(from));
    for (Registered& x : tensors) {
        const int64_t offset = from - x.tensor.data;
        if (x.tensor.output != writes || offset < 0 || offset + bytes > x.span) continue;
        if (within_row(x, offset) + bytes > x.row) continue;
        for (int i = 0; writes && i < bytes; i += x.tensor.element) {
            const int64_t element = (offset + i) / x.tensor.element;
            if (x.written[element]) fail(site, "writes a second time to " + place(x, from));
            x.written[element] = true;
        }
        return;
    }
    const std::string kind = writes ? "output" : "input";
    fail(site, does + std::to_string(bytes) + " bytes that are not all in a row of an " + kind + ": " + nearest(from));
}

void start_shared_memory(int bytes) {
    if (memory == nullptr) {
        void* mapped =
            mmap(nullptr, kMostShared + 2 * kMargin, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) throw std::bad_alloc();
        memory = static_cast<char*>(mapped);
    }
    base = memory + kMargin;
    shared_bytes = bytes;
    std::memset(memory, kGuard, kMargin);
    poison(base, bytes);
    std::memset(base + bytes, kGuard, kMargin);
    cells.assign((bytes + kCell - 1) / kCell, Cell());
    copies.assign(1024, Copies());
    unfenced.assign(1024, {}), unfenced_reads.assign(1024, {});
}

void check_around_shared_memory() {
    if (is_guard(memory) && is_guard(base + shared_bytes)) return;
    throw Failure("the block wrote outside of its " + std::to_string(shared_bytes) + " bytes of shared memory");
}

char* shared_memory() { return base; }

void read_shared(const Site& site, const void* at, int lanes) {
    check_shared(site, at);
    Cell& cell = cell_of(at);
    const size_t index = &cell - cells.data();
    expect_no_copy(site, cell, index);
    expect_ordered(site, cell.written, "written", index, lanes);
    set_read(site, cell, lanes);
    set_unfenced_read(cell, lanes);
}

void write_shared(const Site& site, const void* at) {
    check_shared(site, at);
    write_cell(site, at);
}

uint32_t shared_address(const void* at) {
    return kFirstAddress + static_cast<uint32_t>(static_cast<const char*>(at) - base);
}

int shared_offset(uint32_t address) { return static_cast<int>(address) - static_cast<int>(kFirstAddress); }

const void* shared_at(uint32_t address) { return base + shared_offset(address); }

void start_group_read(const Site& site, uint32_t address) {
    check_shared(site, shared_at(address));
    Cell& cell = cell_of(shared_at(address));
    const size_t index = &cell - cells.data();
    expect_no_copy(site, cell, index);
    expect_ordered(site, cell.written, "written", index, kGroupLanes);
    if (cell.written.thread >= 0 && cell.fenced.thread < 0)
        fail(site, "byte " + std::to_string(index * kCell) + " of shared memory was written by thread " +
                       std::to_string(cell.written.thread) + " at " + describe(cell.written.site) +
                       ", which did not reach group_fence since");
    expect_ordered(site, cell.fenced, "fenced", index, kGroupLanes);
    ++cell.products;
    cell.product = site;
}

void end_group_read(const Site& product, uint32_t address) {
    Cell& cell = cell_of(shared_at(address));
    --cell.products;
    set_read(product, cell, kGroupLanes);
    cell.products_read[thread_index() / kGroupLanes] = waits_of_group(thread_index() / kGroupLanes);
}

void fence_accesses(const Site& site) {
    for (const int i : unfenced[thread_index()]) {
        if (cells[i].written.thread == thread_index() && cells[i].copying < 0) cells[i].fenced = now(site);
    }
    unfenced[thread_index()].clear();
    for (const int i : unfenced_reads[thread_index()]) {
        std::vector<int>& readers = cells[i].unfenced_readers;
        readers.erase(std::find(readers.begin(), readers.end(), thread_index()));
        cells[i].read_fenced = now(site);
    }
    unfenced_reads[thread_index()].clear();
}

void start_box_chunk(const Site& site, void* to) {
    check_shared(site, to);
    Cell& cell = cell_of(to);
    const Touch written = cell.written, fenced = cell.fenced;
    write_cell(site, to);
    expect_fenced(site, cell, written, fenced);
    cell.read_fenced = Touch();
    cell.copying = thread_index();
    cell.copy = site;
    poison(static_cast<char*>(to), kCell);
}

void finish_box_chunk(void* to, const void* from, int barrier, uint32_t phase) {
    Cell& cell = cell_of(to);
    cell.copying = -1;
    cell.written = {-1, block_epoch(), -1, 1, cell.copy, event_of_phase(barrier, phase)};
    cell.fenced = Touch();
    from != nullptr ? std::memcpy(to, from, kCell) : std::memset(to, 0, kCell);
}

void start_copy(const Site& site, void* to_shared, const void* from, bool valid) {
    check_shared(site, to_shared);
    if (reinterpret_cast<uintptr_t>(from) % kCell != 0)
        fail(site, "source is not a multiple of 16: " + nearest(static_cast<const char*>(from)));
    if (valid) check_global(site, from, kCell, false);
    write_cell(site, to_shared);
    cell_of(to_shared).copying = thread_index();
    cell_of(to_shared).copy = site;
    poison(static_cast<char*>(to_shared), kCell);
    copies[thread_index()].started.push_back({static_cast<char*>(to_shared), from, valid});
}

void commit_copies() {
    Copies& mine = copies[thread_index()];
    mine.committed.push_back(std::move(mine.started));
    mine.started.clear();
}

void wait_for_copies(int later_groups) {
    auto& groups = copies[thread_index()].committed;
    const int done = std::max(0, static_cast<int>(groups.size()) - later_groups);
    for (int i = 0; i < done; ++i) {
        for (const Copy& copy : groups[i]) {
            Cell& cell = cell_of(copy.to);
            cell.copying = -1;
            set_written(cell.copy, cell);
            if (copy.valid) {
                std::memcpy(copy.to, copy.from, kCell);
            } else {
                std::memset(copy.to, 0, kCell);
            }
        }
    }
    groups.erase(groups.begin(), groups.begin() + done);
}

void finish_copies() {
    const Copies& mine = copies[thread_index()];
    size_t left = mine.started.size();
    for (const auto& group : mine.committed) left += group.size();
    if (left > 0) fail({"return", "", 0}, "the thread ends with " + std::to_string(left) + " copies on their way");
}

}  // namespace vivit::cuda::sim
