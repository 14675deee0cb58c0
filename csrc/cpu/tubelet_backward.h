// Tubelet embedding, backward. The gradient of the weight is one product over all tokens: each panel of taps is a unit
// of work with its own sums, so that no thread adds to another's. The video's is the forward's product turned around.
#pragma once

#include "gather.h"

namespace vivit::cpu::VIVIT_ISA {

template <class E, class Arithmetic>
class WeightGradient {
    static constexpr int64_t kPack = Arithmetic::kPack;
    static constexpr int64_t kTokens = 256;  // gathered at a time: with their sums they stay in the second-level cache

  public:
    explicit WeightGradient(const TubeletParams& p)
        : p_(p),
          pitch_(pitch_of(round_up<int64_t>(words<Arithmetic>(p.tokens), kLanes))),
          rows_(round_up<int64_t>(p.E, kPanel)) {}

    // The tokens' gradients, transposed: [rows][pitch].
    static int64_t shared_bytes(const TubeletParams& p) {
        const WeightGradient one(p);
        return 4 * one.rows_ * one.pitch_;
    }

    static int64_t pack_units(const TubeletParams& p) { return WeightGradient(p).rows_ / kPanel; }

    static void pack(const TubeletParams& p, int64_t first, int64_t end) {
        const WeightGradient one(p);
        for (int64_t i = first; i < end; ++i) one.pack_columns(i * kPanel);
    }

    static int64_t units(const TubeletParams& p) { return (p.K + kPanel - 1) / kPanel; }

    static void run(const TubeletParams& p, int64_t first, int64_t end) {
        WeightGradient one(p);
        carve(one);
        for (int64_t i = first; i < end; ++i) one.panel(i * kPanel);
    }

    void lay_out(Carver& carver) {
        runs_ = carver.take<Run>(kPanel);
        pixels_ = carver.take<uint32_t>(kTokens / kPack * kPanel);
        for (float*& row : row_) row = carver.take<float>(kPanel + kLanes);
        products_ = carver.take<float>(p_.E * kPanel);
    }

  private:
    uint32_t* packed() const { return static_cast<uint32_t*>(p_.shared); }

    void pack_columns(int64_t e) const {
        constexpr int64_t kVectors = kPanel / kLanes;
        LongSum sums[kVectors];
        const int64_t width = round_up<int64_t>(words<Arithmetic>(p_.tokens), kLanes);
        for (int64_t w = 0; w < width; w += kLanes) {
            for (int64_t v = 0; v < kVectors; ++v) {
                const int64_t column = e + v * kLanes;
                Words tile[kLanes];
                for (int64_t i = 0; i < kLanes; ++i) {
                    const int64_t token = (w + i) * kPack;
                    const Floats one = gradient(token, column), other = kPack > 1 ? gradient(token + 1, column) : one;
                    uint32_t pair[kLanes];
                    Arithmetic::store_pair(pair, one, other);
                    tile[i] = load<Words>(pair);
                    sums[v].add(kPack > 1 ? one + other : one);
                }
                transpose(tile);
                for (int64_t i = 0; i < kLanes; ++i) store(packed() + (column + i) * pitch_ + w, tile[i]);
            }
        }
        for (int64_t i = 0; i < smallest(kPanel, p_.E - e); ++i) {
            p_.sums[e + i] = static_cast<float>(sums[i / kLanes].lane(i % kLanes));
        }
    }

    VIVIT_INLINE Floats gradient(int64_t token, int64_t column) const {
        return token < p_.tokens ? load_some(token_row<E>(p_.rows, token) + column, p_.E - column) : Floats{};
    }

    void panel(int64_t k) {
        const int64_t columns = smallest(kPanel, p_.K - k), vectors = (columns + kLanes - 1) / kLanes;
        const int64_t runs = list_runs(p_.video, k, k + columns, runs_);
        for (int64_t i = 0; i < kPanel + kLanes; ++i) row_[0][i] = row_[1][i] = 0.f;
        for (int64_t token = 0; token < p_.tokens; token += kTokens) {
            const int64_t tokens = smallest(kTokens, p_.tokens - token), depth = words<Arithmetic>(tokens);
            for (int64_t i = 0; i < depth; ++i) gather_words(pixels_ + i * kPanel, token + i * kPack, k, runs);
            const uint32_t* gradients = packed() + token / kPack;
            if (token == 0) {
                product<Arithmetic, Walk::kRows, false, kTapChain<Arithmetic>>(products_, kPanel, gradients, pitch_,
                                                                               pixels_, kPanel, p_.E, vectors, depth);
            } else {
                product<Arithmetic, Walk::kRows, true, kTapChain<Arithmetic>>(products_, kPanel, gradients, pitch_,
                                                                              pixels_, kPanel, p_.E, vectors, depth);
            }
        }
        for (int64_t e = 0; e < p_.E; ++e) finish(e, k, columns);
    }

    // The panel's taps of a token, or of two as pairs.
    void gather_words(uint32_t* to, int64_t token, int64_t k, int64_t runs) {
        for (int64_t i = 0; i < kPack; ++i) {
            if (token + i < p_.tokens) {
                gather_row(row_[i], p_, token + i, runs_, runs, k);
            } else {
                for (int64_t j = 0; j < kPanel; ++j) row_[i][j] = 0.f;
            }
        }
        for (int64_t j = 0; j < kPanel; j += kLanes) {
            Arithmetic::store_pair(to + j, load<Floats>(row_[0] + j), load<Floats>(row_[kPack - 1] + j));
        }
    }

