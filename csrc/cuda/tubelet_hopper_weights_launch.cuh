// Which calls Hopper's own weight gradient runs, and the launch.
#pragma once

#include "tubelet_hopper_weights.cuh"

namespace vivit::cuda {

struct HopperWeights {
    HopperWeightsParams params;
    int32_t blocks;
};

// False where the kernel of sm_80 runs the call: GPUs other than sm_90, pixels of which no two are sure to lie side by
// side, fewer channels than a tile has.
inline bool plan_hopper_weights(HopperWeights& plan, const WeightGradientParams& p, int32_t splits) {
    const PixelPlaces& places = p.places;
    if (!has_hopper_kernels() || places.together < 2 || p.d_out.width < kWeightChannels) return false;
    const int64_t tiles_k = (int64_t{p.pitch} + kWeightTaps - 1) / kWeightTaps;
    const int64_t tiles_e = (int64_t{p.d_out.width} + kWeightChannels - 1) / kWeightChannels;
    const int64_t units = tiles_k * tiles_e * splits;
    if (units > INT32_MAX / 2 || WeightMemory::kBytes > most_shared_bytes()) return false;
    // three pairs of steps are looked up beyond the last
    const int64_t tokens = plan_boxes(plan.params.d_out, p.d_out, places.tubelets, 3 * kStepPair);
    if (tokens == 0) return false;
    const int64_t pairs = (tokens + kStepPair - 1) / kStepPair;
    plan.params.of = p;
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
