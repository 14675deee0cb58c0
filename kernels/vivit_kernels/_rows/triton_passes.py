"""Triton kernels of the passes over rows, and their launches: see passes.py for what each reads and writes.

A tile is some whole rows (norm) or some rows of a block of columns (GELU), 16 or 32 elements a thread. Sums over
rows, for parameters, are kept in registers by a program, which takes neighbouring tiles one after another, and written
once: `[programs, ...]`, which one more sum of PyTorch's adds up, in one order.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportCallIssue=false
# (it takes a device function for one that never returns, and knows no kernel[grid])

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import FUSED
from .passes import Norm, Normed, add, cast_like

_MOST_PROGRAMS = 512  # that keep sums: 4 a multiprocessor of an H100, and 3 MB of partial sums at E = 768


class Tile(NamedTuple):
    rows: int
    columns: int
    warps: int


def norm_tile(E: int, elements: int = 4096) -> Tile:
    """Whole rows; up to 1024 elements a warp has a row to itself, so that no sum leaves it.

    elements: of a tile of 4 warps. In backward half as many, since five tiles are held there. Compiled for sm_80, sm_90
    and sm_100 at E = 768: at most 80 registers forward, 108 backward, so that 24 and 16 warps share a multiprocessor.
    """
    columns = max(16, triton.next_power_of_2(E))
    return Tile(max(1, elements // columns), columns, max(4, 4 * columns // elements))


GELU_TILE = Tile(16, 128, 4)  # a thread's row piece is 16 bytes of 16 bits


# ---- layer norm ----


@triton.jit
def norm_fwd(
    x_ptr, branch_ptr, sum_ptr, n_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, rows, E, eps,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """x, branch, sum, n `[rows, E]`, mean, rstd `[rows]`; without a branch it and sum are None."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLS)
    used = column < E
    inside = (row < rows)[:, None] & used[None, :]
    at = row[:, None] * E + column[None, :]
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)  # [ROWS, COLS]
    if branch_ptr is not None:
        rounded = (x + tl.load(branch_ptr + at, inside, 0.0).to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, inside)
        x = rounded.to(tl.float32)  # the norm is of the sum as backward will read it
    mean = tl.sum(x, 1) / E
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / E + eps)
    n = centred * rstd[:, None]
    if weight_ptr is not None:
        n = n * tl.load(weight_ptr + column, used, 0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        n = n + tl.load(bias_ptr + column, used, 0.0).to(tl.float32)[None, :]
    tl.store(n_ptr + at, n.to(n_ptr.dtype.element_ty), inside)
    tl.store(mean_ptr + row, mean, row < rows)
    tl.store(rstd_ptr + row, rstd, row < rows)


@triton.jit
def norm_bwd(
    dn_ptr, dsum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, sums_ptr, rows, E, tiles,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx `[rows, E]`, sums `[programs, 2, E]` fp32 of dn * xhat and of dn; either may be None. tiles: of a program."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLS)
    used = column < E
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    dbias = tl.zeros([ROWS, COLS], tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, used, 0.0).to(tl.float32)[None, :]
    for i in range(tiles):
        row = (program * tiles + i) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & used[None, :]
        at = row[:, None] * E + column[None, :]
        mean = tl.load(mean_ptr + row, row < rows, 0.0)
        rstd = tl.load(rstd_ptr + row, row < rows, 0.0)
        x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)  # [ROWS, COLS]
        dn = tl.load(dn_ptr + at, inside, 0.0).to(tl.float32)
        xhat = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
        if sums_ptr is not None:
            dweight += dn * xhat
            dbias += dn
        if dx_ptr is not None:
            if weight_ptr is not None:
                dn = dn * weight
            dx = (dn - (tl.sum(dn, 1) / E)[:, None] - xhat * (tl.sum(dn * xhat, 1) / E)[:, None]) * rstd[:, None]
            if dsum_ptr is not None:
                dx += tl.load(dsum_ptr + at, inside, 0.0).to(tl.float32)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), inside)
    if sums_ptr is not None:
        tl.store(sums_ptr + program * 2 * E + column, tl.sum(dweight, 0), used)
        tl.store(sums_ptr + (program * 2 + 1) * E + column, tl.sum(dbias, 0), used)


def norm_forward(x: Tensor, branch: Tensor | None, norm: Norm, dtype: torch.dtype) -> Normed:
    if branch is not None and not (branch.is_contiguous() and branch.shape == x.shape):
        x, branch = add(branch, x), None
    x, E, total = x.contiguous(), x.shape[-1], x
    if branch is not None:
        same = branch.dtype == torch.promote_types(branch.dtype, x.dtype)
        total = branch if same else torch.empty_like(x)
    rows, tile = x.numel() // E, norm_tile(E)
    n = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        norm_fwd[(triton.cdiv(rows, tile.rows),)](
            x_ptr=x, branch_ptr=branch, sum_ptr=None if branch is None else total, n_ptr=n, weight_ptr=norm.weight,
            bias_ptr=norm.bias, mean_ptr=mean, rstd_ptr=rstd, rows=rows, E=E, eps=norm.eps,
            ROWS=tile.rows, COLS=tile.columns, num_warps=tile.warps, num_stages=1, **FUSED,
        )  # fmt: skip
    return Normed(total, n, mean, rstd)


