"""Device functions that all Triton attention kernels share: rows of the token sizes, scores, soft-cap, dropout, rotary.

A row is one token of one head. Its D channels lie in *columns*: one or two pieces, each a power of two wide, because
Triton's tiles are (D = 80 is 64 + 16, not 128); a tile of rows is a tuple of those pieces. With a rotary embedding the
pieces are the two halves of D, so that a pair (i, i + D/2) lies at one place of both. COLS names them:
((first channel, width, channels in use), ...); what is wider than its channels is filled with zeros, never read.

Many keys are likewise a tuple of pieces, KEYS: 196 keys are 128 + 64 + 16, not 256.

An option that is off is None, and everything about it vanishes when the kernel is compiled.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# (it takes a device function for one that never returns, and a compile-time value for no sequence)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class View(NamedTuple):
    """A grid `[B, T, S, H, D]` in memory; strides in units of UNIT elements, so that the compiler sees aligned rows."""

    ptr: Any
    b: int
    t: int
    s: int
    h: int


class Sizes(NamedTuple):
    """Sizes. S_k: tokens of a frame on the side of k and v, where it may differ from q's."""

    B: int
    T: int
    S: int
    S_k: int
    H: int


class Rules(NamedTuple):
    """Options of a call, see options.py; None where they are off.

    scale: of q.k to scores; None where it is positive and there is no soft-cap: then q.k itself is the score, its scale
        part of the unit. With a soft-cap, of q.k to scores / cap. cap: the soft-cap.
    unit: of scores to powers of two. exact: subtract the largest score before multiplying by the unit, else in one FMA:
        in float32 the latter would round a score of 100 to 1e-5.
    slope: of a score by q.k, for gradients. mask: bytes `[B, tokens]`. seed: (seed, offset).
    threshold, keep: a pair stays iff its bits >= threshold, times `keep`. cos, sin: fp32 `[tokens, D/2]`.
    """

    unit: float
    exact: int | None
    scale: float | None
    slope: float
    cap: float | None
    mask: Any
    seed: Any
    threshold: int | None
    keep: float | None
    cos: Any
    sin: Any


# ---- rows ----


@triton.jit
def offsets(x, b, t, s, h, UNIT: tl.constexpr):
    """Where rows begin, in elements: int64, as all of its terms."""
    return (b * x.b + t * x.t + s * x.s + h * x.h) * UNIT


