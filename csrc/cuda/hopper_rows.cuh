// The resident regime with Hopper's products: sequences of more than 64 tokens. A block of two warpgroups takes one
// sequence, a warpgroup 64 rows at a time; the other rows go by in steps of 64 or 32, at the end of 16. As in
// resident.cuh the backward goes over each sequence twice, by keys and by queries. The copy engine brings a sequence's
// rows, asked by one thread, swizzled as all products want them. Here: how they lie, and who works on which.
//
// Rows of the last 64 that are beyond a tensor's lie in what follows it in shared memory: what comes of them belongs to
// rows that are not stored.
#pragma once

#include "resident.cuh"
#include "verbs_hopper.cuh"

namespace vivit::cuda {

constexpr int kGroupRows = 64, kHopperThreads = 256;

// ---- rows in slices ----

// A row of 16 kSteps channels, zeros behind the head's own, lies in slices: of 64 channels, 128 bytes a row, as many as
// there are, and of the 32 or 16 that remain a narrow one; each swizzled as products take it. One slice lies as rows of
// Pitch<kSteps> do.
template <int kSteps>
struct Slices {
    static constexpr int kWide = kSteps / 4, kNarrow = kSteps % 4, kCount = kWide + (kNarrow > 0 ? 1 : 0);
    static_assert(kNarrow < 3, "a product takes rows of 64, 32 or 16 channels");
    static constexpr int32_t kLastRowBytes = kNarrow > 0 ? 32 * kNarrow : 128;

    static VIVIT_BOTH int32_t row_bytes(int32_t slice) { return slice < kWide ? 128 : 32 * kNarrow; }
    // Of chunk `chunk` of 16 bytes of a slice's row.
    static VIVIT_DEVICE int32_t place(int32_t slice, int32_t row, int32_t chunk) {
        if (slice < kWide) return 128 * row + 16 * (chunk ^ row % 8);
        return 32 * kNarrow * row + 16 * (kNarrow == 2 ? chunk ^ row / 2 % 4 : chunk ^ row / 4 % 2);
    }
};

// A step of 16 channels further in a descriptor.
constexpr uint64_t kNextChannels = 32 >> 4;

// Rows of a tensor as products know them: a descriptor of each slice.
template <int kSteps>
struct SlicedRows {
    uint64_t of[Slices<kSteps>::kCount];

    VIVIT_DEVICE uint64_t step(int s) const { return of[s / 4] + s % 4 * kNextChannels; }
    VIVIT_DEVICE uint64_t slice(int i, int32_t row) const {
        return of[i] + static_cast<uint64_t>(row * (Slices<kSteps>::row_bytes(i) >> 4));
    }
    // The same from a row on, a multiple of 8.
    VIVIT_DEVICE SlicedRows from(int32_t row) const {
        SlicedRows later;
#pragma unroll
        for (int i = 0; i < Slices<kSteps>::kCount; ++i) later.of[i] = slice(i, row);
        return later;
    }
};

// x [64, columns] = a b^T.
template <class T, int kColumns, int kSteps>
VIVIT_DEVICE void group_across(float (&x)[kColumns / 8][4], const SlicedRows<kSteps>& a, const SlicedRows<kSteps>& b) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) group_across_step<T, kColumns>(x, a.step(s), b.step(s), s > 0);
}

// Sums of some channels: blocks of 8 from `first` on.
template <int kBlocks, int kSteps>
VIVIT_DEVICE float (&blocks_of(RowSums<kSteps>& sums, int first))
    [kBlocks][4] { return *reinterpret_cast<float (*)[kBlocks][4]>(sums.of + first); }

// sums [64, channels] += a b, b the 16 rows from `row` on.
template <class T, int kSteps>
VIVIT_DEVICE
    void group_along_rows(RowSums<kSteps>& sums, const uint32_t (&a)[4], const SlicedRows<kSteps>& b, int32_t row) {
    constexpr int kWide = Slices<kSteps>::kWide, kNarrow = Slices<kSteps>::kNarrow;
#pragma unroll
    for (int i = 0; i < kWide; ++i) group_along_step<T, 64>(blocks_of<8>(sums, 8 * i), a, b.slice(i, row));
    if constexpr (kNarrow > 0) {
        group_along_step<T, 16 * kNarrow>(blocks_of<2 * kNarrow>(sums, 8 * kWide), a, b.slice(kWide, row));
    }
}

