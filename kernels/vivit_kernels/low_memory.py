"""Layers of a transformer block that keep for backward what cannot be made again for little, with exact gradients.

    norm_linear        linear(layer_norm(x)):           keeps x                      makes the norm again
    linear             linear(x):                       keeps x                      casts the weight again
    norm_mlp           fc2(gelu(fc1(layer_norm(x)))):   keeps x and the hidden rows  makes norm and GELU again;
                                                        or x alone                   and the product of fc1
    attention_linear   linear(attention(qkv)):          keeps qkv                    makes the attention again
    dropout            x with elements dropped:         keeps the generator's state  draws the mask again

What PyTorch keeps beside that: the norm's output, the GELU's output, a mask as large as x, and under autocast a second
copy of every weight (and on a GPU of every norm's input, in float32). The products are those of linear.py; between them
are the passes of _rows/passes.py: fused kernels on a GPU, plain PyTorch elsewhere. Every function's result, and its
draw from the random generator, is that of the plain code in its docstring.

`residual_norm_linear` and `residual_norm_mlp` also take the residual sum before the norm and give it back: so the sum
and its gradient, which comes from two sides, are part of the norm's own pass.

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
from ._dispatch import autocast_dtype
from ._philox import draw_seed
from ._rows.passes import Norm, Normed, cast_like, gelu_backward, layer_norm, layer_norm_backward
from ._rows.passes import add as add  # a residual sum, for who ends a block
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
    return residual_norm_linear(x, None, norm, layer)[1]


def residual_norm_linear(
    x: Tensor, branch: Tensor | None, norm: nn.LayerNorm, layer: nn.Linear
) -> tuple[Tensor, Tensor]:
    """x = x + branch; (x, layer(norm(x))), x and branch `[..., K]`, branch None for x as it is.

    The sum may be written to the branch's memory, which nobody else may read. Backward has the sum alone.
    """
    return _NormLinear.apply(x, branch, norm.weight, norm.bias, norm.eps, layer.weight, layer.bias)


def norm_mlp(
    x: Tensor, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear, dropout_p: float = 0.0, keep_hidden: bool = True
) -> Tensor:
    """fc2(F.dropout(F.gelu(fc1(norm(x)), approximate="tanh"), dropout_p)), x `[..., K]` -> `[..., K]`.

    keep_hidden: whether fc1's output stays for backward; if not, backward multiplies once more, a ninth of the
        products of a layer's training step.
    """
    return residual_norm_mlp(x, None, norm, fc1, fc2, dropout_p, keep_hidden)[1]


def residual_norm_mlp(
    x: Tensor,
    branch: Tensor | None,
    norm: nn.LayerNorm,
    fc1: nn.Linear,
    fc2: nn.Linear,
    dropout_p: float = 0.0,
    keep_hidden: bool = True,
) -> tuple[Tensor, Tensor]:
    """x = x + branch; (x, norm_mlp(x, ...)), as `residual_norm_linear` and `norm_mlp`."""
    return _NormMLP.apply(
        x,
        branch,
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


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """In which F.linear(x, weight) computes."""
    return autocast_dtype(x.device.type) or weight.dtype


def _handed_on(ctx: Any, x: Tensor, branch: Tensor | None, total: Tensor) -> Tensor:
    """The residual sum of x and branch as an output of a function, which its backward may get a gradient of, or not."""
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, x.dtype if branch is None else branch.dtype
    if total is branch:
        ctx.mark_dirty(branch)
    return total


def _to_both(ctx: Any, dsum: Tensor | None) -> list[Tensor | None]:
    """The gradient of the sum as that of x and of the branch, the first two inputs of a function."""
    needs = ctx.needs_input_grad[:2]
    return [
        dsum.to(dtype) if need and dsum is not None else None for need, dtype in zip(needs, ctx.dtypes, strict=True)
    ]


def _norm_backward(
    dn: Tensor | None, dsum: Tensor | None, found: Normed, norm: Norm, needs: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of the sum, the norm's weight and bias, which functions have after x and branch."""
    if dn is None:
        return dsum, None, None
    return layer_norm_backward(dn, dsum, found, norm, (any(needs[:2]), *needs[2:4]))


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
        return cast_like(dx, x), dweight, dbias


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, branch, norm_weight, norm_bias, eps: float, weight, bias) -> tuple[Tensor, Tensor]:
        found = layer_norm(x, branch, Norm(norm_weight, norm_bias, eps), _product_dtype(x, weight))
        total = _handed_on(ctx, x, branch, found.sum)
        ctx.eps = eps
        ctx.save_for_backward(total, norm_weight, norm_bias, weight)
        return total, _owned(product(found.n, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        total, norm_weight, norm_bias, weight = ctx.saved_tensors
        needs, norm = ctx.needs_input_grad, Norm(norm_weight, norm_bias, ctx.eps)
        if dy is None:
            return *_to_both(ctx, dsum), None, None, None, None, None
        with _exact(dy.device):
            found = layer_norm(total, None, norm, dy.dtype)
            dn, dweight, dbias = _product_backward(dy, found.n, weight, (any(needs[:4]), *needs[5:]))
            dx, *dnorm = _norm_backward(dn, dsum, found, norm, needs)
        return *_to_both(ctx, dx), *dnorm, None, dweight, dbias


class _NormMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x, branch, norm_weight, norm_bias, eps: float, weight1, bias1, weight2, bias2, layers,
        p: float, keep: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.options = eps, p
        found = layer_norm(x, branch, Norm(norm_weight, norm_bias, eps), _product_dtype(x, weight1))
        total, n = _handed_on(ctx, x, branch, found.sum), found.n
        del found
        ctx.state = _random_state(x.device) if p else None
        if not keep and not p:
            hidden, y = None, mlp(n, *layers)  # without gradients the GELU is the product's epilogue
        else:
            hidden = product(n, weight1, bias1)
            active = F.gelu(hidden, approximate="tanh")
            y = product(_dropped(active, _kept(active, p), p) if p else active, weight2, bias2)
        ctx.save_for_backward(total, norm_weight, norm_bias, weight1, bias1, weight2, hidden if keep else None)
        return total, _owned(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        total, norm_weight, norm_bias, weight1, bias1, weight2, hidden = ctx.saved_tensors
        (eps, p), needs = ctx.options, ctx.needs_input_grad
        norm = Norm(norm_weight, norm_bias, eps)
        if dy is None:
            return *_to_both(ctx, dsum), *(None,) * 10
        with _exact(dy.device):
            found = layer_norm(total, None, norm, dy.dtype)
            if hidden is None:
                hidden = product(
                    found.n.to(dy.dtype), weight1.to(dy.dtype), None if bias1 is None else bias1.to(dy.dtype)
                )
            if p:
                dhidden, dbias1, *second = _dropped_backward(dy, hidden, weight2, p, ctx.state, needs)
            else:
                dhidden, dbias1, *second = _active_backward(dy, hidden, weight2, needs)
            del hidden
            if dhidden is None:
                return *_to_both(ctx, dsum), None, None, None, None, None, *second, None, None, None
            dn, dweight1, _ = _product_backward(dhidden, found.n, weight1, (any(needs[:4]), needs[5], False))
            del dhidden
            dx, *dnorm = _norm_backward(dn, dsum, found, norm, needs)
        return *_to_both(ctx, dx), *dnorm, None, dweight1, cast_like(dbias1, bias1), *second, None, None, None


def _active_backward(dy: Tensor, hidden: Tensor, weight2: Tensor, needs: Any) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, the bias that made it, the second weight and bias, of product(F.gelu(hidden), ...)."""
    dactive, _, dbias2 = _product_backward(dy, hidden, weight2, (any(needs[:7]), False, needs[8]))
    if dactive is None:
        active, dhidden, dbias1 = F.gelu(hidden, approximate="tanh") if needs[7] else None, None, None
    else:
        active, dhidden, dbias1 = gelu_backward(dactive, hidden, "tanh", (needs[7], needs[6]))
    dweight2 = None if active is None else _product_backward(dy, active, weight2, (False, True, False))[1]
    return dhidden, dbias1, dweight2, dbias2


def _dropped_backward(
    dy: Tensor, hidden: Tensor, weight2: Tensor, p: float, state: Tensor, needs: Any
) -> tuple[Tensor | None, ...]:
    """As `_active_backward`, with dropout between the GELU and the product."""
    active = F.gelu(hidden, approximate="tanh")
    with _replayed(state, dy.device):
        kept = _kept(active, p)
    active = _dropped(active, kept, p)
    dhidden, *second = _product_backward(dy, active, weight2, (any(needs[:7]), *needs[7:9]))
    del active
    if dhidden is None:
        return None, None, *second
    dhidden = torch.ops.aten.gelu_backward(_dropped(dhidden, kept, p), hidden, approximate="tanh")
    return dhidden, dhidden.flatten(0, -2).sum(0) if needs[6] else None, *second


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
