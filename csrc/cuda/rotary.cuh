// Rotary position embedding: pairs (i, i + D/2) of a row turned by the angle of its token.
#pragma once

#include "on_grid.cuh"

namespace vivit::cuda {

// A quarter of a turn's work: channels e, ..., e + 3 of a row, e a multiple of 4, whose partners are D/2 away. D/2 is a
// multiple of 4, so that both fours are whole.
struct Four {
    int32_t partner, angle;  // first channel of the partners; first place in the row of a table
    float sign;              // of the partner's part

    VIVIT_DEVICE Four(int32_t e, int32_t D)
        : partner(e < D / 2 ? e + D / 2 : e - D / 2), angle(e < D / 2 ? e : e - D / 2), sign(e < D / 2 ? -1.f : 1.f) {}
};

// The row of the tables for a token of the clip.
VIVIT_DEVICE int64_t angles_of(const AttentionOptions& p, int64_t token) { return token * (p.D / 2); }

// One channel turned.
VIVIT_DEVICE float turned(const AttentionOptions& p, int64_t at, float x, float partner, float sign) {
    return x * load_one(p.cos + at) + partner * sign * load_one(p.sin + at);
}

// 16 bytes of a row, channels 8 chunk, ..., as they are loaded, turned: partners are read where they lie in memory.
template <class T>
VIVIT_DEVICE uint4 turned_chunk(const AttentionOptions& p, int64_t token, const char* row, int32_t chunk, uint4 x) {
    uint32_t word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Four four(8 * chunk + 4 * half, p.D);
        const uint4 holds = load_16(row + four.partner / 8 * 16, true);
        const bool second = four.partner % 8 != 0;
        const uint32_t other[2] = {second ? holds.z : holds.x, second ? holds.w : holds.y};
        const int64_t at = angles_of(p, token) + four.angle;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float2 own = unpacked<T>(word[2 * half + i]), partner = unpacked<T>(other[i]);
            word[2 * half + i] = packed<T>(turned(p, at + 2 * i, own.x, partner.x, four.sign),
                                           turned(p, at + 2 * i + 1, own.y, partner.y, four.sign));
        }
    }
    return {word[0], word[1], word[2], word[3]};
}

// Four neighbouring numbers of a row into memory.
template <class T>
VIVIT_DEVICE void store_numbers(char* to, const float (&x)[4]) {
    store_8(to, {packed<T>(x[0], x[1]), packed<T>(x[2], x[3])});
}
template <>
VIVIT_DEVICE void store_numbers<float>(char* to, const float (&x)[4]) {
    store_16(to, {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])});
}

// The gradient of kRows rows that were turned, turned back, times `scale`, into memory. They lie in a warp's scratch,
// at a pitch of `pitch` floats, whose lanes have to meet before. place(row) tells `there`, `token` (of the clip) and
// `to` of it.
template <class T, int kRows = 16, class Place>
VIVIT_DEVICE void store_turned_back(const AttentionOptions& p, const float* scratch, int32_t pitch, float scale,
                                    const Place& place) {
    const int32_t half = p.D / 2, fours = half / 4;
    for (int32_t i = static_cast<int32_t>(threadIdx.x) % 32; i < kRows * fours; i += 32) {
        const int32_t row = i / fours, e = i % fours * 4;
        const auto at = place(row);
        if (!at.there) continue;
        float first[4], second[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float x = scratch[row * pitch + e + j] * scale, y = scratch[row * pitch + half + e + j] * scale;
            const int64_t angle = angles_of(p, at.token) + e + j;
            const float c = load_one(p.cos + angle), s = load_one(p.sin + angle);
            first[j] = x * c + y * s, second[j] = y * c - x * s;
        }
        constexpr int32_t kBytes = sizeof(T);
        store_numbers<T>(at.to + kBytes * e, first);
        store_numbers<T>(at.to + kBytes * (half + e), second);
    }
}

struct TurnedRow {
    bool there;
    int64_t token;
    char* to;
};

}  // namespace vivit::cuda
