// Joint attention's forward for Hopper: from a call to a launch.
#include "joint_hopper.cuh"
#include "joint_hopper.h"

namespace vivit::cuda {
namespace {

// Two warpgroups that compute, an eighth of the exponentials by the FMA pipes, bases that rise by 2^8 at a time: by
// `python -m bench cuda_model` what leaves most room beside the products. It has not been timed.
//
// Why no more at a time: a product that runs beside exponentials needs scores, outputs and weights in registers at
// once. nvcc 13.0 gives up on that, spills and waits for each product, where they need more than a launch gives,
// however many setmaxnreg says (tried with 160 to 232): 128 of three warpgroups' block, with 128 keys; 168 of two, with
// 176 keys.
using Chosen = HopperVariant<2, 2, 8>;

// The token grid in place: sizes (D, H, N, B), a box of 64 channels of `rows` tokens; where D is less, zeros follow.
bool map_of(TensorMap& map, const Tokens& x, const JointParams& p, int32_t N, int32_t rows) {
    TensorShape shape;
    shape.data = x.data, shape.element_bytes = 2, shape.rank = 4;
    const int64_t sizes[] = {p.D, p.H, N, p.B}, strides[] = {1, x.stride_h, x.stride_n, x.stride_b};
    const int32_t box[] = {64, 1, rows, 1};
    for (int i = 0; i < 4; ++i) shape.sizes[i] = sizes[i], shape.strides[i] = 2 * strides[i], shape.box[i] = box[i];
    return make_tensor_map(map, shape);
}

bool prepare(JointHopperParams& made, const JointParams& p, int32_t queries) {
    made.o = p.o, made.lse = p.lse;
    made.D = p.D, made.H = p.H, made.N_q = p.N_q, made.N_k = p.N_k;
    made.tiles_of_head = (static_cast<uint32_t>(p.N_q) + queries - 1) / queries;
    const int64_t tiles = static_cast<int64_t>(p.B) * p.H * made.tiles_of_head;
    made.tiles = static_cast<uint32_t>(tiles);
    made.unit = p.scale * kLog2E;
    return tiles < INT32_MAX && map_of(made.q, p.q, p, p.N_q, queries) && map_of(made.k, p.k, p, p.N_k, kTileKeys) &&
           map_of(made.v, p.v, p, p.N_k, kTileKeys);
}

template <class T, class Variant>
int launch_variant(const JointParams& p, void* stream) {
    using Memory = HopperMemory<Variant>;
    JointHopperParams made;
    if (!prepare(made, p, Memory::kQueries)) return 1;  // cudaErrorInvalidValue: the caller has asked before
    const uint32_t blocks = static_cast<uint32_t>(current_multiprocessors());
    return launch(pipelined_joint_forward<T, Variant>, made.tiles < blocks ? made.tiles : blocks, Variant::kThreads,
                  Memory::kBytes, stream, made);
}

template <class Variant>
int launch_dtype(const JointParams& p, void* stream) {
    return p.dtype == DType::kFloat16 ? launch_variant<Float16, Variant>(p, stream)
                                      : launch_variant<BFloat16, Variant>(p, stream);
}

}  // namespace

bool joint_hopper_runs(const JointParams& p) {
    const bool plain = p.scale > 0.f && p.softcap == 0.f && p.mask == nullptr && p.seed == nullptr && p.cos == nullptr;
    if (!plain || p.dtype == DType::kFloat32 || p.D <= 32 || p.D > 64 || p.D % 8 != 0) return false;
    if (p.N_q < 1 || p.N_k < 1 || !has_hopper_kernels()) return false;
    JointHopperParams made;
    return prepare(made, p, HopperMemory<Chosen>::kQueries);
}

int launch_joint_hopper(const JointParams& p, void* stream) { return launch_dtype<Chosen>(p, stream); }

#if defined(VIVIT_SIM)
// The variants that are not chosen, for the tests: they are to be as right.
int launch_joint_hopper_variant(const JointParams& p, int groups, int polynomial, int slack) {
    if (groups == 2 && polynomial == 0 && slack == 0) return launch_dtype<HopperVariant<2, 0, 0>>(p, nullptr);
    if (groups == 3 && polynomial == 2 && slack == 8) return launch_dtype<HopperVariant<3, 2, 8>>(p, nullptr);
    if (groups == 2 && polynomial == 8 && slack == 8) return launch_dtype<HopperVariant<2, 8, 8>>(p, nullptr);
    return 1;
}
#endif

}  // namespace vivit::cuda
