// The resident regime: sequences that fit in shared memory whole, a block for one of them or for several short ones; a
// warp takes 16 rows at a time and goes over the other rows. What its forward and backward have in common.
#pragma once

#include "weights.cuh"

namespace vivit::cuda {

constexpr int kResidentWarps = 8;      // at most
constexpr int kShortBytes = 48 << 10;  // several sequences share a block as far as they take no more

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
    VIVIT_BOTH int32_t bytes(bool rotary) const {
        return before_scratch() + (kBackward && rotary ? kResidentWarps * scratch_bytes() : 0);
    }
    static VIVIT_BOTH int32_t scratch_bytes() { return 16 * kTurnedPitch<kSteps> * 4; }

    // Warps of a block: of the numbers that need the fewest rounds for its tiles of 16 rows, the smallest.
    VIVIT_BOTH int32_t warps() const {
        const int32_t tiles = per * rows / 16 * (kBackward ? 2 : 1);
        const int32_t rounds = (tiles + kResidentWarps - 1) / kResidentWarps;
        return (tiles + rounds - 1) / rounds;
    }
};

// A block: its sequences, and where what it has of them lies in shared memory.
template <int kSteps, bool kBackward>
struct Block {
    Layout<kSteps, kBackward> layout;
    int64_t first;      // number of its first sequence
    int32_t sequences;  // of them
    int32_t beyond;     // bytes before the scratch that nobody uses
    char* memory;

    VIVIT_DEVICE Block(const Axis& axis, int32_t B, int64_t block, int32_t unused = 0)
        : layout(axis.N), first(block * layout.per), beyond(unused), memory(shared_memory()) {
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
        return reinterpret_cast<float*>(memory + layout.before_scratch() + beyond + of_warp);
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
