"""Memory that one call takes: its peak above what was there before, and what it leaves in its results."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def measure(fn: Callable[[], Iterable[Tensor]], device: torch.device) -> dict[str, float]:
    """{"peak", "results", "workspace"} in bytes; on a GPU also "reserved", what PyTorch's allocator took for it.

    fn returns the tensors that are its results; workspace is what the peak holds beyond them. On a CPU this is what
    went through PyTorch's allocator: scratch that a library takes by itself is not seen.
    """
    found = _on_gpu(fn, device) if device.type == "cuda" else _on_cpu(fn)
    found["workspace"] = max(found["peak"] - found["results"], 0)
    return found


def _size(results: Iterable[Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in results)


def _on_gpu(fn: Callable[[], Iterable[Tensor]], device: torch.device) -> dict[str, float]:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = _size(fn())
    torch.cuda.synchronize(device)
    peak, taken = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {"peak": peak - before, "results": results, "reserved": max(taken - reserved, 0)}


def _on_cpu(fn: Callable[[], Iterable[Tensor]]) -> dict[str, float]:
    """The profiler reports every allocation and release in order; their running sum has a largest value."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        results = _size(fn())
    held = peak = 0
    for event in traced.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]":
            held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            peak = max(peak, held)
    return {"peak": peak, "results": results}
