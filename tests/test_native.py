"""The native library as it is found, checked, loaded and explained; also run under the oldest PyTorch it is for."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vivit_kernels import _library, _native

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
OPS = ("best_isa", "resident_keys", "attention_fwd", "attention_bwd")
CUDA_OPS = ("cuda_regime", "cuda_keeps_output", "cuda_attention_fwd", "cuda_attention_bwd")
CUDA_OPS += ("cuda_tubelet_fwd", "cuda_tubelet_bwd", "cuda_joint_fwd", "cuda_joint_bwd")
loaded = pytest.mark.skipif(not _native.AVAILABLE, reason=f"{_native.WHY} -> {_native.REMEDY}")
linux = pytest.mark.skipif(sys.platform != "linux", reason="libraries are ELF files")


# ---- the file ----


def record(**changes: str) -> _library.Record:
    some = _library.Record("1.2.3", "0123456789abcdef", "cpu", "no reason", "g++ 1.0", "2.11.0")
    return some._replace(**changes)


@pytest.fixture
def library(tmp_path):
    """A whole ELF file with a record: of all that is checked before it is loaded, nothing is wrong with it."""
    path = tmp_path / _library.NAME
    text = _library.record_text(record(version=_library._installed_version() or ""))
    path.write_bytes(Path(sys.executable).resolve().read_bytes() + text.encode() + b"\0")
    return path


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "bindings.cpp").write_text("int one;\n")
    (tmp_path / "csrc" / "cpu" / "kernel.h").write_text("int two;\n")
    return tmp_path


def reason(path: Path, root: Path | None = None) -> str:
    """Why a file is not loaded, each with a remedy; "" if it is."""
    found = _library.problem_of(path, root)
    assert found is None or found.remedy
    return found.reason if found else ""


@linux
def test_a_library_of_this_version_is_taken(library, monkeypatch):
    assert reason(library) == ""
    monkeypatch.setattr(_library, "_installed_version", lambda: "9.9.9")
    assert re.search(r"_C.so belongs to vivit-kernels \S*, this is 9.9.9$", reason(library))
    monkeypatch.setattr(_library, "_installed_version", lambda: None)  # on PYTHONPATH: nothing says otherwise
    assert reason(library) == ""


@linux
def test_a_missing_library_is_explained(tmp_path):
    path = tmp_path / _library.NAME
    assert reason(path) == f"the native library is not built: {path} is missing"
    path.with_name(_library.NOTE).write_text("no compiler\ninstall one\n")
    found = _library.problem_of(path, ROOT)
    assert found == (
        f"the native library is not built: {path} is missing (no compiler)",
        "install one, then make build (or: python csrc/build.py)",
    )
    path.with_name(_library.NOTE).write_text("VIVIT_KERNELS_BUILD=none\n\n")
    found = _library.problem_of(path, None)
    assert found and found.reason.endswith("(VIVIT_KERNELS_BUILD=none)") and found.remedy.startswith("reinstall it")


@linux
def test_a_stale_library_is_refused(library, checkout):
    assert reason(library, checkout) == f"{library} is stale: csrc/ has changed since it was built"
    data = library.read_bytes().replace(b"0123456789abcdef", _library.hash_of(checkout / "csrc").encode())
    library.write_bytes(data)
    assert reason(library, checkout) == ""


@linux
def test_the_hash_sees_every_source_and_nothing_else(checkout):
    csrc = checkout / "csrc"
    before = _library.hash_of(csrc)
    (csrc / "notes.txt").write_text("no source")
    assert _library.hash_of(csrc) == before
    seen = {before}
    for name, text in (
        ("bindings.cpp", "int three;\n"),
        ("cpu/kernel.h", "int four;\n"),
        ("cpu/new.cu", ""),
        ("build.py", ""),
    ):
        (csrc / name).write_text(text)
        seen.add(_library.hash_of(csrc))
    (csrc / "cpu" / "new.cu").rename(csrc / "cpu" / "other.cu")
    assert len(seen | {_library.hash_of(csrc)}) == 6


@linux
@pytest.mark.parametrize(
    "spoil, expected",
    [
        (lambda data: b"", "is foreign: it is not an ELF library"),
        (lambda data: b"MZ" + data[2:], "is foreign: it is not an ELF library"),
        (lambda data: data[:18] + b"\x08\x00" + data[20:], "is foreign: it is built for another machine than this"),
        (lambda data: data[:4] + b"\x01" + data[5:], "is foreign: it is built for another machine than this"),
        (lambda data: data[: len(data) // 2], "is cut off"),
        (lambda data: data[: data.index(_library.MARK)], "is foreign: it is not vivit_kernels' library"),
        (lambda data: data.replace(b'"kind"', b'"sort"'), "is foreign: it is not vivit_kernels' library"),
    ],
)
def test_a_foreign_library_is_explained(library, spoil, expected):
    library.write_bytes(spoil(library.read_bytes()))
    assert expected in reason(library)


def test_on_another_system_there_is_no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert reason(tmp_path / _library.NAME) == "the native library is for Linux, this is darwin"


# ---- what users see ----


def report(**environ: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(Path(_library.PACKAGE).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "vivit_kernels"]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": paths} | environ, capture_output=True, text=True)


@linux
def test_a_library_that_does_not_load_is_explained_and_the_rest_runs(library):
    """The system's loader has the last word: here that a program is no library."""
    root = _library.checkout()
    data = library.read_bytes().replace(b"0123456789abcdef", _library.hash_of(root / "csrc").encode() if root else b"")
    library.write_bytes(data)
    done = report(VIVIT_KERNELS_LIBRARY=str(library))
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("native"))
    assert (
        line.startswith(f"native  not used: {library} is foreign: it does not load: ")
        and len(line) > len(str(library)) + 60
    )
    assert "joint_attention" in done.stdout and "  torch   runs" in done.stdout


