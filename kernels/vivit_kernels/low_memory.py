"""Layers of a transformer block that keep for backward what cannot be made again for little, with exact gradients.

    norm_linear        linear(layer_norm(x)):           keeps x                      makes the norm again
    linear             linear(x):                       keeps x                      casts the weight again
    norm_mlp           fc2(gelu(fc1(layer_norm(x)))):   keeps x and the hidden rows  makes norm and GELU again;
                                                        or x alone                   and the product of fc1
    attention_linear   linear(attention(qkv)):          keeps qkv                    makes the attention again
    dropout            x with elements dropped:         keeps the generator's state  draws the mask again

What PyTorch keeps beside that: the norm's output, the GELU's output, a mask as large as x, and under autocast a second
copy of every weight (and on a GPU of every norm's input, in float32). The products are those of linear.py; between them
is plain PyTorch, on any device. Every function's result, and its draw from the random generator, is that of the plain
code in its docstring.

A gradient of a gradient is an error; so are torch.func's transforms, and torch.compile breaks the graph here: its own
partitioner decides what is made again, so give it the plain code (`usable` says which is which).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ._attention.registration import plain
from ._philox import draw_seed
from .linear import gelu_again as gelu_again  # what plain code keeps, for who counts bytes
from .linear import input_gradient, mlp, weight_gradient
from .linear import linear as product


def usable(x: Tensor) -> bool:
    """Whether these functions save anything on this call: a gradient is asked for, by PyTorch's eager autograd."""
    return torch.is_grad_enabled() and plain(x)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """F.linear(x, layer.weight, layer.bias), x `[..., K]` -> `[..., N]`. Autocast's copy of the weight is not kept."""
    return _Linear.apply(x, layer.weight, layer.bias)


def norm_linear(x: Tensor, norm: nn.LayerNorm, layer: nn.Linear) -> Tensor:
    """layer(norm(x)), x `[..., K]` -> `[..., N]`. Backward has x alone and makes the norm's output again."""
    return _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, layer.weight, layer.bias)


def norm_mlp(
    x: Tensor, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear, dropout_p: float = 0.0, keep_hidden: bool = True
) -> Tensor:
    """fc2(F.dropout(F.gelu(fc1(norm(x)), approximate="tanh"), dropout_p)), x `[..., K]` -> `[..., K]`.

    keep_hidden: whether fc1's output stays for backward; if not, backward multiplies once more, a ninth of the
        products of a layer's training step.
    """
    return _NormMLP.apply(
        x,
        norm.weight,
        norm.bias,
        norm.eps,
        fc1.weight,
        fc1.bias,
        fc2.weight,
        fc2.bias,
        (fc1, fc2),
        dropout_p,
        keep_hidden,
    )


def attention_linear(
    qkv: Tensor, attend: Callable[[Tensor, Tensor | None], Tensor], layer: nn.Linear, seeded: bool = False
) -> Tensor:
    """layer(attend(qkv, seed).flatten(-2)), qkv `[..., 3, H, D]` -> `[..., E]`. Backward has qkv alone.

    attend: qkv to `[..., H, D]`, by the operations of vivit_kernels. seeded: with dropout, for which it is given the
        `seed` that those would draw; else None.
    """
    seed = draw_seed(qkv.device) if seeded else None
    return _AttentionLinear.apply(qkv, lambda x: attend(x, seed), layer.weight, layer.bias)


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout(x, p). Backward has the state of the generator (16 bytes on a GPU, 5 KB on a CPU) and no mask."""
    return _Dropout.apply(x, p)


# ---- what the functions share ----


def _normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(layer norm of x, mean, 1 / deviation), in the dtype in which F.layer_norm computes here."""
    if weight is not None and weight.dtype != x.dtype and x.device.type != "cpu":
        x = x.to(weight.dtype)  # a CPU's kernel takes a bfloat16 x beside a float32 weight
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


def _norm_backward(
    dn: Tensor, x: Tensor, found: tuple[Tensor, Tensor, Tensor], norm: tuple[Tensor | None, Tensor | None], needs: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of x and the norm's weight and bias, from that of its output."""
    n, mean, rstd = found
    weight, bias = norm
    same = x.to(n.dtype)
    gradients = torch.ops.aten.native_layer_norm_backward(
        dn.to(n.dtype), same, list(x.shape[-1:]), mean, rstd, weight, bias, list(needs)
    )
    dx, dweight, dbias = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return None if dx is None else dx.to(x.dtype), _like(dweight, weight), _like(dbias, bias)


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or parameter is None else gradient.to(parameter.dtype)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype).contiguous()


