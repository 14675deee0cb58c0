// What a caller of the CUDA kernels of tubelet_embedding fills in. Torch-free; tubelet/bindings.cpp and the host
// simulator include it.
#pragma once

#include <cstdint>

namespace vivit::cuda {

enum class Element : int32_t { kUint8 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat32 = 3 };

constexpr int kMostChannels = 8;

// A video [B, C, F, Y, X]; strides in elements, any.
struct Video {
    void* data = nullptr;
    Element type = Element::kUint8;
    int64_t stride_b = 0, stride_c = 0, stride_f = 0, stride_y = 0, stride_x = 0;
};

// A parameter or its gradient, rows of E numbers side by side at multiples of 16 bytes, in float32 or in the type of
// the products; or none.
struct Table {
    void* data = nullptr;
    int64_t stride = 0;  // from a row to the next, in numbers
    bool is_float = false;
};

// Tubelets of f x y x x pixels, T of them along time, `rows` down and `columns` across, become tokens of E channels.
// What fills no tubelet is left alone. K = C f y x taps of a tubelet, in the order (c, f, y, x), or in that of a video
// whose channels lie side by side, (f, y, x, c): then taps that are neighbours in memory are neighbours in the product.
struct TubeletParams {
    int32_t B = 0, C = 0, T = 0, rows = 0, columns = 0;
    int32_t f = 0, y = 0, x = 0;
    int32_t E = 0;                       // a multiple of 8
    Element dtype = Element::kBFloat16;  // of the products, the weight, the tokens: kBFloat16 or kFloat16
    Video video;                         // of kUint8, dtype or kFloat32
    double scale[kMostChannels] = {};    // a pixel u of channel c counts as scale[c] u + shift[c]
    double shift[kMostChannels] = {};
    bool per_frame = false;        // tokens are [B, T, S, E], else [B, T S, E]; S = rows columns
    bool has_class = false;        // one more row before those of a clip or frame
    const void* weight = nullptr;  // [E, C, f, y, x], contiguous
    void* operand = nullptr;       // [E, pitch_of], what the products read: the weight, or what is made of it
    Table bias;                    // [1, E]
    float* row = nullptr;          // [E] or none: what is added to every token: bias and W shift
    Table position;                // [tokens and class row, E] or none
    Table class_token;             // [1, E] if has_class
    void* out = nullptr;           // [B (, T), tokens and class row, E], contiguous
    // Backward only. Its sums over tokens are made of parts, each in one order: the same bits in every run.
    const void* d_out = nullptr;  // as out
    float* parts = nullptr;       // [splits, E, pitch_of]: the weight's gradient, of a share of the tokens each
    int32_t splits = 0;
    float* strips = nullptr;  // [strip_count, E]: d_out summed over tokens, of some rows each; or none
    int32_t strip_count = 0;
    void* d_weight = nullptr;           // as weight
    Table d_bias, d_position, d_class;  // contiguous
    void* d_video = nullptr;            // [B, C, F, Y, X] by strides d_video_.., of the video's type
    int64_t d_video_b = 0, d_video_c = 0, d_video_f = 0, d_video_y = 0;  // rows of pixels lie side by side
};

// Whether the channels of a video lie side by side in every pixel, so that taps come in the order (f, y, x, c).
bool has_channels_last(const TubeletParams& params);
// Numbers from a row of `operand` to the next: K, and zeros up to a multiple of 8.
int64_t pitch_of(const TubeletParams& params);
// Whether products cannot read the weight as it is: taps in another order, rows that do not begin at multiples of 16
// bytes, or channels with scales of their own. Backward asks for the gradient of the video, in the weight's own order.
bool needs_operand(const TubeletParams& params, bool backward);

// Whether every part has a step of tubelets and every strip a row: the kernels do not look.
bool no_share_is_empty(const TubeletParams& params);

// One launch each, on `stream` (a cudaStream_t) of the current device. Return a cudaError_t, 0 for success.
int launch_tubelet_prepare(const TubeletParams& params, bool backward, void* stream);  // writes row, operand
// Writes out. On sm_90 by Hopper's own instructions (tubelet_hopper.cuh), of the calls that tubelet_hopper_launch.cuh
// plans: pairs of pixels side by side, 128 channels and more; all others by the kernels of sm_80.
int launch_tubelet_forward(const TubeletParams& params, void* stream);
int launch_tubelet_row_sums(const TubeletParams& params, void* stream);  // d_position, d_class, strips
// Writes parts. On sm_90 by Hopper's own instructions (tubelet_hopper_weights.cuh), of the calls that
// tubelet_hopper_weights_launch.cuh plans.
int launch_tubelet_weight_gradient(const TubeletParams& params, void* stream);
int launch_tubelet_finish(const TubeletParams& params, void* stream);  // writes d_weight, d_bias
// Writes d_video; on sm_90 of 128 channels and more by Hopper's own instructions (tubelet_hopper_video.cuh).
int launch_tubelet_video_gradient(const TubeletParams& params, void* stream);

}  // namespace vivit::cuda
