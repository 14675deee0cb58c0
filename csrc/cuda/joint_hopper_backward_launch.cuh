// Joint attention's backward for Hopper: from a call to its two launches, of one dtype.
#pragma once

#include "joint_hopper_backward.cuh"
#include "joint_hopper_map.h"
#include "steps.cuh"

namespace vivit::cuda {

// Of the 232 registers of a thread that computes, sums take 8 kSteps of each gradient, scores and gradients of weights
// half of kPassing each, their rounded copies a quarter each; a kept tensor that is held takes 4 kSteps. Chosen is what
// nvcc 13.0 compiles without local memory, and without products that wait for each other; none of it has been timed.
//
//   channels        16..64   72..80   88..96   104..128          136..160
//   by queries      144      160      176      176               200, of which some go to local memory
//   by keys         192      176      192      200 (options 176)  208, whose products wait for each other
//
// By keys, of 72 channels on, products read k and v from shared memory, which is then busy for 92 to 96 % of the time
// that products take; at 32 rows (options of 104 to 128 channels) for 125 %. Of more than 128 channels the sums of dk
// and dv alone take 160 registers, with 32 rows that pass by 208 in all: those calls are left to the kernels of sm_80.
template <int kSteps, bool kPlain>
struct ChosenBackward {
    using Queries = BackwardVariant<kSteps, 64, kSteps <= 6 ? 2 : 1, kPlain>;
    using Keys = BackwardVariant<kSteps, kSteps <= 6 ? 64 : kPlain ? 48 : 32, kSteps <= 4 ? 2 : 0, kPlain>;
};

constexpr int32_t kMostBackwardChannels = 128;

// with_steps() of those that there are.
template <class Call>
auto with_backward_steps(int32_t D, const Call& call) {
    return with_steps(D, [&](auto steps) {
        constexpr int kSteps = decltype(steps)::value;
        return call(std::integral_constant<int, (16 * kSteps <= kMostBackwardChannels ? kSteps : 8)>());
    });
}

// False where a map cannot be made, or there are too many pieces. The launch that keeps queries, or the one that keeps
// keys.
template <class Variant>
bool prepare_backward(JointHopperBackward& made, const JointParams& p, bool keeps_queries) {
    SlabMaps* of_queries = keeps_queries ? made.kept : made.passing;
    SlabMaps* of_keys = keeps_queries ? made.passing : made.kept;
    const int32_t queries = keeps_queries ? kKeptRows : Variant::kPassing;
    const int32_t keys = keeps_queries ? Variant::kPassing : kKeptRows;
    made.p = p;
    made.N_kept = keeps_queries ? p.N_q : p.N_k, made.N_passing = keeps_queries ? p.N_k : p.N_q;
    const int64_t pieces = static_cast<int64_t>(p.B) * p.H * ((made.N_kept + int64_t(kKeptRows) - 1) / kKeptRows);
    made.pieces = static_cast<uint32_t>(pieces);
    constexpr int kSteps = Variant::kSteps;
    return pieces < INT32_MAX && slab_maps<kSteps>(of_queries[0], p.q, p, p.N_q, queries) &&
           slab_maps<kSteps>(of_queries[1], p.d_o, p, p.N_q, queries) &&
           slab_maps<kSteps>(of_keys[0], p.k, p, p.N_k, keys) && slab_maps<kSteps>(of_keys[1], p.v, p, p.N_k, keys);
}

template <class Variant>
int launch_pass(void (*kernel)(JointHopperBackward), const JointHopperBackward& made, void* stream) {
    const uint32_t blocks = static_cast<uint32_t>(current_multiprocessors());
    return launch(kernel, made.pieces < blocks ? made.pieces : blocks, kBackwardThreads,
                  BackwardMemory<Variant>::kBytes, stream, made);
}

// The second reads the delta of the first.
template <class T, class Chosen>
int launch_both(const JointParams& p, void* stream) {
    using Queries = typename Chosen::Queries;
    using Keys = typename Chosen::Keys;
    JointHopperBackward by_queries, by_keys;
    if (!prepare_backward<Queries>(by_queries, p, true) || !prepare_backward<Keys>(by_keys, p, false))
        return 1;  // cudaErrorInvalidValue: the caller has asked before
    const int error = launch_pass<Queries>(pipelined_joint_gradient_of_queries<T, Queries>, by_queries, stream);
    return error != 0 ? error : launch_pass<Keys>(pipelined_joint_gradients_of_keys<T, Keys>, by_keys, stream);
}

template <class T, bool kPlain>
int launch_hopper_backward_dtype(const JointParams& p, void* stream) {
    return with_backward_steps(
        p.D, [&](auto steps) { return launch_both<T, ChosenBackward<decltype(steps)::value, kPlain>>(p, stream); });
}

}  // namespace vivit::cuda
