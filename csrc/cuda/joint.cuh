// The kernels of joint attention, and how a call becomes its launches.
#pragma once

#include "steps.cuh"
#include "streaming_backward.cuh"
#include "streaming_forward.cuh"

namespace vivit::cuda {

template <class T, int kSteps, bool kPlain>
int launch_streaming_forward(const JointParams& p, void* stream) {
    using Shape = ForwardShape<kSteps>;
    return launch(streaming_forward<T, kSteps, kPlain>, stretches(p, p.N_q, Shape::kQueries), Shape::kThreads,
                  Shape::kBytes, stream, p);
}

// The last launch reads the delta of the first.
template <class T, int kSteps, bool kPlain>
int launch_streaming_backward(const JointParams& p, void* stream) {
    using First = QueriesShape<kSteps>;
    int error = 0;
    if (p.N_q < kFewRows || p.N_k < kFewRows) {
        error = launch(streaming_delta<T, kSteps, kPlain>, stretches(p, p.N_q, First::kQueries), First::kThreads,
                       First::kBytes, stream, p);
    }
    if (error != 0) return error;
    error = launch(streaming_gradient_of_queries<T, kSteps, kPlain>, stretches(p, p.N_q, First::kQueries),
                   First::kThreads, First::kBytes, stream, p);
    if (error != 0) return error;
    using Second = KeysShape<kSteps>;
    return launch(streaming_gradients_of_keys<T, kSteps, kPlain>, stretches(p, p.N_k, Second::kKeys), Second::kThreads,
                  Second::kBytes, stream, p);
}

template <class T, int kSteps, bool kBackward>
int launch_joint_steps(const JointParams& p, void* stream) {
    const bool plain = is_plain(p);
    if constexpr (kBackward) {
        return plain ? launch_streaming_backward<T, kSteps, true>(p, stream)
                     : launch_streaming_backward<T, kSteps, false>(p, stream);
    } else {
        return plain ? launch_streaming_forward<T, kSteps, true>(p, stream)
                     : launch_streaming_forward<T, kSteps, false>(p, stream);
    }
}

template <class T, bool kBackward>
int launch_joint(const JointParams& p, void* stream) {
    return with_steps(p.D, [&](auto steps) { return launch_joint_steps<T, steps, kBackward>(p, stream); });
}

}  // namespace vivit::cuda
