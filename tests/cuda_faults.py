"""Faults planted in the CUDA C++ kernels themselves, for tests that show who finds them.

Lines of a copy of csrc/cuda are changed: in place of what a fault replaces stands a choice, by a number, between that
and the fault. One source file compiled from the copy, linked with the simulator's other objects, makes a module that
has all of a test's faults, of which a number makes one real. So the kernels themselves know nothing of faults, nor does
the simulator, and many cost one compilation, which is done again only when something has changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cuda_simulator
from native_tree import ROOT, build, toolchain

KERNELS = ROOT / "csrc" / "cuda"
NUMBER = "planted_fault"
DECLARED = f'extern "C" __attribute__((visibility("default"))) int {NUMBER};\n'


class Fault(NamedTuple):
    """In a file of csrc/cuda `before`, an expression or, with its semicolon, a statement, becomes `after`; it stands
    once in `within`, which stands once in the file. found: a pattern of what is said then."""

    file: str
    before: str
    after: str
    found: str
    within: str = ""  # `before` itself


def choice(before: str, others: dict[int, str]) -> str:
    """C++ that is `before`, or what others say for the number."""
    if before.endswith(";"):
        cases = "".join(f"if ({NUMBER} == {n}) {{ {after} }} else " for n, after in others.items())
        return f"{{ {cases}{{ {before} }} }}"
    return f"({''.join(f'{NUMBER} == {n} ? ({after}) : ' for n, after in others.items())}({before}))"


def changed(text: str, faults: dict[int, Fault]) -> str:
    """A file's text with these faults, by their numbers, as choices."""
    places: dict[tuple[int, int], dict[int, str]] = {}
    for number, fault in faults.items():
        within = fault.within or fault.before
        for part, whole in ((within, text), (fault.before, within)):
            assert whole.count(part) == 1, f"{fault.file} has {whole.count(part)} of {part!r}"
        start = text.index(within) + within.index(fault.before)
        places.setdefault((start, start + len(fault.before)), {})[number] = fault.after
    following = len(text)
    for (start, end), others in sorted(places.items(), reverse=True):
        assert end <= following, f"faults {[*others]} lie in part where others do"
        text, following = text[:start] + choice(text[start:end], others) + text[end:], start
    return DECLARED + text


def copy(folder: Path, source: str, faults: tuple[Fault, ...]) -> None:
    """csrc/cuda with the faults, in `folder`/cuda. Files that are as before keep their times."""
    for file in [KERNELS / source, *KERNELS.glob("*.cuh"), *KERNELS.glob("*.h")]:
        here = {number: fault for number, fault in enumerate(faults, 1) if fault.file == file.name}
        text = changed(file.read_text(), here) if here else file.read_text()
        last = f"{DECLARED}int {NUMBER} = 0;\n" if file.name == source else ""
        build.write_changed(folder / "cuda" / file.name, text + last)


def ninja_file(folder: Path, source: str) -> str:
    cxx, others = toolchain.find_cxx(os.environ), [x.name for x in cuda_simulator.sources() if x.name != source]
    flags = [*(flag for flag in cuda_simulator.FLAGS if flag != "-O2"), "-O1", "-w"]
    includes = [f"-I{ROOT / 'tests'}", f"-I{folder}", f"-I{folder / 'cuda'}"]
    # first: of a function that several have, the linker keeps the first one's
    objects = [folder / "faulty.o", *(cuda_simulator.FOLDER / f"{other}.o" for other in others)]
    lines = [
        f"builddir = {build.name(folder)}",
        "rule cxx",
        f"  command = {shlex.join([*cxx, *flags, *includes])} -MD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join([*cxx, '-shared'])} $in -o $out",
        f"build {build.name(objects[0])}: cxx {build.name(folder / 'cuda' / source)}",
        f"build {build.name(folder / cuda_simulator.MODULE.name)}: link {' '.join(map(build.name, objects))}",
    ]
    return "\n".join(lines) + "\n"


@cache
def made(source: str, faults: tuple[Fault, ...]) -> tuple[Any, ctypes.c_int]:
    """The simulator's module with all of the faults in csrc/cuda/`source`, and the number of the one that is real; 0:
    of none."""
    cuda_simulator.made()  # objects of everything else; skips the test where nothing can be compiled
    folder = cuda_simulator.FOLDER / "faults" / source
    with build.alone(folder):
        copy(folder, source, faults)
        build.write_changed(folder / "build.ninja", ninja_file(folder, source))
        command = [toolchain.find_ninja(), "-f", str(folder / "build.ninja")]
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, f"{source} with faults does not compile:\n{done.stdout}{done.stderr}"
        module = folder / cuda_simulator.MODULE.name
        return cuda_simulator.loaded(module), ctypes.c_int.in_dll(ctypes.CDLL(str(module)), NUMBER)


@contextlib.contextmanager
def planted(source: str, faults: tuple[Fault, ...], real: Fault | None) -> Iterator[None]:
    """The simulator runs csrc/cuda/`source` with this one of its faults, or with none."""
    module, number = made(source, faults)
    usual, cuda_simulator.made = cuda_simulator.made, lambda: module
    number.value = faults.index(real) + 1 if real else 0
    try:
        yield
    finally:
        number.value, cuda_simulator.made = 0, usual


def said(check: Callable[[], object]) -> str:
    """What stops `check`: what the simulator says, "parity", or "" if nothing."""
    try:
        check()
    except RuntimeError as error:
        return str(error)
    except AssertionError:
        return "parity"
    return ""
