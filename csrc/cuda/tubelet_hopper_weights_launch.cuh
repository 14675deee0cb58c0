// Which calls Hopper's own weight gradient runs, and the launch.
#pragma once

#include "tubelet_hopper_weights.cuh"

namespace vivit::cuda {

struct HopperWeights {
    HopperWeightsParams params;
    int32_t blocks;
};

// dout without its class rows, in groups.
inline TensorShape groups_of(const GradientRows& d_out, int64_t tokens, int64_t groups, int32_t rows) {
    const int32_t before = d_out.tokens.before;
    const int64_t row_bytes = int64_t{2} * d_out.width;
    TensorShape shape;
    shape.data = d_out.first + before * row_bytes, shape.rank = 3;
    shape.sizes[0] = d_out.width, shape.sizes[1] = tokens, shape.sizes[2] = groups;
    shape.strides[1] = row_bytes, shape.strides[2] = (tokens + before) * row_bytes;
    shape.box[0] = kSlab, shape.box[1] = rows, shape.box[2] = 1;
    return shape;
}

// False where the kernel of sm_80 runs the call: GPUs other than sm_90, pixels of which no two are sure to lie side by
// side, fewer channels than a tile has.
inline bool plan_hopper_weights(HopperWeights& plan, const WeightGradientParams& p, int32_t splits) {
    const PixelPlaces& places = p.places;
    if (!has_hopper_kernels() || places.together < 2 || p.d_out.width < kWeightChannels) return false;
    const bool one = p.d_out.tokens.before == 0;  // without class rows one group of all tokens
    const int64_t tokens = one ? places.tubelets : p.d_out.tokens.group.by, groups = places.tubelets / tokens;
    const int32_t rows = one || tokens % 64 == 0 ? 64 : tokens % 32 == 0 ? 32 : 16;
    const int64_t in_boxes = (tokens + rows - 1) / rows * rows;
    const int64_t pairs = (groups * in_boxes + kStepPair - 1) / kStepPair;
    const int64_t tiles_k = (int64_t{p.pitch} + kWeightTaps - 1) / kWeightTaps;
    const int64_t tiles_e = (int64_t{p.d_out.width} + kWeightChannels - 1) / kWeightChannels;
    const int64_t units = tiles_k * tiles_e * splits;
    // the steps that are looked up ahead, and beyond the last
    const bool counts = (pairs + 2) * kStepPair <= INT32_MAX && units <= INT32_MAX / 2;
    if (!counts || WeightMemory::kBytes > most_shared_bytes()) return false;
    if (!make_tensor_map(plan.params.d_out, groups_of(p.d_out, tokens, groups, rows))) return false;
    plan.params.of = p, plan.params.tokens = static_cast<int32_t>(tokens);
    plan.params.rows = rows, plan.params.in_boxes = Divisor(static_cast<int32_t>(in_boxes));
    plan.params.pairs = static_cast<int32_t>(pairs / splits), plan.params.more = static_cast<int32_t>(pairs % splits);
    plan.params.tiles_k = Divisor(static_cast<int32_t>(tiles_k));
    plan.params.tiles = Divisor(static_cast<int32_t>(tiles_k * tiles_e));
    plan.params.units = static_cast<int32_t>(units);
    const int32_t multiprocessors = current_multiprocessors();
    plan.blocks = plan.params.units < multiprocessors ? plan.params.units : multiprocessors;
    return true;
}

template <class T>
int launch_hopper_weights(const HopperWeights& plan, Element type, void* stream) {
    const auto kernel = type == Element::kUint8     ? gathering_weight_gradient<T, uint8_t>
                        : type == Element::kFloat32 ? gathering_weight_gradient<T, float>
                                                    : gathering_weight_gradient<T, T>;
    return launch(kernel, plan.blocks, kGatherThreads, WeightMemory::kBytes, stream, plan.params);
}

}  // namespace vivit::cuda
