"""A small stand-in for csrc/ beside a copy of what builds the real one, for the tests of building."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("native_build", ROOT / "csrc" / "build.py")
assert spec and spec.loader
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
toolchain, library = sys.modules["toolchain"], build.library

SOURCES = {
    "bindings.cpp": """
        #include "cpu/numbers.h"
        extern "C" int aoti_torch_device_type_cpu();
        extern "C" __attribute__((visibility("default"))) int answer() {
            return kAnswer + portable_number() + aoti_torch_device_type_cpu();
        }
    """,
    "cpu/numbers.h": "constexpr int kAnswer = 40;\nint portable_number();\n",
    "cpu/isa_portable.cpp": "int portable_number() { return 2; }\n",
    "cpu/isa_avx2.cpp": "int avx2_number() { return 3; }\n",
}


def can_build() -> str:
    """Why nothing can be compiled here; "" if it can."""
    plan = toolchain.plan(dict(os.environ) | {toolchain.VARIABLE: "auto"})
    return plan.why if plan.kind == "none" else ""


builds = pytest.mark.skipif(bool(can_build()), reason=can_build())


def write(tree: Path, sources: dict[str, str]) -> None:
    for name, text in sources.items():
        (tree / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "csrc" / name).write_text(text)


@pytest.fixture
def tree(tmp_path) -> Path:
    """A checkout with the real build files and small sources."""
    tree = tmp_path / "tree"
    for name in ("kernels", "vivit"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "_C.*"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    write(tree, SOURCES)
    for name in ("build.py", "toolchain.py", "torch_symbols.txt"):
        shutil.copy(ROOT / "csrc" / name, tree / "csrc" / name)
    return tree


def run(tree: Path, *command: str, **environ: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in (toolchain.VARIABLE, "CXX")}
    return subprocess.run(command, cwd=tree, env=kept | environ, capture_output=True, text=True)


def run_build(tree: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
    return run(tree, sys.executable, "csrc/build.py", *arguments, **environ)


def compiled(done: subprocess.CompletedProcess) -> set[str]:
    """The names of what ninja made."""
    assert done.returncode == 0, done.stdout + done.stderr
    return {Path(line.split()[-1]).name for line in done.stdout.splitlines() if line.startswith("[")}


def built(tree: Path) -> Path:
    return tree / "kernels" / "vivit_kernels" / "_C.so"


def answer_of(path: Path) -> int:
    return ctypes.CDLL(str(path)).answer()
