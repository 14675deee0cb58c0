"""The public function explain: which backend a call would run, and why not another; nothing is run."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import _environment
from ._dispatch import Answer, Call, Question, Refusal, column, listed, refusals, unknown, verdict
from ._order import Decision, Rung
from .factorized_attention import api as factorized
from .joint_attention import api as joint
from .temporal_block import api as block
from .tubelet_embedding import api as tubelet

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        tubelet.tubelet_embedding,
        factorized.factorized_attention,
        factorized.spatial_attention,
        factorized.temporal_attention,
        joint.joint_attention,
        block.temporal_block,
    )
}
_DECIDE: dict[str, Callable[[Call], Decision]] = {
    "tubelet_embedding": tubelet.decide,
    "factorized_attention": factorized.decide,
    "joint_attention": joint.decide,
    "temporal_block": block.decide,
}
_WIDTH = 100


@dataclass(frozen=True)
class Explanation:
    """What explain() found; str() is the report.

    call: the facts that a choice may look at. backend: as asked for by name, or None. chosen: who runs the call, None
    if nobody can. order: the backends that are tried, in order; reasons: why these, in this order.
    refusals: of those and of every other backend of the op; none: it can run the call.
    """

    call: Call
    backend: str | None
    chosen: str | None
    order: tuple[str, ...]
    reasons: tuple[str, ...]
    refusals: dict[str, tuple[Refusal, ...]]

    def __str__(self) -> str:
        width = column(self.refusals)
        lines = [verdict(self.call, self.backend, self.chosen), f"  {'call':<{width}}{self.call}"]
        if self.call.isa:
            lines.append(f"  {'cpu':<{width}}{self.call.isa}")
        lines.append(f"  {'order':<{width}}{', '.join(self.order)}")
        for reason in self.reasons:
            head = "why" if reason is self.reasons[0] else ""
            said = textwrap.wrap(reason, _WIDTH - width - 2)
            lines += [f"  {head if i == 0 else '':<{width}}{line}" for i, line in enumerate(said)]
        others = {name: found for name, found in self.refusals.items() if name not in self.order}
        lines += ["tried, the first that runs", *self._listed(self.order, width)]
        if others:
            lines += [f"not tried, only by name or in {_environment.VARIABLE}", *self._listed(tuple(others), width)]
        return "\n".join(lines)

    def _listed(self, names: tuple[str, ...], width: int) -> list[str]:
        return listed({name: self.refusals[name] for name in names}, width)


def explain(op: str | Callable[..., Tensor], /, *args: Any, backend: str | None = None, **kwargs: Any) -> Explanation:
    """Which backend `op(*args, **kwargs)` would run, why it comes first, and what every other would say to the call.

    Equivalent to the call itself up to the choice of its backend: inputs are checked in the same way, with the same
    errors, but nothing is computed, no memory is taken, and no random number is drawn.

    op: one of this package's operations, or its name: tubelet_embedding, factorized_attention, spatial_attention,
        temporal_attention, joint_attention, temporal_block. args, backend, kwargs: as the operation takes them.

    Returns an `Explanation`: print it, or read its `call`, `chosen`, `order`, `reasons` and `refusals`. Where no
    backend can run the call, `chosen` is None. Raises ValueError where the operation would, and for an unknown
    operation.

        print(explain(joint_attention, qkv, dropout_p=0.1))
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    function = _FUNCTIONS.get(name)
    if function is None or not (isinstance(op, str) or op is function):
        raise ValueError(f"explain: op={name} is not known; it is one of {', '.join(_FUNCTIONS)}, or its name")
    answer = _ask(function, args, kwargs)
    call, support = answer.call, answer.support
    if backend is not None and backend not in _environment.NAMES:
        raise unknown(call.op, backend)
    order = (backend,) if backend is not None else _environment.allowed_backends(answer.order)
    others = tuple(one for one in _environment.NAMES if one in support and one not in order)
    found = refusals(call, support, order + others)
    chosen = next((one for one in order if not found[one]), None)
    kept = {one: tuple(reasons) for one, reasons in found.items()}
    return Explanation(call, backend, chosen, order, _reasons(call, backend), kept)


def _ask(function: Callable[..., Tensor], args: tuple, kwargs: dict[str, Any]) -> Answer:
    """Calls it on tensors without data, up to its choice."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # imported by whoever explains, not by all

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def empty(x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else mode.from_tensor(x, static_shapes=True)

    args, kwargs = tree_map_only(Tensor, empty, (args, kwargs))
    try:
        with mode:
            function(*args, **kwargs, backend=Question())
    except Answer as answer:
        return answer
    raise AssertionError(f"{function.__name__} ended without a choice")


def _reasons(call: Call, backend: str | None) -> tuple[str, ...]:
    if backend is not None:
        return (f"backend={backend!r} was asked for by name: no other is tried.",)
    if _environment.RESTRICTED:
        return (f"{_environment.VARIABLE}={','.join(_environment.RESTRICTED)} names these, in this order.",)
    source = _DECIDE[call.op](call).source
    if isinstance(source, Rung):
        return (f"{source.backend!r} is first for calls like this one ({source}). {source.reason}",)
    return (source.reason,)
