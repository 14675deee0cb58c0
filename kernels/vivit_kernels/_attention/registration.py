"""Registers an attention op with torch.library: schema, fake, autograd. One boundary per direction, for every backend.

A packed `[..., 3, H, D]` projection enters as one tensor and its gradient leaves as one tensor: unbinding it outside
would make autograd copy three gradients into a fourth tensor.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _dispatch, _transforms
from .options import Options

_LIBRARY = torch.library.Library("vivit_kernels", "FRAGMENT")
_QKV = "Tensor q, Tensor? k, Tensor? v"
_AUXILIARY = "Tensor? mask, Tensor? seed, Tensor? cos, Tensor? sin"
_OPTIONS = "int temporal_heads, float scale, float softcap, float dropout_p, str backend"
_KEEP = "bool keep=True"  # o and lse for a backward; without one they need not be written
_MODULES = {"torch": "composed"}  # of the other backends it is <backend>_kernels

# Per backend, the shape of the fp32 `lse` that its backward reads beside the forward's o, from the shapes of q and k
# (unpacked), temporal_heads, dtype and device; None where it reads neither, as for those not named. What it holds is up
# to them.
Saved = tuple[int, ...] | None
SavedShape = Mapping[str, Callable[[tuple, tuple, int, torch.dtype, torch.device], Saved]]


def unpack(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views, from three tensors or one packed `[..., 3, H, D]`."""
    if k is None or v is None:
        q, k, v = q.unbind(-3)
    return q, k, v


def _shapes(q, k) -> tuple[tuple, tuple]:
    """Of q and k, tensors or their shapes, once unpacked."""
    q = q if isinstance(q, tuple) else tuple(q.shape)
    if k is None:
        one = (*q[:-3], *q[-2:])
        return one, one
    return q, k if isinstance(k, tuple) else tuple(k.shape)


_EAGER: dict[str, tuple[Callable, Callable]] = {}  # per op, what `run` calls without and with a gradient
_REGISTERED: dict[str, Callable] = {}  # and where anybody looks on


def plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but PyTorch's eager autograd looks on: no compiler or tracer, no mode, no subclass of Tensor."""
    if torch.compiler.is_compiling() or _dispatch.traced():
        return False
    if torch._C._len_torch_dispatch_stack() or _transforms.active():
        return False
    return all(x is None or type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)


def run(op: str, arguments: tuple, needs_grad: bool) -> Tensor:
    """o of a checked call: by the registered op where something may look on, else past the dispatcher.

    A call of temporal attention and its backward took 554 us of a host through ops registered from Python, 325 this way
    (one core, launches left out): at one clip both are more than the kernels take."""
    if not plain(*arguments[:3]):
        return _REGISTERED[op](*arguments)[0]
    without_grad, with_grad = _EAGER[op]
    return with_grad(*arguments) if needs_grad else without_grad(*arguments)


def _eager(fwd: Callable, setup_context: Callable, backward: Callable) -> tuple[Callable, Callable]:
    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            output = fwd(*arguments)
            setup_context(ctx, arguments, output)
            return output[0]

        @staticmethod
        def backward(ctx, *gradients):
            return backward(ctx, gradients[0], None)

    return lambda *arguments: fwd(*arguments)[0], Eager.apply


