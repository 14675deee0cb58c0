"""What the examples share: two forms of a model held to the error budget, and their times in turns."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from vivit_kernels.numerics import judge

Within = Callable[[], AbstractContextManager]


def dtype_asked(what: str | None) -> torch.dtype:
    """`--dtype` of the command line; what: the example's own text."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return getattr(torch, parser.parse_args().dtype)


def compare(stock: nn.Module, ours: nn.Module, x: Tensor, *, within: Within = nullcontext, rounds: int = 5) -> bool:
    """Prints how far `ours` is from the model in float64, beside the stock one, and how much faster it is.

    within: the context that `ours` runs in. Returns whether output and gradients are within the budget of
    vivit_kernels/numerics.py: a small multiple of the stock model's own error against float64.
    """
    dtype = next(stock.parameters()).dtype
    print(f"\n{type(stock).__name__}, {str(dtype).removeprefix('torch.')}, input {tuple(x.shape)}")
    exact = _results(copy.deepcopy(stock).double(), x.double())
    eager = _results(stock, x)
    with within():
        found = _results(ours, x)
    passed = True
    for name, gradient in (("output", False), ("gradients", True)):
        verdict = judge(found[name], exact[name], eager[name], gradient=gradient)
        print(f"  {name:<20}{verdict}, {verdict.share:.2f} of the budget")
        passed &= verdict.ok
    steps = {
        "forward": lambda model: torch.no_grad()(_tensor_of)(model, x),
        "forward + backward": lambda model: _tensor_of(model, x).sum().backward(),
    }
    for name, step in steps.items():
        print(f"  {name:<20}{_times(lambda s=step: s(stock), lambda s=step: s(ours), within, rounds)}")
    return passed


def _tensor_of(model: nn.Module, x: Tensor) -> Tensor:
    """The output that matters: logits, last hidden state, or the only one."""
    out = model(x)
    return getattr(out, "logits", getattr(out, "last_hidden_state", out))


def _results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of all parameters as one vector."""
    model.zero_grad()
    out = _tensor_of(model, x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weights.to(out.dtype)).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return {"output": out.detach(), "gradients": gradients}


def _times(stock: Callable[[], object], ours: Callable[[], object], within: Within, rounds: int) -> str:
    """In every round each has one turn, so that a busy machine slows both; the first round warms up."""
    taken: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        first = _seconds(stock)
        with within():
            taken.append((first, _seconds(ours)))
    taken = taken[1:]
    a, b = (1000 * statistics.median(times) for times in zip(*taken, strict=True))
    ratios = sorted(first / second for first, second in taken)
    return (
        f"stock {a:.1f} ms, ours {b:.1f} ms: {statistics.median(ratios):.2f} times as fast "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f} in {rounds} rounds)"
    )


def _seconds(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