@loaded
def test_the_report_says_which_library_it_is_and_what_it_uses():
    done = report(VIVIT_KERNELS_CPU_ISA="portable")
    assert done.returncode == 0, done.stderr
    assert _native.RECORD is not None
    kind = {"cpu": "CPU alone", "cuda": "CPU and CUDA"}[_native.RECORD.kind]
    assert f"native  {kind}: {_native.RECORD.why}\n        {_library.library_path()}\n" in done.stdout
    assert "instruction set portable, forced by VIVIT_KERNELS_CPU_ISA\n" in done.stdout


# ---- the loaded library ----


@loaded
def test_the_ops_are_there_and_available_means_so():
    for name in OPS:
        assert hasattr(torch.ops.vivit_kernels_native, name)
    for name in CUDA_OPS:
        assert hasattr(torch.ops.vivit_kernels_native, name) == _native.CUDA
    assert _native.RECORD is not None and _native.CUDA == (_native.RECORD.kind == "cuda") == (not _native.NO_CUDA)
    assert _native.WHY == _native.REMEDY == ""
    assert _native.ISAS[torch.ops.vivit_kernels_native.best_isa()] == _native.BEST


def test_where_it_is_not_available_there_is_a_reason():
    assert _native.AVAILABLE or (_native.WHY and _native.REMEDY and _native.RECORD is None and _native.BEST == "")


def test_instruction_sets_are_numbered_as_in_the_sources():
    text = (CSRC / "cpu" / "attention.h").read_text()
    enum = re.search(r"enum class Isa[^{]*\{([^}]*)\}", text)
    assert enum
    numbered = dict(re.findall(r"k(\w+) = (\d+)", enum.group(1)))
    names = {re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower(): int(number) for name, number in numbered.items()}
    assert names == {name: number for number, name in enumerate(_native.ISAS)}


@pytest.fixture
def on_avx2(monkeypatch):
    """As on a processor with AVX2 and no more."""
    monkeypatch.setattr(_native, "BEST", "avx2")
    monkeypatch.setattr(_native, "_forced", -1)


def test_an_instruction_set_is_forced_and_given_back(on_avx2):
    assert _native.isa() == -1 and _native.isa_name() == "avx2"
    with _native.forced_isa("avx2") as outer:
        with pytest.raises(KeyError), _native.forced_isa("portable") as inner:
            assert (outer, inner, _native.isa(), _native.isa_name()) == (1, 0, 0, "portable")
            raise KeyError
        assert _native.isa() == 1
    assert _native.isa() == -1


@pytest.mark.parametrize(
    "name, message",
    [
        ("avx3", "forced_isa: 'avx3' is not an instruction set; use one of portable, avx2"),
        ("avx512", "forced_isa: 'avx512' does not run on this processor, avx2 is its best; use one of portable, avx2"),
    ],
)
def test_an_instruction_set_that_cannot_be_forced(on_avx2, name, message):
    with pytest.raises(ValueError) as error, _native.forced_isa(name):
        pass
    assert str(error.value) == message and _native.isa() == -1


def test_the_environment_forces_an_instruction_set(monkeypatch):
    try:
        monkeypatch.setenv(_native.VARIABLE, "portable")
        importlib.reload(_native)
        assert _native.isa() == 0 and _native.FORCED == "portable"
        monkeypatch.setenv(_native.VARIABLE, "sse9")
        with pytest.raises(ValueError, match=r"VIVIT_KERNELS_CPU_ISA=sse9: 'sse9' is not .* use one of portable"):
            importlib.reload(_native)
    finally:
        monkeypatch.undo()
        importlib.reload(_native)


def test_compiled_code_can_ask_for_it():
    def asked(x):
        return x + _native.isa() if _native.AVAILABLE else x - 1

    x = torch.ones(2)
    compiled = torch.compile(asked, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), asked(x))
    if _native.AVAILABLE:
        with _native.forced_isa("portable"):
            assert torch.equal(compiled(x), x)


# ---- what it asks of PyTorch ----


def symbols(path: Path, which: str) -> set[str]:
    done = subprocess.run(["nm", "-D", which, str(path)], capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in done.stdout.splitlines()}


def listed() -> list[str]:
    lines = (CSRC / "torch_symbols.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


@loaded
def test_the_library_asks_for_listed_symbols_only():
    """Those of glibc and libstdc++ carry a version, `_ITM_` and `__` are the compiler's and may be missing."""
    undefined = {name for name in symbols(_library.library_path(), "--undefined-only") if "@" not in name}
    unlisted = {name for name in undefined if not name.startswith("_")} - set(listed())
    if "sanitized" not in str(_library.library_path()):
        assert not unlisted, (
            "add to csrc/torch_symbols.txt what the libtorch_cpu.so of PyTorch 2.11 exports, avoid the rest"
        )


def test_this_pytorch_has_every_listed_symbol():
    exported = symbols(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so", "--defined-only")
    assert listed() == sorted(set(listed())) and not set(listed()) - {name.partition("@")[0] for name in exported}
