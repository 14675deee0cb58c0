"""Attention on the token grid by Triton: the kernels, one launch a direction wherever no sequence has to be streamed.

The first programs take the heads that attend over time, the others those that attend within the frame; each axis has
its own regime (packed, resident, streaming). joint_attention is a grid of one frame.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import precision
from .options import Options
from .triton_device import Rules, Sizes, View
from .triton_packed import packed_bwd, packed_fwd
from .triton_resident import resident_bwd, resident_fwd
from .triton_streaming import streaming_bwd_keys, streaming_bwd_queries, streaming_fwd
from .triton_tiles import PACKED, RESIDENT, STREAMING, Axis, Tiles, columns, placed, power_of_two

_LOG2E = math.log2(math.e)
_MOST_PROGRAMS = 2**31 - 1  # of a one-dimensional sizes, and what the kernels' 32-bit numbers of sequences count to


# ---- kernels ----


@triton.jit
def _axis_fwd(
    program, q, k, v, o, stats, sizes, rules, first_head, heads, N, N_k,
    TIME: tl.constexpr, AXIS: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    REGIME: tl.constexpr = AXIS[0]
    if REGIME == "packed":
        packed_fwd(program, q, k, v, o, sizes, rules, first_head, heads, TIME, AXIS[1], AXIS[2], COLS, UNIT, PRECISION)
    elif REGIME == "resident":
        resident_fwd(
            program, q, k, v, o, stats, sizes, rules, first_head, heads, N, TIME, AXIS[2], KEYS, AXIS[4], COLS,
            UNIT, PRECISION,
        )  # fmt: skip
    else:
        streaming_fwd(
            program, q, k, v, o, stats, sizes, rules, first_head, heads, N, N_k, TIME, AXIS[2], AXIS[3], COLS, UNIT,
            PRECISION,
        )  # fmt: skip


@triton.jit
def grid_fwd(
    q, k, v, o, stats, sizes, rules, temporal_heads, time_programs,
    TIME: tl.constexpr, SPACE: tl.constexpr, TIME_KEYS: tl.constexpr, SPACE_KEYS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of every head. TIME, SPACE: (regime, N if packed, rows, block of keys, parts), None where no head attends
    along it; _KEYS: (first, count) of the pieces of a resident sequence."""
    program = tl.program_id(0)
    if TIME is None:
        _axis_fwd(
            program,
            q,
            k,
            v,
            o,
            stats,
            sizes,
            rules,
            0,
            sizes.H,
            sizes.S,
            sizes.S_k,
            False,
            SPACE,
            SPACE_KEYS,
            COLS,
            UNIT,
            PRECISION,
        )
    elif SPACE is None:
        _axis_fwd(
            program,
            q,
            k,
            v,
            o,
            stats,
            sizes,
            rules,
            0,
            sizes.H,
            sizes.T,
            sizes.T,
            True,
            TIME,
            TIME_KEYS,
            COLS,
            UNIT,
            PRECISION,
        )
    elif program < time_programs:
        _axis_fwd(
            program, q, k, v, o, stats, sizes, rules, 0, temporal_heads, sizes.T, sizes.T, True, TIME, TIME_KEYS, COLS, UNIT,
            PRECISION,
        )  # fmt: skip
    else:
        _axis_fwd(
            program - time_programs, q, k, v, o, stats, sizes, rules, temporal_heads, sizes.H - temporal_heads,
            sizes.S, sizes.S_k, False, SPACE, SPACE_KEYS, COLS, UNIT, PRECISION,
        )  # fmt: skip


