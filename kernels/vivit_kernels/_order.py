"""In which order the backends of an op are tried, as data: a default for each kind of device, and measured exceptions.

An op's order.py holds its `Ladder`s. A rung is added, moved and removed by hand, from records: tests/test_order.py
holds every record in bench/results against the order, so that a rung or default which stopped being right is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ._dispatch import Call

MANY = 1 << 62  # no upper end


@dataclass(frozen=True)
class Rung:
    """`backend` first for the calls described here; what is left out may be anything.

    arches: of a GPU, 90 for sm_90. isas: instruction sets of a CPU, as Call.isa has them.
    needs_grad: of a call that a backward follows, or of one alone.
    sizes: (letter, at least, at most), the letters of the op's shape, and "N_k" for keys.
    axis: "time", "space" or "both", of an op on the token grid: what its heads attend along.
    options: calls with a mask, dropout, rotary embedding or soft-cap, too. deterministic: also where PyTorch was told
    to refuse what is not the same bit for bit in every run.
    reason: what was measured, where and when.
    """

    backend: str
    reason: str
    arches: tuple[int, ...] = ()
    isas: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    needs_grad: bool | None = None
    sizes: tuple[tuple[str, int, int], ...] = ()
    axis: str = ""
    options: bool = False
    deterministic: bool = True

    def takes(self, call: Call, letters: tuple[str, ...]) -> bool:
        """letters: names of the dimensions of call.shape."""
        # torch.compile does not trace `not` of a tuple, and with dynamic=True it answered `0 in (0,)` by no (2.13)
        return (
            (self.arches == () or any(call.arch == arch for arch in self.arches))
            and (self.isas == () or call.isa in self.isas)
            and (self.dtypes == () or call.dtype in self.dtypes)
            and (self.needs_grad is None or call.needs_grad == self.needs_grad)
            and self.axis in ("", axis(call))
            and (self.options or call.uses == ())
            and all(low <= size(call, name, letters) <= high for name, low, high in self.sizes)
            and (self.deterministic or not is_deterministic())
        )

    def __str__(self) -> str:
        """Which calls, in words."""
        said = [
            " or ".join(f"sm_{arch}" for arch in self.arches),
            " or ".join(self.isas),
            " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes),
            {None: "", True: "with a gradient", False: "without a gradient"}[self.needs_grad],
            {"": "", "both": "along time and space"}.get(self.axis, f"along {self.axis}"),
            ", ".join(_span(*entry) for entry in self.sizes),
            "" if self.options else "without options",
            "" if self.deterministic else "where results may differ from run to run",
        ]
        return ", ".join(filter(None, said))


@dataclass(frozen=True)
class Ladder:
    """Of an op on one kind of device: the order of every call that no rung takes, and why; the first rung counts."""

    default: tuple[str, ...]
    reason: str
    rungs: tuple[Rung, ...] = ()


class Decision(NamedTuple):
    """The backends in the order in which they are tried for a call, and the rung or default that it comes from."""

    order: tuple[str, ...]
    source: Rung | Ladder


def decide(call: Call, ladders: Mapping[str, Ladder], letters: tuple[str, ...]) -> Decision:
    """ladders: for "cuda" and for "cpu", which is that of every other device, too. Never looks at a device."""
    ladder = ladders["cuda" if call.device == "cuda" else "cpu"]
    for rung in ladder.rungs:
        if rung.takes(call, letters):
            return Decision((rung.backend, *(name for name in ladder.default if name != rung.backend)), rung)
    return Decision(ladder.default, ladder)


def size(call: Call, name: str, letters: tuple[str, ...]) -> int:
    """Of a call's shape, by its letter."""
    if name == "N_k":
        return call.shape[1] if call.keys is None else call.keys
    return call.shape[letters.index(name)]


def axis(call: Call) -> str:
    """What the heads of a call on the token grid attend along; "" for another op."""
    if call.temporal_heads is None:
        return ""
    return "space" if call.temporal_heads == 0 else "time" if call.temporal_heads == call.shape[-2] else "both"


def _span(name: str, low: int, high: int) -> str:
    if low == high:
        return f"{name} = {low}"
    return f"{name} >= {low}" if high == MANY else f"{name} <= {high}" if low <= 1 else f"{low} <= {name} <= {high}"


@torch.compiler.assume_constant_result  # a graph is compiled for the settings as they are, which PyTorch guards
def _only_warns() -> bool:
    return torch.is_deterministic_algorithms_warn_only_enabled()


def is_deterministic() -> bool:
    """Whether PyTorch must refuse what is not the same bit for bit in every run."""
    return torch.are_deterministic_algorithms_enabled() and not _only_warns()
