"""Each example runs on a CPU, and says that it is within the error budget."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if not path.name.startswith("_"))


def host_of(example: Path) -> str:
    """The library that an example is for, after which it is called."""
    return {"own": "torch"}.get(name := example.name.partition("_")[0], name)


def command(example: Path) -> list[str]:
    if host_of(example) != "timm":
        pytest.importorskip(host_of(example))
        return [str(example)]
    import timm_host

    try:
        timm_host.load()
    except ImportError:
        pytest.skip("needs timm: pip install --no-deps timm torchvision")
    return [str(ROOT / "tests" / "timm_host.py"), str(example)]


def test_examples_are_found_and_listed():
    listed = (ROOT / "examples" / "README.md").read_text()
    assert len(EXAMPLES) >= 4
    assert not [path.name for path in EXAMPLES if path.name not in listed]


@pytest.mark.full
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_is_within_the_budget(example, tmp_path):
    path = os.pathsep.join([str(ROOT / "kernels"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, *command(example)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "within budget" in done.stdout and "OUT OF BUDGET" not in done.stdout
    assert "times as fast" in done.stdout
