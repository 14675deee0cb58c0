"""What a Triton kernel's launcher launches, compiled instead of launched: no GPU needed.

The registered operation runs on unwritten CPU tensors of a case's shapes, so that every kernel is compiled for the
arguments, alignments and tiles that a GPU would see.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import vivit_kernels  # noqa: F401  registers the operations
from vivit_kernels import _triton

from . import cubin
from .cases import PACKAGES, AttentionCase, Case, TubeletCase

DIRECTIONS = ("forward", "backward")
OPTIONS = ("mask", "dropout", "rotary", "softcap")


@dataclass(frozen=True)
class Compiled:
    """A launch of a Triton kernel. shared: bytes a block, tensor_columns: of tensor memory (Blackwell).

    tile: sizes it was compiled for, by name; ir: what Triton made of its source, before any layout.
    """

    kernel: cubin.Kernel
    grid: tuple[int, ...]
    threads: int
    shared: int
    tensor_columns: int = 0
    tile: tuple[tuple[str, Any], ...] = ()
    ir: str = ""

    @property
    def occupancy(self) -> cubin.Occupancy:
        return cubin.occupancy(self.kernel.arch, self.kernel.registers, self.shared, self.threads)

    @property
    def complaints(self) -> list[str]:
        """What is wrong with it: it could not be launched, or was written to keep in registers what is not."""
        return self.complaints_but_for()

    def complaints_but_for(self, stack: int = 0) -> list[str]:
        """The same, but for so many bytes of local memory a thread outside of loops that multiply."""
        limit = cubin.ARCHS[self.kernel.arch]
        found = cubin.local_memory(self.kernel, stack)
        if early := cubin.overwritten(self.kernel.sass) if self.kernel.mix["HGMMA"] else []:
            found.append(f"race: {len(early)} writes of what a product may still read, first {early[0]}")
        if self.tensor_columns > limit.tensor_columns:
            found.append(f"tensor memory: {self.tensor_columns} columns, {limit.tensor_columns} at most")
        if not self.occupancy.blocks:
            found.append(f"no block fits: {', '.join(self.occupancy.limits)}")
        return found


class NoGPU:
    """Stands in for Triton's CUDA driver. The JIT caches per device: every architecture gets an id of its own."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable:
        return lambda *_, **__: [0.0, 0.0, 0.0]  # an autotuner compiles every configuration and takes the first


def compile_launches(function: Callable[[], object], arch: int) -> list[Compiled]:
    """Runs `function`; each Triton launch in it is compiled for sm_<arch> with its real arguments, and not launched.

    Raises RuntimeError without Triton, or where kernels are interpreted instead of compiled.
    """
    if why := unavailable():
        raise RuntimeError(f"bench static: {why}")
    launched: list[Compiled] = []
    with _instead_of_launches(arch, launched):
        function()
    return launched


