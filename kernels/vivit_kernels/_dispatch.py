"""Choose a backend for a call, or explain every refusal. Nothing here imports a backend or touches a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
    uses: tuple[str, ...] = ()  # options in use, of "key_mask", "dropout", "rotary", "softcap"
    arch: int = 0  # 90 for sm_90; 0 where there is none, or where it does not matter

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        arch = f" (sm_{self.arch})" if self.arch else ""
        uses = f", with {', '.join(self.uses)}" if self.uses else ""
        return f"{tuple(self.shape)} {dtype} on {self.device}{arch}, needs_grad={self.needs_grad}{uses}"


@dataclass(frozen=True)
class Refusal:
    reason: str
    remedy: str


Predicate = Callable[[Call], "list[Refusal]"]


def choose(
    call: Call,
    support: Mapping[str, Predicate],
    backend: str | None = None,
    order: tuple[str, ...] = _environment.BACKENDS,
) -> str:
    """The name of the backend to run: the first of the allowed ones that does not refuse, or the one asked for.

    support: per backend, a pure function from the call to its refusals (none: it can run the call).
    order: in which they are tried, if VIVIT_KERNELS_BACKENDS does not say.
    Raises NotImplementedError with every refusal if none can; a backend asked for by name never falls back.
    """
    if backend is not None and backend not in _environment.NAMES:
        raise ValueError(
            f"{call.op}: backend={backend!r} is not known; it is one of {', '.join(_environment.NAMES)} or None"
        )
    candidates = (backend,) if backend is not None else _environment.allowed_backends(order)
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
    width = column(refused)
    lines = [f"{call.op}: {head}", f"  {'call':<{width}}{call}"]
    for name, reasons in refused.items():
        for i, refusal in enumerate(reasons):
            lines += [f"  {name if i == 0 else '':<{width}}{refusal.reason}", f"  {'':<{width}}-> {refusal.remedy}"]
    if backend is None and _environment.RESTRICTED:
        lines.append(f"  VIVIT_KERNELS_BACKENDS={','.join(_environment.RESTRICTED)} restricts the choice")
    return "\n".join([*lines, "  `python -m vivit_kernels` shows what this install can run."])


def column(names: Iterable[str]) -> int:
    """Width of the column of backends' names in a report."""
    return max([8, *(len(name) + 2 for name in names)])
