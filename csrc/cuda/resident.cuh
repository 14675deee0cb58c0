// The resident regime: sequences that fit in shared memory whole, a block for one of them or for several short ones; a
// warp takes 16 rows at a time and goes over the other rows. What its forward and backward have in common.
#pragma once

#include "weights.cuh"

namespace vivit::cuda {

constexpr int kResidentWarps = 8;      // at most
constexpr int kShortBytes = 48 << 10;  // several sequences share a block as far as they take no more
constexpr int kMostStages = 3;

// Waits until of the groups of copies only the last `later` may be on their way.
VIVIT_DEVICE void wait_for_all_but(int32_t later) {
    if (later == 0) copies_wait<0>();
    if (later == 1) copies_wait<1>();
    if (later == 2) copies_wait<2>();
    static_assert(kMostStages == 3, "a wait for each number of later groups");
}

// What a block of the resident regime has in shared memory: of `per` sequences, each padded to `rows` rows, q, k and v
// and for a backward do; then floats of each row: of a forward what is added to the scores of a key, of a backward lse
// and delta; then of each warp what turning gradients back takes.
template <int kSteps, bool kBackward>
struct Layout {
    static constexpr int32_t kTensors = kBackward ? 4 : 3, kFloats = kBackward ? 2 : 1;
    int32_t rows, per;

    VIVIT_BOTH explicit Layout(int32_t N) : rows((N + 15) / 16 * 16), per(1) {
        const int32_t fit = kShortBytes / before_scratch(), wanted = rows > 64 ? 1 : 128 / rows;
        per = fit < 1 ? 1 : fit < wanted ? fit : wanted;
    }

    VIVIT_BOTH int32_t tensor_bytes() const { return rows * Pitch<kSteps>::kBytes; }
    VIVIT_BOTH int32_t before_scratch() const { return per * (kTensors * tensor_bytes() + 4 * kFloats * rows); }
    // stages: how many blocks' sequences lie in shared memory at a time.
    VIVIT_BOTH int32_t bytes(bool rotary, int32_t stages = 1) const {
        return stages * before_scratch() + (kBackward && rotary ? kResidentWarps * scratch_bytes() : 0);
    }
    static VIVIT_BOTH int32_t scratch_bytes() { return 16 * kTurnedPitch<kSteps> * 4; }

    // Warps of a block: of the numbers that need the fewest rounds for its tiles of 16 rows, the smallest.
    VIVIT_BOTH int32_t warps() const {
        const int32_t tiles = per * rows / 16 * (kBackward ? 2 : 1);
        const int32_t rounds = (tiles + kResidentWarps - 1) / kResidentWarps;
        return (tiles + rounds - 1) / rounds;
    }
};

// A block: its sequences, and where what it has of them lies in shared memory: in one of some stages, which lie one
// behind the other.
template <int kSteps, bool kBackward>
struct Block {
    Layout<kSteps, kBackward> layout;
    int64_t first;       // number of its first sequence
    int32_t sequences;   // of them
    int32_t to_scratch;  // bytes of all stages, and of what lies between them and the scratch
    char* memory;

    VIVIT_DEVICE Block(const Axis& axis, int32_t B, int64_t block, int32_t unused = 0, int32_t stage = 0,
                       int32_t stages = 1)
        : layout(axis.N),
          first(block * layout.per),
          to_scratch(stages * layout.before_scratch() + unused),
          memory(shared_memory() + stage * layout.before_scratch()) {
        const int64_t left = axis.sequences(B) - first;
        sequences = static_cast<int32_t>(left < layout.per ? left : layout.per);
    }

    VIVIT_DEVICE char* rows(int32_t tensor, int32_t s) const {
        return memory + (tensor * layout.per + s) * layout.tensor_bytes();
    }
    VIVIT_DEVICE float* floats(int32_t s) const {
        return reinterpret_cast<float*>(rows(layout.kTensors, 0)) + s * layout.kFloats * layout.rows;
    }
    VIVIT_DEVICE float* scratch() const {
        const int32_t of_warp = thread() / 32 * layout.scratch_bytes();
        return reinterpret_cast<float*>(shared_memory() + to_scratch + of_warp);
    }
    static VIVIT_DEVICE int32_t thread() { return static_cast<int32_t>(threadIdx.x); }
    static VIVIT_DEVICE int32_t threads() { return static_cast<int32_t>(blockDim.x); }

