#include "machine.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <numeric>
#include <vector>

#include "builtins.h"
#include "fibres.h"
#include "groups.h"
#include "knowledge.h"
#include "memory.h"
#include "phases.h"

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace vivit::cuda::sim {

Schedule schedule;

namespace {

constexpr int kInvalidValue = 1, kInvalidConfiguration = 9;  // cudaErrorInvalid...
constexpr int kMostThreads = 1024;

enum class State : uint8_t { kReady, kAtWarpVerb, kAtBarrier, kWaiting, kEnded };

struct Thread {
    Context context;
    State state = State::kReady;
    Site site;
    void* arguments = nullptr;
    const void* what = nullptr;  // it waits for
    std::string (*say)(const void* what) = nullptr;
};

struct Warp {
    int at_verb = 0, at_barrier = 0, waiting = 0, ended = 0, epoch = 0;
    Site site;  // of the verb that lanes wait at
    bool ready() const { return at_verb + at_barrier + waiting + ended < kLanes; }
};

// Of four warps, whose lanes that wait here also count as at_verb of their own.
struct Group {
    int at_verb = 0;
    Site site;
};

// SplitMix64: every seed gives another sequence.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    int below(int n) { return static_cast<int>(next() % static_cast<uint64_t>(n)); }

  private:
    uint64_t state_;
};

Stacks stacks;
std::vector<Thread> threads;
std::vector<Warp> warps;
std::vector<Group> groups;
Context scheduler;
int running = 0, at_barrier = 0, ended = 0, epoch = 0;
void (*kernel)(const void*);
const void* kernel_data;
std::exception_ptr failure;

bool same(const Site& a, const Site& b) {
    return a.line == b.line && std::strcmp(a.verb, b.verb) == 0 && std::strcmp(a.file, b.file) == 0;
}

void run_on(int thread) {
    running = thread;
    threadIdx.x = static_cast<unsigned>(thread);
    change(scheduler, threads[thread].context);
    if (failure) std::rethrow_exception(failure);
}

void give_way() { change(threads[running].context, scheduler); }

// What the threads from first to end - 1 are doing, neighbours that do the same together.
std::string account(int first, int end) {
    const auto what = [](const Thread& thread) -> std::string {
        if (thread.state == State::kEnded) return "ended";
        if (thread.state == State::kReady) return "on the way";
        if (thread.state == State::kWaiting) return "at " + describe(thread.site) + ", " + thread.say(thread.what);
        return "at " + describe(thread.site);
    };
    std::string text;
    for (int i = first, next = 0; i < end; i = next) {
        next = i + 1;
        while (next < end && what(threads[next]) == what(threads[i])) ++next;
        text += text.empty() ? "" : "; ";
        text += next == i + 1 ? "thread " + std::to_string(i)
                              : "threads " + std::to_string(i) + "-" + std::to_string(next - 1);
        text += " " + what(threads[i]);
    }
    return text;
}

std::string account_of_group() {
    const int first = running / kGroupLanes * kGroupLanes;
    return account(first, std::min(first + kGroupLanes, static_cast<int>(threads.size())));
}

std::string account_of_warp() {
    const int first = running / kLanes * kLanes;
    return account(first, first + kLanes);
}

void end_thread() {
    Warp& warp = warps[running / kLanes];
    threads[running].state = State::kEnded;
    ++warp.ended, ++ended;
    finish_copies();
    finish_products();
    if (groups[running / kGroupLanes].at_verb > 0)
        fail({"return", "", 0}, "the thread ends, but others of its warpgroup wait: " + account_of_group());
    if (warp.at_verb > 0) fail({"return", "", 0}, "the thread ends, but others of its warp wait: " + account_of_warp());
    if (at_barrier > 0)
        fail({"return", "", 0}, "the thread ends, but others wait for it: " + account(0, int(threads.size())));
}

[[noreturn]] void entry() {
    try {
        kernel(kernel_data);
        end_thread();
    } catch (...) {
        failure = std::current_exception();
    }
    for (;;) give_way();
}

// Every lane of a warp that can go on does, once, in an order of its own: lanes are at different places between verbs.
void step(int warp, Random& random) {
    const int offset = schedule.seed ? random.below(kLanes) : 0;
    const int factor = schedule.seed ? 2 * random.below(kLanes / 2) + 1 : 1;
    for (int i = 0; i < kLanes; ++i) {
        const int thread = warp * kLanes + ((i * factor + offset) & (kLanes - 1));
        if (threads[thread].state == State::kReady) run_on(thread);
    }
}

// Warps take turns with a seed of 0. Else the first in a random order goes on that can, so that the last may be far
// behind; the order changes after some steps, by chance 1, 8, 64 or 512 of them in a block.
void run_block(Random& random) {
    const int count = static_cast<int>(warps.size());
    const int patience = 1 << (3 * random.below(4));
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    const auto can_go_on = [](int warp) { return warps[warp].ready(); };
    for (bool first = true; ended < static_cast<int>(threads.size()); first = false) {
        if (!schedule.seed) {
            if (!first) std::rotate(order.begin(), order.begin() + 1, order.end());
        } else if (first || random.below(patience) == 0) {
            for (int i = count - 1; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
        }
        if (schedule.seed && random.below(4) == 0) finish_a_box(random.next());
        const auto next = std::find_if(order.begin(), order.end(), can_go_on);
        if (next == order.end() && finish_a_box(random.next())) continue;
        if (next == order.end())
            throw Failure("block " + std::to_string(blockIdx.x) +
                          ": nobody can go on: " + account(0, static_cast<int>(threads.size())));
        const int warp = *next;
        if (!schedule.seed) std::rotate(order.begin(), next, order.end());
        step(warp, random);
    }
}

void start_block(int64_t block, int count) {
    blockIdx = {static_cast<unsigned>(block), 0, 0};
    at_barrier = ended = epoch = 0;
    failure = nullptr;
    threads.assign(count, Thread());
    warps.assign(count / kLanes, Warp());
    groups.assign((count + kGroupLanes - 1) / kGroupLanes, Group());
    start_knowledge(count);
    start_groups(count);
    start_phases(count);
    for (int i = 0; i < count; ++i) stacks.start(threads[i].context, i, entry);
}

}  // namespace

std::string describe(const Site& site) {
    const char* slash = std::strrchr(site.file, '/');
    std::string text = site.verb;
    if (*site.file) text += std::string(" (") + (slash ? slash + 1 : site.file) + ":" + std::to_string(site.line) + ")";
    return text;
}

void fail(const Site& site, const std::string& what) {
    throw Failure("block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(running) + " (warp " +
                  std::to_string(running / kLanes) + ", lane " + std::to_string(running % kLanes) + "), " +
                  describe(site) + ": " + what);
}

void together(const Site& site, void* arguments, void (*work)(const Site& site, void* const* arguments)) {
    Warp& warp = warps[running / kLanes];
    Thread* lanes = &threads[running / kLanes * kLanes];
    if (warp.ended > 0 || warp.at_barrier > 0 || (warp.at_verb > 0 && !same(warp.site, site)))
        fail(site, "not reached by all lanes of the warp together: " + account_of_warp());
    threads[running].state = State::kAtWarpVerb;
    threads[running].site = warp.site = site;
    threads[running].arguments = arguments;
    if (++warp.at_verb == kLanes) {
        void* all[kLanes];
        for (int i = 0; i < kLanes; ++i) all[i] = lanes[i].arguments;
        work(site, all);
        for (int i = 0; i < kLanes; ++i) lanes[i].state = State::kReady;
        warp.at_verb = 0;
    }
    give_way();
}

void together_in_group(const Site& site, void* arguments, void (*work)(const Site& site, void* const* arguments)) {
    if (schedule.arch != 90) fail(site, "sm_" + std::to_string(schedule.arch) + " has no products of a warpgroup");
    const int first = running / kGroupLanes * kGroupLanes;
    if (first + kGroupLanes > static_cast<int>(threads.size()))
        fail(site, "the warpgroup has fewer than four warps: the block has " + std::to_string(threads.size() / kLanes));
    Group& group = groups[running / kGroupLanes];
    Warp& own = warps[running / kLanes];
    bool apart = (own.at_verb > 0 && !same(own.site, site)) || (group.at_verb > 0 && !same(group.site, site));
    for (int i = first / kLanes; i < (first + kGroupLanes) / kLanes; ++i)
        apart = apart || warps[i].ended > 0 || warps[i].at_barrier > 0;
    if (apart) fail(site, "not reached by all threads of the warpgroup together: " + account_of_group());
    threads[running].state = State::kAtWarpVerb;
    threads[running].site = own.site = group.site = site;
    threads[running].arguments = arguments;
    ++own.at_verb;
    if (++group.at_verb == kGroupLanes) {
        void* all[kGroupLanes];
        for (int i = 0; i < kGroupLanes; ++i) all[i] = threads[first + i].arguments;
        work(site, all);
        for (int i = 0; i < kGroupLanes; ++i) threads[first + i].state = State::kReady;
        for (int i = first / kLanes; i < (first + kGroupLanes) / kLanes; ++i) warps[i].at_verb = 0;
        group.at_verb = 0;
    }
    give_way();
}

void wait_for_block(const Site& site) {
    Warp& warp = warps[running / kLanes];
    if (groups[running / kGroupLanes].at_verb > 0)
        fail(site, "others of the warpgroup wait at a verb of all its threads: " + account_of_group());
    if (warp.at_verb > 0 || warp.ended > 0 || (warp.at_barrier > 0 && !same(warp.site, site)))
        fail(site, "not reached by all lanes of the warp together: " + account_of_warp());
    if (ended > 0) fail(site, "some threads have ended before it: " + account(0, static_cast<int>(threads.size())));
    threads[running].state = State::kAtBarrier;
    threads[running].site = warp.site = site;
    ++warp.at_barrier;
    if (++at_barrier == static_cast<int>(threads.size())) {
        for (Thread& thread : threads) thread.state = State::kReady;
        for (Warp& each : warps) each.at_barrier = 0, ++each.epoch;
        at_barrier = 0;
        ++epoch;
        share_knowledge(0, static_cast<int>(threads.size()));
    }
    give_way();
}

void wait_for(const Site& site, const void* what, std::string (*say)(const void* what)) {
    Thread& thread = threads[running];
    thread.state = State::kWaiting;
    thread.site = site, thread.what = what, thread.say = say;
    ++warps[running / kLanes].waiting;
    give_way();
}

void wake(const void* what) {
    for (size_t i = 0; i < threads.size(); ++i) {
        if (threads[i].state != State::kWaiting || threads[i].what != what) continue;
        threads[i].state = State::kReady;
        --warps[i / kLanes].waiting;
    }
}

int thread_index() { return running; }
int block_threads() { return static_cast<int>(threads.size()); }
int block_epoch() { return epoch; }
int warp_epoch() { return warps[running / kLanes].epoch; }
void pass_warp_barrier() {
    const int warp = running / kLanes;
    ++warps[warp].epoch;
    share_knowledge(warp * kLanes, kLanes);
    learn_warp_epoch(warp, warps[warp].epoch);
}

int launch_blocks(void (*call)(const void*), const void* call_data, int64_t blocks, int count, int shared_bytes) {
    if (blocks < 1 || blocks > INT32_MAX || count < 1 || count > kMostThreads) return kInvalidConfiguration;
    if (shared_bytes < 0 || shared_bytes > schedule.most_shared_bytes) return kInvalidValue;
    if (count % kLanes) throw Failure("launch: " + std::to_string(count) + " threads are not whole warps");
    kernel = call, kernel_data = call_data;
    blockDim = {static_cast<unsigned>(count), 1, 1}, gridDim = {static_cast<unsigned>(blocks), 1, 1};
    threadIdx = {0, 0, 0};
    stacks.reserve(count);
    products_of_launch = 0;
    Random random(schedule.seed);
    std::vector<int64_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    for (int64_t i = blocks - 1; schedule.seed && i > 0; --i) std::swap(order[i], order[random.next() % (i + 1)]);
    for (const int64_t block : order) {
        start_block(block, count);
        start_shared_memory(shared_bytes);
        run_block(random);
        finish_phases();
        check_around_shared_memory();
    }
    return 0;
}

}  // namespace vivit::cuda::sim
