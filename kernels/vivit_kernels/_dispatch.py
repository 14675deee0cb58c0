"""Choose a backend for a call, or explain every refusal. Nothing here imports a backend or touches a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from . import _environment


@dataclass(frozen=True)
class Call:
    """What a support predicate may look at: facts about the tensors and options of one call, never their values."""

    op: str
    shape: tuple
    dtype: torch.dtype
    device: str
    needs_grad: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{tuple(self.shape)} {dtype} on {self.device}, needs_grad={self.needs_grad}"


@dataclass(frozen=True)
class Refusal:
    reason: str
    remedy: str


Predicate = Callable[[Call], "list[Refusal]"]


def choose(call: Call, support: Mapping[str, Predicate], backend: str | None = None) -> str:
    """The name of the backend to run: the first of the allowed ones that does not refuse, or the one asked for.

    support: per backend, a pure function from the call to its refusals (none: it can run the call).
    Raises NotImplementedError with every refusal if none can; a backend asked for by name never falls back.
    """
    if backend is not None and backend not in _environment.BACKENDS:
        raise ValueError(
            f"{call.op}: backend={backend!r} is not known; it is one of {', '.join(_environment.BACKENDS)} or None"
        )
    candidates = (backend,) if backend is not None else _environment.allowed_backends()
    for name in candidates:
        if name in support and not support[name](call):
            return name
    raise NotImplementedError(explain(call, refusals(call, support, candidates), backend))


def refusals(call: Call, support: Mapping[str, Predicate], candidates: tuple[str, ...]) -> dict[str, list[Refusal]]:
    """Every candidate's refusals of the call, in order; an empty list means that it runs."""
    return {name: support[name](call) if name in support else [_absent(call.op, name)] for name in candidates}


def _absent(op: str, backend: str) -> Refusal:
    return Refusal(f"this release has no {backend} kernel for {op}", "use backend='torch', or leave backend out")


def explain(call: Call, refused: Mapping[str, list[Refusal]], backend: str | None) -> str:
    head = f"backend {backend!r} cannot run this call." if backend else "no allowed backend can run this call."
    lines = [f"{call.op}: {head}", f"  call    {call}"]
    for name, reasons in refused.items():
        for i, refusal in enumerate(reasons):
            lines += [f"  {name if i == 0 else '':<8}{refusal.reason}", f"          -> {refusal.remedy}"]
    if backend is None and _environment.RESTRICTED:
        lines.append(f"  VIVIT_KERNELS_BACKENDS={','.join(_environment.RESTRICTED)} restricts the choice")
    return "\n".join([*lines, "  `python -m vivit_kernels` shows what this install can run."])
