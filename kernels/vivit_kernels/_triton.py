"""What every Triton backend needs to know before it launches: where it can run, and for which architecture."""

from __future__ import annotations

import functools
from typing import Any

import torch

from . import _environment
from ._dispatch import Call, Refusal

_OLDEST = 80  # bfloat16 products and asynchronous copies

# An option of every launch, also of those that do not go through Launch: a product with a sum behind it stays one
# instruction, which from Triton 3.10 on has to be asked for
FUSED = {"enable_fp_fusion": True}

compiling_for: int | None = None  # the architecture, where kernels on CPU tensors are compiled and not launched


@functools.cache
def _arch_of(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def arch_of(device: torch.device) -> int:
    """90 for sm_90. On a CPU kernels are interpreted, as for sm_90, or only compiled, for `compiling_for`."""
    if device.type != "cuda":
        return compiling_for or 90
    return _arch_of(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _multiprocessors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; where kernels are interpreted or only compiled 2, so that persistent ones go round their loop."""
    if device.type != "cuda":
        return 2
    return _multiprocessors_of(torch.cuda.current_device() if device.index is None else device.index)


class Launch:
    """A launch that is made again and again with other tensors.

    Triton looks at every argument of every launch to find the kernel compiled for it: 60 us for the views of an
    attention on the host of one H200, several times what a small call takes there. Where `reusable`, the first launch
    goes that way and the others start what it found: everything but the addresses, and whether these are multiples of
    16 bytes, must then be the same. Not reusable are launches that do not reach a GPU (interpreted, only compiled).
    """

    def __init__(self, kernel: Any, programs: int, reusable: bool, **options: int) -> None:
        self._kernel, self._programs, self._reusable, self._options = kernel, programs, reusable, FUSED | options
        self._compiled: Any = None

    def take(self, x: Any) -> Any:
        """A tensor, or a descriptor of one, as an argument: of a tensor the address is enough from the second launch
        on."""
        return x if self._compiled is None or not isinstance(x, torch.Tensor) else x.data_ptr()

    def __call__(self, **arguments: Any) -> None:
        """arguments: all of the kernel's, in its order."""
        if self._compiled is not None:
            self._compiled[(self._programs, 1, 1)](*arguments.values())
            return
        assert list(arguments) == self._kernel.arg_names, (list(arguments), self._kernel.arg_names)
        compiled = self._kernel[(self._programs,)](**arguments, **self._options)
        if self._reusable:
            self._compiled = compiled


class Plans(dict):
    """What was prepared for a call, by whatever decides it."""

    _MOST = 4096  # a program with more signatures than that has other worries

    def keep(self, key: tuple, plan: Any) -> Any:
        if len(self) >= self._MOST:
            self.clear()
        self[key] = plan
        return plan


def aligned(*tensors: torch.Tensor | None) -> tuple:
    """What a kernel's compilation sees of pointers: whether they are there, and at multiples of 16 bytes."""
    return tuple(None if x is None else x.data_ptr() % 16 == 0 for x in tensors)


def precision(dtype: torch.dtype) -> str:
    """How float32 products are taken: TF32 only where PyTorch's own setting allows it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def triton_refusals(call: Call) -> list[Refusal]:
    """Why no Triton kernel can run the call, whatever the op."""
    found = []
    if not _environment.HAS_TRITON:
        found.append(Refusal("Triton is not installed", "pip install triton (Linux)"))
    if call.device == "cpu" and not _environment.TRITON_INTERPRETED:
        found.append(
            Refusal(
                "the tensors are on cpu",
                "move them to a GPU; or set TRITON_INTERPRET=1 before the start, to check a kernel slowly",
            )
        )
    if call.device not in ("cpu", "cuda"):
        found.append(Refusal(f"the tensors are on {call.device}", "move them to a CUDA device"))
    if 0 < call.arch < _OLDEST:
        found.append(Refusal(f"this GPU is sm_{call.arch}", f"use one of sm_{_OLDEST} or later, or backend='torch'"))
    if call.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        dtype = str(call.dtype).removeprefix("torch.")
        found.append(Refusal(f"{dtype} is not one of float16, bfloat16, float32", "cast, or use backend='torch'"))
    return found
