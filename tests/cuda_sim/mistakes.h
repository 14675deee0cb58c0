// Mistakes that a test plants in a kernel as it is compiled: its file then calls some verbs as a wrong one would.
#pragma once

#include <string>

#include "machine.h"

namespace vivit::cuda::sim {

enum class Mistake {
    kNone,
    kNoPhaseWait,     // phase_wait does not wait
    kOtherPhase,      // phase_wait waits for the phase before or after
    kNoArrival,       // phase_arrive does not arrive
    kFewerBytes,      // phase_expect expects half
    kNoProductWait,   // group_wait does not wait
    kWaitsTooLittle,  // group_wait leaves one group more running
    kNoWarpBarrier,   // warp_barrier holds nobody up
    kOtherLane,       // what another lane looked up
    kOtherColumn,     // blocks of a left operand in registers change places
    kOtherRow,
    kOtherSlab,  // the second half of a row's channels lies elsewhere
};

struct Planted {
    Mistake mistake = Mistake::kNone;
    std::string file;  // how its name ends
};

extern Planted planted;

inline bool is_planted(const Site& site, Mistake mistake) {
    if (planted.mistake != mistake) return false;
    const std::string file = site.file;
    return file.size() >= planted.file.size() &&
           file.compare(file.size() - planted.file.size(), std::string::npos, planted.file) == 0;
}

}  // namespace vivit::cuda::sim
