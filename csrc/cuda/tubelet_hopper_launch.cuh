// Which calls Hopper's own forward runs, in what tiles, and the launch.
#pragma once

#include "tubelet_hopper.cuh"

namespace vivit::cuda {

// Columns of a tile: those whose rounds of all multiprocessors take least, the widest of equals, which read the video
// least. For 8 clips of ViViT-B on 132: 192, with 784 tiles in 6 rounds; 256 would take 5 of 4.5.
inline int32_t columns_of(int64_t tubelets, int32_t E, int32_t multiprocessors) {
    int64_t least = INT64_MAX;
    int32_t best = 0;
    for (const int32_t columns : {256, 192, 128}) {
        const int64_t tiles = (tubelets + kGatherTile - 1) / kGatherTile * ((E + columns - 1) / columns);
        const int64_t cost = (tiles + multiprocessors - 1) / multiprocessors * columns;
        if (cost < least) least = cost, best = columns;
    }
    return best;
}

struct HopperForward {
    HopperForwardParams params;
    int32_t columns, blocks;
};

template <int kColumns>
bool fits(int64_t steps) {
    return GatherMemory<kColumns>::bytes(steps) <= most_shared_bytes();
}

// False where the kernel of sm_80 runs the call: GPUs other than sm_90; pixels of which no two are sure to lie side by
// side (runs of odd length, rows that begin anywhere); fewer channels than the narrowest tile; tubelets that reach
// further than 2^31 bytes, and more taps than a table fits of beside the weight.
inline bool plan_hopper_forward(HopperForward& plan, const ForwardParams& p) {
    const PixelPlaces& places = p.places;
    if (!has_hopper_kernels() || places.together < 2 || p.E < 128) return false;
    const int64_t reach = (places.per_channel.by < places.taps ? kMostChannels * places.step_c : 0) +
                          places.deep.by * places.step_f + places.tall.by * places.step_y +
                          places.run.by * places.step_x;
    const int64_t steps = (places.taps + 2 * kStep - 1) / (2 * kStep) * 2;
    if (reach > INT32_MAX || !fits<256>(steps) || !fits<192>(steps) || !fits<128>(steps)) return false;
    const int32_t multiprocessors = current_multiprocessors();
    plan.columns = columns_of(places.tubelets, p.E, multiprocessors);
    const int32_t tiles_e = (p.E + plan.columns - 1) / plan.columns;
    const int64_t tiles = (int64_t{places.tubelets} + kGatherTile - 1) / kGatherTile * tiles_e;
    TensorShape weight;
    weight.data = p.weight.first, weight.rank = 2;
    weight.sizes[0] = p.weight.width, weight.sizes[1] = p.E, weight.strides[1] = p.weight.step;
    weight.box[0] = kStep, weight.box[1] = plan.columns;
    if (tiles > INT32_MAX / 2 || !make_tensor_map(plan.params.weight, weight)) return false;
    plan.params.of = p, plan.params.steps = static_cast<int32_t>(steps);
    plan.params.tiles_e = Divisor(tiles_e), plan.params.units = static_cast<int32_t>(tiles);
    plan.blocks = tiles < multiprocessors ? plan.params.units : multiprocessors;
    return true;
}

template <class T, class Pixel, int kColumns>
int launch_gathering(const HopperForward& plan, void* stream) {
    const auto bytes = static_cast<int>(GatherMemory<kColumns>::bytes(plan.params.steps));
    return launch(gathering_tubelet_forward<T, Pixel, kColumns>, plan.blocks, kGatherThreads, bytes, stream,
                  plan.params);
}

template <class T, class Pixel>
int launch_gathering(const HopperForward& plan, void* stream) {
    return plan.columns == 256   ? launch_gathering<T, Pixel, 256>(plan, stream)
           : plan.columns == 192 ? launch_gathering<T, Pixel, 192>(plan, stream)
                                 : launch_gathering<T, Pixel, 128>(plan, stream);
}

template <class T>
int launch_hopper_forward(const HopperForward& plan, Element type, void* stream) {
    return type == Element::kUint8     ? launch_gathering<T, uint8_t>(plan, stream)
           : type == Element::kFloat32 ? launch_gathering<T, float>(plan, stream)
                                       : launch_gathering<T, T>(plan, stream);
}

}  // namespace vivit::cuda
