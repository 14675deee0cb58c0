"""The ops within torch.func's transformations and forward-mode AD, on meta tensors, and traced by torch.jit."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from vivit_kernels import factorized_attention, joint_attention, linear, linear_gelu, temporal_block, tubelet_embedding
from vivit_kernels.numerics import judge

routes = importlib.import_module("vivit_kernels.linear")
T, S, H, D, C = 4, 5, 2, 16, 3
E = H * D
KEYS = torch.arange(T * S) % 4 != 1
WEIGHT, NORM, TUBELET = torch.randn(3 * E, E) * 0.3, torch.randn(E), torch.randn(E, C, 2, 4, 4) * 0.1


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q, k, v `[..., N, D]`."""
    scores = q @ k.transpose(-1, -2) * D**-0.5
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1) @ v


def _joint(qkv: Tensor) -> Tensor:  # [B, N, 3, H, D]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return _attended(q, k, v, KEYS).transpose(1, 2)


def _spatial(qkv: Tensor) -> Tensor:  # [B, T, S, 3, H, D]
    q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)
    return _attended(q, k, v).transpose(-2, -3)


def _temporal(qkv: Tensor) -> Tensor:
    return _spatial(qkv.transpose(1, 2)).transpose(1, 2)


def _halves(qkv: Tensor) -> Tensor:
    return torch.cat([_temporal(qkv[..., :1, :]), _spatial(qkv[..., 1:, :])], -2)


def _block(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    qkv = F.linear(F.layer_norm(x, (E,), norm, norm), weight, weight[:, 0])
    return _temporal(qkv.unflatten(-1, (3, H, D))).flatten(-2)


def _tubelets(video: Tensor, weight: Tensor) -> Tensor:
    return F.conv3d(video, weight, weight[:, 0, 0, 0, 0], weight.shape[2:]).flatten(2).transpose(1, 2)


# name: (ours, in plain PyTorch, shape of the input, others that are differentiated)
OPS: dict[str, tuple[Any, Any, tuple[int, ...], tuple[Tensor, ...]]] = {
    "joint": (lambda x: joint_attention(x, key_mask=KEYS[None]), _joint, (1, T * S, 3, H, D), ()),
    "factorized": (lambda x: factorized_attention(x, temporal_heads=1), _halves, (1, T, S, 3, H, D), ()),
    "block": (
        lambda x, n, w: temporal_block(x, n, n, w, w[:, 0].contiguous(), heads=H, eps=1e-5),
        _block, (1, T, S, E), (NORM, WEIGHT),
    ),
    "tubelets": (lambda x, w: tubelet_embedding(x, w, w[:, 0, 0, 0, 0]), _tubelets, (1, C, T, 8, 8), (TUBELET,)),
    "linear": (linear, F.linear, (1, 20, E), (WEIGHT,)),
    "gelu": (linear_gelu, lambda x, w: F.gelu(F.linear(x, w), approximate="tanh"), (1, 20, E), (WEIGHT,)),
}  # fmt: skip


def _dual(f: Any, x: Tensor, *weights: Tensor) -> Any:
    with forward_ad.dual_level(), torch.no_grad():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()), *weights)).tangent


def _per_sample(f: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    several = torch.stack([x, x.sin(), 2 * x])
    places = tuple(range(1 + len(weights)))
    one = grad(lambda *inputs: f(*inputs).square().sum(), argnums=places)
    return vmap(one, (0, *(None for _ in weights)))(several, *weights)


TRANSFORMS: dict[str, Any] = {
    "jvp": lambda f, x, *w: jvp(f, (x, *w), tuple(y.cos() for y in (x, *w))),
    "jvp of the input": lambda f, x, *w: jvp(lambda y: f(y, *w), (x,), (x.cos(),)),
    "dual numbers": _dual,
    "gradients of samples": _per_sample,
    "second derivative": lambda f, x, *w: grad(
        lambda y: grad(lambda z: f(z, *w).square().sum())(y).square().sum()
    )(x),
    "vmap": lambda f, x, *w: vmap(lambda y: f(y, *w))(torch.stack([x, x.sin()])),
}  # fmt: skip


@pytest.fixture(autouse=True)
def every_row_counts(monkeypatch):
    monkeypatch.setattr(routes, "_FEWEST_ROWS", 1)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("op", OPS)
def test_transformations(op, transform):
    ours, plain, shape, weights = OPS[op]
    inputs = torch.randn(shape), *weights
    exact, eager = transform(plain, *(x.double() for x in inputs)), transform(plain, *inputs)
    found = transform(ours, *inputs)
    three = [[x] if isinstance(x, Tensor) else x for x in (found, exact, eager)]
    for actual, truth, usual in zip(*three, strict=True):
        assert truth.abs().max() > 0
        verdict = judge(actual, truth, usual, gradient=True, row=actual.shape[-1])
        assert verdict.ok, verdict


@pytest.mark.parametrize("op", ["joint", "factorized"])
def test_a_backend_asked_for_by_name_refuses(op):
    """Its kernels would run, and lose the tangent."""
    ours, _, shape, _ = OPS[op]
    attention = {"joint": joint_attention, "factorized": factorized_attention}[op]
    options = {} if op == "joint" else {"temporal_heads": 1}
    x = torch.randn(shape)
    with pytest.raises(NotImplementedError, match=r"(?s)forward-mode.*backend='torch'"):
        jvp(lambda y: attention(y, backend="cpu", **options), (x,), (x,))
    jvp(lambda y: attention(y, backend="torch", **options), (x,), (x,))
    assert ours(x).shape == attention(x, **options).shape


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors(op):
    ours, plain, shape, weights = OPS[op]
    inputs = [torch.randn(shape), *weights]
    expected = plain(*inputs)
    inputs = [x.to("meta").requires_grad_() for x in inputs]
    found = joint_attention(*inputs) if op == "joint" else ours(*inputs)  # not its mask, which is on the CPU
    assert found.is_meta and found.shape == expected.shape
    found.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in inputs)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_traced_by_torch_jit(op, needs_grad):
    """With PyTorch's own check, which traces again without gradients; what is traced without is trained later."""
    ours, plain, shape, weights = OPS[op]
    inputs = [torch.randn(shape), *weights]
    with torch.set_grad_enabled(needs_grad):
        traced: Any = torch.jit.trace(ours, tuple(x.clone().requires_grad_(needs_grad) for x in inputs))

    def gradients(f: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).clone().requires_grad_() for x in inputs]
        return list(torch.autograd.grad(f(*leaves).square().sum(), leaves))

    three = gradients(traced, torch.float32), gradients(plain, torch.float64), gradients(plain, torch.float32)
    for actual, exact, eager in zip(*three, strict=True):
        verdict = judge(actual, exact, eager, gradient=True, row=actual.shape[-1])
        assert verdict.ok, verdict
