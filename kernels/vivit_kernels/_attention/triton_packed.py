"""Packed and resident regimes: whole sequences in one tile of rows, all scores of a tile at once.

Row r of a tile is token r % N of its sequence r // N, so a tile of 64 rows holds four sequences of 16 tokens or two of
25 with 14 rows to spare; scores between different sequences are masked. That multiplies more than needed, which costs
nothing here: the time is that of reading and writing. Neighbouring sequences are heads of one position, whose rows lie
side by side in memory. A resident sequence has a tile of 128 rows to itself. Softmax is exact in one pass; backward
recomputes it and needs neither o nor lse, no workspace and no atomics.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# (it takes a device function for one that never returns, and a compile-time value for no sequence)

from __future__ import annotations

import triton
import triton.language as tl

from .triton_device import (
    across,
    add_product,
    capped,
    dropped,
    dropped_by_key,
    exponential,
    load_rows,
    may_attend,
    offsets,
    reciprocal,
    rotated,
    scaled_rows,
    store_rows,
    store_stats,
    times_slope,
    zero_rows,
)


@triton.jit
def _place(program, sizes, first_head, heads, TIME: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr):
    """Of each row of a tile: which of its sequences, token of the sequence, valid, then b, t, s, h, all `[ROWS]`."""
    PER_TILE: tl.constexpr = ROWS // N
    r = tl.arange(0, ROWS)
    sequence = program * PER_TILE + r // N
    if TIME:
        groups = sizes.S
    else:
        groups = sizes.T
    valid = (r < PER_TILE * N) & (sequence < sizes.B * groups * heads)
    i = (r % N).to(tl.int64)
    h = (first_head + sequence % heads).to(tl.int64)
    g = (sequence // heads % groups).to(tl.int64)
    b = (sequence // heads // groups).to(tl.int64)
    if TIME:
        return r // N, i, valid, b, i, g, h
    else:
        return r // N, i, valid, b, g, i, h


@triton.jit
def _dropped(x, rules, rows, i, N: tl.constexpr, ROWS: tl.constexpr):
    """`[ROWS, ROWS]`; where fours of columns are fours of keys, by shared calls."""
    if ROWS // N == 1:
        return dropped(x, rules, rows, tl.arange(0, ROWS), tl.arange(0, ROWS // 4))
    elif N % 4 == 0:
        return dropped(x, rules, rows, i, tl.arange(0, ROWS // 4) % (N // 4))
    else:
        return dropped_by_key(x, rules, rows[:, None], i[None, :])


@triton.jit
def _probabilities(q, k, rules, within, allowed, SEVERAL: tl.constexpr, PRECISION: tl.constexpr):
    """Of all rows of a tile to all: (exponentials, largest score and sum per row, slope of the soft-cap)."""
    scores, slope = capped(across(q, k, PRECISION), rules)
    attended = allowed[None, :]
    if SEVERAL:  # sequences in the tile
        attended = (within[:, None] == within[None, :]) & attended
    scores = tl.where(attended, scores, float("-inf"))
    m = tl.max(scores, 1)
    m = tl.where(m == float("-inf"), 0.0, m)  # no key: the exponentials must vanish, not be NaN
    p = exponential(scores, m[:, None], rules)
    return p, m, tl.sum(p, 1), slope


@triton.jit
def _query_rows(sizes, b, t, s, h):
    """(token of the clip, row of all queries that names its dropout)"""
    n = t * sizes.S + s
    return n, (b * sizes.H + h) * sizes.T * sizes.S + n


@triton.jit
def _read(q, k, v, sizes, rules, b, t, s, h, n, valid, COLS: tl.constexpr, UNIT: tl.constexpr):
    """(rows of q and k, turned, and of v; which may be attended as keys)"""
    q_rows = rotated(load_rows(q, offsets(q, b, t, s, h, UNIT), valid, COLS), rules, n, valid, 1, COLS)
    k_rows = rotated(load_rows(k, offsets(k, b, t, s, h, UNIT), valid, COLS), rules, n, valid, 1, COLS)
    v_rows = load_rows(v, offsets(v, b, t, s, h, UNIT), valid, COLS)
    return q_rows, k_rows, v_rows, may_attend(rules, b * sizes.T * sizes.S + n, valid)


@triton.jit
def packed_fwd(
    program, q, k, v, o, stats, sizes, rules, first_head, heads,
    TIME: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes o of the tile's sequences, and where stats is not None what a backward that streams reads of them."""
    within, i, valid, b, t, s, h = _place(program, sizes, first_head, heads, TIME, N, ROWS)
    n, rows = _query_rows(sizes, b, t, s, h)
    q_rows, k_rows, v_rows, allowed = _read(q, k, v, sizes, rules, b, t, s, h, n, valid, COLS, UNIT)
    p, m, total, _ = _probabilities(q_rows, k_rows, rules, within, allowed, ROWS // N > 1, PRECISION)
    p = _dropped(p, rules, rows, i, N, ROWS)
    sums = add_product(zero_rows(ROWS, COLS), p, v_rows, PRECISION)
    store_rows(o, offsets(o, b, t, s, h, UNIT), valid, scaled_rows(sums, reciprocal(total)[:, None]), COLS)
    if stats is not None:
        store_stats(stats, rows, valid, m, total, rules)


@triton.jit
def packed_bwd(
    program, do, q, k, v, o, dq, dk, dv, sizes, rules, first_head, heads, EMIT: tl.constexpr,
    TIME: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes dq, dk and dv of the tile's sequences, and o again if EMIT."""
    within, i, valid, b, t, s, h = _place(program, sizes, first_head, heads, TIME, N, ROWS)
    n, rows = _query_rows(sizes, b, t, s, h)
    q_rows, k_rows, v_rows, allowed = _read(q, k, v, sizes, rules, b, t, s, h, n, valid, COLS, UNIT)
    do_rows = load_rows(do, offsets(do, b, t, s, h, UNIT), valid, COLS)
    p, _, total, slope = _probabilities(q_rows, k_rows, rules, within, allowed, ROWS // N > 1, PRECISION)
    p = p * reciprocal(total)[:, None]
    kept = _dropped(p, rules, rows, i, N, ROWS)
    if EMIT:
        sums = add_product(zero_rows(ROWS, COLS), kept, v_rows, PRECISION)
        store_rows(o, offsets(o, b, t, s, h, UNIT), valid, sums, COLS)

    sums = add_product(zero_rows(ROWS, COLS), tl.trans(kept.to(do_rows[0].dtype)), do_rows, PRECISION)
    store_rows(dv, offsets(dv, b, t, s, h, UNIT), valid, sums, COLS)
    dp = _dropped(across(do_rows, v_rows, PRECISION), rules, rows, i, N, ROWS)
    ds = p * (dp - tl.sum(p * dp, 1)[:, None])  # with dp after dropout exact without o
    ds = times_slope(ds, slope).to(q_rows[0].dtype)
    sums = scaled_rows(add_product(zero_rows(ROWS, COLS), ds, k_rows, PRECISION), rules.slope)
    store_rows(dq, offsets(dq, b, t, s, h, UNIT), valid, rotated(sums, rules, n, valid, -1, COLS), COLS)
    sums = scaled_rows(add_product(zero_rows(ROWS, COLS), tl.trans(ds), q_rows, PRECISION), rules.slope)
    store_rows(dk, offsets(dk, b, t, s, h, UNIT), valid, rotated(sums, rules, n, valid, -1, COLS), COLS)
