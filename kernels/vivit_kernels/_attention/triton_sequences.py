"""Sequences of the token grid, for the regimes that take one at a time: where they lie, blocks of their rows, and the
step of backward that both have, from a block of queries to dk and dv of a block of keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_device import (
    across,
    add_product,
    capped,
    dropped,
    exponential,
    load_rows,
    offsets,
    rotated,
    times_slope,
)


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
def key_groups(start, COUNT: tl.constexpr):
    return start // 4 + tl.arange(0, COUNT // 4)


@triton.jit
def _dropped_across(x, rules, rows, start, COUNT: tl.constexpr):
    """`dropped` of scores that lie keys first, `[COUNT, M]`."""
    if rules.seed is None:
        return x
    else:
        return tl.trans(dropped(tl.trans(x), rules, rows, key_groups(start, COUNT)))


@triton.jit
def add_to_keys(
    k_rows, v_rows, allowed, q_rows, do_rows, rules, rows, first, m, inverse, delta, dk_rows, dv_rows,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys first, first + 1, ..., with the share of one block of queries, whose (largest score,
    1 / sum, delta) are given. Scores lie keys first, so that no product has to transpose them."""
    if k_rows[0].dtype == tl.float32:  # summed as the forward did: a score of 100 that differs in its last bit shows
        s, slope = capped(tl.trans(across(q_rows, k_rows, PRECISION)), rules)
    else:
        s, slope = capped(across(k_rows, q_rows, PRECISION), rules)  # [BLOCK_K, BLOCK_Q]
    p = exponential(s, m[None, :], rules) * inverse[None, :]
    if rules.mask is not None:
        p = tl.where(allowed[:, None], p, 0.0)  # a key that is only not there has rows of its own, never written
    dv_rows = add_product(dv_rows, _dropped_across(p, rules, rows, first, BLOCK_K), do_rows, PRECISION)
    dp = _dropped_across(across(v_rows, do_rows, PRECISION), rules, rows, first, BLOCK_K)
    ds = times_slope(p * (dp - delta[None, :]), slope)
    return add_product(dk_rows, ds, q_rows, PRECISION), dv_rows
