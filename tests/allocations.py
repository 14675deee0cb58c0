"""What a function allocates, tensor by tensor, on any device: by whichever operation of PyTorch, named or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OURS = "vivit_kernels"


@dataclass(frozen=True)
class Allocation:
    """A result of `op` in memory that none of its arguments has. It keeps that memory, so that no later one gets it."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: torch.UntypedStorage

    def __str__(self) -> str:
        return f"{self.op} {list(self.shape)} {str(self.dtype).removeprefix('torch.')}, {self.storage.nbytes():,} bytes"


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()
        elif isinstance(leaf, torch.UntypedStorage):
            yield leaf


def _addresses(values: Any) -> set[int]:
    return {storage.data_ptr() for storage in _storages(values)}


class _Counting(TorchDispatchMode):
    """Sees every operation below autograd, and what this project's own, opaque to PyTorch, do inside."""

    def __init__(self):
        super().__init__()
        self.found: list[Allocation] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == _OURS:
            device = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)).device.type
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA if device == "cuda" else torch._C.DispatchKey.CPU)
            with self:  # again, and past this method: straight to the function that was registered
                return func.redispatch(keys, *args, **kwargs)
        result = func(*args, **kwargs)
        known = _addresses((args, kwargs))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() and x.untyped_storage().data_ptr() not in known:
                self.found.append(Allocation(str(func), tuple(x.shape), x.dtype, x.untyped_storage()))
        return result


def allocations(function: Callable[[], Any]) -> tuple[Any, list[Allocation]]:
    """(function(), what it allocated, in order). Backward is seen as well, if it runs inside."""
    with _Counting() as counting:
        result = function()
    return result, counting.found


def scratch(function: Callable[[], Any]) -> list[Allocation]:
    """What `function` allocates and does not return."""
    result, found = allocations(function)
    kept = _addresses(result)
    return [allocation for allocation in found if allocation.storage.data_ptr() not in kept]
