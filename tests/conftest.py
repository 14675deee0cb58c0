"""Every test starts from one seed, and uninitialised memory is NaN: an output that nobody wrote cannot pass.

Tests of Triton kernels are marked `interpreted`. They run on CPU tensors in a process with TRITON_INTERPRET=1, where
nothing else runs (kernels are made for one or the other when they are imported), and on a GPU in an ordinary one.
"""

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def pytest_configure(config):
    if INTERPRETED and importlib.util.find_spec("triton"):
        import triton_interpreter

        if why := triton_interpreter.complaint():
            raise pytest.UsageError(f"TRITON_INTERPRET is set, but {why}")
        triton_interpreter.install()
        # numpy warns of every overflow and NaN, which kernels make and mask
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_ignore_collect(collection_path, config):
    """An interpreting process reads no other test: it could only deselect them."""
    other = collection_path.suffix == ".py" and not collection_path.name.startswith("test_triton_")
    return True if INTERPRETED and other else None


def runs_here(item) -> bool:
    interpreted = item.get_closest_marker("interpreted") is not None
    return interpreted if INTERPRETED else not interpreted or item.get_closest_marker("gpu") is not None


def has_kernels(item) -> bool:
    """AMX has kernels in bfloat16, of attention over more than 16 tokens; all else is avx512_bf16's, tested there."""
    values = item.callspec.params if hasattr(item, "callspec") else {}
    if values.get("isa") != "avx512_amx":
        return True
    case = values.get("case", {})
    if values.get("dtype", case.get("dtype", torch.bfloat16)) != torch.bfloat16:
        return False
    if "grid" in case:
        return max(case["grid"]) > 16
    return "N_k" not in case or min(n for n in (case["N"], case["N_k"]) if n != "same") > 16


def pytest_collection_modifyitems(config, items):
    kept = [item for item in items if runs_here(item) and has_kernels(item)]
    if len(kept) < len(items):
        here = {id(item) for item in kept}
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in here])
        items[:] = kept


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # with this on, PyTorch fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16", "avx512_amx"])
def isa(request):
    """Each instruction set that the native library's CPU kernels have here."""
    from vivit_kernels import _native

    if request.param not in _native.ISAS[: _native.ISAS.index(_native.BEST) + 1]:
        pytest.skip(f"this processor runs {_native.BEST} at best")
    with _native.forced_isa(request.param):
        yield request.param


@pytest.fixture
def cuda_library():
    """A native library that has the CUDA kernels; where there is none, its absence is what `python -m vivit_kernels`
    explains and tests/test_native.py tests."""
    from vivit_kernels import _native

    if not _native.CUDA:
        pytest.skip(_native.NO_CUDA or f"no native library: {_native.WHY}")


@pytest.fixture
def with_kernels(monkeypatch):
    """As with a library that nvcc took part in."""
    from vivit_kernels import _native

    monkeypatch.setattr(_native, "AVAILABLE", True)
    monkeypatch.setattr(_native, "CUDA", True)


@pytest.fixture
def every_call_counts(monkeypatch):
    """Calls that are too small to be worth it are taken all the same: those of tests are small."""
    from vivit_kernels.integrations import pytorch

    monkeypatch.setattr(pytorch, "_LEAST_ELEMENTS", 0)
    monkeypatch.setattr(pytorch, "_LEAST_KEYS", 0)


@pytest.fixture
def no_matrix_unit(monkeypatch):
    """Nothing is left to PyTorch for a unit of this processor that ours has no kernel for."""
    from vivit_kernels.integrations import diffusers_attention

    monkeypatch.setattr(diffusers_attention, "AMX", False)


@pytest.fixture
def poisoned_scratch():
    """Scratch memory of the native library full of NaN: what no kernel wrote cannot pass."""
    torch.ops.vivit_kernels_native.poison_scratch(True)
    yield
    torch.ops.vivit_kernels_native.poison_scratch(False)
