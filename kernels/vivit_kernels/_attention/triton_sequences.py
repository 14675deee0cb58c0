"""Sequences of the token grid, for the regimes that take one at a time: where they lie, and blocks of their rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_device import load_rows, offsets, rotated


@triton.jit
def sequence_place(sequence, sizes, first_head, heads, TIME: tl.constexpr):
    """(b, group, h) of a sequence, int64: its clip, its frame (or position, if TIME) and its head; heads fastest."""
    if TIME:
        groups = sizes.S
    else:
        groups = sizes.T
    h = (first_head + sequence % heads).to(tl.int64)
    g = (sequence // heads % groups).to(tl.int64)
    return (sequence // heads // groups).to(tl.int64), g, h


@triton.jit
def token_offsets(x, b, g, i, h, TIME: tl.constexpr, UNIT: tl.constexpr):
    """Where the rows of tokens i of a sequence begin."""
    if TIME:
        return offsets(x, b, i, g, h, UNIT)
    else:
        return offsets(x, b, g, i, h, UNIT)


@triton.jit
def clip_tokens(g, i, S, TIME: tl.constexpr):
    """Tokens i of a sequence as tokens of the clip."""
    if TIME:
        return i * S + g
    else:
        return g * S + i


@triton.jit
def block_rows(
    x, sizes, rules, b, g, h, start, N, S, TURN: tl.constexpr, WHOLE: tl.constexpr, TIME: tl.constexpr,
    COUNT: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """(rows of tokens start, start + 1, ..., which are valid, their tokens of the clip); WHOLE: all are, unasked."""
    i = (start + tl.arange(0, COUNT)).to(tl.int64)
    n = clip_tokens(g, i, S, TIME)
    if WHOLE:
        valid = tl.full([COUNT], True, tl.int1)
    else:
        valid = i < N
    rows = load_rows(x, token_offsets(x, b, g, i, h, TIME, UNIT), valid, COLS)
    if TURN:
        rows = rotated(rows, rules, n, valid, 1, COLS)
    return rows, valid, n


@triton.jit
def described_rows(x, b, g, h, start, COUNT: tl.constexpr, COLS: tl.constexpr):
    """Rows of tokens start, start + 1, ... within frame g; x: a descriptor of the grid, of blocks of them."""
    at = [b.to(tl.int32), g.to(tl.int32), start, h.to(tl.int32), 0]
    return (tl.reshape(x.load(at), [COUNT, COLS[0][1]]),)
