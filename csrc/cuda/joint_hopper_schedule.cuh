// Who does what, and when: the tiles of a call, the shared memory of a block and the phases of its barriers.
//
// A block stays on its multiprocessor and takes tile after tile: kGroups x 64 queries of one head of one clip. One
// thread of its first warpgroup asks the copy engine for the queries and for stages of kKeys keys and values; each
// other warpgroup computes 64 queries. The next tile's first copies are under way while this one's results are stored.
#pragma once

#include "joint_hopper_slabs.cuh"
#include "scores.cuh"

namespace vivit::cuda {

// What a kernel is compiled for.
// kSteps: of 16 channels, that a head is padded to: 2, 4, 5, 6, 8 or 10.  kKeys: of a tile, a multiple of 16.
// kPlain: no option of the call but a positive scale.
// kGroups: warpgroups that compute, 2 or 3.  kPolynomial: of each 16 exponentials, how many by the FMA pipes.
// kSlack: how far scores may rise above the number that they are taken relative to, before all is taken relative to a
// new one (joint_hopper_softmax.cuh).
template <int kStepsOf, int kKeysOf, bool kPlainOf, int kGroupsOf, int kPolynomialOf, int kSlackOf>
struct HopperVariant {
    static constexpr int kSteps = kStepsOf, kKeys = kKeysOf, kGroups = kGroupsOf;
    static constexpr bool kPlain = kPlainOf;
    static constexpr int kPolynomial = kPolynomialOf, kSlack = kSlackOf;
    static constexpr int kThreads = 128 * (kGroups + 1);
    // A launch gives each thread 65,536 / kThreads registers, a multiple of 8: 168 of two computing warpgroups, 128 of
    // three. What the copying one gives back is for the others, (168 - 24) / 2 more for each of two, (128 - 32) / 3 of
    // three.
    static constexpr int kFew = kGroups == 2 ? 24 : 32, kMany = kGroups == 2 ? 240 : 160;
    static_assert(kKeys % 16 == 0 && kKeys * kSteps % 32 == 0);  // stages are whole 1024 bytes
};

constexpr int32_t kGroupQueries = 64, kKeyStages = 3;

struct JointHopperParams {
    SlabMaps q, k, v;
    Tokens o;
    AttentionOptions options;  // scale, soft-cap, mask, seed and what goes with it, lse; D
    int32_t H, N_q, N_k;
    uint32_t tiles_of_head, tiles;  // of all heads of all clips: 2^31 would have queries of 256 GB
};

// Tiles of one head come one after the other, so that the blocks that run at a time share a few heads' keys and values
// in the second-level cache.
struct HopperTile {
    int32_t b, h, first_query;

    VIVIT_DEVICE HopperTile(const JointHopperParams& p, uint32_t number, int32_t queries) {
        const uint32_t head = number / p.tiles_of_head, heads = static_cast<uint32_t>(p.H);
        first_query = static_cast<int32_t>(number - head * p.tiles_of_head) * queries;
        b = static_cast<int32_t>(head / heads);
        h = static_cast<int32_t>(head - head / heads * heads);
    }

    // The number that dropout and saved statistics know a query by, in [B, H, N_q].
    VIVIT_DEVICE int64_t query_number(const JointHopperParams& p, int32_t query) const {
        return (static_cast<int64_t>(b) * p.H + h) * p.N_q + query;
    }
};

template <class Variant>
VIVIT_DEVICE int32_t key_tiles(const JointHopperParams& p) {
    return (p.N_k + Variant::kKeys - 1) / Variant::kKeys;
}

// Shared memory: the tile's queries, kKeyStages of keys, as many of values, each as Slabs; then the barriers.
// `full`: the copy engine has brought it. `empty`: each warp that computes has read it.
template <class Variant>
struct HopperMemory {
    using Rows = Slabs<Variant::kSteps>;
    static constexpr int32_t kQueries = Variant::kGroups * kGroupQueries, kQueryBytes = kQueries * Rows::kRowBytes;
    static constexpr int32_t kKeyBytes = Variant::kKeys * Rows::kRowBytes;
    static constexpr int32_t kBarriers = 2 + 4 * kKeyStages;
    static constexpr int32_t kBytes = kQueryBytes + 2 * kKeyStages * kKeyBytes + 8 * kBarriers;
    static_assert(kBytes <= 227 << 10);

    char *q, *k, *v;
    PhaseBarrier *q_full, *q_empty, *k_full, *k_empty, *v_full, *v_empty;

    VIVIT_DEVICE HopperMemory()
        : q(shared_memory()),
          k(q + kQueryBytes),
          v(k + kKeyStages * kKeyBytes),
          q_full(reinterpret_cast<PhaseBarrier*>(v + kKeyStages * kKeyBytes)),
          q_empty(q_full + 1),
          k_full(q_empty + 1),
          k_empty(k_full + kKeyStages),
          v_full(k_empty + kKeyStages),
          v_empty(v_full + kKeyStages) {}

    // By one thread.
    VIVIT_DEVICE void make_barriers() const {
        constexpr int32_t kWarps = 4 * Variant::kGroups;
        phase_init(q_full, 1), phase_init(q_empty, kWarps);
        for (int32_t i = 0; i < kKeyStages; ++i) {
            phase_init(k_full + i, 1), phase_init(k_empty + i, kWarps);
            phase_init(v_full + i, 1), phase_init(v_empty + i, kWarps);
        }
        phase_fence();
    }
};

using Ring = RingPlace<kKeyStages>;

// The warpgroups that compute take turns to hand products to the tensor cores: while one's products run, the others
// turn scores into weights, instead of all doing the same at a time. Each waits at the barrier of its own number, where
// the one before it arrives.
template <class Variant>
struct Turns {
    int32_t group;  // from 0

    VIVIT_DEVICE explicit Turns(int32_t mine) : group(mine) {
        if (group + 1 == Variant::kGroups) pass();
    }
    VIVIT_DEVICE void wait() const { named_wait(1 + group, 256); }
    VIVIT_DEVICE void pass() const { named_arrive(group + 1 == Variant::kGroups ? 1 : 2 + group, 256); }
    // Nothing is left of the last turn.
    VIVIT_DEVICE void end() const {
        if (group == 0) wait();
    }
};

}  // namespace vivit::cuda