@triton.jit
def _axis_bwd(
    program, do, q, k, v, o, dq, dk, dv, stats, delta, sizes, rules, first_head, heads, N, N_k,
    TIME: tl.constexpr, AXIS: tl.constexpr, EMIT: tl.constexpr,
    COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    REGIME: tl.constexpr = AXIS[0]
    if REGIME == "packed":
        packed_bwd(
            program, do, q, k, v, o, dq, dk, dv, sizes, rules, first_head, heads, EMIT, TIME, AXIS[1], AXIS[2], COLS,
            UNIT, PRECISION,
        )  # fmt: skip
    elif REGIME == "resident":
        resident_bwd(
            program, do, q, k, v, o, dq, dk, dv, stats, sizes, rules, first_head, heads, N, TIME, AXIS[2], AXIS[3],
            AXIS[4], COLS, UNIT, PRECISION,
        )  # fmt: skip
    else:
        streaming_bwd_queries(
            program, do, q, k, v, o, dq, stats, delta, sizes, rules, first_head, heads, N, N_k, TIME, AXIS[4],
            AXIS[2], AXIS[3], COLS, UNIT, PRECISION,
        )  # fmt: skip


@triton.jit
def grid_bwd(
    do, q, k, v, o, dq, dk, dv, stats, delta, sizes, rules, temporal_heads, time_programs,
    TIME: tl.constexpr, SPACE: tl.constexpr, EMIT: tl.constexpr,
    COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of packed and resident sequences, and o again if EMIT; of streamed ones dq and delta."""
    program = tl.program_id(0)
    if TIME is None:
        _axis_bwd(
            program, do, q, k, v, o, dq, dk, dv, stats, delta, sizes, rules, 0, sizes.H, sizes.S, sizes.S_k,
            False, SPACE, EMIT, COLS, UNIT, PRECISION,
        )  # fmt: skip
    elif SPACE is None:
        _axis_bwd(
            program, do, q, k, v, o, dq, dk, dv, stats, delta, sizes, rules, 0, sizes.H, sizes.T, sizes.T,
            True, TIME, EMIT, COLS, UNIT, PRECISION,
        )  # fmt: skip
    elif program < time_programs:
        _axis_bwd(
            program, do, q, k, v, o, dq, dk, dv, stats, delta, sizes, rules, 0, temporal_heads, sizes.T, sizes.T,
            True, TIME, EMIT, COLS, UNIT, PRECISION,
        )  # fmt: skip
    else:
        _axis_bwd(
            program - time_programs, do, q, k, v, o, dq, dk, dv, stats, delta, sizes, rules, temporal_heads,
            sizes.H - temporal_heads, sizes.S, sizes.S_k, False, SPACE, EMIT, COLS, UNIT, PRECISION,
        )  # fmt: skip


@triton.jit
def grid_bwd_keys(
    do, q, k, v, dk, dv, stats, delta, sizes, rules, first_head, heads, N, N_k,
    OVER_TIME: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of streamed sequences, after their delta."""
    streaming_bwd_keys(
        tl.program_id(0), do, q, k, v, dk, dv, stats, delta, sizes, rules, first_head, heads, N, N_k,
        OVER_TIME, BLOCK_Q, BLOCK_K, COLS, UNIT, PRECISION,
    )  # fmt: skip


# ---- launches ----


def _rules(options: Options, dtype: torch.dtype) -> Rules:
    scale, softcap, dropout_p, mask, seed, cos, sin = options
    plain = scale > 0 and not softcap
    threshold = min(math.ceil(dropout_p * 2**32), 2**32 - 1)  # p = 1 keeps a pair in 4e9, times 0
    return Rules(
        unit=scale * _LOG2E if plain else _LOG2E,
        exact=1 if dtype == torch.float32 else None,
        scale=None if plain else (scale / softcap if softcap else scale),
        slope=scale,
        cap=softcap or None,
        mask=None if mask is None else mask.contiguous().view(torch.uint8),
        seed=seed,
        threshold=None if seed is None else threshold,
        keep=None if seed is None else (1 / (1 - dropout_p) if dropout_p < 1 else 0.0),
        cos=None if cos is None else cos.contiguous(),
        sin=None if sin is None else sin.contiguous(),
    )


def _unit(*tensors: Tensor | None) -> int:
    """8 where every row begins at a multiple of 8 elements (16 bytes in 16 bits), which the compiler is told so."""
    strides = [stride for x in tensors if x is not None for stride in x.stride()[:-1]]
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


def _view(x: Tensor, unit: int) -> View:
    return View(x, *(stride // unit for stride in x.stride()[:4]))


def _sizes(q: Tensor, k: Tensor) -> Sizes:
    B, T, S, H, _ = q.shape
    return Sizes(B, T, S, k.shape[2], H)


def _programs(axis: Axis | None, sequences: int, N: int) -> int:
    if axis is None:
        return 0
    if axis.regime == PACKED:
        return -(-sequences // (axis.rows // N))
    return sequences * (axis.parts if axis.regime == RESIDENT else -(-N // axis.rows))


def _counted(op: str, q: Tensor, time: int, space: int) -> tuple[int]:
    if time + space > _MOST_PROGRAMS:
        raise ValueError(
            f"{op}: {tuple(q.shape)} makes {time + space} programs of the Triton kernel, {_MOST_PROGRAMS} at most; "
            "give fewer clips a call"
        )
    return (time + space,)


def _axis(axis: Axis | None, N: int, N_k: int, backward: bool) -> tuple | None:
    """The constants of an axis for a kernel."""
    if axis is None:
        return None
    if axis.regime == PACKED:
        return PACKED, N, axis.rows, 0, 1
    if axis.regime == RESIDENT:
        blocks = power_of_two(-(-N // axis.rows), 1)
        return RESIDENT, 0, axis.rows, axis.keys[0], blocks if backward else axis.parts
    return STREAMING, 0, axis.rows, axis.keys[0], N_k <= axis.keys[0] if backward else 1


def _pieces(axis: Axis | None) -> tuple[tuple[int, int], ...] | None:
    return placed(axis.keys) if axis is not None and axis.regime == RESIDENT else None


def _split_stats(stats: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if stats is None else (stats[0], stats[1])


def launch_fwd(
    op: str, q: Tensor, k: Tensor, v: Tensor, temporal_heads: int, options: Options, tile: Tiles, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """q `[B, T, S, H, D]`, k, v `[B, T, S_k, H, D]` -> o, and if `keep` the statistics `[2, B, H, T * S]`."""
    (B, T, S, H, D), unit = q.shape, _unit(q, k, v)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    stats = torch.empty(2, B, H, T * S, dtype=torch.float32, device=q.device) if keep else None
    if not q.numel():
        return o, stats
    time = _programs(tile.time, B * S * temporal_heads, T)
    programs = _counted(op, q, time, _programs(tile.space, B * T * (H - temporal_heads), S))
    with torch.cuda.device_of(q):
        grid_fwd[programs](
            q=_view(q, unit), k=_view(k, unit), v=_view(v, unit), o=_view(o, unit), stats=_split_stats(stats),
            sizes=_sizes(q, k), rules=_rules(options, q.dtype), temporal_heads=temporal_heads, time_programs=time,
            TIME=_axis(tile.time, T, T, False), SPACE=_axis(tile.space, S, k.shape[2], False),
            TIME_KEYS=_pieces(tile.time), SPACE_KEYS=_pieces(tile.space),
            COLS=columns(D, tile.split, options.cos is not None), UNIT=unit, PRECISION=precision(q.dtype),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return o, stats


def launch_bwd(
    op: str, do, q, k, v, o, stats, dq, dk, dv, temporal_heads: int, options: Options, tile: Tiles,
    o_again: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes dq, dk, dv; o and stats are the forward's, read where a sequence is not packed.

    o_again: packed sequences write o again, recomputed, into it."""
    if not q.numel():
        return
    if tile.keeps_output and (o is None or stats is None):
        raise RuntimeError(f"{op}: this backward reads o and statistics; run the forward with keep=True")
    do = do if do.stride(-1) == 1 or do.shape[-1] == 1 else do.contiguous()
    (B, T, S, H, D), S_k = q.shape, k.shape[2]
    o = o_again if tile.keeps_output is False else o
    unit = _unit(do, q, k, v, o, dq, dk, dv)
    views = {name: _view(x, unit) for name, x in (("do", do), ("q", q), ("k", k), ("v", v), ("dk", dk), ("dv", dv))}
    shared = {
        "stats": _split_stats(stats) if tile.keeps_output else None,
        "delta": torch.empty(B, H, T * S, dtype=torch.float32, device=q.device) if tile.streams else None,
        "sizes": _sizes(q, k), "rules": _rules(options, q.dtype), "UNIT": unit, "PRECISION": precision(q.dtype),
    }  # fmt: skip
    halves = options.cos is not None
    time = _programs(tile.time, B * S * temporal_heads, T)
    programs = _counted(op, q, time, _programs(tile.space, B * T * (H - temporal_heads), S))
    with torch.cuda.device_of(q):
        grid_bwd[programs](
            **views, o=None if o is None else _view(o, unit), dq=_view(dq, unit), **shared,
            temporal_heads=temporal_heads, time_programs=time, EMIT=o_again is not None,
            TIME=_axis(tile.time, T, T, True), SPACE=_axis(tile.space, S, S_k, True),
            COLS=columns(D, tile.split, halves), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if tile.keys is None:
            return
        for axis, over_time, first, heads, sequences, N, N_k in (
            (tile.keys.time, True, 0, temporal_heads, B * S, T, T),
            (tile.keys.space, False, temporal_heads, H - temporal_heads, B * T, S, S_k),
        ):
            if axis is None:
                continue
            grid_bwd_keys[_counted(op, q, 0, sequences * heads * -(-N_k // axis.keys[0]))](
                **views, **shared, first_head=first, heads=heads, N=N, N_k=N_k,
                OVER_TIME=over_time, BLOCK_Q=axis.rows, BLOCK_K=axis.keys[0],
                COLS=columns(D, tile.keys.split, halves), num_warps=tile.keys.warps, num_stages=tile.keys.stages,
            )  # fmt: skip
