"""What can be built here, and with what: the C++ compiler, ninja, PyTorch's headers, nvcc.

Standard library only, and torch is not imported: its headers are enough.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("_library", CSRC.parent / "kernels" / "vivit_kernels" / "_library.py")
assert _spec and _spec.loader
library = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(library)

VARIABLE = "VIVIT_KERNELS_BUILD"
MODES = ("auto", "cuda", "cpu", "none")
OLDEST_TORCH = (2, 11)
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
# A file whose name ends in one of these is compiled with its flags, and left out on other processors (portable is not).
# In this order they are linked: of an inline function that several files contain the linker keeps the first copy, which
# must be the one that runs everywhere.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
_BFLOAT16 = [*_AVX512, "-mavx512bf16"]
ISA_FLAGS = {"portable": [], "avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": _BFLOAT16, "avx512_amx": _BFLOAT16}
# Of compilers that know them (g++ 11, clang++ 12); without, the file compiles to nothing, and best_isa() is another.
NEWER_FLAGS = {"avx512_amx": ["-mamx-tile", "-mamx-bf16"]}
# PTX 8.0 for what comes later, which a driver compiles at the first call. It is what sm_80 is made from, so it takes no
# time here; machine code for one more GPU takes half as much again.
CUDA_ARCHES = ["sm_80", "compute_80", "sm_90a"]
SPECIFIC = {90: "a"}  # machine code for 9.0 is that of 9.0a: the same GPUs, with their warpgroups' products
OLDEST_ARCH = 80


class BuildError(Exception):
    """Shown without a traceback."""

    def __init__(self, reason: str, remedy: str = ""):
        super().__init__(reason, remedy)
        self.reason, self.remedy = reason, remedy

    def __str__(self) -> str:
        return f"{self.reason}\n  -> {self.remedy}" if self.remedy else self.reason


class Plan(NamedTuple):
    """What is going to be built, with what."""

    kind: str  # "cuda", "cpu" or "none"
    why: str
    remedy: str = ""  # of "none"
    cxx: tuple[str, ...] = ()
    ninja: str = ""
    torch: Path = Path()
    nvcc: str = ""
    arches: tuple[str, ...] = ()

    def line(self) -> str:
        if self.kind == "none":
            return f"native library: none: {self.why}" + (f" -> {self.remedy}" if self.remedy else "")
        tools = f"{compiler_name(self.cxx)}, headers of torch {torch_version(self.torch)}"
        if self.kind == "cuda":
            return f"native library: CPU and CUDA ({' '.join(self.arches)}): {self.why}; {tools}"
        return f"native library: CPU alone: {self.why}; {tools}"


def answer(command: list[str]) -> str:
    """A command's standard output, or "" where it cannot run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def compiler_name(cxx: tuple[str, ...]) -> str:
    """Such as "g++ 12.2.0"."""
    version = answer([*cxx, "-dumpfullversion"]) or answer([*cxx, "-dumpversion"])  # clang++ knows only the latter
    return f"{Path(cxx[-1]).name} {version.strip()}"


def warning_flags(cxx: tuple[str, ...]) -> list[str]:
    """g++ 12 takes undefined vectors in its own AVX-512 header for a mistake; clang++ does not know that warning."""
    return [] if "clang" in answer([*cxx, "--version"]) else ["-Wno-maybe-uninitialized"]


def takes(cxx: Iterable[str], flags: Iterable[str]) -> bool:
    command = [*cxx, *FLAGS, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).returncode == 0


@functools.cache
def newer_flags(cxx: tuple[str, ...], isa: str) -> list[str]:
    """Flags of an instruction set beyond ISA_FLAGS, if this compiler knows them."""
    flags = NEWER_FLAGS.get(isa, [])
    return flags if flags and takes(cxx, [*ISA_FLAGS[isa], *flags]) else []


def machine_flags() -> dict[str, list[str]]:
    return ISA_FLAGS if platform.machine() in ("x86_64", "AMD64") else {"portable": []}


def find_cxx(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The first C++ compiler that takes every flag. Raises BuildError, saying what was tried."""
    chosen = environ.get("CXX")
    names = [shlex.split(chosen)] if chosen else [["g++"], ["clang++"], ["c++"]]
    newest = [flag for flags in machine_flags().values() for flag in flags]
    old = ""
    for name in names:
        if not shutil.which(name[0]):
            continue
        if takes(name, newest):
            return tuple(name)
        old = old or shlex.join(name)
    if old:
        raise BuildError(f"{old} does not know this processor's instruction sets", "install g++ >= 10 or clang++ >= 9")
    tried = f"CXX={chosen}" if chosen else "g++, clang++ and c++"
    raise BuildError(f"no C++ compiler is here (tried {tried})", "install g++ (on Debian and Ubuntu: apt install g++)")


def find_ninja() -> str:
    """This environment's before any other: one of another version takes no log of its, and compiles all again."""
    places = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent), None]  # None: PATH
    found = next((found for place in places if (found := shutil.which("ninja", path=place))), None)
    if found is None:
        raise BuildError("ninja is not here", "pip install ninja")
    return found


