// The CPU kernels for AMX: attention in bfloat16 whose sequences fill tiles, tubelets in bfloat16 forward, and linear
// layers in bfloat16; what else there is, avx512_bf16 does. The build compiles this file with AMX's flags where the
// compiler knows them; else it has no kernels, and no name.
#define VIVIT_ISA avx512_amx
#include "attention.h"
#include "linear.h"

#if defined(__AMX_BF16__)
#include "backward.h"
#include "forward.h"
#include "linear_in_tiles.h"
#include "tubelet_forward.h"

namespace vivit::cpu {

namespace avx512_bf16 {
extern const AttentionKernels kAttention;
extern const TubeletKernels kTubelets;
extern const LinearWork kLinear;
}  // namespace avx512_bf16

namespace avx512_amx {
namespace {

// One core of an Intel Xeon, forward, 64 heads of 64: sequences of 16 tokens take as long in tiles as in vectors, of 17
// 140 and 180 us, of 32 100 and 240, of 64 310 and 950.
constexpr int64_t kFewestQueries = 17, kFewestKeys = 17;

bool fills_tiles(const AttentionParams& p, Axis axis) {
    const AxisSize size = size_of(p, axis);
    return p.dtype == DType::kBFloat16 && size.N >= kFewestQueries && size.N_k >= kFewestKeys;
}

template <template <class, class> class Kernel>
struct TileEntry {
    using Type = Kernel<BFloat16, InTiles>;

    static int64_t units(const AttentionParams& p, Axis axis, int64_t (*other)(const AttentionParams&, Axis)) {
        return fills_tiles(p, axis) ? Type(p, axis).units() : other(p, axis);
    }
    static void run(const AttentionParams& p, Axis axis, int64_t first, int64_t end,
                    void (*other)(const AttentionParams&, Axis, int64_t, int64_t)) {
        if (!fills_tiles(p, axis)) return other(p, axis, first, end);
        const WithTiles here;
        Type(p, axis).run(first, end);
    }
};

int64_t forward_units(const AttentionParams& p, Axis axis) {
    return TileEntry<Forward>::units(p, axis, avx512_bf16::kAttention.forward_units);
}

void forward(const AttentionParams& p, Axis axis, int64_t first, int64_t end) {
    TileEntry<Forward>::run(p, axis, first, end, avx512_bf16::kAttention.forward);
}

int64_t backward_units(const AttentionParams& p, Axis axis) {
    return TileEntry<Backward>::units(p, axis, avx512_bf16::kAttention.backward_units);
}

void backward(const AttentionParams& p, Axis axis, int64_t first, int64_t end) {
    TileEntry<Backward>::run(p, axis, first, end, avx512_bf16::kAttention.backward);
}

using Tubelet = TubeletForward<BFloat16, InTiles>;

bool in_tiles(const TubeletParams& p) { return p.dtype == DType::kBFloat16; }

int64_t tubelet_bytes(const TubeletParams& p) {
    return in_tiles(p) ? Tubelet::shared_bytes(p) : avx512_bf16::kTubelets.forward.shared_bytes(p);
}

int64_t tubelet_panels(const TubeletParams& p) {
    return in_tiles(p) ? Tubelet::pack_units(p) : avx512_bf16::kTubelets.forward.units[0](p);
}

void tubelet_pack(const TubeletParams& p, int64_t first, int64_t end) {
    in_tiles(p) ? Tubelet::pack(p, first, end) : avx512_bf16::kTubelets.forward.run[0](p, first, end);
}

int64_t tubelet_blocks(const TubeletParams& p) {
    return in_tiles(p) ? Tubelet::units(p) : avx512_bf16::kTubelets.forward.units[1](p);
}

void tubelets(const TubeletParams& p, int64_t first, int64_t end) {
    if (!in_tiles(p)) return avx512_bf16::kTubelets.forward.run[1](p, first, end);
    const WithTiles here;
    Tubelet::run(p, first, end);
}

bool in_tiles(const LinearParams& p) { return p.dtype == DType::kBFloat16 && !p.x.across && !p.weight.across; }

int64_t linear_bytes(const LinearParams& p) {
    return in_tiles(p) ? LinearInTiles::shared_bytes(p) : avx512_bf16::kLinear.shared_bytes(p);
}

int64_t linear_panels(const LinearParams& p) {
    return in_tiles(p) ? LinearInTiles::pack_units(p) : avx512_bf16::kLinear.units[0](p);
}

void linear_pack(const LinearParams& p, int64_t first, int64_t end) {
    in_tiles(p) ? LinearInTiles::pack(p, first, end) : avx512_bf16::kLinear.run[0](p, first, end);
}

int64_t linear_blocks(const LinearParams& p) {
    return in_tiles(p) ? LinearInTiles::units(p) : avx512_bf16::kLinear.units[1](p);
}

void linear_rows(const LinearParams& p, int64_t first, int64_t end) {
    in_tiles(p) ? LinearInTiles::run(p, first, end) : avx512_bf16::kLinear.run[1](p, first, end);
}

}  // namespace

extern const TubeletWork kTubeletForward;
const TubeletWork kTubeletForward = {tubelet_bytes, {tubelet_panels, tubelet_blocks}, {tubelet_pack, tubelets}};

extern const AttentionKernels kAttention;
const AttentionKernels kAttention = {"avx512_amx", forward_units, forward, backward_units, backward};

extern const LinearWork kLinear;
const LinearWork kLinear = {linear_bytes, {linear_panels, linear_blocks}, {linear_pack, linear_rows}};

}  // namespace avx512_amx
}  // namespace vivit::cpu

#else

namespace vivit::cpu::avx512_amx {

extern const AttentionKernels kAttention;
const AttentionKernels kAttention = {nullptr, nullptr, nullptr, nullptr, nullptr};

extern const TubeletWork kTubeletForward;
const TubeletWork kTubeletForward = {nullptr, {nullptr, nullptr}, {nullptr, nullptr}};

extern const LinearWork kLinear;
const LinearWork kLinear = {nullptr, {nullptr, nullptr}, {nullptr, nullptr}};

}  // namespace vivit::cpu::avx512_amx

#endif
