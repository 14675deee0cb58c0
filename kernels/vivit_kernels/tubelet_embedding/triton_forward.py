"""Forward kernels of the Triton backend: the product over gathered tubelets, and what the weight is prepared to."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .._triton_device import waited_for
from .triton_gather import gathered_rows, load_pixels, of_channels, tap_channels


@triton.jit
def prepare_weight(
    weight_ptr, bias_ptr, scaled_ptr, row_ptr, scales, shifts, stride_bias, E,
    TAPS: tl.constexpr, C: tl.constexpr, FOLDED: tl.constexpr, X: tl.constexpr, STEP: tl.constexpr,
    PHASES: tl.constexpr, HAS_BIAS: tl.constexpr, WRITES_SCALED: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """row `[E]` = bias + W @ shift in fp32; and, if WRITES_SCALED, W * scale `[PHASES, E, K]` in the order of the
    video's taps, with zeros where a run of X is longer than the tubelet's STEP.

    TAPS: pixels of a tubelet in one of the C channels; EARLY: the next kernel may begin beside this one."""
    if EARLY:
        gdc_launch_dependents()
    K: tl.constexpr = C * TAPS // STEP * X
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.float32)
    for phase in tl.static_range(PHASES):
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = k % X - phase * (X - STEP)
            tap = k // X * STEP + x
            inside = (e < E)[:, None] & (k < K)[None, :]
            channels = tap_channels(tap, TAPS, FOLDED)
            source = tap
            if FOLDED > 1:
                source = tap % FOLDED * TAPS + tap // FOLDED
            pointers = weight_ptr + (e.to(tl.int64) * (C * TAPS))[:, None] + source[None, :]
            # [BLOCK_E, BLOCK_K]
            weight = tl.load(pointers, mask=inside & ((x >= 0) & (x < STEP))[None, :], other=0.0).to(tl.float32)
            if phase == 0:
                total += tl.sum(weight * of_channels(shifts, channels)[None, :], 1)
            if WRITES_SCALED:
                scaled = (weight * of_channels(scales, channels)[None, :]).to(scaled_ptr.dtype.element_ty)
                lines = (e.to(tl.int64) + phase * E) * K
                tl.store(scaled_ptr + lines[:, None] + k[None, :], scaled, mask=inside)
    if HAS_BIAS:
        # [BLOCK_E]
        total += tl.load(bias_ptr + e.to(tl.int64) * stride_bias, mask=e < E, other=0.0).to(tl.float32)
    tl.store(row_ptr + e, total, mask=e < E)


@triton.jit
def load_weight(
    weight_ptr, phase, first, E, start, K: tl.constexpr,
    DESCRIBED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_K, BLOCK_E]`: columns from `first` on of a phase's weight, taps from `start` on; 0 for taps beyond the
    last. DESCRIBED: weight_ptr describes the rows of all phases to TMA, which needs no addresses from the threads."""
    if DESCRIBED:
        return weight_ptr.load([phase * E + first, start]).T
    else:
        e, k = first + tl.arange(0, BLOCK_E), start + tl.arange(0, BLOCK_K)
        # columns beyond the last are not stored
        pointers = weight_ptr + ((phase.to(tl.int64) * E + tl.minimum(e, E - 1)) * K)[None, :] + k[:, None]
        if K % BLOCK_K == 0:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(k < K)[:, None], other=0.0)


