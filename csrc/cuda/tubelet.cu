// From a call of tubelet_embedding to the parameters of its kernels. The products are compiled elsewhere, by dtype and
// direction, so that it can be done side by side.
#include "tubelet_backward.cuh"
#include "tubelet_hopper_launch.cuh"
#include "tubelet_hopper_video.cuh"
#include "tubelet_hopper_weights_launch.cuh"
#include "tubelet_launch.cuh"
#include "tubelet_parameters.cuh"

namespace vivit::cuda {

extern template int launch_forward_products<BFloat16>(const ForwardParams&, Element, void*);
extern template int launch_forward_products<Float16>(const ForwardParams&, Element, void*);
extern template int launch_hopper_forward<BFloat16>(const HopperForward&, Element, void*);
extern template int launch_hopper_forward<Float16>(const HopperForward&, Element, void*);
extern template int launch_hopper_weights<BFloat16>(const HopperWeights&, Element, void*);
extern template int launch_hopper_weights<Float16>(const HopperWeights&, Element, void*);
extern template int launch_hopper_video<BFloat16>(const HopperVideo&, void*);
extern template int launch_hopper_video<Float16>(const HopperVideo&, void*);
extern template int launch_weight_products<BFloat16>(const WeightGradientParams&, Element, int32_t, void*);
extern template int launch_weight_products<Float16>(const WeightGradientParams&, Element, int32_t, void*);
extern template int launch_video_products<BFloat16>(const VideoGradientParams&, void*);
extern template int launch_video_products<Float16>(const VideoGradientParams&, void*);

namespace {

int64_t bytes_of(Element type) { return type == Element::kUint8 ? 1 : type == Element::kFloat32 ? 4 : 2; }
int32_t taps_of(const TubeletParams& p) { return p.C * p.f * p.y * p.x; }
int32_t blocks(int32_t n, int32_t size) { return (n + size - 1) / size; }
int32_t tubelets_of(const TubeletParams& p) { return p.B * p.T * p.rows * p.columns; }
int32_t tokens_of_group(const TubeletParams& p) { return p.rows * p.columns * (p.per_frame ? 1 : p.T); }

// Whether numbers may be read n side by side wherever a run has them: every n-th lies at a multiple of their size, of
// 16 bytes at most. Strides of what there is only one of do not count.
bool lie_together(const TubeletParams& p, const Video& v, int32_t run, int32_t n) {
    const int64_t most = 16 / bytes_of(v.type), unit = n < most ? n : most;
    const auto fits = [&](int32_t count, int64_t step) { return count == 1 || step % unit == 0; };
    return run % n == 0 && reinterpret_cast<uintptr_t>(v.data) % (unit * bytes_of(v.type)) == 0 &&
           fits(p.B, v.stride_b) && fits(p.T, p.f * v.stride_f) && fits(p.f, v.stride_f) &&
           fits(p.rows, p.y * v.stride_y) && fits(p.y, v.stride_y) && fits(run == p.x ? p.C : 1, v.stride_c);
}

// folded: channels belong to the runs.
PixelPlaces places_of(const TubeletParams& p, const Video& v, bool folded) {
    PixelPlaces places;
    const int64_t bytes = bytes_of(v.type);
    const int32_t run = folded ? p.C * p.x : p.x;
    places.data = static_cast<char*>(v.data);
    places.tubelets = tubelets_of(p), places.taps = taps_of(p);
    places.columns = Divisor(p.columns), places.rows = Divisor(p.rows), places.frames = Divisor(p.T);
    places.step_b = v.stride_b * bytes, places.step_t = p.f * v.stride_f * bytes;
    places.step_row = p.y * v.stride_y * bytes, places.step_column = p.x * v.stride_x * bytes;
    places.run = Divisor(run), places.tall = Divisor(p.y), places.deep = Divisor(p.f);
    places.step_c = v.stride_c * bytes, places.step_f = v.stride_f * bytes, places.step_y = v.stride_y * bytes;
    places.step_x = (folded ? 1 : v.stride_x) * bytes;
    places.per_channel = Divisor(p.f * p.y * p.x), places.channels = Divisor(folded ? p.C : 1);
    if (folded || v.stride_x == 1) {
        for (const int32_t n : {2, 4, 8}) places.together = lie_together(p, v, run, n) ? n : places.together;
    }
    return places;
}

// A pixel u of channel c counts as scale[c] u + shift[c]. Bytes enter the products as (u - 128) / unit: a scale that is
// common to all channels and unit are left to the float32 sums, one per channel is in the operand, the shift is a row
// that is added to all tokens. Floating-point pixels are normalised when they are read.
struct Affine {
    double unit = 1.;
    double scale[kMostChannels], shift[kMostChannels];
    bool common = true;
    Normalisation on_load;

