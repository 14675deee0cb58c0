#include "phases.h"

#include <algorithm>
#include <array>
#include <map>
#include <string>
#include <vector>

#include "builtins.h"
#include "groups.h"
#include "knowledge.h"
#include "memory.h"

namespace vivit::cuda::sim {
namespace {

constexpr int kChunk = 16, kAligned = 128, kNames = 16, kRegisterFile = 65536;

std::string number(int64_t n) { return std::to_string(n); }

// ---- barriers with phases ----

struct PhaseState {
    int index = 0;                  // among those of the block
    int count = 0, left = 0;        // arrivals of a phase, and still to come in this one
    int64_t bytes = 0, coming = 0;  // that the phase expects and that are not there yet; of them, on their way
    uint32_t over = 0;              // phases
    uint32_t seen = 0;              // of them, by who waited
    int thread = -1, epoch = 0;     // who made it, and when
    bool fenced = false;
    Knowledge heard, of_phases_over;
};

std::map<uint64_t*, PhaseState> barriers;

// What the barrier's own words hold, as long as nobody else writes to them.
uint64_t seal(const PhaseState& x) { return 0x9e3779b97f4a7c15u * (x.over * 4096u + x.left + 1u) ^ x.bytes; }

PhaseState& barrier_at(const Site& site, uint64_t* word) {
    if (!is_shared(word) || !is_shared(reinterpret_cast<char*>(word) + 7) || reinterpret_cast<uintptr_t>(word) % 8 != 0)
        fail(site, "a barrier is 8 bytes of shared memory, at a multiple of 8");
    const auto found = barriers.find(word);
    if (found == barriers.end()) fail(site, "the barrier was not made: phase_init comes before");
    PhaseState& x = found->second;
    if (*word != seal(x)) fail(site, "something else wrote to the barrier's words");
    if (x.thread != thread_index() && (!x.fenced || block_epoch() == x.epoch))
        fail(site, "the barrier was made by thread " + number(x.thread) +
                       ", but no phase_fence of that thread and block barrier lie between");
    return x;
}

std::string account_of(const PhaseState& x) {
    return "phase " + number(x.over) + " of barrier " + number(x.index) + " wants " + number(x.left) + " of " +
           number(x.count) + " arrivals and " + number(x.bytes) + " bytes";
}

void end_if_complete(const Site& site, uint64_t* word, PhaseState& x) {
    if (x.left == 0 && x.bytes == 0) {
        ++x.over;
        if (x.over - x.seen > 1)
            throw Failure("block " + number(blockIdx.x) + ": " + describe(site) + " ends phase " + number(x.over - 1) +
                          " of barrier " + number(x.index) + ", and nobody has waited for the one before");
        x.left = x.count;
        x.of_phases_over = x.heard;
        wake(word);
    }
    *word = seal(x);
}

// ---- copies of boxes ----

struct Box {
    Site site;
    char* to;
    TensorShape shape;
    std::array<int64_t, kMostDimensions> first;
    uint64_t* word;
    int64_t bytes, rows, row_bytes;
};

std::vector<Box> boxes;  // on their way

// Calls work(place in shared memory, source or null outside of the tensor) for each 16 bytes.
template <class Work>
void for_chunks(const Box& x, Work work) {
    std::array<int64_t, kMostDimensions> at = {};  // within the box; neighbours go by chunks
    for (int64_t row = 0; row < x.rows; ++row) {
        const char* from = static_cast<const char*>(x.shape.data);
        bool inside = true;
        for (int i = 1; i < x.shape.rank; ++i) {
            const int64_t place = x.first[i] + at[i];
            inside = inside && place >= 0 && place < x.shape.sizes[i];
            from += place * x.shape.strides[i];
        }
        for (int chunk = 0; chunk < x.row_bytes / kChunk; ++chunk) {
            const int64_t column = x.first[0] + chunk * kChunk / x.shape.element_bytes;
            const bool there = inside && column >= 0 && column < x.shape.sizes[0];
            const uint32_t plain = shared_address(x.to) + static_cast<uint32_t>(row * x.row_bytes + chunk * kChunk);
            const void* place = shared_at(swizzled_address(plain, static_cast<uint32_t>(x.row_bytes)));
            work(const_cast<void*>(place), there ? from + column * x.shape.element_bytes : nullptr);
        }
        for (int i = 1; i < x.shape.rank && ++at[i] == x.shape.box[i]; ++i) at[i] = 0;
    }
}

void finish_box(const Box& x) {
    PhaseState& barrier = barriers.at(x.word);
    for_chunks(x, [&](void* to, const void* from) { finish_box_chunk(to, from, barrier.index, barrier.over + 1); });
    barrier.bytes -= x.bytes, barrier.coming -= x.bytes;
    end_if_complete(x.site, x.word, barrier);
}

// ---- barriers of some warps ----

struct Named {
    int threads = 0;  // that it takes, as the first of them said
    std::vector<int> warps;
    uint64_t passed = 0;  // how often
    Knowledge heard, of_the_last;
    Site site;
};

std::array<Named, kNames> named;

std::string account_of_name(const void* what) {
    const Named& x = *static_cast<const Named*>(what);
    return "barrier " + number(&x - named.data()) + " has " + number(32 * x.warps.size()) + " of " + number(x.threads) +
           " threads";
}

// ---- registers ----

std::array<int, kMostGroups> registers;  // of a thread
int free_registers = 0;                  // of all: what was given back

std::string account_of_registers(const void*) { return number(free_registers) + " registers are free"; }

}  // namespace

void start_phases(int threads) {
    barriers.clear();
    boxes.clear();
    named.fill(Named());
    registers.fill(std::min(255, kRegisterFile / threads / 8 * 8));
    free_registers = 0;
}

bool finish_a_box(uint64_t chosen) {
    if (boxes.empty()) return false;
    const size_t i = schedule.seed ? chosen % boxes.size() : 0;
    const Box box = boxes[i];
    boxes.erase(boxes.begin() + static_cast<std::ptrdiff_t>(i));
    finish_box(box);
    return true;
}

void finish_phases() {
    const std::string block = "block " + number(blockIdx.x);
    if (!boxes.empty()) throw Failure(block + " ends before the copy by " + describe(boxes[0].site) + " is done");
    for (const Named& x : named) {
        if (!x.warps.empty()) throw Failure(block + " ends at " + describe(x.site) + ": " + account_of_name(&x));
    }
}

void init_phases(const Site& site, uint64_t* word, int arrivals) {
    if (!is_shared(word) || reinterpret_cast<uintptr_t>(word) % 8 != 0)
        fail(site, "a barrier is 8 bytes of shared memory, at a multiple of 8");
    if (barriers.count(word) > 0) fail(site, "the barrier was made before");
    if (arrivals < 1 || arrivals >= 1 << 20) fail(site, "a phase takes 1 to 2^20 - 1 arrivals: " + number(arrivals));
    if (barriers.size() == kMostPhaseBarriers) fail(site, "the simulator knows 64 barriers of a block, no more");
    use_knowledge();
    PhaseState x;
    x.index = static_cast<int>(barriers.size());
    x.count = x.left = arrivals;
    x.thread = thread_index(), x.epoch = block_epoch();
    *word = seal(x);
    barriers.emplace(word, x);
}

void fence_phases(const Site&) {
    for (auto& [word, x] : barriers) x.fenced = x.fenced || x.thread == thread_index();
}

void arrive_at_phase(const Site& site, uint64_t* word, int bytes) {
    PhaseState& x = barrier_at(site, word);
    if (bytes < 0 || x.bytes + bytes >= 1 << 20) fail(site, "a phase expects less than 2^20 bytes");
    if (x.left == 0)
        fail(site, "more than the " + number(x.count) + " arrivals of a phase: " + number(x.bytes) +
                       " bytes of it are still to come");
    tell(x.heard);
    --x.left, x.bytes += bytes;
    end_if_complete(site, word, x);
}

void wait_for_phase(const Site& site, uint64_t* word, uint32_t parity) {
    if (parity > 1) fail(site, "parity " + number(parity));
    while (barrier_at(site, word).over % 2 == parity)
        wait_for(site, word, [](const void* what) {
            return account_of(barriers.at(static_cast<uint64_t*>(const_cast<void*>(what))));
        });
    PhaseState& x = barrier_at(site, word);
    x.seen = x.over;
    if (!x.of_phases_over.empty()) hear(x.of_phases_over);
    learn_phase(x.index, x.over);
}

void start_box(const Site& site, void* to, const TensorMap& map, uint64_t* word, const int32_t* first, int rank) {
    PhaseState& barrier = barrier_at(site, word);
    const TensorShape& shape = map.shape;
    if (shape.rank != rank)
        fail(site, number(rank) + " coordinates of a tensor of " + number(shape.rank) + " dimensions");
    if (!is_shared(to) || shared_address(to) % kAligned != 0)
        fail(site, "a box goes to shared memory, to a multiple of 128 bytes");
    const int64_t row_bytes = int64_t(shape.box[0]) * shape.element_bytes;
    Box x = {site, static_cast<char*>(to), shape, {}, word, row_bytes, 1, row_bytes};
    std::copy(first, first + rank, x.first.begin());
    for (int i = 1; i < rank; ++i) x.rows *= shape.box[i];
    x.bytes = x.rows * row_bytes;
    if (barrier.coming + x.bytes > barrier.bytes)
        fail(site, "the copy brings " + number(x.bytes) + " bytes, but phase " + number(barrier.over) + " of barrier " +
                       number(barrier.index) + " expects " + number(barrier.bytes - barrier.coming) + " more");
    barrier.coming += x.bytes;
    for_chunks(x, [&](void* place, const void* from) {
        if (from != nullptr) check_global(site, from, kChunk, false);
        start_box_chunk(site, place);
    });
    boxes.push_back(x);
}

void meet_by_name(const Site& site, int name, int threads, bool waits) {
    struct Mine {
        int name, threads;
        uint64_t passed;
    } mine = {name, threads, 0};
    if (name < 1 || name >= kNames) fail(site, "barriers have numbers from 1 to 15: " + number(name));
    if (threads < kLanes || threads > block_threads() || threads % kLanes != 0)
        fail(site, number(threads) + " threads are not some whole warps of the block");
    use_knowledge();
    together(site, &mine, [](const Site& where, void* const* lanes) {
        const Mine& given = *static_cast<const Mine*>(lanes[0]);
        Named& x = named[given.name];
        const int warp = thread_index() / kLanes;
        for (int i = 0; i < kLanes; ++i) {
            Mine& lane = *static_cast<Mine*>(lanes[i]);
            if (lane.name != given.name || lane.threads != given.threads)
                fail(where, "lane " + number(i) + " names another barrier, or another number of threads, than lane 0");
            lane.passed = x.passed;
        }
        if (!x.warps.empty() && x.threads != given.threads)
            fail(where, "barrier " + number(given.name) + " of " + number(given.threads) + " threads is one of " +
                            number(x.threads) + " at " + describe(x.site));
        if (std::count(x.warps.begin(), x.warps.end(), warp) > 0)
            fail(where, "warp " + number(warp) + " arrives twice at barrier " + number(given.name));
        x.threads = given.threads, x.site = where;
        x.warps.push_back(warp);
        // The warp's lanes know alike: the barrier is theirs together.
        share_knowledge(warp * kLanes, kLanes);
        tell(x.heard);
        if (kLanes * static_cast<int>(x.warps.size()) < x.threads) return;
        x.of_the_last = std::move(x.heard);
        x.heard.clear(), x.warps.clear();
        ++x.passed;
        wake(&x);
    });
    if (!waits) return;
    while (named[name].passed == mine.passed) wait_for(site, &named[name], account_of_name);
    hear(named[name].of_the_last);
}

void change_registers(const Site& site, int wanted, bool grow) {
    struct Mine {
        int wanted;
        bool grow;
    } mine = {wanted, grow};
    static const char pool = 0;  // what those who want registers wait for
    together_in_group(site, &mine, [](const Site& where, void* const* lanes) {
        const Mine& given = *static_cast<const Mine*>(lanes[0]);
        int& mine_now = registers[thread_index() / kGroupLanes];
        if (given.wanted % 8 != 0 || given.wanted < 24 || given.wanted > 256)
            fail(where, "registers of a thread are a multiple of 8 from 24 to 256: " + number(given.wanted));
        if (given.grow ? given.wanted < mine_now : given.wanted > mine_now)
            fail(where, "the thread has " + number(mine_now) + " registers: " + number(given.wanted) + " are " +
                            (given.grow ? "fewer" : "more"));
        if (given.grow) return;
        free_registers += kGroupLanes * (mine_now - given.wanted);
        mine_now = given.wanted;
        wake(&pool);
    });
    int& now = registers[thread_index() / kGroupLanes];
    while (grow && now < wanted) {
        const int more = kGroupLanes * (wanted - now);
        if (free_registers < more) {
            wait_for(site, &pool, account_of_registers);
            continue;
        }
        free_registers -= more;
        now = wanted;
        wake(&pool);
    }
}

}  // namespace vivit::cuda::sim
