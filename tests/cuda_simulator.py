"""CUDA C++ kernels on the CPU: compiles csrc/cuda and tests/cuda_sim into the module `cuda_sim`, and calls it.

`forward` and `backward` take what the launchers of a CUDA call take, on CPU tensors. What the simulator finds wrong
(tests/cuda_sim/machine.h, memory.h) is a RuntimeError that names verb, line, block and thread.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from native_tree import ROOT, build, toolchain
from torch import Tensor

FOLDER = ROOT / "build" / "cuda_sim"
MODULE = FOLDER / f"cuda_sim{sysconfig.get_config_var('EXT_SUFFIX')}"
DTYPES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # DType of csrc/cuda/attention.h
MOST_SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10}  # bytes that a block may have
# -ffp-contract=off: a product and a sum are rounded as they are written, on every processor
FLAGS = [*toolchain.FLAGS, "-O2", "-ffp-contract=off", "-Wno-unknown-pragmas", "-DVIVIT_SIM"]


def sources() -> list[Path]:
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    return [*sorted((ROOT / "tests" / "cuda_sim").glob("*.cpp")), *kernels]


def ninja_file(cxx: tuple[str, ...], torch_folder: Path) -> str:
    """pybind11 comes with PyTorch, whose headers have it; nothing else of PyTorch is used."""
    includes = ["-Itests", "-Icsrc", "-Icsrc/cuda"]
    foreign = [f"-isystem{torch_folder / 'include'}", f"-isystem{sysconfig.get_path('include')}"]
    command = shlex.join([*cxx, *FLAGS, *includes])
    lines = [
        f"builddir = {build.name(FOLDER)}",
        "rule cxx",
        f"  command = {command} $flags -MD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join([*cxx, '-shared'])} $in -o $out",
    ]
    objects = []
    for source in sources():
        objects.append(build.name(FOLDER / f"{source.name}.o"))
        lines.append(f"build {objects[-1]}: cxx {build.name(source)}")
        if source.name.endswith("module.cpp"):
            lines.append(f"  flags = {shlex.join(foreign)}")
    lines.append(f"build {build.name(MODULE)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


@cache
def made() -> Any:
    """The module, up to date. Skips the test where no compiler is; raises where one fails."""
    try:
        cxx, ninja, torch_folder = toolchain.find_cxx(os.environ), toolchain.find_ninja(), toolchain.find_torch()
    except toolchain.BuildError as error:
        pytest.skip(f"the host simulator cannot be compiled: {error}")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        pytest.skip("the host simulator cannot be compiled: Python's headers are not here (apt install python3-dev)")
    with build.alone(FOLDER):
        build.write_changed(FOLDER / "build.ninja", ninja_file(cxx, torch_folder))
        command = [ninja, "-f", str(FOLDER / "build.ninja")]
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the host simulator does not compile:\n{done.stdout}{done.stderr}")
        return loaded(MODULE)


def loaded(path: Path) -> Any:
    """pybind11 gives one that it has loaded under the same name before: the folder's name is a part of it."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.cuda_sim", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def counted(monkeypatch: pytest.MonkeyPatch, launcher: str) -> list[int]:
    """Products of warpgroups that every launch of this launcher asks for, from here on."""
    found: list[int] = []
    module = made()
    launch = getattr(module, launcher)

    def run(*args: Any) -> None:
        launch(*args)
        found.append(module.products_of_launch())

    monkeypatch.setattr(module, launcher, run)
    return found


def view(x: Tensor) -> tuple[int, int, list[int], list[int]]:
    """A tensor as the module knows it: address, bytes of an element, sizes, strides."""
    assert x.device.type == "cpu"
    return x.data_ptr(), x.element_size(), list(x.shape), list(x.stride())


def maybe(x: Tensor | None) -> tuple | None:
    return None if x is None else view(x)


def _call(kind: str, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, options: dict) -> Any:
    """A Call or a JointCall."""
    given: dict[str, Any] = {"scale": q.shape[-1] ** -0.5, "softcap": 0.0, "dropout_p": 0.0, "schedule_seed": 0}
    given |= {"arch": 90} | options
    given.setdefault("shared_bytes", MOST_SHARED[f"sm_{given['arch']}"])
    names = ("mask", "cos", "sin", "seed", *(("turned",) if kind == "JointCall" else ()))
    tensors = {name: maybe(given.pop(name, None)) for name in names}
    qkv = {"q": view(q), "k": view(k), "v": view(v)}
    return getattr(made(), kind)(**qkv, lse=maybe(lse), dtype=DTYPES[q.dtype], **tensors, **given)


def forward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor | None = None, **options: Any) -> None:
    """Writes o and, if given, lse: `launch_forward` of csrc/cuda on the simulator.

    q, k, v, o: `[B, T, S, H, D]`, one of DTYPES, any strides but a unit last one. lse: float32 `[B, H, T * S]`.
    options: temporal_heads; mask bool `[B, T * S]`; cos, sin float32 `[T * S, D / 2]`; seed int64 `[2]`; scale,
    softcap, dropout_p; schedule_seed (0: in order), arch (of the GPU, 80 or 90), shared_bytes (what a block may have);
    packed_warps, stages (`Tiling` of csrc/cuda/attention.h).
    Raises RuntimeError for what hardware leaves undefined, and for a launch that it would refuse.
    """
    made().attention_forward(_call("Call", q, k, v, lse, options), view(o))


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor | None, lse: Tensor | None, dq, dk, dv,
    o_again: Tensor | None = None, **options: Any,
) -> None:  # fmt: skip
    """Writes dq, dk, dv, and where o is not read o once more into o_again: `launch_backward` of csrc/cuda; o and lse
    are the forward's, where it keeps them."""
    gradients = view(dq), view(dk), view(dv)
    made().attention_backward(_call("Call", q, k, v, lse, options), maybe(o), view(do), *gradients, maybe(o_again))


def joint_forward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor | None = None, **options: Any) -> None:
    """Writes o and, if given, lse: `launch_joint_forward` of csrc/cuda. q, o: `[B, N_q, H, D]`; k, v: `[B, N_k, H, D]`;
    lse: float32 `[B, H, N_q]`; options as of `forward`, but temporal_heads; turned: room for q and k turned, contiguous
    `[2, B, N_q, H, D]`, or none."""
    made().joint_forward(_call("JointCall", q, k, v, lse, options), view(o))


def joint_backward(do, q, k, v, o, lse, delta, dq, dk, dv, **options: Any) -> None:
    """Writes delta, float32 `[B, H, N_q]`, and dq, dk, dv: `launch_joint_backward` of csrc/cuda."""
    tensors = o, do, delta, dq, dk, dv
    made().joint_backward(_call("JointCall", q, k, v, lse, options), *map(view, tensors))


def regime_of(N: int, D: int, dtype: torch.dtype, backward: bool, rotary: bool, shared_bytes: int) -> int:
    """`regime_of` of csrc/cuda/attention.h."""
    return made().regime_of(N, D, DTYPES[dtype], backward, rotary, shared_bytes)


def keeps_output(T: int, S: int, H: int, temporal_heads: int, dtype: torch.dtype) -> bool:
    return made().keeps_output(T, S, H, temporal_heads, DTYPES[dtype])


def expect(found: str) -> Any:
    """A RuntimeError that says so, as a context."""
    return pytest.raises(RuntimeError, match=re.compile(found, re.DOTALL))
