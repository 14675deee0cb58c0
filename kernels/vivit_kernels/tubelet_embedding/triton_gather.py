"""Device functions of the Triton backend: where a tubelet's pixels lie, and what a pixel counts as in a product.

A row m is a tubelet, (b, t, row, column) with the column fastest; a tap k is a pixel of it, (c, f, y, x) with x
fastest. Channels-last video is seen as one channel of C times as many columns (`FOLDED` = C): its runs stay whole and
its taps come in the order (f, y, x, c). All sizes of a tubelet are compile-time constants, so that no tap costs a
division at run time and the compiler sees which taps are neighbours in memory.

Runs of 14 bytes start at odd multiples of 2, where the hardware copies nothing asynchronously: that takes 4 bytes. So
runs are read 2 bytes longer, `X` = `STEP` + 2, from 2 bytes earlier in every second column, and these bytes meet a zero
in the weight. Even and odd columns are then rows of two products (`PHASES` = 2), M and COLUMNS those of one.
"""

# pyright: reportGeneralTypeIssues=false
# (it takes a device function for one that never returns)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_rows(m, T, ROWS, COLUMNS):
    """The tubelets m `[BLOCK_M]` as (b, t, row, column)."""
    column = m % COLUMNS
    row = m // COLUMNS % ROWS
    frame = m // (COLUMNS * ROWS)
    return frame // T, frame % T, row, column


@triton.jit
def row_offsets(
    b, t, row, column, stride_b, stride_f, stride_y, stride_x, F: tl.constexpr, Y: tl.constexpr, X: tl.constexpr
):
    """Where each tubelet's first pixel lies, `[BLOCK_M]`."""
    frames = b.to(tl.int64) * stride_b + t.to(tl.int64) * F * stride_f
    return frames + row.to(tl.int64) * Y * stride_y + column.to(tl.int64) * X * stride_x


@triton.jit
def gathered_rows(
    m, phase, T, ROWS, COLUMNS, stride_b, stride_f, stride_y, stride_x,
    F: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, STEP: tl.constexpr, PHASES: tl.constexpr,
):  # fmt: skip
    """Of the tubelets m `[BLOCK_M]` of a phase: (b, t, token in the frame, where the pixels to read begin)."""
    b, t, row, column = split_rows(m, T, ROWS, COLUMNS)
    column = column * PHASES + phase
    rows = row_offsets(b, t, row, column, stride_b, stride_f, stride_y, stride_x, F, Y, STEP)
    return b, t, row * (COLUMNS * PHASES) + column, rows - phase * (X - STEP)


@triton.jit
def tap_offsets(k, stride_c, stride_f, stride_y, stride_x, F: tl.constexpr, Y: tl.constexpr, X: tl.constexpr):
    """How far each tap lies from its tubelet's first pixel, `[BLOCK_K]`."""
    x = k % X
    y = k // X % Y
    f = k // (X * Y) % F
    c = k // (X * Y * F)
    far = c.to(tl.int64) * stride_c + f.to(tl.int64) * stride_f + y.to(tl.int64) * stride_y
    return far + x.to(tl.int64) * stride_x


@triton.jit
def tap_channels(k, TAPS: tl.constexpr, FOLDED: tl.constexpr):
    """The channel of each tap; TAPS: pixels of a tubelet in one channel, as the video is seen."""
    if FOLDED > 1:
        return k % FOLDED
    else:
        return k // TAPS


@triton.jit
def of_channels(values, channels):
    """The one of `values`, a tuple with a number for each channel or one for all, that belongs to each tap."""
    result = tl.zeros(channels.shape, tl.float32) + values[0]
    for c in tl.static_range(1, len(values)):
        result = tl.where(channels == c, values[c], result)
    return result


@triton.jit
def load_pixels(
    video_ptr, rows, k, scales, shifts, stride_c, stride_f, stride_y, stride_x,
    C: tl.constexpr, F: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, FOLDED: tl.constexpr, ALIGN: tl.constexpr,
    NORMALISED: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Pixels of the tubelets at `rows` `[BLOCK_M]`, taps k `[BLOCK_K]`, as DTYPE `[BLOCK_M, BLOCK_K]`; 0 or -128 for
    taps beyond the last.

    ALIGN: bytes of which the first pixel of every run is a multiple; the compiler cannot know it from strides, of which
    it is told only whether 16 divides them."""
    offsets = tap_offsets(k, stride_c, stride_f, stride_y, stride_x, F, Y, X)
    pointers = tl.multiple_of(video_ptr + (rows[:, None] + offsets[None, :]), (1, ALIGN))
    # [BLOCK_M, BLOCK_K]
    if C * F * Y * X % BLOCK_K == 0:
        pixels = tl.load(pointers)
    else:
        pixels = tl.load(pointers, mask=(k < C * F * Y * X)[None, :], other=0)
    if pixels.dtype == tl.uint8:
        # u - 128, exact in 16 bits: the byte becomes the last digits of 2^23, and a subtraction is cheaper than the
        # conversion instruction
        pixels = (pixels.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    elif NORMALISED:
        channels = tap_channels(k, F * Y * X, FOLDED)
        scale, shift = of_channels(scales, channels), of_channels(shifts, channels)
        pixels = pixels.to(tl.float32) * scale[None, :] + shift[None, :]
    return pixels.to(DTYPE)
