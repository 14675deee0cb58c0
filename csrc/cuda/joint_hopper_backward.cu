// Joint attention's backward for Hopper: from a call to its two launches.
#include "joint_hopper_backward.cuh"
#include "joint_hopper_backward.h"
#include "joint_hopper_map.h"

namespace vivit::cuda {
namespace {

// The launch that keeps queries, or the one that keeps keys.
bool prepare(JointHopperBackward& made, const JointParams& p, bool keeps_queries) {
    TensorMap* of_queries = keeps_queries ? made.kept : made.passing;
    TensorMap* of_keys = keeps_queries ? made.passing : made.kept;
    made.p = p;
    made.N_kept = keeps_queries ? p.N_q : p.N_k, made.N_passing = keeps_queries ? p.N_k : p.N_q;
    const int64_t pieces = static_cast<int64_t>(p.B) * p.H * ((made.N_kept + int64_t(kKeptRows) - 1) / kKeptRows);
    made.pieces = static_cast<uint32_t>(pieces);
    return pieces < INT32_MAX && map_of(of_queries[0], p.q, p, p.N_q, kPassingRows) &&
           map_of(of_queries[1], p.d_o, p, p.N_q, kPassingRows) && map_of(of_keys[0], p.k, p, p.N_k, kPassingRows) &&
           map_of(of_keys[1], p.v, p, p.N_k, kPassingRows);
}

int launch_pass(void (*kernel)(JointHopperBackward), const JointHopperBackward& made, void* stream) {
    const uint32_t blocks = static_cast<uint32_t>(current_multiprocessors());
    return launch(kernel, made.pieces < blocks ? made.pieces : blocks, kBackwardThreads, BackwardMemory::kBytes, stream,
                  made);
}

// The second reads the delta of the first.
template <class T>
int launch_both(const JointParams& p, void* stream) {
    JointHopperBackward by_queries, by_keys;
    if (!prepare(by_queries, p, true) || !prepare(by_keys, p, false)) return 1;  // cudaErrorInvalidValue
    const int error = launch_pass(pipelined_joint_gradient_of_queries<T>, by_queries, stream);
    return error != 0 ? error : launch_pass(pipelined_joint_gradients_of_keys<T>, by_keys, stream);
}

}  // namespace

bool joint_hopper_backward_runs(const JointParams& p) {
    if (!is_plain(p) || p.dtype == DType::kFloat32 || p.D <= 32 || p.D > 64 || p.D % 8 != 0) return false;
    if (p.N_q < kFewRows || p.N_k < kFewRows || !has_hopper_kernels()) return false;
    JointHopperBackward made;
    return prepare(made, p, true) && prepare(made, p, false);
}

int launch_joint_hopper_backward(const JointParams& p, void* stream) {
    return p.dtype == DType::kFloat16 ? launch_both<Float16>(p, stream) : launch_both<BFloat16>(p, stream);
}

}  // namespace vivit::cuda