    // Sequence s of the block in shared memory as tensor number `tensor`, not yet waited for.
    VIVIT_DEVICE void copy(int32_t tensor, int32_t s, const Grid& x, const Axis& axis, int32_t D) const {
        const Rows from(x, Sequence(first + s, axis), axis);
        copy_rows<kSteps>(rows(tensor, s), from, axis.N, layout.rows, D, thread(), threads());
    }
    // The rows of q and k turned, once all of them are there.
    template <class T>
    VIVIT_DEVICE void turn(const AttentionParams& p, const Axis& axis) const {
        for (int32_t s = 0; s < sequences; ++s) {
            const Sequence at(first + s, axis);
            const auto token = [&](int32_t row) { return at.token(row, axis, p.S); };
            turn_rows<T, kSteps>(p, rows(0, s), axis.N, thread(), threads(), token);
            turn_rows<T, kSteps>(p, rows(1, s), axis.N, thread(), threads(), token);
        }
        block_barrier();
    }
};

// The blocks of an axis number first, first + step, ... below `end`, one after the other by the same threads.
struct Walk {
    uint32_t first, end, step;
};

// Blocks of a kernel that share a multiprocessor, by its registers: what it is compiled for. Of two, one copies while
// the other computes, and each takes one block of the axis.
template <int kSteps, bool kPlain, bool kBackward>
constexpr int kBlocksAtATime = kSteps <= 4 && kPlain && !kBackward ? 2 : 1;

// Whether copies run stages ahead: of a block that is alone, but where its registers are full (nvcc 13.0 spills).
template <int kSteps, bool kPlain, bool kBackward>
constexpr bool kStaged = kBlocksAtATime<kSteps, kPlain, kBackward> == 1 && (kPlain || !kBackward || kSteps < 8);

// Of each block of a walk copy(block), which asks for its rows, and once they are there work(block). While a block is
// worked on those of the next stages - 1 are on their way. kOne: the walk has one block, and there is one stage.
template <int kSteps, bool kBackward, bool kOne, class Copy, class Work>
VIVIT_DEVICE void in_stages(const AttentionParams& p, const Axis& axis, const Walk& walk, const Copy& copy,
                            const Work& work) {
    if constexpr (kOne) {
        const Block<kSteps, kBackward> block(axis, p.B, walk.first);
        copy(block);
        copies_commit();
        copies_wait<0>();
        block_barrier();
        work(block);
        return;
    }
    const int32_t stages = p.tiling.stages;
    const auto block = [&](uint32_t number, int32_t stage) {
        return Block<kSteps, kBackward>(axis, p.B, number, 0, stage, stages);
    };
    int32_t asked = 0, stage = 0;  // how many of the next blocks were asked for; the first of them lies in `stage`
#pragma unroll 1
    for (uint32_t number = walk.first; number < walk.end;) {
        const uint32_t wanted = number + static_cast<uint32_t>(asked) * walk.step;
        const int32_t to = stage + asked < stages ? stage + asked : stage + asked - stages;
        if (wanted < walk.end) copy(block(wanted, to));
        copies_commit();  // where nothing is left to copy, too: a wait counts groups
        if (++asked < stages) continue;
        wait_for_all_but(stages - 1);
        block_barrier();
        work(block(number, stage));
        number += walk.step, --asked, stage = stage + 1 < stages ? stage + 1 : 0;
        if (number < walk.end) block_barrier();  // the next copies go where this block's rows are
    }
}

// What the steps of a warp over the other rows have in common.
template <bool kPlain>
struct Rules {
    const AttentionParams& p;
    const Axis& axis;
    Scores<kPlain> scores;
    Dropout dropout;

    VIVIT_DEVICE Rules(const AttentionParams& params, const Axis& of)
        : p(params), axis(of), scores(params), dropout(params) {}
    VIVIT_DEVICE bool drops() const { return !kPlain && dropout.on; }
};

}  // namespace vivit::cuda