    void finish(int64_t e, int64_t k, int64_t columns) const {
        E* to = static_cast<E*>(p_.dweight) + e * p_.K + k;
        for (int64_t i = 0; i < columns; i += kLanes) {
            Floats x = load<Floats>(products_ + e * kPanel + i) * p_.factor;
            if (p_.scale != nullptr) x *= load<Floats>(p_.scale + k + i);
            if (p_.shift != nullptr) x += load<Floats>(p_.shift + k + i) * p_.sums[e];
            store_some(to + i, x, columns - i);
        }
    }

    const TubeletParams& p_;
    const int64_t pitch_, rows_;  // words from one row of gradients to the next; E in whole panels
    Run* runs_ = nullptr;
    uint32_t* pixels_ = nullptr;  // [kTokens / kPack][kPanel]
    float* row_[2] = {};          // taps of two tokens, and what a last run writes too much
    float* products_ = nullptr;   // [E][kPanel]
};

template <class E, class Arithmetic>
class VideoGradient {
    static constexpr int64_t kPack = Arithmetic::kPack;
    using Element = typename Arithmetic::Element;

  public:
    explicit VideoGradient(const TubeletParams& p)
        : p_(p), depth_(words<Arithmetic>(p.E)), pitch_(pitch_of(depth_)), panels_((p.K + kPanel - 1) / kPanel) {}

    // The weight [panels][depth][kPanel].
    static int64_t shared_bytes(const TubeletParams& p) {
        const VideoGradient one(p);
        return 4 * one.panels_ * kPanel * one.depth_;
    }

    static int64_t pack_units(const TubeletParams& p) { return VideoGradient(p).panels_; }

    static void pack(const TubeletParams& p, int64_t first, int64_t end) {
        const VideoGradient one(p);
        for (int64_t i = first; i < end; ++i) one.pack_panel(i);
    }

    static int64_t units(const TubeletParams& p) { return TokenBlocks(p.tokens).blocks; }

    static void run(const TubeletParams& p, int64_t first, int64_t end) {
        VideoGradient one(p);
        carve(one);
        const TokenBlocks blocks(p.tokens);
        for (int64_t i = first; i < end; ++i) one.block(blocks.first(i), blocks.first(i + 1));
    }

    void lay_out(Carver& carver) {
        const int64_t tokens = TokenBlocks(p_.tokens).most();
        runs_ = carver.take<Run>(kPanel);
        gradients_ = carver.take<uint32_t>(tokens * pitch_ + kLanes);
        products_ = carver.take<float>(tokens * kPanel);
    }

  private:
    uint32_t* packed(int64_t panel) const { return static_cast<uint32_t*>(p_.shared) + panel * kPanel * depth_; }

    void pack_panel(int64_t panel) const {
        const int64_t k = panel * kPanel;
        const E* weight = static_cast<const E*>(p_.weight) + k;
        uint32_t* to = packed(panel);
        for (int64_t e = 0; e < p_.E; e += kPack, to += kPanel) {
            const E* row = weight + e * p_.K;
            for (int64_t i = 0; i < kPanel; i += kLanes) {
                const int64_t left = p_.K - k - i;
                const Floats other = e + 1 < p_.E && kPack > 1 ? load_some(row + p_.K + i, left) : Floats{};
                Arithmetic::store_pair(to + i, load_some(row + i, left), other);
            }
        }
    }

    void block(int64_t first, int64_t end) {
        const int64_t tokens = end - first;
        for (int64_t i = 0; i < tokens; ++i) {
            Element* to = reinterpret_cast<Element*>(gradients_ + i * pitch_);
            const E* row = token_row<E>(p_.rows, first + i);
            for (int64_t e = 0; e < p_.E; e += kLanes) store_floats(to + e, load_some(row + e, p_.E - e));
            for (int64_t e = p_.E; e < depth_ * kPack; ++e) to[e] = Element{};
        }
        for (int64_t panel = 0; panel < panels_; ++panel) {
            const int64_t k = panel * kPanel, columns = smallest(kPanel, p_.K - k);
            product<Arithmetic, Walk::kRows, false, kTapChain<Arithmetic>>(products_, kPanel, gradients_, pitch_,
                                                                           packed(panel), kPanel, tokens,
                                                                           (columns + kLanes - 1) / kLanes, depth_);
            const int64_t runs = list_runs(p_.video, k, k + columns, runs_);
            for (int64_t i = 0; i < tokens; ++i) scatter(first + i, products_ + i * kPanel, k, runs);
        }
    }

    void scatter(int64_t token, const float* products, int64_t k, int64_t runs) const {
        with_pixels(p_.video, token, [&](auto* tubelet) {
            if constexpr (sizeof(*tubelet) > 1) {  // no gradient in uint8
                for (int64_t i = 0; i < runs; ++i) {
                    const Run run = runs_[i];
                    for (int64_t done = 0; done < run.count; done += kLanes) {
                        Floats x = load_some(products + run.tap - k + done, run.count - done);
                        if (p_.scale != nullptr) x *= load<Floats>(p_.scale + run.tap + done);
                        store_some(tubelet + run.offset + done, x, run.count - done);
                    }
                }
            }
        });
    }

    const TubeletParams& p_;
    const int64_t depth_, pitch_, panels_;  // E in words; words from one token's to the next one's; of taps
    Run* runs_ = nullptr;
    uint32_t* gradients_ = nullptr;  // [tokens of a block][pitch]
    float* products_ = nullptr;      // [tokens of a block][kPanel]
};

}  // namespace vivit::cpu::VIVIT_ISA
