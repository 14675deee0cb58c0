"""Faults planted in the CUDA C++ kernels themselves, for tests that show who finds them: one line of a copy of
csrc/cuda is changed, a source file compiled from it, and the simulator's module linked with that in place of its own.

A module cannot be loaded beside another of the same name, so each has a process of its own.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cuda_simulator
from native_tree import ROOT, toolchain

CAUGHT, PASSED = 7, 0  # exit statuses of a check
CHECK = """
import importlib.util, sys
import cuda_simulator, {module} as checks
spec = importlib.util.spec_from_file_location("cuda_sim", sys.argv[1])
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)
cuda_simulator.made = lambda: made
try:
    checks.{function}()
except RuntimeError as error:
    print(error)
except AssertionError:
    print("parity")
else:
    sys.exit({passed})
sys.exit({caught})
"""


class Fault(NamedTuple):
    """`before` in a file of csrc/cuda, where it stands once, becomes `after`; `found` is a pattern of what is said."""

    file: str
    before: str
    after: str
    found: str


def planted(folder: Path, fault: Fault | None, source: str) -> Path:
    """The simulator's module with csrc/cuda/`source` compiled from a copy that has the fault, in `folder`."""
    cuda_simulator.made()  # objects of everything else
    kernels = ROOT / "csrc" / "cuda"
    copy = folder / "cuda"
    copy.mkdir()
    for file in [*kernels.glob("*.cu*"), *kernels.glob("*.h")]:
        shutil.copy(file, copy)
    if fault:
        text = (copy / fault.file).read_text()
        assert text.count(fault.before) == 1, f"{fault.file} has {text.count(fault.before)} of {fault.before!r}"
        (copy / fault.file).write_text(text.replace(fault.before, fault.after))
    cxx, made, module = toolchain.find_cxx(os.environ), folder / "faulty.o", folder / "cuda_sim.so"
    includes = [f"-I{ROOT / 'tests'}", f"-I{folder}", f"-I{copy}"]
    flags = [flag for flag in cuda_simulator.FLAGS if flag != "-O2"]
    run([*cxx, *flags, "-O1", "-w", *includes, "-x", "c++", "-c", str(copy / source), "-o", str(made)])
    others = [cuda_simulator.FOLDER / f"{x.name}.o" for x in cuda_simulator.sources() if x.name != source]
    # first: of a function that several have, the linker keeps the first one's
    run([*cxx, "-shared", str(made), *map(str, others), "-o", str(module)])
    return module


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


def said(module: Path, check: str) -> str:
    """What stops `check`, "module.function", with that module: what the simulator says, "parity", or "" if nothing."""
    where, _, function = check.rpartition(".")
    program = CHECK.format(module=where, function=function, passed=PASSED, caught=CAUGHT)
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", program, str(module)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode in (CAUGHT, PASSED), done.stderr
    return done.stdout.strip() if done.returncode == CAUGHT else ""
