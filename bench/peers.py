"""How a contestant is described: what others run today, each honest, and this project's backends beside them.

A peer is a function from the inputs of a case to a `Candidate`; `@peer("temporal", "spatial")` puts it on the list of
those operations. It pays for what it needs: permutes, copies and im2col stand inside `forward`. A peer marked `ideal`
gets its inputs in the layout it likes instead and is reported beside the others, never as the best peer.
It says why it cannot run by raising `Missing` (not installed) or `Refused` (not this call).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .cases import OPS


class Missing(Exception):
    """A peer that is not installed here; the message names it and how to get it."""


class Refused(Exception):
    """A peer that is here and will not run this call; the message is its reason."""


def _same(x: Any) -> Any:
    return x


@dataclass
class Candidate:
    """What is timed: `forward()`, and `torch.autograd.grad(forward(), leaves, grad_output)`.

    leaves: the tensors that get gradients, requiring them; grad_output: like what forward returns.
    output, gradients: bring the results into the case's own layout for the check; they are not timed.
    """

    leaves: list[Tensor]
    forward: Callable[[], Tensor]
    grad_output: Tensor
    output: Callable[[Tensor], Tensor] = _same
    gradients: Callable[[list[Tensor]], list[Tensor]] = _same


@dataclass(frozen=True)
class Peer:
    name: str
    build: Callable[[Any], Candidate]
    ideal: bool = False
    ours: bool = False


PEERS: dict[str, dict[str, Peer]] = {}


def peer(*ops: str, name: str = "", ideal: bool = False) -> Callable:
    """Registers a peer for these operations under its function's name or `name`."""

    def add(build: Callable[[Any], Candidate]) -> Callable[[Any], Candidate]:
        for op in ops:
            if op not in OPS:
                raise ValueError(f"bench: @peer({op!r}): no such operation; it is one of {', '.join(OPS)}")
            label = name or build.__name__
            PEERS.setdefault(op, {})[label] = Peer(label, build, ideal)
        return build

    return add


def load_plugin(path: str) -> None:
    """Runs a user's file, whose `@peer` functions then take part: `python -m bench --with my_kernel.py`."""
    file = Path(path)
    spec = importlib.util.spec_from_file_location(f"bench_plugin_{file.stem}", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"bench: --with {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def require(module: str, why: str) -> Any:
    """Imports an optional package or says what is missing."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package built for another CUDA fails in many ways
        kind = "not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported: {error}"
        raise Missing(f"{module.partition('.')[0]} is {kind}; {why}".splitlines()[0]) from error
