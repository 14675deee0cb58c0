"""What pip makes of this project: wheels with and without the native library, sdists, editable installs."""

from __future__ import annotations

import platform
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from native_tree import answer_of, builds, built, library, run, run_build, tree

__all__ = ["tree"]  # a fixture


def make_wheel(source: Path, folder: Path, **environ: str) -> tuple[str, list[str]]:
    """The name of the wheel that pip makes, and what it holds of the native library."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    done = run(source, *command, **environ)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel.name, [name for name in zipfile.ZipFile(wheel).namelist() if Path(name).stem == "_C"]


@builds
def test_the_sdist_builds_a_wheel_for_every_python_of_the_platform(tree, tmp_path):
    run_build(tree)  # what lies about in the checkout does not get into the sdist
    ask = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    assert run(tree, sys.executable, "-c", ask).returncode == 0
    (sdist,) = (tree / "dist").glob("vivit_kernels-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked", filter="data")
    present = {str(path.relative_to(tree)) for path in (tree / "csrc").rglob("*.*") if "__pycache__" not in path.parts}
    assert present <= names and not [name for name in names if name.endswith((".so", ".o", ".ninja"))]
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    name, held = make_wheel(unpacked, tmp_path / "wheels")
    assert name.endswith(f"-py3-none-linux_{platform.machine()}.whl") and held == ["vivit_kernels/_C.so"]


def test_a_wheel_without_the_library_is_for_every_platform_and_says_why(tree, tmp_path):
    built(tree).write_bytes(b"left over from another build")
    name, held = make_wheel(tree, tmp_path / "wheels", VIVIT_KERNELS_BUILD="none")
    assert name.endswith("-py3-none-any.whl") and held == ["vivit_kernels/_C.why"]
    text = zipfile.ZipFile(tmp_path / "wheels" / name).read("vivit_kernels/_C.why").decode()
    assert text.startswith("VIVIT_KERNELS_BUILD=none\n")


@builds
@pytest.mark.parametrize(
    "command",
    [
        ["-c", "from setuptools import build_meta; print(build_meta.build_editable('dist'))"],  # as pip does
        ["setup.py", "build_ext", "--inplace"],
    ],
)
def test_an_editable_install_builds_in_place(tree, command):
    done = run(tree, sys.executable, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("native library: CPU alone") == 1, "the decision is one line"
    assert library.problem_of(built(tree), tree) is None and answer_of(built(tree)) == 42


def test_setup_py_without_a_compiler_leaves_the_reason(tree):
    done = run(tree, sys.executable, "setup.py", "build_ext", "--inplace", CXX="missing++")
    assert done.returncode == 0 and "native library: none: no C++ compiler is here" in done.stdout
    assert built(tree).with_name(library.NOTE).read_text().startswith("no C++ compiler is here")


def test_an_install_of_what_cannot_be_built_stops_with_the_reason(tree):
    ask = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = run(tree, sys.executable, "-c", ask, VIVIT_KERNELS_BUILD="cuda")
    assert (
        done.returncode == 1 and "native library: VIVIT_KERNELS_BUILD=cuda: " in done.stderr and "  -> " in done.stderr
    )
    assert "Traceback" not in done.stderr
