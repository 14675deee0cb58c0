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
    temporal_heads: int | None = None  # of an op on the token grid: how many of its heads attend along time
    keys: int | None = None  # tokens of k and v, of an op where they may be others than those of q
    isa: str = ""  # of a CPU: of its kernels (_native.call_isa); "" without kernels, or on another device
    channels: int | None = None  # of a token, of an op whose shape does not say it
    beyond_kernels: bool = False  # within forward-mode AD, or of a second derivative (_transforms.py)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        arch = f" (sm_{self.arch})" if self.arch else ""
        heads = "" if self.temporal_heads is None else f", temporal_heads={self.temporal_heads}"
        keys = "" if self.keys in (None, self.shape[1]) else f", {self.keys} keys"
        uses = f", with {', '.join(self.uses)}" if self.uses else ""
        return f"{tuple(self.shape)} {dtype} on {self.device}{arch}, needs_grad={self.needs_grad}{heads}{keys}{uses}"


@dataclass(frozen=True)
class Refusal:
    reason: str
    remedy: str


Predicate = Callable[[Call], "list[Refusal]"]
_NO_RULES = Refusal(
    "kernels have no forward-mode and no second derivatives",
    "leave backend out, or use backend='torch': plain PyTorch within torch.func and forward-mode AD",
)


def traced() -> bool:
    """Whether torch.jit.trace writes down what runs."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast asks for on a device; None where it is off, or where there is none, as for "meta"."""
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


class Question(str):
    """In the place of a backend's name: the op checks what it was given and raises its `Answer`, having run nothing.

    So explain() goes the way of the call itself, and a call that asks nothing pays nothing for it.
    """


class Answer(Exception):
    """What an op knows at the moment of its choice."""

    def __init__(self, call: Call, support: Mapping[str, Predicate], order: tuple[str, ...]) -> None:
        super().__init__(f"{call.op}: its choice was asked for")
        self.call, self.support, self.order = call, support, order


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
        if isinstance(backend, Question):
            raise Answer(call, support, order)
        raise unknown(call.op, backend)
    candidates = (backend,) if backend is not None else _environment.allowed_backends(order)
    for name in candidates:
        if name in support and not _reasons(call, support, name):
            return name
    raise NotImplementedError(complaint(call, refusals(call, support, candidates), backend))


def unknown(op: str, backend: str) -> ValueError:
    return ValueError(f"{op}: backend={backend!r} is not known; it is one of {', '.join(_environment.NAMES)} or None")


def refusals(call: Call, support: Mapping[str, Predicate], candidates: tuple[str, ...]) -> dict[str, list[Refusal]]:
    """Every candidate's refusals of the call, in order; an empty list means that it runs."""
    return {name: _reasons(call, support, name) if name in support else [_absent(call.op, name)] for name in candidates}


def _reasons(call: Call, support: Mapping[str, Predicate], name: str) -> list[Refusal]:
    found = support[name](call)
    return [*found, _NO_RULES] if call.beyond_kernels and name != "torch" else found


def _absent(op: str, backend: str) -> Refusal:
    return Refusal(f"this release has no {backend} kernel for {op}", "use backend='torch', or leave backend out")


def verdict(call: Call, backend: str | None, chosen: str | None) -> str:
    """Who runs the call, or that nobody can, in one sentence."""
    if chosen:
        return f"{call.op}: backend {chosen!r} runs this call."
    if backend:
        return f"{call.op}: backend {backend!r} cannot run this call."
    return f"{call.op}: no allowed backend can run this call."


def complaint(call: Call, refused: Mapping[str, list[Refusal]], backend: str | None) -> str:
    """The message of a call that cannot run: every reason, each with its remedy."""
    width = column(refused)
    lines = [verdict(call, backend, None), f"  {'call':<{width}}{call}", *listed(refused, width)]
    if backend is None and _environment.RESTRICTED:
        lines.append(f"  {_environment.VARIABLE}={','.join(_environment.RESTRICTED)} restricts the choice")
    return "\n".join([*lines, "  `python -m vivit_kernels` shows what this install can run."])


def listed(refused: Mapping[str, Iterable[Refusal]], width: int) -> list[str]:
    """Lines for each backend: that it runs, or its reasons against it and what to do about each."""
    lines = []
    for name, reasons in refused.items():
        said = [text for refusal in reasons for text in (refusal.reason, f"-> {refusal.remedy}")] or ["runs"]
        lines += [f"  {name if i == 0 else '':<{width}}{text}" for i, text in enumerate(said)]
    return lines


def column(names: Iterable[str]) -> int:
    """Width of the column of backends' names in a report."""
    return max([8, *(len(name) + 2 for name in names)])