def unavailable() -> str:
    """Why Triton kernels cannot be compiled here, or ''."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, so its kernels cannot be compiled here\n  -> pip install triton; no GPU needed"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set: kernels are interpreted, not compiled\n  -> use a process without it"
    return ""


@contextmanager
def _instead_of_launches(arch: int, launched: list[Compiled]) -> Iterator[None]:
    from triton.runtime import JITFunction, driver

    launch, before, for_before = JITFunction.run, driver._active, _triton.compiling_for

    def run(self, *args, grid: Any, warmup: bool, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if callable(grid):
            grid = grid(dict(zip(self.arg_names, args, strict=False)) | options)
        constants = {param.name for param in self.params if param.is_constexpr}
        named = {name: value for name, value in options.items() if name in constants}
        launched.append(_compiled(kernel, tuple(grid), named))
        return kernel

    JITFunction.run = run
    driver.set_active(NoGPU(arch))  # pyright: ignore[reportArgumentType]
    _triton.compiling_for = arch  # tiles are chosen for it too
    try:
        yield
    finally:
        JITFunction.run, _triton.compiling_for = launch, for_before
        driver.set_active(before)  # pyright: ignore[reportArgumentType]


def _compiled(kernel: Any, grid: tuple[int, ...], constants: dict[str, Any]) -> Compiled:
    facts, read = kernel.metadata, _read_bytes(kernel.asm["cubin"])
    threads = read.threads or 32 * facts.num_warps  # with warp specialisation more than num_warps
    sizes = {name: value for name, value in constants.items() if _is_size(value)}
    tile = tuple((sizes | {"warps": facts.num_warps, "stages": facts.num_stages}).items())
    shared, columns = max(facts.shared, read.shared), getattr(facts, "tmem_size", 0) or 0
    return Compiled(read, grid, threads, shared, columns, tile, kernel.asm["ttir"])


def _is_size(value: Any) -> bool:
    """Flags and names are no part of a tile."""
    return isinstance(value, tuple) or (isinstance(value, int) and not isinstance(value, bool))


@cache
def _read_bytes(binary: bytes) -> cubin.Kernel:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        return cubin.read(path)[0]


# ---- what is launched for a case ----


def has_kernel(op: str) -> bool:
    return importlib.util.find_spec(f"vivit_kernels.{PACKAGES[op]}.triton_kernels") is not None


def case_launches(
    case: Case, dtype: torch.dtype, direction: str, arch: int, options: tuple[str, ...] = ()
) -> list[Compiled]:
    """What backend `triton` launches for a case in one direction; a backward's forward is run and left out.

    options: of attention, besides the case's own: some of OPTIONS.
    """
    results: list[Tensor] = []

    def run() -> None:
        if isinstance(case, AttentionCase):
            results.append(_attention(case, dtype, options))
        else:
            results.append(_tubelet(case, dtype))

    forward = compile_launches(run, arch)
    if direction == "forward":
        return forward
    return compile_launches(lambda: results[0].backward(torch.empty_like(results[0])), arch)


def _attention(case: AttentionCase, dtype: torch.dtype, options: tuple[str, ...]) -> Tensor:
    tokens = (case.S,) if case.op == "joint" else (case.T, case.S)
    qkv = torch.empty(case.B, *tokens, 3, case.H, case.D, dtype=dtype, requires_grad=True)
    op = getattr(torch.ops.vivit_kernels, f"{PACKAGES[case.op]}_fwd")
    mask = torch.ones(case.B, case.T * case.S, dtype=torch.bool) if "mask" in options else None
    seed = torch.zeros(2, dtype=torch.int64) if "dropout" in options else None
    table = torch.zeros(case.T * case.S, case.D // 2) if "rotary" in options else None
    softcap = case.softcap or (5.0 if "softcap" in options else 0.0)
    numbers = (case.temporal_heads, case.D**-0.5, softcap, 0.1 if seed is not None else 0.0)
    return op(qkv, None, None, mask, seed, table, table, *numbers, "triton")[0]


def _tubelet(case: TubeletCase, dtype: torch.dtype) -> Tensor:
    video = torch.empty(case.B, case.C, case.F, case.Y, case.X, dtype=torch.uint8)
    shapes = ((case.E, case.C, *case.tubelet), (case.E,), (1, case.tokens, case.E))
    weight, bias, position = (torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    scale, shift = [1 / 127.5] * case.C, [-1.0] * case.C
    return torch.ops.vivit_kernels.tubelet_embedding_fwd(
        video, weight, bias, position, None, False, scale, shift, "triton"
    )


# ---- what no case names: the passes over rows, and the temporal block, which is no headline ----

PASSES = ("layer norm", "residual norm", "layer norm backward", "residual norm backward", "GELU backward")
BLOCKS = ("temporal block", "temporal block backward")


def pass_launches(name: str, dtype: torch.dtype, arch: int, rows: int = 25088, E: int = 768) -> list[Compiled]:
    """What one of PASSES launches for tokens `[rows, E]`, hidden rows of 4 E, parameters in float32."""
    from vivit_kernels._rows import triton_passes
    from vivit_kernels._rows.passes import Norm, Normed

    x, other, dn = (torch.empty(rows, E, dtype=dtype) for _ in range(3))
    norm = Norm(torch.empty(E), torch.empty(E), 1e-6)
    found = Normed(x, x, torch.empty(rows), torch.empty(rows))
    hidden = torch.empty(rows, 4 * E, dtype=dtype) if name == "GELU backward" else x
    run = {
        "layer norm": lambda: triton_passes.norm_forward(x, None, norm, dtype),
        "residual norm": lambda: triton_passes.norm_forward(x, other, norm, dtype),
        "layer norm backward": lambda: triton_passes.norm_backward(dn, None, found, norm, (True, True, True)),
        "residual norm backward": lambda: triton_passes.norm_backward(dn, other, found, norm, (True, True, True)),
        "GELU backward": lambda: triton_passes.gelu_backward(hidden, hidden, "tanh", (True, True)),
    }
    return compile_launches(run[name], arch)


def block_launches(
    name: str, dtype: torch.dtype, arch: int, T: int = 16, E: int = 768, heads: int = 12
) -> list[Compiled]:
    """What one of BLOCKS launches for 2 clips of `[T, 16, E]`."""
    from vivit_kernels.temporal_block import triton_kernels

    x = torch.empty(2, T, 16, E, dtype=dtype)
    norm_weight, norm_bias, weight, bias = (
        torch.empty(shape, dtype=dtype) for shape in ((E,), (E,), (3 * E, E), (3 * E,))
    )
    given = x, norm_weight, norm_bias, weight, bias, heads, 1e-6
    if name == "temporal block":
        return compile_launches(lambda: triton_kernels.launch_fwd(*given), arch)
    return compile_launches(lambda: triton_kernels.launch_bwd(x, *given), arch)
