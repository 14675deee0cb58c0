"""temporal_block by Triton: layer norm, the projection of one head after another, and attention along time.

Forward reads x and writes o: 2 tensors `[B, T, S, E]` where norm, projection and attention take 2 + 4 + 4. Backward
reads x and do and writes n, the norm again, and dqkv (7 tensors with statistics); dx, dweight and dbias are PyTorch's
products over these two and one pass over rows (_rows). No atomics: the same bits in every run.

Row r of a tile is frame r % T of its position r // T, and scores of different positions are masked, as in
_attention/triton_packed.py. Those are multiplied in vain: at E = 768 and 128 rows the scores are 11 % of the products.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# (it takes a device function for one that never returns, and knows no kernel[grid])

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._attention.triton_tiles import power_of_two
from .._rows.passes import Norm, Normed, layer_norm_backward
from .._triton import FUSED, arch_of, precision
from .._triton_device import waited_for
from . import tiles


@triton.jit
def _place(B, T: tl.constexpr, S, ROWS: tl.constexpr):
    """Of each row of a tile: which of its positions, token `[B * T * S]` in int64, valid."""
    PER_TILE: tl.constexpr = ROWS // T
    r = tl.arange(0, ROWS)
    position = tl.program_id(0).to(tl.int64) * PER_TILE + r // T
    valid = (r < PER_TILE * T) & (position < B * S)
    return r // T, (position // S * T + r % T) * S + position % S, valid


@triton.jit
def _chunk(x_ptr, token, valid, first, E: tl.constexpr, STEP: tl.constexpr):
    """Channels first, ... of the rows, fp32 `[ROWS, STEP]`, and which of them are there."""
    c = first + tl.arange(0, STEP)
    inside = valid[:, None] & (c < E)[None, :]
    return tl.load(x_ptr + token[:, None] * E + c[None, :], inside, 0.0).to(tl.float32), inside


@triton.jit
def _statistics(x_ptr, token, valid, E: tl.constexpr, eps, ROWS: tl.constexpr, STEP: tl.constexpr):
    """(mean, 1 / deviation) of the rows, the deviation in a second pass: x is in L2 after the first."""
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, E, STEP):
        x, _ = _chunk(x_ptr, token, valid, first, E, STEP)
        total += tl.sum(x, 1)
    mean = total / E
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, E, STEP):
        x, inside = _chunk(x_ptr, token, valid, first, E, STEP)
        x = tl.where(inside, x - mean[:, None], 0.0)
        total += tl.sum(x * x, 1)
    return mean, 1.0 / tl.sqrt(total / E + eps)


@triton.jit
def _normalised(x_ptr, norm, token, valid, mean, rstd, first, E: tl.constexpr, STEP: tl.constexpr):
    """Norm of the rows, `[ROWS, STEP]`, rounded as the norm of a layer of its own is; 0 where there is none."""
    x, inside = _chunk(x_ptr, token, valid, first, E, STEP)
    c = first + tl.arange(0, STEP)
    weight = tl.load(norm[0] + c, c < E, 0.0).to(tl.float32)
    bias = tl.load(norm[1] + c, c < E, 0.0).to(tl.float32)
    n = (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    return tl.where(inside, n, 0.0).to(x_ptr.dtype.element_ty), inside


@triton.jit
def _slice(weight_ptr, row, used, first, E: tl.constexpr, STEP: tl.constexpr):
    """Rows of the weight, turned: `[STEP, COLS]`."""
    c = first + tl.arange(0, STEP)
    return tl.trans(tl.load(weight_ptr + row[:, None] * E + c[None, :], used[:, None] & (c < E)[None, :], 0.0))


@triton.jit
def _projected(
    x_ptr, norm, weight_ptr, bias_ptr, token, valid, mean, rstd, head, E: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, k, v of a head, `[ROWS, COLS]`, rounded to x's dtype."""
    d = tl.arange(0, COLS)
    used = d < D
    row = (head * D + d).to(tl.int64)  # of the weight, for q; E further for k, and again for v
    q = tl.zeros([ROWS, COLS], tl.float32)
    k = tl.zeros([ROWS, COLS], tl.float32)
    v = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, E, STEP):
        n, _ = _normalised(x_ptr, norm, token, valid, mean, rstd, first, E, STEP)
        q = tl.dot(n, _slice(weight_ptr, row, used, first, E, STEP), q, input_precision=PRECISION)
        k = tl.dot(n, _slice(weight_ptr, row + E, used, first, E, STEP), k, input_precision=PRECISION)
        v = tl.dot(n, _slice(weight_ptr, row + 2 * E, used, first, E, STEP), v, input_precision=PRECISION)
        q, k, v = waited_for(q), waited_for(k), waited_for(v)  # n is in registers
    q += tl.load(bias_ptr + row, used, 0.0).to(tl.float32)[None, :]
    k += tl.load(bias_ptr + row + E, used, 0.0).to(tl.float32)[None, :]
    v += tl.load(bias_ptr + row + 2 * E, used, 0.0).to(tl.float32)[None, :]
    dtype = x_ptr.dtype.element_ty
    return q.to(dtype), k.to(dtype), v.to(dtype)


