"""Loads the native library (csrc/) once, at import, and decides which instruction set its CPU kernels use.

    AVAILABLE       whether torch.ops.vivit_kernels_native can be called; a constant, so that torch.compile can use it
    WHY, REMEDY     where it cannot: the reason, and what to do about it; else ""
    RECORD          what the library says of its build: kind "cpu" or "cuda", and why; None where it is not AVAILABLE
    ISAS, BEST      names of the instruction sets in rising order, and the best one that runs here ("" without library)
    isa()           what to give to an op as `isa`
    CUDA            whether it holds CUDA kernels, too; NO_CUDA, CUDA_REMEDY: where it is AVAILABLE and does not
    refusals(call), cuda_refusals(call)  why its CPU and its CUDA kernels cannot run a call

Nothing here touches a GPU: initialising CUDA at import breaks forked data loaders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import _library
from ._dispatch import Call, Refusal

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "avx512_amx")  # csrc/cpu/attention.h numbers them so
VARIABLE = "VIVIT_KERNELS_CPU_ISA"
_CHOOSE_BEST = -1
_OLDEST_ARCH = 80  # bfloat16 products and asynchronous copies
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _load() -> _library.Problem | None:
    found = _library.problem()
    # A second library with these names would end the process: one that somebody has loaded by hand stays.
    if found is None and not hasattr(torch.ops.vivit_kernels_native, "best_isa"):
        try:
            torch.ops.load_library(str(_library.library_path()))
        except OSError as error:
            return _library.unloadable(str(error))
    return found


_problem = _load()
AVAILABLE: bool = _problem is None
WHY: str = _problem.reason if _problem else ""
REMEDY: str = _problem.remedy if _problem else ""
RECORD: _library.Record | None = None if _problem else _library.read_record(_library.library_path())
CUDA: bool = RECORD is not None and RECORD.kind == "cuda"
NO_CUDA: str = (
    f"the native library has no CUDA kernels, it is built for the CPU alone ({RECORD.why})"
    if RECORD is not None and not CUDA
    else ""
)
CUDA_REMEDY = "pip install -e . --no-build-isolation on a machine with nvcc (or there: make build)"
# Kernels of avx512_bf16 beside a PyTorch whose products have AMX: forced, or the compiler did not know AMX.
BESIDE_AMX = "avx512_bf16_beside_amx"
HAS_AMX: bool = torch.cpu._is_amx_tile_supported()
BEST: str = "" if _problem else ISAS[torch.ops.vivit_kernels_native.best_isa()]


def _number(name: str, who: str) -> int:
    """Of an instruction set that can run here."""
    runs_here = ISAS[: ISAS.index(BEST) + 1] if BEST else ISAS
    if name not in ISAS:
        raise ValueError(f"{who}: {name!r} is not an instruction set; use one of {', '.join(runs_here)}")
    if name not in runs_here:
        raise ValueError(
            f"{who}: {name!r} does not run on this processor, {BEST} is its best; use one of {', '.join(runs_here)}"
        )
    return ISAS.index(name)


FORCED: str = os.environ.get(VARIABLE) or ""  # by the environment
_forced = _number(FORCED, f"{VARIABLE}={FORCED}") if FORCED else _CHOOSE_BEST


def isa() -> int:
    """The forced instruction set's number, or -1: the library takes the best one."""
    return _forced


def isa_name() -> str:
    """Of the instruction set in use; "" without library."""
    return BEST if _forced == _CHOOSE_BEST or not BEST else ISAS[_forced]


def call_isa(device: str) -> str:
    """Of a call on this device, as `Call.isa`: that of the kernels, or BESIDE_AMX."""
    if device != "cpu":
        return ""
    return BESIDE_AMX if HAS_AMX and isa_name() == "avx512_bf16" else isa_name()


@contextmanager
def forced_isa(name: str) -> Iterator[int]:
    """Within it isa() is that of `name`, in every thread of the process; for tests and measurements.

    Raises ValueError when `name` is unknown, or does not run on this processor.
    """
    global _forced
    before, _forced = _forced, _number(name, "forced_isa")
    try:
        yield _forced
    finally:
        _forced = before


def refusals(call: Call) -> list[Refusal]:
    """The CPU kernels: tensors of 16 and 32 bits, on the CPU."""
    found = []
    if not AVAILABLE:
        found.append(Refusal(WHY, REMEDY))
    if call.device != "cpu":
        found.append(Refusal(f"the tensors are on {call.device}", "move them to the CPU, or leave backend out"))
    return found + _dtype_refusals(call)


def _dtype_refusals(call: Call) -> list[Refusal]:
    if call.dtype in _DTYPES:
        return []
    dtype = str(call.dtype).removeprefix("torch.")
    return [Refusal(f"{dtype} is not one of float16, bfloat16, float32", "cast, or use backend='torch'")]


def cuda_refusals(call: Call) -> list[Refusal]:
    """The CUDA kernels: tensors of 16 or 32 bits, on a GPU from sm_80 on, in a library that nvcc took part in."""
    found = []
    if not AVAILABLE:
        found.append(Refusal(WHY, REMEDY))
    elif not CUDA:
        found.append(Refusal(NO_CUDA, CUDA_REMEDY))
    if call.device != "cuda":
        found.append(Refusal(f"the tensors are on {call.device}", "move them to a CUDA device"))
    if 0 < call.arch < _OLDEST_ARCH:
        remedy = f"use one of sm_{_OLDEST_ARCH} or later, or backend='torch'"
        found.append(Refusal(f"this GPU is sm_{call.arch}", remedy))
    return found + _dtype_refusals(call)