    explicit Affine(const TubeletParams& p) {
        const bool bytes = p.video.type == Element::kUint8;
        const double centred = p.dtype == Element::kBFloat16 ? kCentredUnit<BFloat16> : kCentredUnit<Float16>;
        for (int32_t c = 0; c < kMostChannels; ++c) {
            scale[c] = bytes && c < p.C ? p.scale[c] * centred : 1.;
            shift[c] = bytes && c < p.C ? p.shift[c] + 128 * p.scale[c] : 0.;
            if (c >= p.C) continue;
            common = common && scale[c] == scale[0];
            on_load.scale[c] = static_cast<float>(p.scale[c]), on_load.shift[c] = static_cast<float>(p.shift[c]);
            on_load.applies = on_load.applies || (!bytes && (p.scale[c] != 1 || p.shift[c] != 0));
        }
        if (common) unit = scale[0];
    }
};

TokenPlaces tokens_of(const TubeletParams& p) { return {Divisor(tokens_of_group(p)), p.has_class ? 1 : 0}; }

GradientRows gradient_rows(const TubeletParams& p) {
    return {static_cast<const char*>(p.d_out), tokens_of(p), tubelets_of(p), p.E};
}

int32_t rows_of_group(const TubeletParams& p) { return tokens_of_group(p) + (p.has_class ? 1 : 0); }
// Of n in equal shares, but for the last.
bool none_is_empty(int32_t n, int32_t shares) {
    return shares == 0 || (n > 0 && blocks(n, blocks(n, shares)) == shares);
}

template <class BFloat16Launch, class Float16Launch>
int by_dtype(const TubeletParams& p, BFloat16Launch bfloat16, Float16Launch float16) {
    return p.dtype == Element::kBFloat16 ? bfloat16() : float16();
}

}  // namespace

bool has_channels_last(const TubeletParams& p) { return p.C > 1 && p.video.stride_c == 1 && p.video.stride_x == p.C; }

int64_t pitch_of(const TubeletParams& p) { return static_cast<int64_t>(blocks(taps_of(p), 8)) * 8; }

bool needs_operand(const TubeletParams& p, bool backward) {
    const bool as_rows = taps_of(p) % 8 == 0 && reinterpret_cast<uintptr_t>(p.weight) % 16 == 0;
    return !as_rows || (!backward && (has_channels_last(p) || !Affine(p).common));
}

bool no_share_is_empty(const TubeletParams& p) {
    return none_is_empty(blocks(tubelets_of(p), kStep), p.splits) && none_is_empty(rows_of_group(p), p.strip_count);
}

int launch_tubelet_prepare(const TubeletParams& p, bool backward, void* stream) {
    const Affine affine(p);
    PrepareParams params;
    params.weight = p.weight, params.bias = p.bias, params.row = backward ? nullptr : p.row;
    params.operand = p.operand == p.weight ? nullptr : static_cast<char*>(p.operand);
    params.E = p.E, params.K = taps_of(p), params.pitch = static_cast<int32_t>(pitch_of(p));
    params.per_channel = Divisor(p.f * p.y * p.x);
    params.channels = Divisor(!backward && has_channels_last(p) ? p.C : 1);
    for (int32_t c = 0; c < kMostChannels; ++c) {
        params.scale[c] = backward || affine.common ? 1.f : static_cast<float>(affine.scale[c]);
        params.shift[c] = static_cast<float>(affine.shift[c]);
    }
    const auto kernel = p.dtype == Element::kBFloat16 ? parameter_row<BFloat16> : parameter_row<Float16>;
    return launch(kernel, blocks(p.E, kRowWarps), kRowThreads, 0, stream, params);
}

int launch_tubelet_forward(const TubeletParams& p, void* stream) {
    const Affine affine(p);
    ForwardParams params;
    params.places = places_of(p, p.video, has_channels_last(p)), params.normalisation = affine.on_load;
    params.tokens = tokens_of(p);
    params.weight = {static_cast<const char*>(p.operand), 2 * pitch_of(p), p.E, static_cast<int32_t>(pitch_of(p))};
    params.unit = static_cast<float>(affine.unit);
    params.row = p.row, params.position = p.position, params.class_token = p.class_token;
    params.out = static_cast<char*>(p.out), params.E = p.E, params.blocks_e = blocks(p.E, kTile);
    if (HopperForward plan; plan_hopper_forward(plan, params)) {
        return by_dtype(
            p, [&] { return launch_hopper_forward<BFloat16>(plan, p.video.type, stream); },
            [&] { return launch_hopper_forward<Float16>(plan, p.video.type, stream); });
    }
    return by_dtype(
        p, [&] { return launch_forward_products<BFloat16>(params, p.video.type, stream); },
        [&] { return launch_forward_products<Float16>(params, p.video.type, stream); });
}

int launch_tubelet_row_sums(const TubeletParams& p, void* stream) {
    RowSumsParams params;
    params.d_out = static_cast<const char*>(p.d_out), params.before = p.has_class ? 1 : 0;
    params.groups = p.per_frame ? p.B * p.T : p.B, params.rows = rows_of_group(p), params.E = p.E;
    params.rows_of_strip = blocks(params.rows, p.strip_count), params.blocks_e = blocks(p.E, kSumsWidth);
    params.d_position = p.d_position, params.d_class = p.d_class, params.strips = p.strips;
    const auto kernel = p.dtype == Element::kBFloat16 ? parameter_sums<BFloat16> : parameter_sums<Float16>;
    return launch(kernel, int64_t{p.strip_count} * params.blocks_e, kRowThreads, kSumsBytes, stream, params);
}

int launch_tubelet_weight_gradient(const TubeletParams& p, void* stream) {
    WeightGradientParams params;
    params.places = places_of(p, p.video, has_channels_last(p)), params.normalisation = Affine(p).on_load;
    params.d_out = gradient_rows(p);
    params.parts = p.parts, params.pitch = static_cast<int32_t>(pitch_of(p));
    params.steps_of_part = blocks(blocks(params.places.tubelets, kStep), p.splits);
    params.blocks_e = blocks(p.E, kTile), params.blocks_k = blocks(params.places.taps, kTile);
    if (HopperWeights plan; plan_hopper_weights(plan, params, p.splits)) {
        return by_dtype(
            p, [&] { return launch_hopper_weights<BFloat16>(plan, p.video.type, stream); },
            [&] { return launch_hopper_weights<Float16>(plan, p.video.type, stream); });
    }
    return by_dtype(
        p, [&] { return launch_weight_products<BFloat16>(params, p.video.type, p.splits, stream); },
        [&] { return launch_weight_products<Float16>(params, p.video.type, p.splits, stream); });
}

int launch_tubelet_finish(const TubeletParams& p, void* stream) {
    const Affine affine(p);
    FinishParams params;
    params.parts = p.parts, params.strips = p.strips, params.splits = p.splits, params.strip_count = p.strip_count;
    params.E = p.E, params.K = taps_of(p), params.pitch = static_cast<int32_t>(pitch_of(p));
    params.per_channel = Divisor(p.f * p.y * p.x), params.channels = Divisor(has_channels_last(p) ? p.C : 1);
    for (int32_t c = 0; c < kMostChannels; ++c) {
        params.scale[c] = static_cast<float>(affine.scale[c]), params.shift[c] = static_cast<float>(affine.shift[c]);
    }
    params.d_weight = {p.d_weight, params.K, false}, params.d_bias = p.d_bias;
    const auto kernel = p.dtype == Element::kBFloat16 ? parameter_gradients<BFloat16> : parameter_gradients<Float16>;
    return launch(kernel, p.E, kFinishThreads, 0, stream, params);
}

int launch_tubelet_video_gradient(const TubeletParams& p, void* stream) {
    const Video video = {p.d_video, p.video.type, p.d_video_b, p.d_video_c, p.d_video_f, p.d_video_y, 1};
    VideoGradientParams params;
    params.places = places_of(p, video, false), params.scales = Affine(p).on_load;
    params.d_out = gradient_rows(p);
    params.weight = {static_cast<const char*>(p.operand), 2 * pitch_of(p), p.E, static_cast<int32_t>(pitch_of(p))};
    params.type = p.video.type, params.blocks_k = blocks(params.places.taps, kTile);
    if (HopperVideo plan; plan_hopper_video(plan, params)) {
        return by_dtype(
            p, [&] { return launch_hopper_video<BFloat16>(plan, stream); },
            [&] { return launch_hopper_video<Float16>(plan, stream); });
    }
    return by_dtype(
        p, [&] { return launch_video_products<BFloat16>(params, stream); },
        [&] { return launch_video_products<Float16>(params, stream); });
}

}  // namespace vivit::cuda