@triton.jit
def _probabilities(q, k, within, valid, scale, PRECISION: tl.constexpr):
    """`[ROWS, ROWS]`: every row has a key, itself, and those of no tile have their own kind."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores = tl.where((within[:, None] == within[None, :]) & (valid[:, None] == valid[None, :]), scores, float("-inf"))
    p = tl.exp2((scores - tl.max(scores, 1)[:, None]) * (scale * 1.4426950408889634))
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def block_fwd(
    x_ptr, norm, weight_ptr, bias_ptr, o_ptr, B, S, heads, eps, scale,
    E: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    within, token, valid = _place(B, T, S, ROWS)
    mean, rstd = _statistics(x_ptr, token, valid, E, eps, ROWS, STEP)
    d = tl.arange(0, COLS)
    for head in range(heads):
        q, k, v = _projected(
            x_ptr, norm, weight_ptr, bias_ptr, token, valid, mean, rstd, head, E, D, ROWS, COLS, STEP, PRECISION
        )
        p = _probabilities(q, k, within, valid, scale, PRECISION)
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        at = token[:, None] * E + (head * D + d)[None, :]
        tl.store(o_ptr + at, o.to(o_ptr.dtype.element_ty), valid[:, None] & (d < D)[None, :])


@triton.jit
def block_bwd(
    do_ptr, x_ptr, norm, weight_ptr, bias_ptr, n_ptr, dqkv_ptr, mean_ptr, rstd_ptr, B, S, heads, eps, scale,
    E: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """n `[tokens, E]`, mean and rstd `[tokens]`, dqkv `[tokens, 3 E]`."""
    within, token, valid = _place(B, T, S, ROWS)
    mean, rstd = _statistics(x_ptr, token, valid, E, eps, ROWS, STEP)
    tl.store(mean_ptr + token, mean, valid)
    tl.store(rstd_ptr + token, rstd, valid)
    for first in range(0, E, STEP):
        n, inside = _normalised(x_ptr, norm, token, valid, mean, rstd, first, E, STEP)
        tl.store(n_ptr + token[:, None] * E + (first + tl.arange(0, STEP))[None, :], n, inside)
    d = tl.arange(0, COLS)
    stored = valid[:, None] & (d < D)[None, :]
    for head in range(heads):
        q, k, v = _projected(
            x_ptr, norm, weight_ptr, bias_ptr, token, valid, mean, rstd, head, E, D, ROWS, COLS, STEP, PRECISION
        )
        do = tl.load(do_ptr + token[:, None] * E + (head * D + d)[None, :], stored, 0.0)
        p = _probabilities(q, k, within, valid, scale, PRECISION)
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q.dtype)
        dq = tl.dot(ds, k, input_precision=PRECISION) * scale
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
        at = dqkv_ptr + token[:, None] * (3 * E) + (head * D + d)[None, :]
        tl.store(at, dq.to(do.dtype), stored)
        tl.store(at + E, dk.to(do.dtype), stored)
        tl.store(at + 2 * E, dv.to(do.dtype), stored)


def _constants(direction: str, x: Tensor, heads: int) -> tuple[int, dict]:
    """(programs, what both kernels are told beside their tensors)."""
    B, T, S, E = x.shape
    D = E // heads
    tile = tiles.current(direction, T, x.element_size(), arch_of(x.device))
    return -(-B * S // (tile.rows // T)), {
        "B": B, "S": S, "heads": heads, "scale": D**-0.5, "E": E, "D": D, "T": T, "ROWS": tile.rows,
        "COLS": power_of_two(D), "STEP": tile.step, "PRECISION": precision(x.dtype),
        "num_warps": tile.warps, "num_stages": tile.stages, **FUSED,
    }  # fmt: skip


def launch_fwd(x, norm_weight, norm_bias, weight, bias, heads: int, eps: float) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    o = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        programs, constants = _constants("forward", x, heads)
        with torch.cuda.device_of(x):
            block_fwd[(programs,)](
                x_ptr=x, norm=(norm_weight.contiguous(), norm_bias.contiguous()), weight_ptr=weight,
                bias_ptr=bias.contiguous(), o_ptr=o, eps=eps, **constants,
            )  # fmt: skip
    return o


def launch_bwd(do, x, norm_weight, norm_bias, weight, bias, heads: int, eps: float) -> list[Tensor]:
    do, x, weight = do.contiguous(), x.contiguous(), weight.contiguous()
    if not x.numel():
        return [torch.zeros_like(t) for t in (x, norm_weight, norm_bias, weight, bias)]
    tokens, E = x.numel() // x.shape[-1], x.shape[-1]
    n = torch.empty(tokens, E, dtype=x.dtype, device=x.device)
    dqkv = torch.empty(tokens, 3 * E, dtype=x.dtype, device=x.device)
    mean, rstd = torch.empty(2, tokens, dtype=torch.float32, device=x.device)
    programs, constants = _constants("backward", x, heads)
    with torch.cuda.device_of(x):
        block_bwd[(programs,)](
            do_ptr=do, x_ptr=x, norm=(norm_weight.contiguous(), norm_bias.contiguous()), weight_ptr=weight,
            bias_ptr=bias.contiguous(), n_ptr=n, dqkv_ptr=dqkv, mean_ptr=mean, rstd_ptr=rstd, eps=eps, **constants,
        )  # fmt: skip
    found, norm = Normed(x.view(tokens, E), n, mean, rstd), Norm(norm_weight, norm_bias, eps)
    dx, dnorm_weight, dnorm_bias = layer_norm_backward(dqkv @ weight, None, found, norm, (True, True, True))
    assert dx is not None and dnorm_weight is not None and dnorm_bias is not None
    return [dx.view(x.shape), dnorm_weight, dnorm_bias, dqkv.t() @ n, dqkv.sum(0)]
