"""How tensors lie for the kernels of others: they read 16 bytes at a time and do not check that they may."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_VECTOR_BYTES = 16


def reads_whole_vectors(x: Tensor) -> bool:
    """Whether every row of x `[..., D]` begins at a multiple of 16 bytes, and no two elements share one place."""
    step = _VECTOR_BYTES // x.element_size()
    rows = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    aligned = x.data_ptr() % _VECTOR_BYTES == 0 and all(stride > 0 and stride % step == 0 for stride in rows)
    return aligned and (x.stride(-1) == 1 or x.shape[-1] == 1)


def whole_vectors(*tensors: Tensor) -> list[Tensor]:
    """The tensors themselves, as strided as they are; a copy of those that lie as the kernels cannot read them."""
    return [x if reads_whole_vectors(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors]


def write(targets: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Gradients into the places that the op has for them, which may be views of one packed gradient."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
