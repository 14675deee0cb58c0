// A linear layer in vectors, with sums in float32: for processors whose libraries have no product of the dtype, or a
// slower one. The weight is packed once for all threads; then each block of rows is packed, part by part of the
// contraction, and multiplied panel by panel: a part of a block and of a panel stay in the second-level cache.
#pragma once

#include "gather.h"
#include "gelu.h"
#include "pack.h"

namespace vivit::cpu::VIVIT_ISA {

template <class E, class Arithmetic>
class LinearInVectors {
    using Pack = Packing<E, Arithmetic>;
    static constexpr int64_t kRows = 96;           // of a block: a multiple of the rows that are multiplied at once
    static constexpr int64_t kGroup = 4 * kPanel;  // columns of a unit of work, so that few rows are many units, too
    static constexpr int64_t kWords = 768;         // of a part, at most

  public:
    explicit LinearInVectors(const LinearParams& p)
        : p_(p),
          words_(Pack::words(p.K)),
          parts_((words_ + kWords - 1) / kWords),
          part_words_(smallest(words_, round_up<int64_t>((words_ + parts_ - 1) / parts_, kLanes))),
          panels_((p.N + kPanel - 1) / kPanel),
          groups_((p.N + kGroup - 1) / kGroup) {}

    // The weight, [panels][words][kPanel].
    static int64_t shared_bytes(const LinearParams& p) {
        const LinearInVectors one(p);
        return 4 * one.panels_ * one.words_ * kPanel;
    }

    static int64_t pack_units(const LinearParams& p) { return LinearInVectors(p).panels_; }

    static void pack(const LinearParams& p, int64_t first, int64_t end) {
        const LinearInVectors one(p);
        for (int64_t panel = first; panel < end; ++panel) one.pack_panel(panel);
    }

    static int64_t units(const LinearParams& p) { return (p.M + kRows - 1) / kRows * LinearInVectors(p).groups_; }

    static void run(const LinearParams& p, int64_t first, int64_t end) {
        LinearInVectors one(p);
        carve(one);
        int64_t packed = -1;  // the block whose rows are packed in whole
        for (int64_t unit = first; unit < end; ++unit) {
            const int64_t block = unit / one.groups_;
            one.multiply(block, unit % one.groups_, packed == block);
            packed = one.parts_ == 1 ? block : -1;
        }
    }

    void lay_out(Carver& carver) {
        rows_ = carver.take<uint32_t>(kRows * part_words_);
        sums_ = carver.take<float>(kRows * kGroup);
    }

  private:
    static const E* at(const Matrix& of, int64_t i) { return static_cast<const E*>(of.data) + i * of.stride; }

    uint32_t* packed(int64_t panel) const { return static_cast<uint32_t*>(p_.shared) + panel * words_ * kPanel; }

    void pack_panel(int64_t panel) const {
        const int64_t n = panel * kPanel, columns = smallest(kPanel, p_.N - n);
        if (p_.weight.across) {
            Pack::paired(packed(panel), {at(p_.weight, 0) + n, p_.weight.stride}, 0, p_.K, kPanel, columns);
        } else {
            Pack::transposed(packed(panel), {at(p_.weight, n), p_.weight.stride}, 0, columns, kPanel, p_.K);
        }
    }

    // Of a part of the contraction: [rows][words], or [words][kRows] of rows that lie across, which need no turning.
    void pack_rows(int64_t first, int64_t rows, int64_t word, int64_t words) const {
        const int64_t k = word * Pack::kPack, count = smallest(words * Pack::kPack, p_.K - k);
        if (p_.x.across) {
            Pack::paired(rows_, {at(p_.x, k) + first, p_.x.stride}, 0, count, kRows, rows);
        } else {
            Pack::straight(rows_, {at(p_.x, first) + k, p_.x.stride}, 0, rows, count);
        }
    }

    void multiply(int64_t block, int64_t group, bool packed) {
        const int64_t first = block * kRows, rows = smallest(kRows, p_.M - first);
        for (int64_t word = 0; word < words_; word += part_words_) {
            const int64_t words = smallest(part_words_, words_ - word);
            if (!packed) pack_rows(first, rows, word, words);
            word == 0 ? add<false>(group, rows, word, words) : add<true>(group, rows, word, words);
        }
        const auto finish_with = [&](auto activation) {
            finish<decltype(activation)::kValue>(first, rows, group * kGroup);
        };
        with_activation(p_.activation, finish_with);
    }

    // sums [rows][kGroup] = or += the packed rows * a part of each panel of the group.
    template <bool kAdd>
    void add(int64_t group, int64_t rows, int64_t word, int64_t words) {
        constexpr int64_t kChain = kTapChain<Arithmetic>;
        for (int64_t n = group * kGroup; n < smallest((group + 1) * kGroup, p_.N); n += kPanel) {
            const uint32_t* panel = packed(n / kPanel) + word * kPanel;
            float* to = sums_ + n - group * kGroup;
            const int64_t vectors = (smallest(kPanel, p_.N - n) + kLanes - 1) / kLanes;
            if (p_.x.across) {
                product<Arithmetic, Walk::kColumns, kAdd, kChain>(to, kGroup, rows_, kRows, panel, kPanel, rows,
                                                                  vectors, words);
            } else {
                product<Arithmetic, Walk::kRows, kAdd, kChain>(to, kGroup, rows_, words, panel, kPanel, rows, vectors,
                                                               words);
            }
        }
    }

    // Rows from `first` and columns from n on of the result.
    template <Activation kActivation>
    void finish(int64_t first, int64_t rows, int64_t n) const {
        const int64_t columns = smallest(kGroup, p_.N - n);
        for (int64_t i = 0; i < rows; ++i) {
            E* to = static_cast<E*>(p_.y) + (first + i) * p_.y_stride + n;
            for (int64_t v = 0; v < columns; v += kLanes) {
                Floats x = load<Floats>(sums_ + i * kGroup + v);
                if (p_.bias != nullptr) x += load_some(static_cast<const E*>(p_.bias) + n + v, columns - v);
                store_some(to + v, activated<kActivation>(x), columns - v);
            }
        }
    }

    const LinearParams& p_;
    const int64_t words_, parts_, part_words_;  // of the contraction
    const int64_t panels_, groups_;             // of columns
    uint32_t* rows_ = nullptr;                  // of a block, a part of their words
    float* sums_ = nullptr;                     // [kRows][kGroup]
};

}  // namespace vivit::cpu::VIVIT_ISA
