// Pixels of tubelets as numbers: which runs of neighbours a tubelet has, and their taps in a row, converted.
#pragma once

#include "arithmetic.h"
#include "scratch.h"
#include "tubelet.h"

namespace vivit::cpu::VIVIT_ISA {

constexpr int64_t kPanel = 64;  // columns of a product at a time: four vectors of AVX-512, as wide as a tile

// Products in one chain of roundings, where there are chains: sums of 500 to 4,000 terms err as little as in chains of
// 16 (a chain's error and that of the sum over chains add up), and come 20 % sooner (EPYC Zen 4, float32).
template <class Arithmetic>
constexpr int64_t kTapChain = Arithmetic::kChain < 128 ? 128 : Arithmetic::kChain;

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

// uint8 counts as 128 less: exact in bfloat16, and small, so that little is lost to rounding.
template <class P>
VIVIT_INLINE Floats load_pixels(const P* from) {
    if constexpr (sizeof(P) > 1) {
        return load_floats(from);
    } else {
#if defined(__AVX512F__)
        const Floats x = (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bits<__m128i>(load<Bytes>(from))));
#elif defined(__AVX2__)
        const Floats x =
            (Floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
        const Floats x = __builtin_convertvector(load<Bytes>(from), Floats);
#endif
        return x - 128.f;
    }
}

// The first `count` alone, the others as if they were 0.
template <class P>
VIVIT_INLINE Floats load_pixels(const P* from, int64_t count) {
    P copy[kLanes] = {};
    __builtin_memcpy(copy, from, sizeof(P) * static_cast<uint64_t>(count));
    return load_pixels(static_cast<const P*>(copy));
}

struct Run {
    int64_t offset, tap, count;
};

// The runs of taps [first, end) of a tubelet; those at the ends may be cut. How many there are.
inline int64_t list_runs(const Tubelets& video, int64_t first, int64_t end, Run* runs) {
    int64_t found = 0, tap = 0;
    const int64_t* n = video.loops;
    for (int64_t a = 0; a < n[0]; ++a) {
        for (int64_t b = 0; b < n[1]; ++b) {
            for (int64_t c = 0; c < n[2]; ++c) {
                for (int64_t d = 0; d < n[3]; ++d, tap += video.run) {
                    const int64_t from = tap < first ? first : tap, to = smallest(tap + video.run, end);
                    if (from >= to) continue;
                    const int64_t* stride = video.loop_stride;
                    const int64_t offset = a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3];
                    runs[found++] = {offset + from - tap, from, to - from};
                }
            }
        }
    }
    return found;
}

// Calls work(pointer to the tubelet's first pixel) with the pixels' type.
template <class Work>
VIVIT_INLINE void with_pixels(const Tubelets& video, int64_t token, Work work) {
    const int64_t column = token % video.size[3], row = token / video.size[3] % video.size[2];
    const int64_t frame = token / video.size[3] / video.size[2], t = frame % video.size[1], b = frame / video.size[1];
    const int64_t* stride = video.stride;
    const int64_t offset = b * stride[0] + t * stride[1] + row * stride[2] + column * stride[3];
    if (video.pixel == Pixel::kUInt8) return work(static_cast<uint8_t*>(video.data) + offset);
    if (video.pixel == Pixel::kFloat32) return work(static_cast<float*>(video.data) + offset);
    if (video.pixel == Pixel::kBFloat16) return work(static_cast<BFloat16*>(video.data) + offset);
    return work(static_cast<Float16*>(video.data) + offset);
}

// to[tap - first] of the listed runs, in order: a run's last vector may write over the place of the next one, and up to
// kLanes elements behind the last.
template <class Element>
void gather_row(Element* to, const TubeletParams& p, int64_t token, const Run* runs, int64_t count, int64_t first) {
    with_pixels(p.video, token, [&](const auto* tubelet) {
        const auto* end = static_cast<decltype(tubelet)>(p.video.end);
        for (int64_t i = 0; i < count; ++i) {
            const Run run = runs[i];
            const auto* from = tubelet + run.offset;
            Element* at = to + run.tap - first;
            for (int64_t done = 0; done < run.count; done += kLanes) {
                const bool whole = done + kLanes <= run.count || end - (from + done) >= kLanes;
                Floats x = whole ? load_pixels(from + done) : load_pixels(from + done, run.count - done);
                if (p.pixel_scale != nullptr) {
                    const int64_t tap = run.tap + done;
                    x = x * load<Floats>(p.pixel_scale + tap) + load<Floats>(p.pixel_shift + tap);
                }
                store_floats(at + done, x);
            }
        }
    });
}

template <class E>
VIVIT_INLINE E* token_row(const TokenRows& rows, int64_t token) {
    return static_cast<E*>(rows.data) + token / rows.group * rows.stride_group + token % rows.group * rows.stride;
}

// Elements from `from` on as far as `count` goes, which may be none or more than a vector has; zeros behind.
template <class E>
VIVIT_INLINE Floats load_some(const E* from, int64_t count) {
    if (count >= kLanes) return load_floats(from);
    return count > 0 ? load_floats(from, static_cast<int>(count)) : Floats{};
}

template <class E>
VIVIT_INLINE void store_some(E* to, Floats x, int64_t count) {
    if (count >= kLanes)
        store_floats(to, x);
    else if (count > 0)
        store_floats(to, x, static_cast<int>(count));
}

// Tokens in blocks as even as can be, whose rows of words stay in the second-level cache beside a panel.
struct TokenBlocks {
    int64_t tokens, blocks;

    explicit TokenBlocks(int64_t all) : tokens(all), blocks(round_up<int64_t>((all + 111) / 112, 4)) {}
    int64_t first(int64_t block) const { return tokens * block / blocks; }
    int64_t most() const { return (tokens + blocks - 1) / blocks; }
};

template <class Arithmetic>
VIVIT_INLINE int64_t words(int64_t n) {
    return round_up((n + Arithmetic::kPack - 1) / Arithmetic::kPack, Arithmetic::kStep);
}

// Words from one row to the next: rows that lie a multiple of 1 KB apart would share few sets of the first-level cache.
VIVIT_INLINE int64_t pitch_of(int64_t width) { return width % 256 == 0 ? width + 16 : width; }

// Sums of many floats, lane by lane: in float32 over short chains, in float64 over these.
class LongSum {
  public:
    VIVIT_INLINE void add(Floats x) {
        part_ += x;
        if (++terms_ == 16) fold();
    }
    VIVIT_INLINE double lane(int64_t i) {
        fold();
        return total_[i];
    }

  private:
    VIVIT_INLINE void fold() {
        for (int i = 0; i < kLanes; ++i) total_[i] += static_cast<double>(part_[i]);
        part_ = Floats{}, terms_ = 0;
    }

    Floats part_ = {};
    int terms_ = 0;
    double total_[kLanes] = {};
};

}  // namespace vivit::cpu::VIVIT_ISA
