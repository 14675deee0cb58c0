"""Attention on the token grid by Triton: the kernels, one launch a direction wherever no sequence has to be streamed.

The first programs take the heads that attend over time, the others those that attend within the frame; each axis has
its own regime (packed, resident, streaming). joint_attention is a grid of one frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import _triton
from .._triton import Launch, Plans, aligned, precision
from .options import Options
from .triton_arguments import as_read, descriptors_of, rules_of, sizes_of, strides_of, unit_of
from .triton_device import Rules, View
from .triton_packed import packed_bwd, packed_fwd
from .triton_streaming import streaming_bwd_keys, streaming_bwd_queries, streaming_fwd
from .triton_tiles import STREAMING, Axis, Tiles, columns, has_narrow_piece, power_of_two, statistics

_MOST_PROGRAMS = 2**31 - 1  # of a one-dimensional sizes, and what the kernels' 32-bit numbers of sequences count to


# ---- kernels ----
# fmt: off


@triton.jit
def _axis_fwd(
    program, q, k, v, o, stats, keys, sizes, rules, first_head, heads, N, N_k,
    OVER_TIME: tl.constexpr, AXIS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):
    if AXIS[0] == "packed":
        packed_fwd(
            program, q, k, v, o, None, sizes, rules, first_head, heads,
            OVER_TIME, AXIS[1], AXIS[2], COLS, UNIT, PRECISION,
        )
    elif AXIS[0] == "resident":
        packed_fwd(
            program, q, k, v, o, stats, sizes, rules, first_head, heads,
            OVER_TIME, AXIS[1], AXIS[2], COLS, UNIT, PRECISION,
        )
    else:
        streaming_fwd(
            program, q, k, v, o, stats, keys, sizes, rules, first_head, heads, N, N_k,
            OVER_TIME, AXIS[2], AXIS[3], AXIS[5], AXIS[6], COLS, UNIT, PRECISION,
        )


@triton.jit
def _tile_fwd(
    program, q, k, v, o, stats, keys, sizes, rules, temporal_heads, time_programs,
    TIME: tl.constexpr, SPACE: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):
    """One tile of either axis."""
    if TIME is None:
        _axis_fwd(
            program, q, k, v, o, stats, keys, sizes, rules, 0, sizes.H, sizes.S, sizes.S_k,
            False, SPACE, COLS, UNIT, PRECISION,
        )
    elif SPACE is None:
        _axis_fwd(
            program, q, k, v, o, stats, None, sizes, rules, 0, sizes.H, sizes.T, sizes.T,
            True, TIME, COLS, UNIT, PRECISION,
        )
    elif program < time_programs:
        _axis_fwd(
            program, q, k, v, o, stats, None, sizes, rules, 0, temporal_heads, sizes.T, sizes.T,
            True, TIME, COLS, UNIT, PRECISION,
        )
    else:
        _axis_fwd(
            program - time_programs, q, k, v, o, stats, keys, sizes, rules,
            temporal_heads, sizes.H - temporal_heads, sizes.S, sizes.S_k,
            False, SPACE, COLS, UNIT, PRECISION,
        )


@triton.jit
def grid_fwd(
    q, k, v, o, stats, k_blocks, v_blocks, sizes, rules, temporal_heads, time_programs, tiles,
    TIME: tl.constexpr, SPACE: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):
    """o of every head, and of all but packed sequences, where stats is not None, what a backward reads. TIME, SPACE:
    see `_axis`, None where no head attends along it. tiles: their number, if a program takes one after the other."""
    if k_blocks is None:
        keys = None
    else:
        keys = (k_blocks, v_blocks)
    if tiles is None:
        _tile_fwd(
            tl.program_id(0), q, k, v, o, stats, keys, sizes, rules, temporal_heads, time_programs,
            TIME, SPACE, COLS, UNIT, PRECISION,
        )
    else:
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _tile_fwd(
                tile, q, k, v, o, stats, keys, sizes, rules, temporal_heads, time_programs,
                TIME, SPACE, COLS, UNIT, PRECISION,
            )


@triton.jit
def _axis_bwd(
    program, do, q, k, v, o, dq, dk, dv, stats, delta, sizes, rules, first_head, heads, N, N_k,
    OVER_TIME: tl.constexpr, AXIS: tl.constexpr, EMIT: tl.constexpr,
    COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):
    if AXIS[0] != "streaming":
        packed_bwd(
            program, do, q, k, v, o, dq, dk, dv, sizes, rules, first_head, heads,
            EMIT, OVER_TIME, AXIS[1], AXIS[2], COLS, UNIT, PRECISION,
        )
    else:
        streaming_bwd_queries(
            program, do, q, k, v, o, dq, stats, delta, sizes, rules, first_head, heads, N, N_k,
            OVER_TIME, AXIS[2], AXIS[3], AXIS[5], AXIS[6], AXIS[4], COLS, UNIT, PRECISION,
        )


@triton.jit
def grid_bwd(
    do, q, k, v, o, dq, dk, dv, stats, delta, sizes, rules, temporal_heads, time_programs,
    TIME: tl.constexpr, SPACE: tl.constexpr, EMIT: tl.constexpr,
    COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):
    """dq, dk and dv of packed and resident sequences, and o again if EMIT; dq and delta of streamed ones."""
    program = tl.program_id(0)
    if TIME is None:
        _axis_bwd(
            program, do, q, k, v, o, dq, dk, dv, stats, delta, sizes, rules, 0, sizes.H, sizes.S, sizes.S_k,
            False, SPACE, EMIT, COLS, UNIT, PRECISION,
        )
    elif SPACE is None:
        _axis_bwd(
            program, do, q, k, v, o, dq, dk, dv, stats, delta, sizes, rules, 0, sizes.H, sizes.T, sizes.T,
            True, TIME, EMIT, COLS, UNIT, PRECISION,
        )
    elif program < time_programs:
        _axis_bwd(
            program, do, q, k, v, o, dq, dk, dv, stats, delta, sizes, rules, 0, temporal_heads, sizes.T, sizes.T,
            True, TIME, EMIT, COLS, UNIT, PRECISION,
        )
    else:
        _axis_bwd(
            program - time_programs, do, q, k, v, o, dq, dk, dv, stats, delta, sizes, rules,
            temporal_heads, sizes.H - temporal_heads, sizes.S, sizes.S_k,
            False, SPACE, EMIT, COLS, UNIT, PRECISION,
        )


@triton.jit
def grid_bwd_keys(
    do, q, k, v, dk, dv, stats, delta, sizes, rules, first_head, heads, N, N_k,
    OVER_TIME: tl.constexpr, AXIS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):
    """dk and dv of streamed sequences, after their delta."""
    streaming_bwd_keys(
        tl.program_id(0), do, q, k, v, dk, dv, stats, delta, sizes, rules, first_head, heads, N, N_k,
        OVER_TIME, AXIS[2], AXIS[3], AXIS[5], AXIS[6], COLS, UNIT, PRECISION,
    )


# fmt: on
# ---- what a kernel is told ----


def _programs(axis: Axis | None, sequences: int, N: int) -> int:
    if axis is None:
        return 0
    if axis.regime == STREAMING:
        return sequences * -(-N // axis.rows)
    return -(-sequences // (axis.rows // N))


def _counted(op: str, q: Tensor, programs: int) -> int:
    if programs > _MOST_PROGRAMS:
        raise ValueError(
            f"{op}: {tuple(q.shape)} makes {programs} programs of the Triton kernel, {_MOST_PROGRAMS} at most; "
            "give fewer clips a call"
        )
    return programs


def _tail(n: int, size: int, kept: bool, whole: bool) -> int:
    """The last block of n in blocks of `size`, 0 if it is like the others: 16, or as small as may be where no tile
    keeps it, since 32 rows of a product take the tensor cores of before Hopper, and more registers. whole: what a tile
    keeps is always like the others."""
    if n % size == 0 or (kept and whole):
        return 0
    least = power_of_two(n % size)
    return size if kept and least > 16 else least


def _axis(axis: Axis | None, N: int, N_k: int, whole: bool, keys_first: bool = False) -> tuple | None:
    """The constants of an axis for a kernel: (regime, N unless streamed, rows of a block, keys of a block, a power of
    two that holds all keys if one block does, rows of the last block of queries, keys of the last block of keys); 0
    where there is nothing to say, and where the last block is like the others."""
    if axis is None:
        return None
    if axis.regime != STREAMING:
        return axis.regime, N, axis.rows, 0, 0, 0, 0
    block = axis.keys
    only = power_of_two(N_k) if N_k <= block else 0
    tails = _tail(N, axis.rows, not keys_first, whole), _tail(N_k, block, keys_first, whole)
    return STREAMING, 0, axis.rows, block, only, *tails


# ---- launches ----


class _Plan(NamedTuple):
    """A launch as it is prepared for all calls that differ in their tensors only.

    strides: of the kernel's views, by name, None for one that it does without. described: of k and v where TMA loads
    their blocks, as `descriptors_of` has it."""

    launch: Launch
    strides: Mapping[str, tuple | None]
    rules: Rules
    before: dict[str, Any]
    after: dict[str, Any]
    described: tuple | None = None

    def __call__(self, tensors: dict[str, Tensor], options: Options, **others: Any) -> None:
        """tensors: of the views, by name; others: statistics and the like, which come after the views."""
        take = self.launch.take
        views = {name: None if at is None else View(take(tensors[name]), *at) for name, at in self.strides.items()}
        rules = self.rules
        if options.mask is not None or options.seed is not None or options.cos is not None:
            given = {"mask": options.mask, "seed": options.seed, "cos": options.cos, "sin": options.sin}
            rules = rules._replace(**{name: take(x) for name, x in given.items() if x is not None})
        self.launch(**views, **others, **self.before, rules=rules, **self.after)


_PLANS = Plans()


def _key(q: Tensor, k: Tensor, temporal_heads: int, options: Options, tensors: Iterable[Tensor | None]) -> tuple:
    """All that decides how a call is launched, but for a forced tile."""
    strides = tuple(None if x is None else x.stride() for x in tensors)
    numbers = temporal_heads, *options[:3], precision(q.dtype), _triton.compiling_for
    return q.shape, k.shape, q.dtype, q.device, *numbers, strides, aligned(*options[3:], *tensors)


def _constants(tile: Tiles, q: Tensor, options: Options, unit: int) -> dict[str, Any]:
    return {"COLS": _columns(tile, q, options), "UNIT": unit, "PRECISION": precision(q.dtype)}


def _columns(tile: Tiles, q: Tensor, options: Options) -> tuple[tuple[int, int, int], ...]:
    return columns(q.shape[-1], tile.split, options.cos is not None)


def _ends_whole(tile: Tiles, q: Tensor, options: Options) -> bool:
    return tile.whole and has_narrow_piece(_columns(tile, q, options))


def _axes(
    tile: Tiles, q: Tensor, k: Tensor, temporal_heads: int, options: Options, op: str
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """(programs; how a kernel tells both axes apart, and their constants)."""
    B, T, S, H, _ = q.shape
    time = _programs(tile.time, B * S * temporal_heads, T)
    programs = _counted(op, q, time + _programs(tile.space, B * T * (H - temporal_heads), S))
    whole = _ends_whole(tile, q, options)
    axes = {"TIME": _axis(tile.time, T, T, whole), "SPACE": _axis(tile.space, S, k.shape[2], whole)}
    return programs, {"temporal_heads": temporal_heads, "time_programs": time}, axes


def launch_fwd(
    op: str, q: Tensor, k: Tensor, v: Tensor, temporal_heads: int, options: Options,
    choose: Callable[[str], Tiles], remember: bool, keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """q `[B, T, S, H, D]`, k, v `[B, T, S_k, H, D]` -> o, and if `keep` the statistics `[1 or 2, B, H, T * S]`.

    choose: the tile of a direction. remember: it follows from the call, so that the launch may be made again."""
    (B, T, S, H, _), options = q.shape, as_read(options)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    stats = None
    if keep:
        stats = torch.empty(statistics(q.dtype.itemsize), B, H, T * S, dtype=torch.float32, device=q.device)
    if not q.numel():
        return o, stats
    key = (op, "forward", keep, _key(q, k, temporal_heads, options, (q, k, v)))
    plan = _PLANS.get(key) if remember else None
    if plan is None:
        tile, unit = choose("forward"), unit_of(q, k, v)
        programs, split, axes = _axes(tile, q, k, temporal_heads, options, op)
        launched = min(programs, tile.persistent * _triton.multiprocessors(q.device)) if tile.persistent else programs
        launch = Launch(grid_fwd, launched, remember and q.is_cuda, num_warps=tile.warps, num_stages=tile.stages)
        strides = {name: strides_of(x, unit) for name, x in zip("qkvo", (q, k, v, o), strict=True)}
        after = split | {"tiles": programs if tile.persistent else None} | axes | _constants(tile, q, options, unit)
        described = descriptors_of(tile.space, (k, v), _columns(tile, q, options)) if tile.described else None
        plan = _Plan(launch, strides, rules_of(options, q.dtype), {"sizes": sizes_of(q, k)}, after, described)
        if remember:
            _PLANS.keep(key, plan)
    blocks = {"k_blocks": None, "v_blocks": None}
    if plan.described is not None:
        of_k, of_v = plan.described
        blocks = {"k_blocks": TensorDescriptor(k, *of_k), "v_blocks": TensorDescriptor(v, *of_v)}
    with torch.cuda.device_of(q):
        given = None if stats is None else _parts(stats, plan)
        plan({"q": q, "k": k, "v": v, "o": o}, options, stats=given, **blocks)
    return o, stats


def _parts(stats: Tensor, plan: _Plan) -> tuple:
    return tuple(plan.launch.take(part) for part in stats.unbind(0))


def launch_bwd(
    op: str, do, q, k, v, o, stats, dq, dk, dv, temporal_heads: int, options: Options,
    choose: Callable[[str], Tiles], remember: bool, o_again: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes dq, dk, dv; o and stats are the forward's, read where a sequence is streamed.

    o_again: other sequences write o again, recomputed, into it."""
    if not q.numel():
        return
    do = do if do.stride(-1) == 1 or do.shape[-1] == 1 else do.contiguous()
    (B, T, S, H, _), options = q.shape, as_read(options)
    tensors = {"do": do, "q": q, "k": k, "v": v, "o": o if o_again is None else o_again, "dq": dq, "dk": dk, "dv": dv}
    key = (op, "backward", o_again is None, _key(q, k, temporal_heads, options, tensors.values()))
    plans = _PLANS.get(key) if remember else None
    if plans is None:
        tile = choose("backward")
        if tile.keeps_output and (o is None or stats is None):
            raise RuntimeError(f"{op}: this backward reads o and statistics; run the forward with keep=True")
        plans = _plans_bwd(op, tensors, temporal_heads, options, tile, remember, o_again is not None)
        if remember:
            _PLANS.keep(key, plans)
    delta = torch.empty(B, H, T * S, dtype=torch.float32, device=q.device) if len(plans) > 1 else None
    with torch.cuda.device_of(q):
        for plan in plans:
            given = None if stats is None else _parts(stats, plan)
            plan(tensors, options, stats=given, delta=None if delta is None else plan.launch.take(delta))


