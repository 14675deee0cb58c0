"""Backward kernels of the Triton backend. Every sum has one order: results are the same bit for bit, run to run."""

# pyright: reportGeneralTypeIssues=false
# (it takes a device function for one that never returns)

from __future__ import annotations

import triton
import triton.language as tl

from .triton_gather import load_pixels, of_channels, row_offsets, split_rows, tap_channels, tap_offsets


@triton.jit
def _sum_of_rows(x, N: tl.constexpr, M: tl.constexpr):
    """`[M]` of x `[N, M]`, N a power of two up to 128: neighbours added to each other until one row is left.

    tl.sum adds in the order of the layout, which follows what else the kernel stores: dbias asked for alone differed in
    bits from dbias beside dclass (H100)."""
    for i in tl.static_range(7):
        if (N >> i) > 1:
            x = tl.sum(tl.reshape(x, [N >> (i + 1), 2, M]), 1)
    return tl.reshape(x, [M])


@triton.jit
def sum_rows(
    dout_ptr, dposition_ptr, dclass_ptr, partial_ptr, TABLE, OUTER, INNER, E, blocks_per_strip,
    stride_do, stride_di, stride_dn, stride_de,
    FIRST: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_CLASS: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Sums dout over clips (and frames): the gradient of the table `[TABLE, E]` of positions, of the class row, and by
    strips of the table its sum over tokens, partial `[strips, E]`, which bias and weight want.

    dout is `[OUTER, INNER, TABLE, E]`; FIRST: 1 if row 0 of the table is the class row. A thread adds up what it loads;
    threads are added up once, at the end. WHOLE: groups and columns fill their blocks, so that no load has a mask.
    ptxas puts a load with a mask behind the sums of the one before: 32 waits for memory in a row, 25 us (8 clips of
    ViT-B, H200, 2026-11-26). Without masks four are in flight."""
    blocks_e = tl.cdiv(E, BLOCK_E)
    strip = tl.program_id(0) // blocks_e
    e = tl.program_id(0) % blocks_e * BLOCK_E + tl.arange(0, BLOCK_E)
    columns = e.to(tl.int64) * stride_de
    tokens = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    last = tl.minimum((strip + 1) * blocks_per_strip, tl.cdiv(TABLE, BLOCK_N))
    for block in range(strip * blocks_per_strip, last):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (n < TABLE)[:, None] & (e < E)[None, :]
        places = tl.minimum(n, TABLE - 1).to(tl.int64)[:, None] * stride_dn + columns[None, :]
        total = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
        for start in range(0, OUTER * INNER, BLOCK_G):
            loaded = ()
            for j in tl.static_range(BLOCK_G):
                g = start + j
                group = (g // INNER).to(tl.int64) * stride_do + (g % INNER).to(tl.int64) * stride_di
                # [BLOCK_N, BLOCK_E]
                if WHOLE:
                    loaded += (tl.load(dout_ptr + group + places),)
                else:
                    loaded += (tl.load(dout_ptr + group + places, mask=inside & (g < OUTER * INNER), other=0.0),)
            for j in tl.static_range(BLOCK_G):
                total += loaded[j].to(tl.float32)
        if HAS_POSITION:
            pointers = dposition_ptr + n.to(tl.int64)[:, None] * E + e[None, :]
            tl.store(pointers, total.to(dposition_ptr.dtype.element_ty), mask=inside)
        if HAS_CLASS:
            pointers = dclass_ptr + tl.broadcast_to(e[None, :], [BLOCK_N, BLOCK_E])
            tl.store(pointers, total.to(dclass_ptr.dtype.element_ty), mask=inside & (n == 0)[:, None])
        tokens += tl.where(((n >= FIRST) & (n < TABLE))[:, None], total, 0.0)
    tl.store(partial_ptr + strip.to(tl.int64) * E + e, _sum_of_rows(tokens, BLOCK_N, BLOCK_E), mask=e < E)


@triton.jit
def weight_gradient(
    dout_ptr, video_ptr, partial_ptr, scales, shifts, FRAMES, E, T, ROWS, steps_per_split, STEPS,
    stride_db, stride_dt, stride_ds, stride_de, stride_vb, stride_vc, stride_vf, stride_vy, stride_vx,
    C: tl.constexpr, F: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, STEP: tl.constexpr, PHASES: tl.constexpr,
    FOLDED: tl.constexpr, ALIGN: tl.constexpr, NORMALISED: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS_ABREAST: tl.constexpr, COLUMNS_ABREAST: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial `[splits, PHASES, E, K]` = dout^T @ tubelets, a part of the tubelets in each. dout_ptr points behind a
    class row.

    A step takes a small rectangle of tubelets, ROWS_ABREAST by COLUMNS_ABREAST, in each of several frames (b, t): from
    one rectangle to the next the way is the same for all, so that no tubelet's place is computed within the inner loop.
    WHOLE: rectangles fill the grid. STEPS: rectangles of all frames, those of the same frames together."""
    K: tl.constexpr = C * F * Y * X
    blocks_k: tl.constexpr = tl.cdiv(K, BLOCK_K)
    ABREAST: tl.constexpr = ROWS_ABREAST * COLUMNS_ABREAST
    ACROSS: tl.constexpr = tl.cdiv(COLUMNS, COLUMNS_ABREAST)
    blocks_e = tl.cdiv(E, BLOCK_E)
    # the split slowest: what runs at the same time shares its rows
    part = tl.program_id(0) // (blocks_e * blocks_k)
    phase, split = part % PHASES, part // PHASES
    e = tl.program_id(0) // blocks_k % blocks_e * BLOCK_E + tl.arange(0, BLOCK_E)
    k = tl.program_id(0) % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    edges = e.to(tl.int64) * stride_de
    i = tl.arange(0, BLOCK_M)
    row, column = i // COLUMNS_ABREAST % ROWS_ABREAST, i % COLUMNS_ABREAST
    rectangles = tl.cdiv(ROWS, ROWS_ABREAST) * ACROSS
    first, last = split * steps_per_split, tl.minimum((split + 1) * steps_per_split, STEPS)
    total = tl.zeros([BLOCK_E, BLOCK_K], tl.float32)
    for block in range(first // rectangles, tl.cdiv(last, rectangles)):
        frame = block * (BLOCK_M // ABREAST) + i // ABREAST
        inside = (frame < FRAMES)[:, None] & (e < E)[None, :]
        frame = tl.minimum(frame, FRAMES - 1)
        b, t, at = frame // T, frame % T, column * PHASES + phase
        pixel_rows = row_offsets(b, t, row, at, stride_vb, stride_vf, stride_vy, stride_vx, F, Y, STEP)
        pixel_rows -= phase * (X - STEP)
        token = row * (COLUMNS * PHASES) + at
        places = b.to(tl.int64) * stride_db + t.to(tl.int64) * stride_dt + token.to(tl.int64) * stride_ds
        start = block * rectangles
        for step in range(tl.maximum(first, start), tl.minimum(last, start + rectangles)):
            rectangle = step - start
            top, left = rectangle // ACROSS * ROWS_ABREAST, rectangle % ACROSS * COLUMNS_ABREAST
            there = (row < ROWS - top) & (column < COLUMNS - left)
            # [BLOCK_M, BLOCK_K]
            pixels = load_pixels(
                video_ptr + top * Y * stride_vy + left * (STEP * PHASES) * stride_vx, pixel_rows, k, scales, shifts,
                stride_vc, stride_vf, stride_vy, stride_vx, C, F, Y, X, FOLDED, ALIGN, NORMALISED, BLOCK_K, DTYPE, 4,
                there, WHOLE,
            )  # fmt: skip
            mask = inside if WHOLE else inside & there[:, None]
            pointers = dout_ptr + (top * COLUMNS + left) * PHASES * stride_ds + (places[:, None] + edges[None, :])
            # [BLOCK_M, BLOCK_E]
            dout = tl.load(pointers, mask=mask, other=0.0).to(DTYPE)
            total = tl.dot(tl.trans(dout), pixels, total, input_precision=PRECISION)
    lines = (part.to(tl.int64) * E + e)[:, None] * K + k[None, :]
    tl.store(partial_ptr + lines, total, mask=(e < E)[:, None] & (k < K)[None, :])


@triton.jit
def finish_parameters(
    partial_ptr, rows_ptr, dweight_ptr, dbias_ptr, scales, shifts, E, parts, strips,
    TAPS: tl.constexpr, C: tl.constexpr, FOLDED: tl.constexpr, X: tl.constexpr, STEP: tl.constexpr,
    PHASES: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dbias `[E]`, and dweight `[E, K]` = scale * (sum of its parts) + shift * (sum of all rows of dout)."""
    K: tl.constexpr = C * TAPS
    blocks_k: tl.constexpr = tl.cdiv(K if HAS_WEIGHT else 1, BLOCK_K)
    e = tl.program_id(0) // blocks_k * BLOCK_E + tl.arange(0, BLOCK_E)
    k = tl.program_id(0) % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    summed = tl.zeros([BLOCK_E], tl.float32)
    if HAS_ROWS:
        s = tl.arange(0, BLOCK_S)
        mask = (s < strips)[:, None] & (e < E)[None, :]
        # [BLOCK_S, BLOCK_E]
        rows = tl.load(rows_ptr + s.to(tl.int64)[:, None] * E + e[None, :], mask=mask, other=0.0)
        summed += _sum_of_rows(rows, BLOCK_S, BLOCK_E)
    if HAS_BIAS:
        first = tl.program_id(0) % blocks_k == 0
        tl.store(dbias_ptr + e, summed.to(dbias_ptr.dtype.element_ty), mask=(e < E) & first)
    if HAS_WEIGHT:
        channels = k // TAPS
        source = k
        if FOLDED > 1:
            source = k % TAPS * FOLDED + channels
        source = source // STEP * X + source % STEP
        inside = (e < E)[:, None] & (k < K)[None, :]
        total = tl.zeros([BLOCK_E, BLOCK_K], tl.float32)
        for part in range(0, parts):
            lines = (e.to(tl.int64) + part * E)[:, None] * (K // STEP * X) + part % PHASES * (X - STEP)
            # [BLOCK_E, BLOCK_K]
            total += tl.load(partial_ptr + lines + source[None, :], mask=inside, other=0.0)
        total *= of_channels(scales, channels)[None, :]
        if HAS_ROWS:
            total += summed[:, None] * of_channels(shifts, channels)[None, :]
        pointers = dweight_ptr + e.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(pointers, total.to(dweight_ptr.dtype.element_ty), mask=inside)


@triton.jit
def video_gradient(
    dout_ptr, weight_ptr, dvideo_ptr, scales, M, E, T, ROWS, COLUMNS, stride_db, stride_dt, stride_ds, stride_de,
    stride_vb, stride_vc, stride_vf, stride_vy,
    C: tl.constexpr, F: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dvideo = scale * (dout @ weight), each pixel of a tubelet written once. dout_ptr points behind a class row."""
    K: tl.constexpr = C * F * Y * X
    blocks_k: tl.constexpr = tl.cdiv(K, BLOCK_K)
    m = tl.program_id(0) // blocks_k * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    b, t, row, column = split_rows(tl.minimum(m, M - 1), T, ROWS, COLUMNS)
    token = (row * COLUMNS + column).to(tl.int64)
    places = b.to(tl.int64) * stride_db + t.to(tl.int64) * stride_dt + token * stride_ds
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        pointers = dout_ptr + places[:, None] + e.to(tl.int64)[None, :] * stride_de
        # [BLOCK_M, BLOCK_E]
        dout = tl.load(pointers, mask=(e < E)[None, :], other=0.0).to(weight_ptr.dtype.element_ty)
        pointers = weight_ptr + e.to(tl.int64)[:, None] * K + k[None, :]
        # [BLOCK_E, BLOCK_K]
        weight = tl.load(pointers, mask=(e < E)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(dout, weight, total, input_precision=PRECISION)
    total *= of_channels(scales, tap_channels(k, F * Y * X, 1))[None, :]
    rows = row_offsets(b, t, row, column, stride_vb, stride_vf, stride_vy, 1, F, Y, X)
    pointers = dvideo_ptr + rows[:, None] + tap_offsets(k, stride_vc, stride_vf, stride_vy, 1, F, Y, X)[None, :]
    tl.store(pointers, total.to(dvideo_ptr.dtype.element_ty), mask=(m < M)[:, None] & (k < K)[None, :])