def register(op: str, package: str, flops: Callable[..., int], saved: SavedShape | None = None) -> None:
    """Defines `vivit_kernels::<op>_fwd` and `<op>_bwd`.

    package: its modules, one per backend (`_MODULES`), hold the launchers `launch_fwd` and `launch_bwd`.
    flops: of the two products of one forward, from the shapes of q and k (unpacked) and temporal_heads; backward, which
    recomputes the scores, has five products. PyTorch's FlopCounterMode uses it.
    """
    steps = _Steps(package, saved or {})

    def setup_context(ctx, inputs, output):
        q, k, v, mask, seed, cos, sin, temporal_heads, scale, softcap, dropout_p, backend, keep = inputs
        ctx.options = temporal_heads, scale, softcap, dropout_p, backend
        o, lse = output if keep and steps.saved_shape(q, k, v, temporal_heads, backend) is not None else (None, None)
        ctx.save_for_backward(q, k, v, mask, seed, cos, sin, o, lse)
        ctx.set_materialize_grads(False)

    def backward(ctx, do, _):
        nothing = (None,) * 13
        if do is None:
            return nothing
        q, k, v, mask, seed, cos, sin, o, lse = ctx.saved_tensors
        alone = not torch.is_grad_enabled() and plain(do, q, k, v) and not _transforms.batched_by_autograd(do)
        step = steps.bwd if alone else registered_bwd
        gradients = step(do, q, k, v, o, lse, mask, seed, cos, sin, *ctx.options)
        return (*gradients, *nothing[len(gradients) :])

    def no_double_backward(ctx, *_):
        raise NotImplementedError(
            f"{op}: double backward (a gradient of a gradient) is not implemented; got create_graph=True through it. "
            "Use plain PyTorch attention where second derivatives are needed"
        )

    _EAGER[op] = _eager(steps.fwd, setup_context, backward)
    lib, name = _LIBRARY, f"vivit_kernels::{op}"
    lib.define(f"{op}_fwd({_QKV}, {_AUXILIARY}, {_OPTIONS}, {_KEEP}) -> (Tensor, Tensor)")
    lib.define(f"{op}_bwd(Tensor do, {_QKV}, Tensor? o, Tensor? lse, {_AUXILIARY}, {_OPTIONS}) -> Tensor[]")
    lib.impl(f"{op}_fwd", steps.fwd, "CompositeExplicitAutograd")
    lib.impl(f"{op}_bwd", steps.bwd, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{name}_fwd", steps.fwd_fake, lib=lib)
    torch.library.register_fake(f"{name}_bwd", steps.bwd_fake, lib=lib)
    torch.library.register_autograd(f"{name}_fwd", backward, setup_context=setup_context, lib=lib)
    torch.library.register_autograd(f"{name}_bwd", no_double_backward, lib=lib)
    _REGISTERED[op], registered_bwd = _transforms.registered(op, setup_context, backward, no_double_backward)
    _register_flops(op, flops)


class _Steps:
    """Forward and backward of an op below autograd, by the launchers of whichever backend a call names."""

    def __init__(self, package: str, saved: SavedShape):
        self._saved = saved
        self._module = functools.cache(lambda backend: importlib.import_module(f"{package}.{_module_name(backend)}"))

    def saved_shape(self, q, k, v, temporal_heads: int, backend: str) -> Saved:
        rule = self._saved.get(backend)
        return None if rule is None else rule(*_shapes(q, k), temporal_heads, q.dtype, q.device)

    def fwd(self, q, k, v, mask, seed, cos, sin, temporal_heads, scale, softcap, dropout_p, backend, keep=True):
        options = Options(scale, softcap, dropout_p, mask, seed, cos, sin)
        saves = keep and self.saved_shape(q, k, v, temporal_heads, backend) is not None
        launch = self._module(backend).launch_fwd
        o, lse = launch(*unpack(q, k, v), temporal_heads, options, **({"keep": True} if saves else {}))
        return o, q.new_empty(0, dtype=torch.float32) if lse is None else lse

    def fwd_fake(self, q, k, v, mask, seed, cos, sin, temporal_heads, scale, softcap, dropout_p, backend, keep=True):
        shape = self.saved_shape(q, k, v, temporal_heads, backend) if keep else None
        q = unpack(q, k, v)[0]
        return q.new_empty(q.shape), q.new_empty((0,) if shape is None else shape, dtype=torch.float32)

    def bwd(
        self, do, q, k, v, o, lse, mask, seed, cos, sin, temporal_heads, scale, softcap, dropout_p, backend
    ) -> list[Tensor]:
        options = Options(scale, softcap, dropout_p, mask, seed, cos, sin)
        gradients = _empty_gradients(q, k, v)
        views = gradients if k is not None else list(gradients[0].unbind(-3))
        self._module(backend).launch_bwd(do, *unpack(q, k, v), o, lse, *views, temporal_heads, options)
        return gradients

    def bwd_fake(self, do, q, k, v, *_) -> list[Tensor]:
        return _empty_gradients(q, k, v)


def _module_name(backend: str) -> str:
    return _MODULES.get(backend, f"{backend}_kernels")


def _register_flops(op: str, flops: Callable[..., int]) -> None:
    @register_flop_formula(getattr(torch.ops.vivit_kernels, f"{op}_fwd"))
    def forward_flops(q, k, v, mask, seed, cos, sin, temporal_heads, *_, **__) -> int:
        return flops(*_shapes(q, k), temporal_heads)

    @register_flop_formula(getattr(torch.ops.vivit_kernels, f"{op}_bwd"))
    def backward_flops(do, q, k, v, o, lse, mask, seed, cos, sin, temporal_heads, *_, **__) -> int:
        return 5 * flops(*_shapes(q, k), temporal_heads) // 2


def _empty_gradients(q: Tensor, k: Tensor | None, v: Tensor | None) -> list[Tensor]:
    """Contiguous gradients: one for a packed projection, else three."""
    return [x.new_empty(x.shape) for x in (q, k, v) if x is not None]