def _product_backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x `[..., K]`, weight `[N, K]` and bias, from that of x @ weight.T + bias, `[..., N]`."""
    rows = _rows(dy, dy.dtype)
    dx = input_gradient(rows, weight.to(dy.dtype)).view(*dy.shape[:-1], weight.shape[1]) if needs[0] else None
    dweight = weight_gradient(rows, _rows(x, dy.dtype)).to(weight.dtype) if needs[1] else None
    return dx, dweight, rows.sum(0).to(weight.dtype) if needs[2] else None


def _owned(y: Tensor) -> Tensor:
    """y, which nothing else refers to, not as a view: a caller may add a residual in its memory."""
    return torch.ops.aten._unsafe_view(y, y.shape)


def _random_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)  # pyright: ignore[reportCallIssue]


@contextmanager
def _replayed(state: Tensor, device: torch.device) -> Iterator[None]:
    """The generator of this device as it was, and afterwards as it is."""
    if device.type == "cpu":
        with torch.random.fork_rng([]):
            torch.set_rng_state(state)
            yield
        return
    with torch.random.fork_rng([device], device_type=device.type):
        torch.get_device_module(device).set_rng_state(state, device)
        yield


def _kept(x: Tensor, p: float) -> Tensor:
    """Which elements F.dropout(x, p) would keep, drawn as it draws: bool of x's shape."""
    return F.dropout(torch.ones_like(x, memory_format=torch.contiguous_format), p) != 0


def _dropped(x: Tensor, kept: Tensor, p: float) -> Tensor:
    return torch.where(kept, x * (1 / (1 - p) if p < 1 else 0.0), 0.0)


def _exact(device: torch.device) -> torch.autocast:
    """Backward computes in the dtypes that forward left, whatever autocast is on around loss.backward()."""
    return torch.autocast(device.type, enabled=False)


# ---- autograd ----


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _owned(product(x, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        with _exact(dy.device):
            dx, dweight, dbias = _product_backward(dy, x, weight, ctx.needs_input_grad)
        return _like(dx, x), dweight, dbias


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, norm_weight, norm_bias, eps: float, weight, bias) -> Tensor:
        ctx.save_for_backward(x, norm_weight, norm_bias, weight)
        ctx.eps = eps
        return _owned(product(_normalised(x, norm_weight, norm_bias, eps)[0], weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with _exact(dy.device):
            found = _normalised(x, norm_weight, norm_bias, ctx.eps)
            dn, dweight, dbias = _product_backward(dy, found[0], weight, (any(needs[:3]), *needs[4:]))
            if dn is None:
                return None, None, None, None, dweight, dbias
            dx = _norm_backward(dn, x, found, (norm_weight, norm_bias), needs[:3])
        return *dx, None, dweight, dbias


class _NormMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x, norm_weight, norm_bias, eps: float, weight1, bias1, weight2, bias2, layers, p: float, keep: bool
    ) -> Tensor:
        ctx.options = eps, p
        n = _normalised(x, norm_weight, norm_bias, eps)[0]
        ctx.state = _random_state(x.device) if p else None
        if not keep and not p:
            hidden, y = None, mlp(n, *layers)  # without gradients the GELU is the product's epilogue
        else:
            hidden = product(n, weight1, bias1)
            active = F.gelu(hidden, approximate="tanh")
            y = product(_dropped(active, _kept(active, p), p) if p else active, weight2, bias2)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight1, bias1, weight2, hidden if keep else None)
        return _owned(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight1, bias1, weight2, hidden = ctx.saved_tensors
        (eps, p), needs, dtype = ctx.options, ctx.needs_input_grad, dy.dtype
        with _exact(dy.device):
            found = _normalised(x, norm_weight, norm_bias, eps)
            if hidden is None:
                n = found[0].to(dtype)
                hidden = product(n, weight1.to(dtype), None if bias1 is None else bias1.to(dtype))
            active, kept = F.gelu(hidden, approximate="tanh"), None
            if p:
                with _replayed(ctx.state, x.device):
                    kept = _kept(active, p)
                active = _dropped(active, kept, p)
            below = any(needs[:6])
            dhidden, dweight2, dbias2 = _product_backward(dy, active, weight2, (below, *needs[6:8]))
            del active
            if dhidden is None:
                return (None,) * 6 + (dweight2, dbias2, None, None, None)
            dhidden = dhidden if kept is None else _dropped(dhidden, kept, p)
            dhidden = torch.ops.aten.gelu_backward(dhidden, hidden, approximate="tanh")
            del hidden
            dn, dweight1, dbias1 = _product_backward(dhidden, found[0], weight1, (any(needs[:3]), *needs[4:6]))
            del dhidden
            dx = (None,) * 3 if dn is None else _norm_backward(dn, x, found, (norm_weight, norm_bias), needs[:3])
        return *dx, None, dweight1, dbias1, dweight2, dbias2, None, None, None


class _AttentionLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, attend: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(qkv, weight)
        ctx.attend = attend
        return _owned(product(attend(qkv).flatten(-2), weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        qkv, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with _exact(dy.device):
            with torch.enable_grad():
                inner = qkv.detach().requires_grad_(needs[0])
                o = ctx.attend(inner)
            do, dweight, dbias = _product_backward(dy, o.detach().flatten(-2), weight, (needs[0], *needs[2:]))
            dqkv = None if do is None else torch.autograd.grad(o, inner, do.view(o.shape).to(o.dtype))[0]
        return dqkv, None, dweight, dbias


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.p, ctx.state = p, _random_state(x.device)
        return _dropped(x, _kept(x, p), p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        with _replayed(ctx.state, dy.device):
            kept = _kept(dy, ctx.p)
        return _dropped(dy, kept, ctx.p), None
