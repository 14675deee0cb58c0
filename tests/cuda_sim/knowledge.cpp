#include "knowledge.h"

#include <algorithm>
#include <array>

namespace vivit::cuda::sim {
namespace {

int threads = 0, warps = 0;
std::vector<Knowledge> known;  // by thread; empty until it counts
std::array<uint32_t, kMostGroups> waits;
// The last answer that was yes, and stays so: nobody forgets. Products ask the same of hundreds of cells.
Event last;
int last_first = -1, last_lanes = 0;

// Where a Knowledge has what.
int place_of_thread(int thread) { return thread; }
int place_of_warp(int warp) { return threads + warp; }
int place_of_waits(int warp) { return threads + warps + warp; }
int place_of_phase(int barrier) { return threads + 2 * warps + barrier; }

void join(Knowledge& into, const Knowledge& from) {
    if (into.empty()) into.resize(from.size());
    for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

bool knows(const Knowledge& mine, const Event& event) {
    switch (event.kind) {
        case Event::Kind::kThread:
            return mine[place_of_thread(event.who)] >= event.number;
        case Event::Kind::kWarp:
            return mine[place_of_warp(event.who)] > event.number;
        case Event::Kind::kProducts: {
            // Of each of the four warps: the wait of one says nothing of what the others' products read.
            bool all = true;
            for (int warp = 4 * event.who; warp < 4 * event.who + 4; ++warp)
                all = all && mine[place_of_waits(warp)] >= event.number;
            return all;
        }
        case Event::Kind::kPhase:
            return mine[place_of_phase(event.who)] >= event.number;
        default:
            return true;
    }
}

}  // namespace

Event event_of(int thread, int lanes, int warp_epoch) {
    if (lanes == 1) {
        const uint32_t now = known.empty() ? 1 : known[thread][place_of_thread(thread)];
        return {Event::Kind::kThread, thread, now};
    }
    if (lanes == kLanes) return {Event::Kind::kWarp, thread / kLanes, static_cast<uint32_t>(warp_epoch)};
    return event_of_products(thread / kGroupLanes, waits[thread / kGroupLanes]);
}

Event event_of_products(int group, uint32_t number) { return {Event::Kind::kProducts, group, number}; }
Event event_of_phase(int barrier, uint32_t phase) { return {Event::Kind::kPhase, barrier, phase}; }

void start_knowledge(int count) {
    threads = count, warps = count / kLanes;
    known.clear();
    waits = {};
    last_first = -1;
}

void use_knowledge() {
    if (knowledge_counts()) return;
    known.assign(threads, Knowledge(place_of_phase(kMostPhaseBarriers)));
    for (int i = 0; i < threads; ++i) known[i][place_of_thread(i)] = 1;
}

bool knowledge_counts() { return !known.empty(); }

bool is_known(const Event& event, int lanes) {
    if (!knowledge_counts() || event.kind == Event::Kind::kNone) return false;
    const int first = thread_index() / lanes * lanes, end = std::min(first + lanes, threads);
    const bool same = event.kind == last.kind && event.who == last.who && event.number == last.number;
    if (same && first == last_first && lanes == last_lanes) return true;
    const bool all = std::all_of(known.begin() + first, known.begin() + end,
                                 [&](const Knowledge& mine) { return knows(mine, event); });
    if (all) last = event, last_first = first, last_lanes = lanes;
    return all;
}

void tell(Knowledge& heard) {
    Knowledge& mine = known[thread_index()];
    join(heard, mine);
    ++mine[place_of_thread(thread_index())];
}

void hear(const Knowledge& heard) { join(known[thread_index()], heard); }

void share_knowledge(int first, int count) {
    if (!knowledge_counts()) return;
    Knowledge all;
    for (int i = first; i < first + count; ++i) join(all, known[i]);
    for (int i = first; i < first + count; ++i) {
        known[i] = all;
        ++known[i][place_of_thread(i)];
    }
}

void learn_warp_epoch(int warp, int epoch) {
    for (int i = warp * kLanes; knowledge_counts() && i < (warp + 1) * kLanes; ++i)
        known[i][place_of_warp(warp)] = static_cast<uint32_t>(epoch);
}

void learn_phase(int barrier, uint32_t phase) {
    uint32_t& mine = known[thread_index()][place_of_phase(barrier)];
    mine = std::max(mine, phase);
}

void learn_wait_of_group(int group) {
    ++waits[group];
    for (int i = group * kGroupLanes; knowledge_counts() && i < (group + 1) * kGroupLanes; ++i)
        known[i][place_of_waits(i / kLanes)] = waits[group];
}

uint32_t waits_of_group(int group) { return waits[group]; }

}  // namespace vivit::cuda::sim
