"""What each backend of temporal_block can run, in which order they are tried (order.py), and where its kernel pays."""

from __future__ import annotations

from dataclasses import replace

from .. import _environment
from .._dispatch import Call, Refusal
from .._order import Decision
from .._triton import triton_refusals
from . import order as ladders
from . import tiles
from .order import order

_LONGEST, _WIDEST_HEAD = 32, 64


def torch_refusals(call: Call) -> list[Refusal]:
    """A composition of PyTorch ops runs every call."""
    return []


def triton_block_refusals(call: Call) -> list[Refusal]:
    """Triton's kernel: whole sequences in a tile of rows, head sizes 16 to 64 in steps of 8."""
    found = triton_refusals(call)
    _, T, _, _, D = call.shape
    if T > _LONGEST:
        reason = f"T={T}: its tiles hold whole sequences, of {_LONGEST} at most"
        found.append(Refusal(reason, "use backend='torch', or a linear layer and temporal_attention"))
    if D % 8 or not 16 <= D <= _WIDEST_HEAD:
        reason = f"head size {D} is not one of 16, 24, ..., {_WIDEST_HEAD}"
        found.append(Refusal(reason, "use backend='torch', or a linear layer and temporal_attention"))
    return found


SUPPORT = {"triton": triton_block_refusals, "torch": torch_refusals}


def obstacle(call: Call, backend: str | None) -> str:
    """Why the one kernel is not to stand in for a norm, a linear layer and temporal_attention; "" where it is.

    backend: who was asked for by name to run these, or None. Nothing of this is measured: tiles.times computes it.
    """
    if backend not in (None, "triton"):
        return "another backend was asked for by name"
    if backend is None and call.device != "cuda":
        return "its kernel is for GPUs"
    if backend is None and _environment.allowed_backends(order(call))[0] != "triton":
        return f"{_environment.VARIABLE} names another backend first"
    if triton_block_refusals(call) != []:
        return "its kernel cannot run this call"
    if call.needs_grad:
        return "a backward, which multiplies again, is not computed to win"
    if call.device != "cuda":
        return ""  # interpreted, where no time counts: to be checked, by name
    if call.dtype.itemsize != 2:
        return "it is computed for 16 bits alone"
    one, apart = tiles.times(call.shape, 2, call.arch)
    return "" if one < apart else "its least time is more than that of the three steps"


def decide(call: Call) -> Decision:
    """As order.py has it, for explain(); on a GPU with what is computed for this very call."""
    found = ladders.decide(call)
    if call.device != "cuda" or call.dtype.itemsize != 2 or triton_block_refusals(call):
        return found
    one, apart = (ns / 1000 for ns in tiles.times(call.shape, 2, call.arch))
    why = obstacle(call, None)
    said = f"not this call, since {why}" if why else "this call, too"
    reason = f"{found.source.reason} Computed for this call: {one:.1f} and {apart:.1f} us; a model makes {said}."
    return Decision(found.order, replace(found.source, reason=reason))