// ---- what a block has ----

// How a sequence, padded to sixteens, is cut: tiles of 64 rows for a warpgroup, and from `rest_from` on up to two
// sixteens for single warps, by products of their own: of 196 tokens the last four would else keep four warps as busy
// as sixty-four do. Those products take rows in one slice; of more slices the last tile is a tile like the others.
template <int kSteps>
struct Cut {
    static constexpr bool kRests = Slices<kSteps>::kCount == 1;
    static constexpr int32_t kBeyondRows = kRests ? 16 : 48;  // of a last tile, at most, beyond the sequence's
    int32_t tiles, rest, rest_from;

    VIVIT_DEVICE explicit Cut(int32_t rows) : tiles(rows / kGroupRows), rest(rows % kGroupRows / 16) {
        if (rest > (kRests ? 2 : 0)) ++tiles, rest = 0;
        rest_from = tiles * kGroupRows;
    }
};

// In shared memory: of all tensors (q, k and v, and for a backward do) the first slices, then their next ones, so that
// each begins at a multiple of eight of its rows; floats of each row as in Layout; what a last tile may reach beyond; a
// barrier; and of each warp what turning gradients back takes.
template <int kSteps, bool kBackward>
struct SlicedLayout {
    static constexpr int32_t kTensors = kBackward ? 4 : 3, kFloats = kBackward ? 2 : 1;
    static constexpr int32_t kBeyond = Cut<kSteps>::kBeyondRows * Slices<kSteps>::kLastRowBytes;
    int32_t rows;

    VIVIT_BOTH explicit SlicedLayout(int32_t N) : rows((N + 15) / 16 * 16) {}

    VIVIT_BOTH int32_t slice(int32_t tensor, int32_t i) const {
        return rows * (kTensors * 128 * i + tensor * Slices<kSteps>::row_bytes(i));
    }
    VIVIT_BOTH int32_t of_tensors() const { return kTensors * rows * 32 * kSteps; }
    VIVIT_BOTH int32_t barrier() const { return of_tensors() + 4 * kFloats * rows + kBeyond; }
    VIVIT_BOTH int32_t scratch() const { return barrier() + 16; }
    VIVIT_BOTH int32_t bytes(bool rotary) const {
        return scratch() + (kBackward && rotary ? kHopperThreads / 32 * 16 * kTurnedPitch<kSteps> * 4 : 0);
    }
};

// A block: its sequence, and where what it has of it lies.
template <int kSteps, bool kBackward>
struct SlicedBlock {
    SlicedLayout<kSteps, kBackward> layout;
    int64_t number;  // of the sequence

    VIVIT_DEVICE SlicedBlock(const Axis& axis, int64_t block) : layout(axis.N), number(block) {}

    static VIVIT_DEVICE int32_t thread() { return static_cast<int32_t>(threadIdx.x); }
    VIVIT_DEVICE char* slice(int32_t tensor, int32_t i) const { return shared_memory() + layout.slice(tensor, i); }
    VIVIT_DEVICE char* place(int32_t tensor, int32_t row, int32_t chunk) const {
        const int32_t i = Slices<kSteps>::kCount == 1 ? 0 : chunk / 8;
        return slice(tensor, i) + Slices<kSteps>::place(i, row, chunk - 8 * i);
    }
    VIVIT_DEVICE SlicedRows<kSteps> rows(int32_t tensor) const {
        constexpr int kWide = Slices<kSteps>::kWide, kNarrow = Slices<kSteps>::kNarrow;
        SlicedRows<kSteps> found;
#pragma unroll
        for (int i = 0; i < kWide; ++i) found.of[i] = descriptor(slice(tensor, i));
        if constexpr (kNarrow > 0) found.of[kWide] = narrow_descriptor<32 * kNarrow>(slice(tensor, kWide));
        return found;
    }
    VIVIT_DEVICE float* floats() const { return reinterpret_cast<float*>(shared_memory() + layout.of_tensors()); }
    VIVIT_DEVICE PhaseBarrier* barrier() const {
        return reinterpret_cast<PhaseBarrier*>(shared_memory() + layout.barrier());
    }
    VIVIT_DEVICE float* scratch() const {
        const int32_t of_warp = thread() / 32 * 16 * kTurnedPitch<kSteps> * 4;
        return reinterpret_cast<float*>(shared_memory() + layout.scratch() + of_warp);
    }
    // The same as a warp's own products know it: of one slice.
    VIVIT_DEVICE Block<kSteps, kBackward> of_warps(const Axis& axis, int32_t B) const {
        return Block<kSteps, kBackward>(axis, B, number, layout.scratch() - layout.of_tensors() - floats_bytes());
    }
    // The rows of q and k turned, once all of them are there, for products.
    template <class T>
    VIVIT_DEVICE void turn(const AttentionParams& p, const Axis& axis) const {
        const Sequence at(number, axis);
        for (int32_t tensor = 0; tensor < 2; ++tensor) {
            turn_rows<T>(
                p, axis.N, thread(), kHopperThreads,
                [&](int32_t row, int32_t chunk) { return place(tensor, row, chunk); },
                [&](int32_t row) { return at.token(row, axis, p.S); });
        }
        group_fence();
        block_barrier();
    }

