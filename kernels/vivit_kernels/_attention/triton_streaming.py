"""Streaming regime: sequences of any length, keys block by block with an online softmax.

A length that is no multiple of a block ends in a smaller one, for queries and for keys: 196 in blocks of 64 are
3 x 64 + 16, not 4 x 64.

Forward leaves the lse of every query to the backward (in float32 its parts: their sum would round a score of 100 to
1e-5, more than float32 attention errs). Backward takes two passes: over blocks of queries for dq, which also leaves
delta = sum(do * o) of every query behind, then over blocks of keys for dk and dv. That multiplies seven times where one
pass with atomic additions to dq would five times, and gives the same bits in every run.
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
    exponential,
    load_stats,
    may_attend,
    reciprocal,
    rotated,
    row_products,
    scaled_rows,
    store_rows,
    store_stats,
    times_slope,
    weights,
    zero_rows,
)
from .triton_sequences import block_rows, described_rows, sequence_place, token_offsets


@triton.jit
def _forbid(s, rules, at, valid, WHOLE: tl.constexpr):
    """Scores `[M, COUNT]`, minus infinity where the key is masked or not there."""
    if WHOLE and rules.mask is None:
        return s
    else:
        return tl.where(may_attend(rules, at, valid)[None, :], s, float("-inf"))


@triton.jit
def _dropped(x, rules, rows, start, COUNT: tl.constexpr):
    """x `[M, COUNT]` over the keys start, start + 1, ..."""
    keys = start + tl.arange(0, COUNT)
    return dropped(x, rules, rows, keys, start // 4 + tl.arange(0, COUNT // 4))


@triton.jit
def _step(
    q_rows, k, v, keys, sizes, rules, b, g, h, rows, start, N_k, m, total, sums, WHOLE: tl.constexpr,
    TIME: tl.constexpr, BLOCK_K: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys of the forward: (largest score, sum of exponentials, weighted sum of V) with it."""
    k_rows, valid, n = block_rows(
        k, sizes, rules, b, g, h, start, N_k, sizes.S_k, True, WHOLE, TIME, BLOCK_K, COLS, UNIT
    )
    # what is loaded by addresses and then by TMA, the compiler loads once: nothing uses the first
    if keys is not None:
        k_rows = described_rows(keys[0], b, g, h, start, BLOCK_K, COLS)
    s, _ = capped(across(q_rows, k_rows, PRECISION), rules)
    s = _forbid(s, rules, b * sizes.T * sizes.S_k + n, valid, WHOLE)
    new_m = tl.maximum(m, tl.max(s, 1))
    if rules.mask is None:
        safe = new_m
    else:
        safe = tl.where(new_m == float("-inf"), 0.0, new_m)  # no key yet
    p = exponential(s, safe[:, None], rules)
    shrink = exponential(m, safe, rules)
    total = total * shrink + tl.sum(p, 1)
    v_rows, _, _ = block_rows(v, sizes, rules, b, g, h, start, N_k, sizes.S_k, False, WHOLE, TIME, BLOCK_K, COLS, UNIT)
    if keys is not None:
        v_rows = described_rows(keys[1], b, g, h, start, BLOCK_K, COLS)
    kept = _dropped(p, rules, rows, start, BLOCK_K)
    return new_m, total, add_product(scaled_rows(sums, shrink[:, None]), kept, v_rows, PRECISION)