@triton.jit
def forward(
    video_ptr, weight_ptr, row_ptr, position_ptr, class_ptr, out_ptr, scale, scales, shifts, M, E, T,
    stride_vb, stride_vc, stride_vf, stride_vy, stride_vx, stride_row, stride_pn, stride_pe, stride_class,
    stride_ob, stride_ot, stride_os,
    C: tl.constexpr, F: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, STEP: tl.constexpr, PHASES: tl.constexpr,
    FOLDED: tl.constexpr, ALIGN: tl.constexpr, NORMALISED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_ROW: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_CLASS: tl.constexpr,
    PER_FRAME: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr, WAITS: tl.constexpr, EARLY: tl.constexpr,
    DESCRIBED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = scale * (tubelets @ weight^T) + row + position, and the class rows, whose program is the one of the token
    that follows. out_ptr and position_ptr point to the first token's row, behind the class row. WAITS: in every step
    for its product, see `waited_for`; EARLY: begun beside the kernel that writes row, for which it waits before it
    reads that or writes."""
    K: tl.constexpr = C * F * Y * X
    # neighbours in the grid share their tubelets: the video is read once, the weight stays in L2
    blocks_e = tl.cdiv(E, BLOCK_E)
    phase = tl.program_id(0) // blocks_e % PHASES
    m = tl.program_id(0) // (blocks_e * PHASES) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) % blocks_e * BLOCK_E
    b, t, token, rows = gathered_rows(
        tl.minimum(m, M - 1), phase, T, ROWS, COLUMNS, stride_vb, stride_vf, stride_vy, stride_vx, F, Y, X, STEP, PHASES
    )  # rows beyond the last are not stored

    total = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        # [BLOCK_M, BLOCK_K]
        pixels = load_pixels(
            video_ptr, rows, k, scales, shifts, stride_vc, stride_vf, stride_vy, stride_vx,
            C, F, Y, X, FOLDED, ALIGN, NORMALISED, BLOCK_K, out_ptr.dtype.element_ty, 2, True, True,
        )  # fmt: skip
        weight = load_weight(weight_ptr, phase, first, E, start, K, DESCRIBED, BLOCK_E, BLOCK_K)
        total = tl.dot(pixels, weight, total, input_precision=PRECISION)
        if WAITS:
            total = waited_for(total)
    if EARLY:
        gdc_wait()
    inside = m < M
    lines = b.to(tl.int64) * stride_ob + t.to(tl.int64) * stride_ot + token.to(tl.int64) * stride_os
    if not PER_FRAME:
        token += t * (ROWS * COLUMNS * PHASES)
    if HALVED:
        # with the positions of all columns there are not enough registers
        left, right = tl.split(tl.permute(tl.reshape(total, [BLOCK_M, 2, BLOCK_E // 2]), (0, 2, 1)))
        e = first + tl.arange(0, BLOCK_E // 2)
        store_tokens(
            left, scale, lines, token, inside, e, row_ptr, position_ptr, class_ptr, out_ptr, E, stride_row, stride_pn,
            stride_pe, stride_class, stride_os, HAS_ROW, HAS_POSITION, HAS_CLASS,
        )  # fmt: skip
        store_tokens(
            right, scale, lines, token, inside, e + BLOCK_E // 2, row_ptr, position_ptr, class_ptr, out_ptr, E,
            stride_row, stride_pn, stride_pe, stride_class, stride_os, HAS_ROW, HAS_POSITION, HAS_CLASS,
        )  # fmt: skip
    else:
        e = first + tl.arange(0, BLOCK_E)
        store_tokens(
            total, scale, lines, token, inside, e, row_ptr, position_ptr, class_ptr, out_ptr, E, stride_row, stride_pn,
            stride_pe, stride_class, stride_os, HAS_ROW, HAS_POSITION, HAS_CLASS,
        )  # fmt: skip


@triton.jit
def store_tokens(
    products, scale, lines, token, inside, e, row_ptr, position_ptr, class_ptr, out_ptr, E, stride_row, stride_pn,
    stride_pe, stride_class, stride_os,
    HAS_ROW: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_CLASS: tl.constexpr,
):  # fmt: skip
    """Columns e `[BLOCK]` of the rows of out at `lines` `[BLOCK_M]`, and of the class rows before first tokens."""
    total, inside = products * scale, inside[:, None] & (e < E)[None, :]
    if HAS_ROW:
        # [BLOCK]
        total += tl.load(row_ptr + e.to(tl.int64) * stride_row, mask=e < E, other=0.0).to(tl.float32)[None, :]
    if HAS_POSITION:
        positions = token.to(tl.int64)[:, None] * stride_pn + e.to(tl.int64)[None, :] * stride_pe
        # [BLOCK_M, BLOCK]
        total += tl.load(position_ptr + positions, mask=inside, other=0.0).to(tl.float32)
    pointers = out_ptr + lines[:, None] + e[None, :]
    tl.store(pointers, total.to(out_ptr.dtype.element_ty), mask=inside)
    if HAS_CLASS:
        # [BLOCK]
        first = tl.load(class_ptr + e.to(tl.int64) * stride_class, mask=e < E, other=0.0).to(tl.float32)
        if HAS_POSITION:
            before = position_ptr - stride_pn + e.to(tl.int64) * stride_pe
            first += tl.load(before, mask=e < E, other=0.0).to(tl.float32)
        first = tl.broadcast_to(first[None, :], total.shape)
        tl.store(pointers - stride_os, first.to(out_ptr.dtype.element_ty), mask=inside & (token == 0)[:, None])