  private:
    VIVIT_DEVICE int32_t floats_bytes() const { return 4 * layout.kFloats * layout.rows; }
};

// The first of a warp's rows among those of its warpgroup.
VIVIT_DEVICE int32_t rows_of_warp() { return static_cast<int32_t>(threadIdx.x) / 32 % 4 * 16; }

// ---- copies ----

// q, k, v and of a backward do as the copy engine knows them, a box of rows of a slice at a time: of wide slices, and
// of the narrow one.
template <int kSteps>
struct RowMaps {
    static constexpr int kKinds = (Slices<kSteps>::kWide > 0 ? 1 : 0) + (Slices<kSteps>::kNarrow > 0 ? 1 : 0);
    TensorMap of[4][kKinds];
};

// A call as the kernels get it. Of an axis whose sequences are packed there are no maps.
template <int kSteps>
struct HopperCall {
    AttentionParams p;
    RowMaps<kSteps> over_space, over_time;
};

// Rows of a box: as many as a copy may bring, in equal boxes of a sequence that is padded to `rows`.
VIVIT_BOTH int32_t box_rows(int32_t rows) {
    int32_t boxes = (rows + 255) / 256;
    while (rows % (16 * boxes) != 0) ++boxes;
    return rows / boxes;
}

// The rows of a block's sequence on their way: of all of its tensors, zeros where the sequence has no more. They are
// there after wait().
template <int kSteps, bool kBackward>
struct Arriving {
    PhaseBarrier* barrier;

    VIVIT_DEVICE Arriving(const SlicedBlock<kSteps, kBackward>& block, const RowMaps<kSteps>& maps, const Axis& axis)
        : barrier(block.barrier()) {
        if (block.thread() == 0) {
            phase_init(barrier, 1);
            phase_fence();
            phase_expect(barrier, block.layout.of_tensors());
            const Sequence at(block.number, axis);
#pragma unroll
            for (int i = 0; i < Slices<kSteps>::kCount; ++i) {
                for (int32_t tensor = 0; tensor < block.layout.kTensors; ++tensor) {
                    const bool last = i == Slices<kSteps>::kCount - 1;
                    ask(block, maps.of[tensor][last ? RowMaps<kSteps>::kKinds - 1 : 0], axis, at, tensor, i);
                }
            }
        }
        block_barrier();
    }
    VIVIT_DEVICE void wait() const { phase_wait(barrier, 0); }

  private:
    VIVIT_DEVICE void ask(const SlicedBlock<kSteps, kBackward>& block, const TensorMap& map, const Axis& axis,
                          const Sequence& at, int32_t tensor, int32_t slice) const {
        const int32_t rows = block.layout.rows, box = box_rows(rows);
        for (int32_t row = 0; row < rows; row += box) {
            copy_box(block.slice(tensor, slice) + row * Slices<kSteps>::row_bytes(slice), map, barrier, 64 * slice,
                     at.h, axis.over_time ? at.g : row, axis.over_time ? row : at.g, at.b);
        }
    }
};

}  // namespace vivit::cuda
