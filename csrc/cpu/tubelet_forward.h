// Tubelet embedding, forward: the weight is packed once for all threads; then each block of tokens is gathered into the
// cache, multiplied panel by panel, and its rows are written where they belong, bias and position added.
#pragma once

#include "gather.h"
#include "tiles.h"

namespace vivit::cpu::VIVIT_ISA {

template <class E, class Arithmetic>
class TubeletForward {
    using Element = typename Arithmetic::Element;

  public:
    explicit TubeletForward(const TubeletParams& p)
        : p_(p), depth_(words<Arithmetic>(p.K)), pitch_(pitch_of(depth_)), panels_((p.E + kPanel - 1) / kPanel) {}

    // The row that is added to every token [panels * kPanel], and the weight [panels][depth][kPanel].
    static int64_t shared_bytes(const TubeletParams& p) {
        const TubeletForward one(p);
        return 4 * one.panels_ * kPanel * (one.depth_ + 1);
    }

    static int64_t pack_units(const TubeletParams& p) { return TubeletForward(p).panels_; }

    static void pack(const TubeletParams& p, int64_t first, int64_t end) {
        const TubeletForward one(p);
        for (int64_t panel = first; panel < end; ++panel) {
            for (int64_t column = 0; column < kPanel; column += kLanes) one.pack_rows(panel, column);
        }
    }

    static int64_t units(const TubeletParams& p) { return TokenBlocks(p.tokens).blocks; }

    static void run(const TubeletParams& p, int64_t first, int64_t end) {
        TubeletForward one(p);
        carve(one);
        const int64_t runs = list_runs(p.video, 0, p.K, one.runs_);
        const TokenBlocks blocks(p.tokens);
        for (int64_t i = first; i < end; ++i) one.block(blocks.first(i), blocks.first(i + 1), runs);
    }

    void lay_out(Carver& carver) {
        const int64_t tokens = tile_rows<Arithmetic>(TokenBlocks(p_.tokens).most());
        runs_ = carver.take<Run>(p_.K);
        pixels_ = carver.take<uint32_t>(tokens * pitch_ + kLanes);
        products_ = carver.take<float>(tokens * kPanel);
    }

  private:
    float* row_of_all() const { return static_cast<float*>(p_.shared); }
    uint32_t* packed(int64_t panel) const {
        return static_cast<uint32_t*>(p_.shared) + kPanel * (panels_ + panel * depth_);
    }

    // kLanes rows of the weight become columns.
    void pack_rows(int64_t panel, int64_t column) const {
        const int64_t e = panel * kPanel + column;
        const E* weight = static_cast<const E*>(p_.weight) + e * p_.K;
        uint32_t* to = packed(panel) + column;
        LongSum shifts;
        for (int64_t k = 0; k < p_.K; k += kLanes) {
            Words tile[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) {
                tile[i] = bits<Words>(e + i < p_.E ? load_some(weight + i * p_.K + k, p_.K - k) : Floats{});
            }
            transpose(tile);
            const int64_t here = smallest<int64_t>(kLanes, p_.K - k);
            if (p_.shift != nullptr) {
                for (int64_t i = 0; i < here; ++i) shifts.add(bits<Floats>(tile[i]) * p_.shift[k + i]);
            }
            if (p_.scale != nullptr) {
                for (int64_t i = 0; i < here; ++i) tile[i] = bits<Words>(bits<Floats>(tile[i]) * p_.scale[k + i]);
            }
            for (int64_t i = 0; i < here; i += Arithmetic::kPack, to += kPanel) {  // rows behind the last are zeros
                Arithmetic::store_pair(to, bits<Floats>(tile[i]), bits<Floats>(tile[i + Arithmetic::kPack - 1]));
            }
        }
        for (const uint32_t* end = packed(panel + 1) + column; to < end; to += kPanel) store(to, Words{});
        for (int64_t i = 0; i < kLanes; ++i) {
            const double bias = p_.bias != nullptr && e + i < p_.E ? static_cast<double>(p_.bias[e + i]) : 0.0;
            row_of_all()[e + i] = static_cast<float>(bias + shifts.lane(i));
        }
    }

    void block(int64_t first, int64_t end, int64_t runs) {
        const int64_t tokens = end - first;
        for (int64_t i = 0; i < tokens; ++i) {
            Element* to = reinterpret_cast<Element*>(pixels_ + i * pitch_);
            gather_row(to, p_, first + i, runs_, runs, 0);
            for (int64_t k = p_.K; k < depth_ * Arithmetic::kPack; ++k) to[k] = Element{};
        }
        for (int64_t panel = 0; panel < panels_; ++panel) {
            const int64_t columns = smallest(kPanel, p_.E - panel * kPanel);
            product_of_rows<Arithmetic, false, kTapChain<Arithmetic>>(products_, kPanel, pixels_, pitch_, packed(panel),
                                                                      kPanel, tokens, (columns + kLanes - 1) / kLanes,
                                                                      depth_);
            for (int64_t i = 0; i < tokens; ++i) finish(first + i, products_ + i * kPanel, panel * kPanel, columns);
        }
    }

    void finish(int64_t token, const float* products, int64_t e, int64_t columns) const {
        E* to = token_row<E>(p_.rows, token) + e;
        const int64_t place = token % p_.rows.group * p_.position_stride + e;
        for (int64_t i = 0; i < columns; i += kLanes) {
            Floats table = load<Floats>(row_of_all() + e + i);
            if (p_.position != nullptr) {
                table += p_.position_is_float
                             ? load_some(static_cast<const float*>(p_.position) + place + i, columns - i)
                             : load_some(static_cast<const E*>(p_.position) + place + i, columns - i);
            }
            store_some(to + i, load<Floats>(products + i) * p_.factor + table, columns - i);
        }
    }

    const TubeletParams& p_;
    const int64_t depth_, pitch_, panels_;  // K in words; words from one token's to the next one's; of columns
    Run* runs_ = nullptr;
    uint32_t* pixels_ = nullptr;  // [tokens of a block][pitch]
    float* products_ = nullptr;   // [tokens of a block][kPanel]
};

}  // namespace vivit::cpu::VIVIT_ISA