def find_torch() -> Path:
    """torch's folder; in pip's isolated build, of the environment that pip installs into, if one is there."""
    spec = importlib.util.find_spec("torch")  # does not import it
    found = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    found += [Path(sysconfig.get_path(place), "torch") for place in ("purelib", "platlib")]
    for folder in found:
        if (folder / "include/torch/csrc/stable/library.h").is_file():
            version = torch_version(folder)
            if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
                raise BuildError(f"torch {version} is too old to build with", "pip install 'torch>=2.11'")
            return folder
    raise BuildError("PyTorch's headers are not here", "pip install 'torch>=2.11'")


def torch_version(folder: Path) -> str:
    found = re.search(r"^__version__ = '(.+)'", (folder / "version.py").read_text(), re.MULTILINE)
    return found.group(1) if found else "0.0"


def find_nvcc(environ: Mapping[str, str]) -> str:
    home = environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else [None, "/usr/local/cuda/bin"]
    found = next((found for place in places if (found := shutil.which("nvcc", path=place))), None)
    if found is None:
        where = f"in CUDA_HOME={home}" if home else "on PATH or in /usr/local/cuda"
        raise BuildError(f"no nvcc is here ({where})", f"install the CUDA toolkit and set CUDA_HOME, or {VARIABLE}=cpu")
    return found


def cuda_arches(chosen: str, known: str) -> tuple[str, ...]:
    """sm_.. (machine code) and compute_.. (PTX) of TORCH_CUDA_ARCH_LIST, or the default's that nvcc knows.

    chosen: as PyTorch reads it, such as "8.0;9.0a+PTX"; GPUs before sm_80 are left out: no kernel here runs on them.
    known: what `nvcc --list-gpu-code` prints.
    Raises BuildError.
    """
    numbers = {int(number) for number in re.findall(r"sm_(\d+)", known)}
    if not chosen.strip():
        return tuple(arch for arch in CUDA_ARCHES if int(re.sub(r"\D", "", arch)) in numbers)
    arches: list[str] = []
    for entry in re.split(r"[;,\s]+", chosen.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST={chosen!r}: {entry!r} is no GPU", "write it like 8.0, 9.0a or 9.0+PTX"
            )
        number, letter, ptx = int(match[1] + match[2]), match[3], match[4]
        if number < OLDEST_ARCH:
            continue
        if number not in numbers:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST={chosen!r}: this nvcc does not know {entry}", "leave it out, or a newer CUDA"
            )
        machine = letter or SPECIFIC.get(number, "")
        arches += [f"sm_{number}{machine}"] + [f"compute_{number}{letter}"] * bool(ptx)
    if not arches:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST={chosen!r}: no GPU of it runs the CUDA kernels", "name sm_80 or newer")
    return tuple(dict.fromkeys(arches))


def plan(environ: Mapping[str, str] = os.environ) -> Plan:
    """Decides what to build. Raises BuildError if a kind that was asked for cannot be built."""
    mode = environ.get(VARIABLE) or "auto"
    if mode not in MODES:
        raise BuildError(f"{VARIABLE}={mode!r} is not known", f"it is one of {', '.join(MODES)}")
    if mode == "none":
        return Plan("none", f"{VARIABLE}=none")
    try:
        if sys.platform != "linux":
            raise BuildError(f"it is built on Linux only, this is {sys.platform}")
        cxx, ninja, torch = find_cxx(environ), find_ninja(), find_torch()
    except BuildError as error:
        if mode == "auto":
            return Plan("none", error.reason, error.remedy)
        raise BuildError(f"{VARIABLE}={mode}: {error.reason}", error.remedy) from None
    if mode == "cpu":
        return Plan("cpu", f"{VARIABLE}=cpu", "", cxx, ninja, torch)
    try:
        if not any(CSRC.rglob("*.cu")):
            raise BuildError("csrc/ has no CUDA sources", f"{VARIABLE}=cpu")
        nvcc = find_nvcc(environ)
    except BuildError as error:
        if mode == "auto":
            return Plan("cpu", error.reason, "", cxx, ninja, torch)
        raise BuildError(f"{VARIABLE}=cuda: {error.reason}", error.remedy) from None
    arches = cuda_arches(environ.get("TORCH_CUDA_ARCH_LIST", ""), answer([nvcc, "--list-gpu-code"]))
    release = re.search(r"release ([\d.]+)", answer([nvcc, "--version"]))
    return Plan("cuda", f"nvcc {release.group(1) if release else ''} is here", "", cxx, ninja, torch, nvcc, arches)
