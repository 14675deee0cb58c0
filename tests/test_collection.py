"""Which tests of Triton kernels run where, see conftest.py: asked of pytest itself, in processes of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
HERE = Path(__file__).parent
TESTS = """
import pytest
pytestmark = pytest.mark.interpreted

def test_kernel(device): pass

@pytest.mark.full
def test_more(device): pass

def test_about_the_interpreter(): pass
"""
ORDINARY = "def test_plain(): pass\n"


@pytest.fixture
def chosen(tmp_path):
    """Function: names of the tests that a process would run."""
    for name in ("conftest.py", "triton_interpreter.py"):
        (tmp_path / name).write_text((HERE / name).read_text())
    (tmp_path / "test_triton_some.py").write_text(TESTS)
    (tmp_path / "test_triton_gate.py").write_text(ORDINARY)
    (tmp_path / "test_other.py").write_text("import os\nassert 'TRITON_INTERPRET' not in os.environ\n" + ORDINARY)
    settings = HERE.parent / "pyproject.toml"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))

    def names(*options: str, **variables: str) -> set[str]:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-c",
            str(settings),
            "--collect-only",
            "-q",
        ]
        command += ["--rootdir", str(tmp_path), *options, str(tmp_path)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment | variables)
        assert result.returncode in (0, 5), result.stdout + result.stderr
        return {line.partition("::")[2] for line in result.stdout.splitlines() if "::" in line}

    return names


def test_an_ordinary_process_leaves_them_to_others(chosen):
    assert chosen() == {"test_plain"}


@pytest.mark.full
def test_on_a_gpu_they_run_in_an_ordinary_process(chosen):
    assert chosen("-m", "gpu and not full") == {"test_kernel[cuda]"}
    assert chosen("-m", "gpu") == {"test_kernel[cuda]", "test_more[cuda]"}


def test_an_interpreting_process_runs_nothing_else(chosen):
    some = {"test_kernel[cpu]", "test_about_the_interpreter"}
    assert chosen(TRITON_INTERPRET="1") == some


@pytest.mark.full
def test_every_tier_is_divided_in_the_same_way(chosen):
    assert chosen("-m", "not gpu") == {"test_plain"}
    every = {"test_kernel[cpu]", "test_more[cpu]", "test_about_the_interpreter"}
    assert chosen("-m", "not gpu", TRITON_INTERPRET="1") == every