@triton.jit
def _mask(valid, columns, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    m = valid[:, None]
    if COUNT < WIDTH:
        m = m & (columns < COUNT)[None, :]
    return m


@triton.jit
def _load_piece(ptr, at, valid, START: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    c = tl.arange(0, WIDTH)
    # [rows, WIDTH]
    return tl.load(ptr + at[:, None] + (START + c)[None, :], mask=_mask(valid, c, WIDTH, COUNT), other=0.0)


@triton.jit
def _store_piece(ptr, at, valid, x, START: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    c = tl.arange(0, WIDTH)
    # [rows, WIDTH]
    tl.store(ptr + at[:, None] + (START + c)[None, :], x, mask=_mask(valid, c, WIDTH, COUNT))


@triton.jit
def load_rows(x, at, valid, COLS: tl.constexpr):
    """Rows that are not valid are zero: of what lies there, 0 * NaN would spread."""
    rows = ()
    for i in tl.static_range(len(COLS)):
        rows = rows + (_load_piece(x.ptr, at, valid, COLS[i][0], COLS[i][1], COLS[i][2]),)
    return rows


@triton.jit
def store_rows(x, at, valid, rows, COLS: tl.constexpr):
    for i in tl.static_range(len(COLS)):
        value = rows[i].to(x.ptr.dtype.element_ty)
        _store_piece(x.ptr, at, valid, value, COLS[i][0], COLS[i][1], COLS[i][2])


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def zero_rows(ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = ()
    for i in tl.static_range(len(COLS)):
        rows = rows + (_zeros(ROWS, COLS[i][1]),)
    return rows


@triton.jit
def scaled_rows(rows, factor):
    scaled = ()
    for i in tl.static_range(len(rows)):
        scaled = scaled + (rows[i] * factor,)
    return scaled


@triton.jit
def rotated(rows, rules, tokens, valid, SIGN: tl.constexpr, COLS: tl.constexpr):
    """Rows turned by the tables' angles (SIGN 1), or gradients turned back (-1), in fp32 and rounded as they came."""
    if rules.cos is None:
        return rows
    else:
        at = tokens * COLS[0][2]  # the two pieces are the halves of D
        cos = _load_piece(rules.cos, at, valid, 0, COLS[0][1], COLS[0][2])
        sin = _load_piece(rules.sin, at, valid, 0, COLS[0][1], COLS[0][2]) * SIGN
        a = rows[0].to(tl.float32)
        b = rows[1].to(tl.float32)
        return ((a * cos - b * sin).to(rows[0].dtype), (b * cos + a * sin).to(rows[0].dtype))


# ---- products ----


@triton.jit
def across(a, b, PRECISION: tl.constexpr):
    """a `[M, D]`, b `[N, D]` -> a b^T `[M, N]`, fp32."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=PRECISION)
    return s


@triton.jit
def add_product(total, p, b, PRECISION: tl.constexpr):
    """total `[M, D]` + p `[M, N]` b `[N, D]`, p rounded to b's dtype as a product of 16-bit tensors has it."""
    sums = ()
    for i in tl.static_range(len(b)):
        sums = sums + (tl.dot(p.to(b[i].dtype), b[i], total[i], input_precision=PRECISION),)
    return sums


# ---- scores to probabilities ----


@triton.jit
def _tanh(x):
    """In fp32: the quotient loses digits near 0, where six terms of the series have all."""
    x2 = x * x
    series = x2 * (0.1333333333 + x2 * (-0.0539682540 + x2 * (0.0218694885 - x2 * 0.0088632355)))
    series = x + x * (x2 * (series - 0.3333333333))
    quotient = 1 - 2 / (1 + tl.exp2(x * 2.8853900817779268))
    return tl.where(tl.abs(x) < 0.3, series, quotient)


@triton.jit
def capped(s, rules):
    """q.k -> (scores, but for the unit; their slope by q.k, but for rules.slope: a tuple, empty where it is 1)."""
    if rules.cap is not None:
        bent = _tanh(s * rules.scale)
        return bent * rules.cap, (1 - bent * bent,)
    elif rules.scale is not None:
        return s * rules.scale, ()
    else:
        return s, ()


@triton.jit
def times_slope(ds, slope):
    for i in tl.static_range(len(slope)):
        ds = ds * slope[i]
    return ds


@triton.jit
def exponential(scores, m, rules):
    """e to the power of scores - m; both as `capped` leaves them."""
    if rules.exact is not None:
        return tl.exp2((scores - m) * rules.unit)
    else:
        return tl.exp2(scores * rules.unit - m * rules.unit)


@triton.jit
def may_attend(rules, at, valid):
    """Which keys may be attended; `at` is their place in the mask."""
    if rules.mask is None:
        return valid
    else:
        return valid & (tl.load(rules.mask + at, mask=valid, other=0) != 0)


@triton.jit
def reciprocal(total):
    """1 / sum; 0 for a row without keys, whose output is zero."""
    return tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)


@triton.jit
def store_stats(stats, rows, valid, m, total, rules):
    """What a backward that reads o reads, too, of every query: its largest score and its sum of exponentials; if not
    exact, the one number that takes their place, infinite where there is no key."""
    if rules.exact is not None:
        tl.store(stats[0] + rows, m, mask=valid)
        tl.store(stats[1] + rows, total, mask=valid)
    else:
        lse = m * rules.unit + tl.log2(tl.where(total > 0, total, 1.0))
        tl.store(stats[0] + rows, tl.where(total > 0, lse, float("inf")), mask=valid)


@triton.jit
def load_stats(stats, rows, valid, rules):
    """A tuple for `weights`; of queries that are not there such that nothing counts."""
    if rules.exact is not None:
        m = tl.load(stats[0] + rows, mask=valid, other=0.0)
        return (m, reciprocal(tl.load(stats[1] + rows, mask=valid, other=0.0)))
    else:
        return (tl.load(stats[0] + rows, mask=valid, other=float("inf")),)


@triton.jit
def weights(scores, stats, rules, QUERIES_FIRST: tl.constexpr):
    """Probabilities, before dropout, from scores and the statistics of their queries."""
    if QUERIES_FIRST:
        first = stats[0][:, None]
    else:
        first = stats[0][None, :]
    if rules.exact is None:
        return tl.exp2(scores * rules.unit - first)
    elif QUERIES_FIRST:
        return exponential(scores, first, rules) * stats[1][:, None]
    else:
        return exponential(scores, first, rules) * stats[1][None, :]


@triton.jit
def row_products(a, b):
    """sum over channels of a * b, `[M]`, fp32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total


# ---- dropout ----


@triton.jit
def _words(rules, rows, groups):
    """Philox words 0 to 3 for query rows and groups of four keys, see _philox.py."""
    seed = tl.load(rules.seed)
    offset = (tl.load(rules.seed + 1) & 0xFFFFFFFF).to(tl.uint32)
    zero = rows.to(tl.uint32) * 0 + groups.to(tl.uint32) * 0
    low = zero + (rows & 0xFFFFFFFF).to(tl.uint32)
    high = zero + ((rows >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, zero + groups.to(tl.uint32), zero + offset, low, high)


@triton.jit
def dropped_by_key(x, rules, rows, keys):
    """x `[M, N]` for query rows `[M, 1]` or `[1, N]` and keys in any order, four times the integer work."""
    if rules.seed is None:
        return x
    else:
        w0, w1, w2, w3 = _words(rules, rows, keys // 4)
        bits = tl.where(keys % 4 < 2, tl.where(keys % 4 == 0, w0, w1), tl.where(keys % 4 == 2, w2, w3))
        return tl.where(bits >= tl.cast(rules.threshold, tl.uint32), x * rules.keep, 0.0)


@triton.jit
def dropped(x, rules, rows, keys, groups):
    """x `[M, N]` dropped for query rows `[M]` and keys `[N]`; groups `[N/4]`: their numbers by fours (4g, ..., 4g + 3),
    which share a Philox call.

    Not in tiles of 16, where the joined words came out in another order on a GPU (sm_90, Triton 3.6)."""
    if rules.seed is None:
        return x
    elif x.shape[0] <= 16 or x.shape[1] <= 16:
        return dropped_by_key(x, rules, rows[:, None], keys[None, :])
    else:
        w0, w1, w2, w3 = _words(rules, rows[:, None], groups[None, :])  # [M, N/4]
        bits = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [x.shape[0], x.shape[1]])  # key 4g + w: word w
        return tl.where(bits >= tl.cast(rules.threshold, tl.uint32), x * rules.keep, 0.0)