def _plans_bwd(op, tensors, temporal_heads: int, options: Options, tile: Tiles, remember: bool, emit: bool) -> list:
    """The launches of a backward: of everything but the dk and dv of streamed sequences, and then of those per axis."""
    q, k = tensors["q"], tensors["k"]
    (B, T, S, H, _), S_k = q.shape, k.shape[2]
    unit = unit_of(*tensors.values())
    strides = {name: None if x is None else strides_of(x, unit) for name, x in tensors.items()}
    if not tile.keeps_output and not emit:
        strides["o"] = None
    programs, split, axes = _axes(tile, q, k, temporal_heads, options, op)
    reusable, rules, before = remember and q.is_cuda, rules_of(options, q.dtype), {"sizes": sizes_of(q, k)}
    launch = Launch(grid_bwd, programs, reusable, num_warps=tile.warps, num_stages=tile.stages)
    after = split | axes | {"EMIT": emit} | _constants(tile, q, options, unit)
    plans = [_Plan(launch, strides, rules, before, after)]
    if tile.keys is None:
        return plans
    strides = {name: at for name, at in strides.items() if name not in ("o", "dq")}
    for axis, over_time, first, heads, sequences, N, N_k in (
        (tile.keys.time, True, 0, temporal_heads, B * S, T, T),
        (tile.keys.space, False, temporal_heads, H - temporal_heads, B * T, S, S_k),
    ):
        if axis is not None:
            programs = _counted(op, q, sequences * heads * -(-N_k // axis.keys))
            launch = Launch(grid_bwd_keys, programs, reusable, num_warps=tile.keys.warps, num_stages=tile.keys.stages)
            after = {"first_head": first, "heads": heads, "N": N, "N_k": N_k, "OVER_TIME": over_time}
            constants = _axis(axis, N, N_k, _ends_whole(tile.keys, q, options), keys_first=True)
            after |= {"AXIS": constants} | _constants(tile.keys, q, options, unit)
            plans.append(_Plan(launch, strides, rules, before, after))
    return plans
