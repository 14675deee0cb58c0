"""Resident regime, forward: all keys of a sequence on chip, softmax exact in one pass, no running maximum.

A program takes one sequence (one head of one frame or position) and walks over its queries block by block; K and V are
read once and stay in shared memory. The keys lie in pieces, each a power of two: 196 are 128 + 64 + 16.

There is no resident backward: with dk and dv of all keys in registers, or s and dp of all keys, Triton 3.6 spilled 100
to 700 registers with every tile tried (sm_90, 196 x 64), and one program that walks twice over its sequence was no
faster than the two launches of triton_streaming.py (385 against 333 us, 1536 sequences of 196 x 64, H200).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_device import (
    across,
    add_product,
    capped,
    dropped,
    exponentials,
    load_rows,
    may_attend,
    reciprocal,
    rotated,
    row_maximum,
    scaled_rows,
    store_rows,
    store_stats,
    zero_rows,
)
from .triton_sequences import clip_tokens, sequence_place, token_offsets


@triton.jit
def _piece(x, b, g, h, N, FIRST: tl.constexpr, COUNT: tl.constexpr, TIME: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    i = FIRST + tl.arange(0, COUNT).to(tl.int64)
    return load_rows(x, token_offsets(x, b, g, i, h, TIME, UNIT), i < N, COLS)


@triton.jit
def _turned_piece(rows, sizes, rules, g, N, SIGN: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, TIME: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    i = FIRST + tl.arange(0, COUNT).to(tl.int64)
    return rotated(rows, rules, clip_tokens(g, i, sizes.S_k, TIME), i < N, SIGN, COLS)


@triton.jit
def _allowed(rules, sizes, b, g, N, FIRST: tl.constexpr, COUNT: tl.constexpr, TIME: tl.constexpr):
    i = FIRST + tl.arange(0, COUNT).to(tl.int64)
    return may_attend(rules, b * sizes.T * sizes.S_k + clip_tokens(g, i, sizes.S_k, TIME), i < N)


@triton.jit
def _dropped_piece(x, rules, rows, FIRST: tl.constexpr, COUNT: tl.constexpr):
    return dropped(x, rules, rows, FIRST // 4 + tl.arange(0, COUNT // 4))


@triton.jit
def _keys(k, v, sizes, rules, b, g, h, N, TIME: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """K, V and which keys may be attended, each a tuple over the pieces of KEYS ((first, count), ...)."""
    k_all = ()
    v_all = ()
    allowed = ()
    for j in tl.static_range(len(KEYS)):
        piece = _piece(k, b, g, h, N, KEYS[j][0], KEYS[j][1], TIME, COLS, UNIT)
        k_all = k_all + (_turned_piece(piece, sizes, rules, g, N, 1, KEYS[j][0], KEYS[j][1], TIME, COLS),)
        v_all = v_all + (_piece(v, b, g, h, N, KEYS[j][0], KEYS[j][1], TIME, COLS, UNIT),)
        allowed = allowed + (_allowed(rules, sizes, b, g, N, KEYS[j][0], KEYS[j][1], TIME),)
    return k_all, v_all, allowed


@triton.jit
def _scores(q, k, allowed, rules, PRECISION: tl.constexpr):
    """Of a block of queries to one piece of the keys: (scores, slope)."""
    s, slope = capped(across(q, k, PRECISION), rules)
    return tl.where(allowed[None, :], s, float("-inf")), slope


@triton.jit
def _probabilities(q, k_all, allowed, rules, PRECISION: tl.constexpr):
    """Of a block of queries to all keys: (exponentials by pieces, their sums and the largest scores of rows)."""
    scores = ()
    for j in tl.static_range(len(k_all)):
        s, _ = _scores(q, k_all[j], allowed[j], rules, PRECISION)
        scores = scores + (s,)
    m = row_maximum(scores)
    p, total = exponentials(scores, m, rules)
    return p, total, m


@triton.jit
def resident_fwd(
    program, q, k, v, o, stats, sizes, rules, first_head, heads, N,
    TIME: tl.constexpr, BLOCK_Q: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
    COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes o of one sequence, or of every PARTS-th block of its queries; and where asked its statistics."""
    b, g, h = sequence_place(program // PARTS, sizes, first_head, heads, TIME)
    k_all, v_all, allowed = _keys(k, v, sizes, rules, b, g, h, N, TIME, KEYS, COLS, UNIT)
    for start in range(program % PARTS * BLOCK_Q, N, PARTS * BLOCK_Q):
        i = (start + tl.arange(0, BLOCK_Q)).to(tl.int64)
        n = clip_tokens(g, i, sizes.S, TIME)
        q_rows = load_rows(q, token_offsets(q, b, g, i, h, TIME, UNIT), i < N, COLS)
        q_rows = rotated(q_rows, rules, n, i < N, 1, COLS)
        p, total, m = _probabilities(q_rows, k_all, allowed, rules, PRECISION)
        rows = (b * sizes.H + h) * sizes.T * sizes.S + n
        sums = zero_rows(BLOCK_Q, COLS)
        for j in tl.static_range(len(KEYS)):
            kept = _dropped_piece(p[j], rules, rows, KEYS[j][0], KEYS[j][1])
            sums = add_product(sums, kept, v_all[j], PRECISION)
        sums = scaled_rows(sums, reciprocal(total)[:, None])
        store_rows(o, token_offsets(o, b, g, i, h, TIME, UNIT), i < N, sums, COLS)
        if stats is not None:
            store_stats(stats, rows, i < N, m, total, rules)
