"""The passes over rows by Triton (_rows/triton_passes.py), against their definition by PyTorch's ops in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is not installed")
from vivit_kernels import _environment, low_memory
from vivit_kernels._rows import passes
from vivit_kernels.numerics import judge

pytestmark = pytest.mark.interpreted
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows and width: odd widths, rows that leave a tile half empty, one of each; a whole tile, wide rows
SHAPES = [(37, 72), (5, 33), (1, 1), *(pytest.param(shape, marks=pytest.mark.full) for shape in [(8, 32), (3, 1040)])]


def made(shape: tuple[int, ...], dtype: torch.dtype, device) -> Tensor:
    """Between NaN: what is read out of bounds shows."""
    buffer = torch.full((torch.Size(shape).numel() + 64,), float("nan"), dtype=dtype, device=device)
    x = buffer[32:-32].view(shape)
    return x.copy_(torch.randn(shape) * torch.rand(shape[:-1] + (1,)).add(0.5) + 0.7)


def norm_results(tensors: dict[str, Tensor], dtype: torch.dtype, out: torch.dtype, affine: bool) -> dict[str, Tensor]:
    """Sum, norm and all gradients by PyTorch, everything in `dtype`, the norm in `out`."""
    x, branch, weight, bias = (tensors[k].to(dtype).requires_grad_() for k in ("x", "branch", "weight", "bias"))
    total = (x.to(out if dtype != torch.float64 else dtype) + branch).to(dtype)
    n = F.layer_norm(total, x.shape[-1:], *((weight, bias) if affine else (None, None)), 1e-5)
    loss = (n * tensors["dn"].to(n.dtype)).sum() + (total * tensors["dsum"].to(dtype)).sum()
    wanted = [x, weight, bias] if affine else [x]
    found = torch.autograd.grad(loss, wanted)
    return dict(zip(("sum", "n", "dx", "dweight", "dbias"), (total.detach(), n.detach(), *found), strict=False))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["affine", "bare", "mixed"])
def test_norms(shape, dtype, kind, device):
    """mixed: parameters in float32 beside tokens in 16 bits, as under autocast."""
    if kind == "mixed" and dtype == torch.float32:
        pytest.skip("nothing is mixed")
    given = {name: made(shape, dtype, device) for name in ("x", "branch", "dn", "dsum")}
    parameters = torch.float32 if kind == "mixed" else dtype
    given |= {name: made(shape[-1:], parameters, device) for name in ("weight", "bias")}
    exact = norm_results({k: x.double() for k, x in given.items()}, torch.float64, dtype, kind != "bare")
    eager = norm_results({k: x.to(dtype) for k, x in given.items()}, dtype, dtype, kind != "bare")
    norm = passes.Norm(*((given["weight"], given["bias"]) if kind != "bare" else (None, None)), 1e-5)
    assert passes.fused(given["x"], norm.weight)
    branch = given["branch"].clone()
    normed = passes.layer_norm(given["x"], branch, norm, dtype)
    assert normed.sum is branch, "the sum is in the branch's memory"
    again = passes.layer_norm(normed.sum, None, norm, dtype)
    assert torch.equal(again.n, normed.n) and again.sum is normed.sum
    needs = (True, kind != "bare", kind != "bare")
    gradients = passes.layer_norm_backward(given["dn"], given["dsum"], normed, norm, needs)
    found = dict(zip(("sum", "n", "dx", "dweight", "dbias"), (normed.sum, normed.n, *gradients), strict=True))
    for name, reference in exact.items():
        width = 1 if name in ("dweight", "dbias") else shape[-1]
        scale = float(given["dn"].double().norm(dim=-1).max()) if shape[-1] == 1 and name == "dx" else None
        verdict = judge(
            found[name].cpu(), reference.cpu(), eager[name].cpu(), gradient=name[0] == "d", row=width, scale=scale
        )
        assert verdict.ok, f"{name}: {verdict}"
        assert found[name].dtype == (parameters if name in ("dweight", "dbias") else dtype)


def test_what_is_not_asked_for_is_not_made(device):
    x, weight, dn = made((6, 32), torch.float32, device), torch.ones(32, device=device), torch.randn(6, 32).to(device)
    norm = passes.Norm(weight, None, 1e-5)
    found = passes.layer_norm(x, None, norm, torch.float32)
    both = passes.layer_norm_backward(dn, None, found, norm, (True, True, False))
    assert both[2] is None
    for i in range(2):
        needs = (i == 0, i == 1, False)
        one = passes.layer_norm_backward(dn, None, found, norm, needs)
        assert torch.equal(one[i], both[i]) and one[1 - i] is None


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("shape", [(40, 128), (2, 33, 136), (5, 33), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_backward(shape, dtype, approximate, device):
    hidden, dactive = made(shape, dtype, device) * 2, made(shape, dtype, device)

    def plain(to: torch.dtype) -> tuple[Tensor, ...]:
        x = hidden.to(to).requires_grad_()
        active = F.gelu(x, approximate=approximate)
        (dx,) = torch.autograd.grad(active, x, dactive.to(to))
        return active.detach(), dx, dx.flatten(0, -2).sum(0)

    exact, eager = plain(torch.float64), plain(dtype)
    found = passes.gelu_backward(dactive, hidden, approximate, (True, True))
    assert found[1] is dactive, "in the memory of the gradient that came"
    for i, name in enumerate(("active", "dhidden", "dbias")):
        verdict = judge(found[i].cpu(), exact[i].cpu(), eager[i].cpu(), gradient=i > 0)
        assert verdict.ok, f"{name}: {verdict}"


def test_a_gelu_far_out_is_its_limit(device):
    x = torch.tensor([[-100.0, -20.0, -0.0, 0.0, 20.0, 100.0]], device=device)
    for approximate in ("tanh", "none"):
        active, dhidden, _ = passes.gelu_backward(torch.ones_like(x), x, approximate, (True, False))
        assert active.tolist() == [[0.0, 0.0, 0.0, 0.0, 20.0, 100.0]]
        assert dhidden.tolist() == [[0.0, 0.0, 0.5, 0.5, 1.0, 1.0]]


def test_the_same_bits_in_every_run(device):
    x, dn = (made((300, 48), torch.float32, device) for _ in range(2))
    norm = passes.Norm(torch.ones(48, device=device), None, 1e-5)
    found = passes.layer_norm(x, None, norm, torch.float32)
    runs = [passes.layer_norm_backward(dn, None, found, norm, (True, True, False))[1] for _ in range(2)]
    assert torch.equal(*runs)


def test_a_restriction_of_the_backends_leaves_them_out(device, monkeypatch):
    x = torch.randn(4, 16, device=device)
    assert passes.fused(x) and not passes.fused(x.double()) and not passes.fused(x[:0])
    monkeypatch.setattr(_environment, "RESTRICTED", ("torch",))
    assert not passes.fused(x)


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "again"])
def test_a_block_runs_by_them(keep, device, monkeypatch):
    """low_memory's functions, residual and all, as training calls them: float64's gradients within the budget."""
    E, hidden = 24, 40
    norm, fc1, fc2 = nn.LayerNorm(E), nn.Linear(E, hidden), nn.Linear(hidden, E)
    layers = nn.ModuleList([norm, fc1, fc2]).to(device)
    x, branch, dy = (torch.randn(2, 9, E, device=device) for _ in range(3))

    def run(mine: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        layers.to(dtype).zero_grad()
        a, b = (t.detach().to(dtype).requires_grad_() for t in (x, branch))
        if mine:
            total, y = low_memory.residual_norm_mlp(a, b * 1, norm, fc1, fc2, 0.0, keep)
        else:
            total = a + b
            y = fc2(F.gelu(fc1(norm(total)), approximate="tanh"))
        (total + y).backward(dy.to(dtype))
        grads = {"dx": a.grad, "dbranch": b.grad} | {k: p.grad.clone() for k, p in layers.named_parameters()}
        return {"y": y.detach(), "total": total.detach()} | grads

    exact, eager = run(False, torch.float64), run(False, torch.float32)
    called = []
    kernels = {name: getattr(passes, name) for name in ("layer_norm", "layer_norm_backward", "gelu_backward")}
    for name, function in kernels.items():
        wrapped = lambda *a, name=name, function=function: (called.append(name), function(*a))[1]  # noqa: E731
        monkeypatch.setattr(low_memory, name, wrapped)
    found = run(True, torch.float32)
    assert set(called) == set(kernels)
    for key, reference in exact.items():
        verdict = judge(found[key].cpu(), reference.cpu(), eager[key].cpu(), gradient=key not in ("y", "total"), row=E)
        assert verdict.ok, f"{key}: {verdict}"
