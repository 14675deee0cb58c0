"""The options of an attention call, checked once, in the words of the user."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._dispatch import autocast_dtype
from .._philox import draw_seed

Rotary = tuple[Tensor, Tensor]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # kernels take scale and softcap so


class Options(NamedTuple):
    """How scores become probabilities: softmax over keys of cap(scale * q.k), masked, then dropped.

    cos, sin: fp32 `[N, D/2]` in token order. softcap 0 is none. mask: bool `[B, N]`, True may be attended.
    """

    scale: float
    softcap: float = 0.0
    dropout_p: float = 0.0
    mask: Tensor | None = None
    seed: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None


def check_options(op, q, tokens, grid, *, scale, key_mask, dropout_p, seed, rotary, softcap, key_grid=None) -> Options:
    """Checks every option against q's clip count, head size and token grid; fills in what was left out.

    tokens: number of query tokens in a clip; grid: the shape users give per-token tensors in, (T, S) or (N,);
    key_grid: the same for keys, where they may differ.
    """
    B, D = q.shape[0], q.shape[-1]
    key_grid = key_grid or grid
    scale = _check_scale(op, scale, D)
    if softcap is not None and not _LEAST <= softcap <= _MOST:
        raise ValueError(
            f"{op}: softcap={softcap} must be positive and finite (scores become softcap * tanh(score / softcap)); "
            "leave it out for none"
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p={dropout_p} must be a probability, 0 to 1")
    mask = None if key_mask is None else _check_mask(op, key_mask, (B, *key_grid), q.device).flatten(1)
    cos, sin = (None, None) if rotary is None else _check_rotary(op, rotary, tokens, grid, key_grid, D, q.device)
    if dropout_p > 0:
        seed = draw_seed(q.device) if seed is None else _check_seed(op, seed, q.device)
    return Options(scale, float(softcap or 0.0), float(dropout_p), mask, seed if dropout_p > 0 else None, cos, sin)


def _check_scale(op: str, scale: float | Tensor | None, D: int) -> float:
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise ValueError(f"{op}: scale requires a gradient, which is not computed; multiply q by it, with scale=1.0")
    number = D**-0.5 if scale is None else float(scale)
    if not abs(number) <= _MOST:
        raise ValueError(f"{op}: scale={scale} must be finite; leave it out for 1/sqrt(D)")
    return number


def _check_mask(op: str, mask: Tensor, shape: tuple, device: torch.device) -> Tensor:
    if mask.dtype != torch.bool or tuple(mask.shape) != shape or mask.device != device:
        raise ValueError(
            f"{op}: key_mask must be bool {tuple(shape)} on {device}, True where a key may be attended; "
            f"got {mask.dtype} {tuple(mask.shape)} on {mask.device}"
        )
    return mask


def _check_seed(op: str, seed: Tensor, device: torch.device) -> Tensor:
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or tuple(seed.shape) != (2,) or seed.device != device:
        got = f"{seed.dtype} {tuple(seed.shape)} on {seed.device}" if isinstance(seed, Tensor) else repr(seed)
        raise ValueError(
            f"{op}: seed must be an int64 tensor of two, (seed, offset), on {device}; got {got}. "
            "Leave it out to draw one"
        )
    return seed


def _check_rotary(op, rotary, tokens, grid, key_grid, D, device) -> Rotary:
    if key_grid != grid:
        raise ValueError(
            f"{op}: rotary needs as many keys as queries, got {key_grid} and {grid}; rotate q and k before the call"
        )
    if D % 2:
        raise ValueError(f"{op}: rotary pairs channels (i, i + D/2): head size {D} must be even")
    if len(rotary) != 2:
        raise ValueError(f"{op}: rotary must be two tables, (cos, sin), got {len(rotary)}; rotary_tables makes them")
    cos, sin = rotary
    shapes = {(*grid, D // 2), (tokens, D // 2)}
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) not in shapes or table.dtype != torch.float32 or table.device != device:
            raise ValueError(
                f"{op}: rotary {name} must be float32 {sorted(shapes)} on {device}; "
                f"got {table.dtype} {tuple(table.shape)} on {table.device}"
            )
        if table.requires_grad:
            raise ValueError(f"{op}: rotary {name} requires a gradient, which is not computed; detach it")
    return cos.reshape(tokens, D // 2), sin.reshape(tokens, D // 2)


def check_qkv(op: str, letters: str, q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views, whether they came apart or packed `[..., 3, H, D]`; `letters` names the dimensions of q."""
    dims = len(letters.split())
    if q.is_nested:
        raise ValueError(f"{op}: nested tensors are not taken; pad them (to_padded_tensor) and give a key_mask")
    if (k is None) != (v is None):
        raise ValueError(
            f"{op}: give q, k and v, or q alone packed as [{letters.replace('H', '3 H')}]; "
            f"got {'v' if k is None else 'k'} without the other"
        )
    if k is None or v is None:
        if q.dim() != dims + 1 or q.shape[-3] != 3:
            raise ValueError(
                f"{op}: q alone must be packed [{letters.replace('H', '3 H')}], got {tuple(q.shape)}; or give k and v"
            )
        q, k, v = q.unbind(-3)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != dims:
            raise ValueError(f"{op}: {name} must be [{letters}], got {tuple(x.shape)}")
        if x.dtype not in _DTYPES or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{op}: q, k and v must share one floating-point dtype, of 16, 32 or 64 bits, and one device; "
                f"q is {q.dtype} on {q.device}, {name} {x.dtype} on {x.device}"
            )
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(
                f"{op}: {name} must have unit stride along D, got strides {x.stride()}; call {name}.contiguous()"
            )
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[-2:] != k.shape[-2:]:
        raise ValueError(
            f"{op}: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} "
            "must agree in clips, heads and head size, k and v in all"
        )
    if 0 in q.shape[1:] or 0 in k.shape[1:]:
        raise ValueError(
            f"{op}: q {tuple(q.shape)} and k {tuple(k.shape)} must hold at least one token, head and channel"
        )
    return q, k, v


def without_autocast(launch: Callable) -> Callable:
    """`launch`, a composition of PyTorch's ops, whose dtypes are its own affair: autocast would narrow them within."""

    @functools.wraps(launch)
    def launched(x: Tensor, *rest: Any) -> Any:
        kind = x.device.type
        if autocast_dtype(kind) is None:
            return launch(x, *rest)
        with torch.autocast(kind, enabled=False):
            return launch(x, *rest)

    return launched


def autocast(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Under autocast, floating tensors but float64 become autocast's dtype, as for scaled_dot_product_attention."""
    dtype = autocast_dtype(q.device.type)
    if dtype is None:
        return q, k, v

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x

    return cast(q), None if k is None else cast(k), None if v is None else cast(v)
