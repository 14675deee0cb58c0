"""What the Triton attention kernels are told of a call's tensors and options."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .options import Options
from .triton_device import Rules, Sizes
from .triton_tiles import Axis

_LOG2E = math.log2(math.e)


def rules_of(options: Options, dtype: torch.dtype) -> Rules:
    scale, softcap, dropout_p, mask, seed, cos, sin = options
    plain = scale > 0 and not softcap
    threshold = min(math.ceil(dropout_p * 2**32), 2**32 - 1)  # p = 1 keeps a pair in 4e9, times 0
    return Rules(
        unit=scale * _LOG2E if plain else _LOG2E,
        exact=1 if dtype == torch.float32 else None,
        scale=None if plain else (scale / softcap if softcap else scale),
        slope=scale,
        cap=softcap or None,
        mask=mask,
        seed=seed,
        threshold=None if seed is None else threshold,
        keep=None if seed is None else (1 / (1 - dropout_p) if dropout_p < 1 else 0.0),
        cos=cos,
        sin=sin,
    )


def unit_of(*tensors: Tensor | None) -> int:
    """8 where every row begins at a multiple of 8 elements (16 bytes in 16 bits), which the compiler is told so."""
    strides = [stride for x in tensors if x is not None for stride in x.stride()[:-1]]
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


def strides_of(x: Tensor, unit: int) -> tuple:
    return tuple(stride // unit for stride in x.stride()[:4])


def sizes_of(q: Tensor, k: Tensor) -> Sizes:
    B, T, S, H, _ = q.shape
    return Sizes(B, T, S, k.shape[2], H)


def as_read(options: Options) -> Options:
    """Masks, seeds and tables as the kernels read them: without gaps, a mask as bytes."""
    if options.mask is not None:
        options = options._replace(mask=options.mask.contiguous().view(torch.uint8))
    if options.seed is not None:
        options = options._replace(seed=options.seed.contiguous())
    if options.cos is not None and options.sin is not None:
        options = options._replace(cos=options.cos.contiguous(), sin=options.sin.contiguous())
    return options


def descriptors_of(axis: Axis | None, keys: tuple[Tensor, Tensor], columns: tuple) -> tuple | None:
    """Shape, strides and block of the descriptors of k and v `[B, T, S, H, D]`, if both can have one: addresses at
    multiples of 16 bytes, a stride wherever there is more than one row, heads that are a power of two wide."""
    (_, width, used), *more = columns
    if axis is None or more or width != used:
        return None
    found = []
    for x in keys:
        strides = _described_strides(x)
        if strides is None or x.data_ptr() % 16 or x.stride(-1) != 1:
            return None
        found.append((list(x.shape), strides, [1, 1, axis.keys, 1, width]))
    return tuple(found)


def _described_strides(x: Tensor) -> list[int] | None:
    """Of one row, which has none that counts, as if the next lay behind it."""
    units, strides, extent = 16 // x.element_size(), [1], x.shape[-1]
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        stride = stride if size > 1 else extent
        if stride % units or stride <= 0:
            return None
        strides.insert(0, stride)
        extent = size * stride
    return strides
