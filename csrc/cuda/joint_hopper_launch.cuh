// Joint attention's forward for Hopper: from a call to a launch, of one dtype.
#pragma once

#include "joint_hopper.cuh"
#include "joint_hopper.h"
#include "joint_hopper_map.h"
#include "steps.cuh"

namespace vivit::cuda {

// By `python -m bench cuda_model`, none of it timed: two warpgroups that compute; of heads up to 64 channels, where
// exponentials take as long as products, an eighth of them by the FMA pipes, of others none, and none beside options,
// which need the issue slots; bases that rise by 2^8 at a time; 128 keys to a tile where registers (beside options) and
// shared memory (of the longest heads) hold them.
//
// Three warpgroups would leave each more time for its own chain of a tile (912 cycles of 1536, of two 912 of 1024), but
// 3,136 queries fill 16.3 tiles of 192 and 24.5 of 128: 295 microseconds at least for 8 clips of 12 heads of 64, of two
// 291.
template <int kSteps, bool kPlain>
struct ChosenVariant {
    static constexpr int kMost = kSteps <= 4 ? 128 : kSteps <= 8 ? 96 : 64;  // beside options
    static constexpr int kKeys = !kPlain ? kMost : kSteps <= 8 ? 128 : 96;
    template <int kOtherKeys>
    using Of = HopperVariant<kSteps, kOtherKeys, kPlain, 2, kPlain && kSteps <= 4 ? 2 : 0, 8>;
    using Type = Of<kKeys>;
};

// False where a map cannot be made, or there are too many tiles.
template <class Variant>
bool prepare(JointHopperParams& made, const JointParams& p) {
    constexpr int32_t kQueries = HopperMemory<Variant>::kQueries, kKeys = Variant::kKeys;
    made.options = p, made.o = p.o;
    made.H = p.H, made.N_q = p.N_q, made.N_k = p.N_k;
    made.tiles_of_head = (static_cast<uint32_t>(p.N_q) + kQueries - 1) / kQueries;
    const int64_t tiles = static_cast<int64_t>(p.B) * p.H * made.tiles_of_head;
    made.tiles = static_cast<uint32_t>(tiles);
    return tiles < INT32_MAX && slab_maps<Variant::kSteps>(made.q, p.q, p, p.N_q, kQueries) &&
           slab_maps<Variant::kSteps>(made.k, p.k, p, p.N_k, kKeys) &&
           slab_maps<Variant::kSteps>(made.v, p.v, p, p.N_k, kKeys);
}

template <class T, class Variant>
int launch_hopper_variant(const JointParams& p, void* stream) {
    JointHopperParams made;
    if (!prepare<Variant>(made, p)) return 1;  // cudaErrorInvalidValue: the caller has asked before
    const uint32_t blocks = static_cast<uint32_t>(current_multiprocessors());
    return launch(pipelined_joint_forward<T, Variant>, made.tiles < blocks ? made.tiles : blocks, Variant::kThreads,
                  HopperMemory<Variant>::kBytes, stream, made);
}

// Whether tiles of 176 keys pad a call to fewer than tiles of 128: 3,136 and 3,137 to 3,168 instead of 3,200, 1,568 to
// 1,584 instead of 1,664; not 6,272 or 12,544, which are whole tiles of 128.
inline bool fits_wide_tiles(int32_t N_k) { return (N_k + 175) / 176 * 11 < (N_k + 127) / 128 * 8; }

template <class T, bool kPlain>
int launch_hopper_dtype(const JointParams& p, void* stream) {
    return with_steps(p.D, [&](auto steps) {
        using Chosen = ChosenVariant<decltype(steps)::value, kPlain>;
        if constexpr (kPlain && decltype(steps)::value == 4) {
            if (fits_wide_tiles(p.N_k)) return launch_hopper_variant<T, typename Chosen::template Of<176>>(p, stream);
        }
        return launch_hopper_variant<T, typename Chosen::Type>(p, stream);
    });
}

}  // namespace vivit::cuda