def norm_backward(
    dn: Tensor, dsum: Tensor | None, found: Normed, norm: Norm, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, E = found.sum.contiguous(), found.sum.shape[-1]
    dn, dsum = dn.contiguous(), None if dsum is None else dsum.contiguous()
    rows, tile = x.numel() // E, norm_tile(E, 2048)
    programs, tiles = _shared_out(triton.cdiv(rows, tile.rows), _MOST_PROGRAMS)
    dx = torch.empty_like(x) if needs[0] else None
    sums = torch.empty(programs, 2, E, dtype=torch.float32, device=x.device) if any(needs[1:]) else None
    with torch.cuda.device_of(x):
        norm_bwd[(programs,)](
            dn_ptr=dn, dsum_ptr=dsum if needs[0] else None, x_ptr=x, weight_ptr=norm.weight, mean_ptr=found.mean,
            rstd_ptr=found.rstd, dx_ptr=dx, sums_ptr=sums, rows=rows, E=E, tiles=tiles,
            ROWS=tile.rows, COLS=tile.columns, num_warps=tile.warps, num_stages=1, **FUSED,
        )  # fmt: skip
    dweight, dbias = (None, None) if sums is None else sums.sum(0).unbind(0)
    return (
        dx,
        cast_like(dweight, norm.weight) if needs[1] else None,
        cast_like(dbias, norm.bias) if needs[2] else None,
    )


def _shared_out(tiles: int, most: int) -> tuple[int, int]:
    """(programs, at most so many; tiles of each): none is left without a tile."""
    each = math.ceil(tiles / most)
    return math.ceil(tiles / each), each


# ---- GELU ----


@triton.jit
def _gelu(x, TANH: tl.constexpr):
    """(what x is multiplied by, its derivative), in fp32. (1 + tanh(u)) / 2 is sigmoid(2 u), which loses no digits."""
    if TANH:
        share = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))  # 2 sqrt(2/pi)
        return share, share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        share = 0.5 * (1.0 + tl.math.erf(0.7071067811865476 * x))
        return share, 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def gelu_bwd(
    dactive_ptr, hidden_ptr, active_ptr, dhidden_ptr, sums_ptr, rows, M, blocks, tiles,
    TANH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """active (or None) and dhidden `[rows, M]`, sums `[programs / blocks, M]` fp32 or None. blocks: of columns."""
    program = tl.program_id(0).to(tl.int64)
    part = program // blocks
    column = program % blocks * COLS + tl.arange(0, COLS)
    used = column < M
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for i in range(tiles):
        row = (part * tiles + i) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & used[None, :]
        at = row[:, None] * M + column[None, :]
        x = tl.load(hidden_ptr + at, inside, 0.0).to(tl.float32)  # [ROWS, COLS]
        dactive = tl.load(dactive_ptr + at, inside, 0.0).to(tl.float32)
        share, slope = _gelu(x, TANH)
        dhidden = dactive * (share + x * slope)
        sums += dhidden
        tl.store(dhidden_ptr + at, dhidden.to(dhidden_ptr.dtype.element_ty), inside)
        if active_ptr is not None:
            tl.store(active_ptr + at, (x * share).to(active_ptr.dtype.element_ty), inside)
    if sums_ptr is not None:
        tl.store(sums_ptr + part * M + column, tl.sum(sums, 0), used)


def gelu_backward(
    dactive: Tensor, hidden: Tensor, approximate: str, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    hidden, dactive = hidden.contiguous(), dactive.contiguous()
    M, tile = hidden.shape[-1], GELU_TILE
    rows, blocks = hidden.numel() // M, triton.cdiv(M, tile.columns)
    parts, tiles = _shared_out(triton.cdiv(rows, tile.rows), max(1, 4 * _MOST_PROGRAMS // blocks))
    active = torch.empty_like(hidden) if needs[0] else None
    sums = torch.empty(parts, M, dtype=torch.float32, device=hidden.device) if needs[1] else None
    with torch.cuda.device_of(hidden):
        gelu_bwd[(parts * blocks,)](
            dactive_ptr=dactive, hidden_ptr=hidden, active_ptr=active, dhidden_ptr=dactive, sums_ptr=sums, rows=rows,
            M=M, blocks=blocks, tiles=tiles, TANH=approximate == "tanh", ROWS=tile.rows, COLS=tile.columns,
            num_warps=tile.warps, num_stages=1, **FUSED,
        )  # fmt: skip
    return active, dactive, None if sums is None else sums.sum(0)
