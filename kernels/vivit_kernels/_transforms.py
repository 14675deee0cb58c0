"""The ops within torch.func's transformations and forward-mode AD, for which torch.library has no rules: left to it, a
jvp is zero without a word, and grad is an error that names no op.

Here grad, vjp and jacrev run the kernels, vmap one call after another. Forward-mode and second derivatives are those
of the op's definition in plain PyTorch, which has its N x N matrix; so is torch.func's gradient within a graph of
torch.compile, which knows no rule of ours (the gradient of a compiled function runs the kernels). PyTorch's old vmap,
which autograd still uses for is_grads_batched=True, is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad


def active() -> bool:
    """Within torch.func's transformations (vmap, jvp, ...) or a level of forward-mode AD, which alone counts in a
    graph: that is guarded by it, and traces the others away."""
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and functorch.maybe_current_level() is not None


def beyond_kernels() -> bool:
    """Within forward-mode AD, or two of torch.func's gradients, of which a graph takes none: whose derivatives only
    plain PyTorch has. A graph that this is traced into is guarded by both."""
    most = 0 if torch.compiler.is_compiling() else 1
    return forward_ad._current_level >= 0 or _levels().count("Grad") > most


def asks_for_rules() -> bool:
    """Within a transformation for which an op needs its rules here: in no graph, and not functionalize, which knows ops
    of torch.library and no autograd.Function."""
    if torch.compiler.is_compiling() or not active():
        return False
    top = functorch.peek_interpreter_stack()
    return top is None or top.key() != functorch.TransformType.Functionalize


def batched_by_autograd(gradient: Tensor) -> bool:
    """Whether a backward was called once for many gradients, by is_grads_batched=True."""
    return not torch.compiler.is_compiling() and functorch.is_legacy_batchedtensor(gradient)


def _levels() -> tuple[str, ...]:
    """The transformations that this is run in."""
    return tuple(level.key().name for level in functorch.get_interpreter_stack() or ())


setattr(_levels, "_dynamo_marked_constant", True)  # noqa: B010  of a graph: those that it is traced in


def _forward_mode(op: str) -> NotImplementedError:
    return NotImplementedError(
        f"{op}: kernels have no forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad); "
        "call the function of vivit_kernels, which then takes plain PyTorch, or use torch.func.vjp or grad"
    )


def _transformed(op: str, step: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """`step`, an op of torch.library or what calls one, with a rule for each transformation.

    setup_context, backward: as for torch.library.register_autograd."""

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*arguments):
            found = step(*arguments)
            return tuple(found) if isinstance(found, list) else found

        @staticmethod
        def jvp(ctx, *_):
            raise _forward_mode(op)

        @staticmethod
        def vmap(info, in_dims, *arguments):
            return _one_by_one(Transformed.apply, info.batch_size, in_dims, arguments)

    Transformed.setup_context = staticmethod(setup_context)
    Transformed.backward = staticmethod(backward)
    return Transformed.apply


def registered(op: str, setup_context: Callable, backward: Callable, refuse: Callable) -> tuple[Callable, Callable]:
    """What runs `vivit_kernels::<op>_fwd` and `<op>_bwd`, within a transformation by their rules for it.

    setup_context, backward: of the first, as for torch.library.register_autograd. refuse: the second's backward."""
    fwd, bwd = (getattr(torch.ops.vivit_kernels, f"{op}_{direction}") for direction in ("fwd", "bwd"))
    ruled_fwd = _transformed(op, fwd, setup_context, backward)
    ruled_bwd = _transformed(op, bwd, lambda *_: None, refuse)

    def run(*arguments):
        if asks_for_rules():
            return ruled_fwd(*arguments)
        return fwd(*arguments)

    def run_bwd(*arguments):
        if batched_by_autograd(arguments[0]):
            raise NotImplementedError(
                f"{op}: kernels have no rule for is_grads_batched=True (torch.autograd.grad; vectorize=True of "
                "torch.autograd.functional), which is PyTorch's old vmap; use torch.func.vjp and torch.func.vmap, or "
                "one call for each gradient"
            )
        return (ruled_bwd if asks_for_rules() else bwd)(*arguments)

    return run, run_bwd


def _one_by_one(function: Callable, calls: int, in_dims: tuple, arguments: tuple) -> tuple[Any, Any]:
    """As a vmap rule returns it: (outputs, their batch dimension), along a new first one."""

    def of(i: int) -> list:
        pairs = zip(arguments, in_dims, strict=True)
        return [x.select(d, i) if isinstance(x, Tensor) and d is not None else x for x, d in pairs]

    found = [function(*of(i)) for i in range(calls)]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True)), (0,) * len(found[0])