@triton.jit
def _attend(
    q, k, v, o, stats, keys, sizes, rules, b, g, h, first, N, N_k,
    TIME: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr,
    COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of the queries first, first + 1, ... of a sequence."""
    q_rows, valid, n = block_rows(q, sizes, rules, b, g, h, first, N, sizes.S, True, False, TIME, BLOCK_Q, COLS, UNIT)
    rows = (b * sizes.H + h) * sizes.T * sizes.S + n
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    sums = zero_rows(BLOCK_Q, COLS)
    whole = N_k // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        m, total, sums = _step(
            q_rows, k, v, keys, sizes, rules, b, g, h, rows, start, N_k, m, total, sums, True, TIME,
            BLOCK_K, COLS, UNIT, PRECISION,
        )  # fmt: skip
    if TAIL_K:
        m, total, sums = _step(
            q_rows, k, v, None, sizes, rules, b, g, h, rows, whole, N_k, m, total, sums, False, TIME,
            TAIL_K, COLS, UNIT, PRECISION,
        )  # fmt: skip
    i = (first + tl.arange(0, BLOCK_Q)).to(tl.int64)
    sums = scaled_rows(sums, reciprocal(total)[:, None])
    store_rows(o, token_offsets(o, b, g, i, h, TIME, UNIT), valid, sums, COLS)
    if stats is not None:
        store_stats(stats, rows, valid, tl.where(m == float("-inf"), 0.0, m), total, rules)


@triton.jit
def streaming_fwd(
    program, q, k, v, o, stats, keys, sizes, rules, first_head, heads, N, N_k,
    TIME: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_Q: tl.constexpr, TAIL_K: tl.constexpr,
    COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes o of one block of queries, and where stats is not None what a backward reads of them.

    keys: descriptors of k and v, by which TMA loads whole blocks of them, or None."""
    blocks = tl.cdiv(N, BLOCK_Q)
    b, g, h = sequence_place(program // blocks, sizes, first_head, heads, TIME)
    first = program % blocks * BLOCK_Q
    if TAIL_Q == 0 or TAIL_Q == BLOCK_Q:
        _attend(
            q, k, v, o, stats, keys, sizes, rules, b, g, h, first, N, N_k,
            TIME, BLOCK_Q, BLOCK_K, TAIL_K, COLS, UNIT, PRECISION,
        )  # fmt: skip
    elif program % blocks == blocks - 1:
        _attend(
            q, k, v, o, stats, keys, sizes, rules, b, g, h, first, N, N_k,
            TIME, TAIL_Q, BLOCK_K, TAIL_K, COLS, UNIT, PRECISION,
        )  # fmt: skip
    else:
        _attend(
            q, k, v, o, stats, keys, sizes, rules, b, g, h, first, N, N_k,
            TIME, BLOCK_Q, BLOCK_K, TAIL_K, COLS, UNIT, PRECISION,
        )  # fmt: skip


@triton.jit
def _step_queries(
    q_rows, do_rows, k, v, sizes, rules, b, g, h, rows, start, N_k, stats, delta, dq_rows,
    EXACT: tl.constexpr, WHOLE: tl.constexpr, TIME: tl.constexpr,
    BLOCK_K: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys for dq: (delta, dq with the block's share). EXACT: it is the only one, delta comes of it."""
    k_rows, valid, n = block_rows(
        k, sizes, rules, b, g, h, start, N_k, sizes.S_k, True, WHOLE, TIME, BLOCK_K, COLS, UNIT
    )
    v_rows, _, _ = block_rows(v, sizes, rules, b, g, h, start, N_k, sizes.S_k, False, WHOLE, TIME, BLOCK_K, COLS, UNIT)
    s, slope = capped(across(q_rows, k_rows, PRECISION), rules)
    s = _forbid(s, rules, b * sizes.T * sizes.S_k + n, valid, WHOLE)
    p = weights(s, stats, rules, True)
    dp = _dropped(across(do_rows, v_rows, PRECISION), rules, rows, start, BLOCK_K)
    if EXACT:
        delta = tl.sum(p * dp, 1)
    ds = times_slope(p * (dp - delta[:, None]), slope)
    return delta, add_product(dq_rows, ds, k_rows, PRECISION)


@triton.jit
def _gradient_of_queries(
    do, q, k, v, o, dq, stats, delta_ptr, sizes, rules, b, g, h, first, N, N_k,
    TIME: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr, EXACT: tl.constexpr,
    COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and delta of the queries first, first + 1, ... of a sequence.

    EXACT: all keys fit in one block, delta = sum(p * dp) comes of it, without the rounding of o."""
    q_rows, valid, n = block_rows(q, sizes, rules, b, g, h, first, N, sizes.S, True, False, TIME, BLOCK_Q, COLS, UNIT)
    do_rows, valid, n = block_rows(
        do, sizes, rules, b, g, h, first, N, sizes.S, False, False, TIME, BLOCK_Q, COLS, UNIT
    )
    rows = (b * sizes.H + h) * sizes.T * sizes.S + n
    stats_rows = load_stats(stats, rows, valid, rules)
    dq_rows = zero_rows(BLOCK_Q, COLS)
    if EXACT:
        delta, dq_rows = _step_queries(
            q_rows, do_rows, k, v, sizes, rules, b, g, h, rows, 0, N_k, stats_rows, stats_rows[0], dq_rows,
            True, False, TIME, EXACT, COLS, UNIT, PRECISION,
        )  # fmt: skip
    else:
        o_rows, valid, n = block_rows(
            o, sizes, rules, b, g, h, first, N, sizes.S, False, False, TIME, BLOCK_Q, COLS, UNIT
        )
        delta = row_products(do_rows, o_rows)
        whole = N_k // BLOCK_K * BLOCK_K
        for start in range(0, whole, BLOCK_K):
            delta, dq_rows = _step_queries(
                q_rows, do_rows, k, v, sizes, rules, b, g, h, rows, start, N_k, stats_rows, delta, dq_rows,
                False, True, TIME, BLOCK_K, COLS, UNIT, PRECISION,
            )  # fmt: skip
        if TAIL_K:
            delta, dq_rows = _step_queries(
                q_rows, do_rows, k, v, sizes, rules, b, g, h, rows, whole, N_k, stats_rows, delta, dq_rows,
                False, False, TIME, TAIL_K, COLS, UNIT, PRECISION,
            )  # fmt: skip
    tl.store(delta_ptr + rows, delta, mask=valid)
    dq_rows = rotated(scaled_rows(dq_rows, rules.slope), rules, n, valid, -1, COLS)
    i = (first + tl.arange(0, BLOCK_Q)).to(tl.int64)
    store_rows(dq, token_offsets(dq, b, g, i, h, TIME, UNIT), valid, dq_rows, COLS)


@triton.jit
def streaming_bwd_queries(
    program, do, q, k, v, o, dq, stats, delta, sizes, rules, first_head, heads, N, N_k,
    TIME: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_Q: tl.constexpr, TAIL_K: tl.constexpr,
    EXACT: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes dq and delta of one block of queries."""
    blocks = tl.cdiv(N, BLOCK_Q)
    b, g, h = sequence_place(program // blocks, sizes, first_head, heads, TIME)
    first = program % blocks * BLOCK_Q
    if TAIL_Q == 0 or TAIL_Q == BLOCK_Q:
        _gradient_of_queries(
            do, q, k, v, o, dq, stats, delta, sizes, rules, b, g, h, first, N, N_k,
            TIME, BLOCK_Q, BLOCK_K, TAIL_K, EXACT, COLS, UNIT, PRECISION,
        )  # fmt: skip
    elif program % blocks == blocks - 1:
        _gradient_of_queries(
            do, q, k, v, o, dq, stats, delta, sizes, rules, b, g, h, first, N, N_k,
            TIME, TAIL_Q, BLOCK_K, TAIL_K, EXACT, COLS, UNIT, PRECISION,
        )  # fmt: skip
    else:
        _gradient_of_queries(
            do, q, k, v, o, dq, stats, delta, sizes, rules, b, g, h, first, N, N_k,
            TIME, BLOCK_Q, BLOCK_K, TAIL_K, EXACT, COLS, UNIT, PRECISION,
        )  # fmt: skip


@triton.jit
def _keys_first(q_rows, k_rows, rules, PRECISION: tl.constexpr):
    """k q^T `[BLOCK_K, BLOCK_Q]`; if exact, summed as the other pass did: what must cancel differs in no bit."""
    if rules.exact is not None:
        return tl.trans(across(q_rows, k_rows, PRECISION))
    else:
        return across(k_rows, q_rows, PRECISION)


@triton.jit
def _step_keys(
    k_rows, v_rows, allowed, do, q, stats, delta, sizes, rules, b, g, h, first, start, N, dk_rows, dv_rows,
    WHOLE: tl.constexpr, TIME: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries for (dk, dv) of a block of keys first, ...: both with its share.

    Scores lie keys first, so that no product has to transpose them."""
    q_rows, valid, n = block_rows(q, sizes, rules, b, g, h, start, N, sizes.S, True, WHOLE, TIME, BLOCK_Q, COLS, UNIT)
    do_rows, valid, n = block_rows(
        do, sizes, rules, b, g, h, start, N, sizes.S, False, WHOLE, TIME, BLOCK_Q, COLS, UNIT
    )
    rows = (b * sizes.H + h) * sizes.T * sizes.S + n
    stats_rows = load_stats(stats, rows, valid, rules)
    delta_rows = tl.load(delta + rows, mask=valid, other=0.0)
    s, slope = capped(_keys_first(q_rows, k_rows, rules, PRECISION), rules)
    p = weights(s, stats_rows, rules, False)
    if rules.mask is not None:
        p = tl.where(allowed[:, None], p, 0.0)  # a key that is only not there has rows of its own, never written
    dv_rows = add_product(dv_rows, _dropped_across(p, rules, rows, first, BLOCK_K), do_rows, PRECISION)
    dp = _dropped_across(_keys_first(do_rows, v_rows, rules, PRECISION), rules, rows, first, BLOCK_K)
    ds = times_slope(p * (dp - delta_rows[None, :]), slope)
    return add_product(dk_rows, ds, q_rows, PRECISION), dv_rows


@triton.jit
def _dropped_across(x, rules, rows, start, COUNT: tl.constexpr):
    """`dropped` of scores that lie keys first, `[COUNT, M]`."""
    if rules.seed is None:
        return x
    else:
        return tl.trans(_dropped(tl.trans(x), rules, rows, start, COUNT))


@triton.jit
def _gradients_of_keys(
    do, q, k, v, dk, dv, stats, delta, sizes, rules, b, g, h, first, N, N_k,
    TIME: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_Q: tl.constexpr,
    COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of the keys first, first + 1, ... of a sequence."""
    k_rows, valid, n = block_rows(
        k, sizes, rules, b, g, h, first, N_k, sizes.S_k, True, False, TIME, BLOCK_K, COLS, UNIT
    )
    v_rows, valid, n = block_rows(
        v, sizes, rules, b, g, h, first, N_k, sizes.S_k, False, False, TIME, BLOCK_K, COLS, UNIT
    )
    allowed = may_attend(rules, b * sizes.T * sizes.S_k + n, valid)
    dk_rows = zero_rows(BLOCK_K, COLS)
    dv_rows = zero_rows(BLOCK_K, COLS)
    whole = N // BLOCK_Q * BLOCK_Q
    for start in range(0, whole, BLOCK_Q):
        dk_rows, dv_rows = _step_keys(
            k_rows, v_rows, allowed, do, q, stats, delta, sizes, rules, b, g, h, first, start, N, dk_rows, dv_rows,
            True, TIME, BLOCK_Q, BLOCK_K, COLS, UNIT, PRECISION,
        )  # fmt: skip
    if TAIL_Q:
        dk_rows, dv_rows = _step_keys(
            k_rows, v_rows, allowed, do, q, stats, delta, sizes, rules, b, g, h, first, whole, N, dk_rows, dv_rows,
            False, TIME, TAIL_Q, BLOCK_K, COLS, UNIT, PRECISION,
        )  # fmt: skip
    j = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
    dk_rows = rotated(scaled_rows(dk_rows, rules.slope), rules, n, valid, -1, COLS)
    store_rows(dk, token_offsets(dk, b, g, j, h, TIME, UNIT), valid, dk_rows, COLS)
    store_rows(dv, token_offsets(dv, b, g, j, h, TIME, UNIT), valid, dv_rows, COLS)


@triton.jit
def streaming_bwd_keys(
    program, do, q, k, v, dk, dv, stats, delta, sizes, rules, first_head, heads, N, N_k,
    TIME: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_Q: tl.constexpr, TAIL_K: tl.constexpr,
    COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes dk and dv of one block of keys."""
    blocks = tl.cdiv(N_k, BLOCK_K)
    b, g, h = sequence_place(program // blocks, sizes, first_head, heads, TIME)
    first = program % blocks * BLOCK_K
    if TAIL_K == 0 or TAIL_K == BLOCK_K:
        _gradients_of_keys(
            do, q, k, v, dk, dv, stats, delta, sizes, rules, b, g, h, first, N, N_k,
            TIME, BLOCK_Q, BLOCK_K, TAIL_Q, COLS, UNIT, PRECISION,
        )  # fmt: skip
    elif program % blocks == blocks - 1:
        _gradients_of_keys(
            do, q, k, v, dk, dv, stats, delta, sizes, rules, b, g, h, first, N, N_k,
            TIME, BLOCK_Q, TAIL_K, TAIL_Q, COLS, UNIT, PRECISION,
        )  # fmt: skip
    else:
        _gradients_of_keys(
            do, q, k, v, dk, dv, stats, delta, sizes, rules, b, g, h, first, N, N_k,
            TIME, BLOCK_Q, BLOCK_K, TAIL_Q, COLS, UNIT, PRECISION,
        )  # fmt: skip
