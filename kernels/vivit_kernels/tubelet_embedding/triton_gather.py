"""Device functions of the Triton backend: where a tubelet's pixels lie, and what a pixel counts as in a product.

A row m is a tubelet, (b, t, row, column) with the column fastest; a tap k is a pixel of it, (c, f, y, x) with x
fastest. Channels-last video is seen as one channel of C times as many columns (`FOLDED` = C): its runs stay whole and
its taps come in the order (f, y, x, c). All sizes of a tubelet are compile-time constants, so that no tap costs a
division at run time and the compiler sees which taps are neighbours in memory.

Runs of 14 bytes start at odd multiples of 2, where the hardware copies nothing asynchronously: that takes 4 bytes. So
runs are read 2 bytes longer, `X` = `STEP` + 2, from 2 bytes earlier in every second column, and these bytes meet a zero
in the weight. Even and odd columns are then rows of two products (`PHASES` = 2), M and COLUMNS those of one.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# (it takes a device function for one that never returns, and a compile-time text for none)

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_device import IN_PTX as _IN_PTX


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


def _ptx(body: str, *, fill: str, constants: tuple[str, ...], count: int) -> tl.constexpr:
    """`body` makes two numbers, RESULT, of two bytes that lie in the halves of `pair` with `fill` above them."""
    names = [f"constant{i}" for i in range(len(constants))]
    lines = [f"{{ .reg .b32 word, pair, {', '.join(names)};"]
    lines += [f"mov.b32 {name}, {constant};" for name, constant in zip(names, constants, strict=True)]
    lines.append("mov.b32 word, $2;" if count == 4 else "cvt.u32.u16 word, $1;")
    for i in range(count // 2):
        lines += [f"prmt.b32 pair, word, {fill}, {('0x4140', '0x4342')[i]};", body.replace("RESULT", f"${i}")]
    return tl.constexpr(" ".join(lines) + " }")


# Two or four bytes that share a register to pairs of numbers, in two instructions a pair.
_BFLOAT16 = "fma.rn.bf16x2 RESULT, pair, constant0, constant1;"
_BFLOAT16_OF_2 = _ptx(_BFLOAT16, fill="0", constants=("0x7F007F00", "0xC000C000"), count=2)  # 2^127 and -2
_BFLOAT16_OF_4 = _ptx(_BFLOAT16, fill="0", constants=("0x7F007F00", "0xC000C000"), count=4)
_FLOAT16 = "sub.rn.f16x2 RESULT, pair, constant0;"
_FLOAT16_OF_2 = _ptx(_FLOAT16, fill="0x64646464", constants=("0x64806480",), count=2)  # 1152
_FLOAT16_OF_4 = _ptx(_FLOAT16, fill="0x64646464", constants=("0x64806480",), count=4)


@triton.jit
def centred(pixels, dtype: tl.constexpr, PACK: tl.constexpr):
    """u - 128 of bytes u, and in bfloat16 (u - 128) / 64, exact, without the conversion instruction, which is slow;
    PACK: bytes that a thread finds in one register, 2 or 4.

    A byte becomes the last digits of a number of which all others are known, and a subtraction leaves it: of 2^10 in
    float16, of 2^23 in float32. bfloat16 has room for 7 of its 8 bits there, but all 8 are a number below the normal
    ones, u * 2^-133: times 2^127, less 2."""
    if dtype == tl.float32:
        return (pixels.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    elif dtype == tl.float16:
        if not _IN_PTX:
            return (pixels.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
        elif PACK == 2:
            return tl.inline_asm_elementwise(_FLOAT16_OF_2, "=r,h", [pixels], tl.float16, True, 2)
        else:
            return tl.inline_asm_elementwise(_FLOAT16_OF_4, "=r,=r,r", [pixels], tl.float16, True, 4)
    else:
        if not _IN_PTX:
            return (pixels.to(tl.float32) * 0.015625 - 2.0).to(tl.bfloat16)
        elif PACK == 2:
            return tl.inline_asm_elementwise(_BFLOAT16_OF_2, "=r,h", [pixels], tl.bfloat16, True, 2)
        else:
            return tl.inline_asm_elementwise(_BFLOAT16_OF_4, "=r,=r,r", [pixels], tl.bfloat16, True, 4)


@triton.jit
def load_pixels(
    video_ptr, rows, k, scales, shifts, stride_c, stride_f, stride_y, stride_x,
    C: tl.constexpr, F: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, FOLDED: tl.constexpr, ALIGN: tl.constexpr,
    NORMALISED: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr, PACK: tl.constexpr,
    there, WHOLE: tl.constexpr,
):  # fmt: skip
    """Pixels of the tubelets at `rows` `[BLOCK_M]`, taps k `[BLOCK_K]`, as DTYPE `[BLOCK_M, BLOCK_K]`; finite for
    taps beyond the last and, unless WHOLE, for tubelets that are not `there` `[BLOCK_M]`.

    ALIGN: bytes of which the first pixel of every run is a multiple; the compiler cannot know it from strides, of which
    it is told only whether 16 divides them."""
    offsets = tap_offsets(k, stride_c, stride_f, stride_y, stride_x, F, Y, X)
    pointers = tl.multiple_of(video_ptr + (rows[:, None] + offsets[None, :]), (1, ALIGN))
    # [BLOCK_M, BLOCK_K]
    if not WHOLE:
        pixels = tl.load(pointers, mask=there[:, None] & (k < C * F * Y * X)[None, :], other=0)
    elif C * F * Y * X % BLOCK_K == 0:
        pixels = tl.load(pointers)
    else:
        pixels = tl.load(pointers, mask=(k < C * F * Y * X)[None, :], other=0)
    if pixels.dtype == tl.uint8:
        pixels = centred(pixels, DTYPE, PACK)
    elif NORMALISED:
        channels = tap_channels(k, F * Y * X, FOLDED)
        scale, shift = of_channels(scales, channels), of_channels(shifts, channels)
        pixels = pixels.to(tl.float32) * scale[None, :] + shift[None, :]
    return pixels.to(DTYPE)
