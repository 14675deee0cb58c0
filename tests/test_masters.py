"""vivit/masters.py: parameters in bfloat16 take the steps of their float32 masters, through a whole run."""

from __future__ import annotations

import copy

import pytest
import torch
from parity import small
from processes import together
from test_parallel import CALM, curve, run
from test_train import EVERYTHING, NARROW, Noise, checkpoint_of, config, losses, steps

from vivit import finetune, masters, recipe
from vivit.averaging import Average
from vivit.masters import Masters, joined, split
from vivit.optimizers import clip, make_optimizer
from vivit.train import NotFinite, Run

BF16 = torch.finfo(torch.bfloat16).eps


def test_halves_are_the_whole():
    """Every kind of float32 to the bit; the upper half is the nearest bfloat16, of two as near the larger."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator)
    ties = torch.arange(-(2**15), 2**15) * 2**16 + 0x8000
    x = (
        torch.cat([bits, ties, torch.tensor([0, -(2**31), 1, 0x7F800000, 0xFF800000 - 2**32])])
        .int()
        .view(torch.float32)
    )
    x = x[~x.isnan()]
    high, rest = split(x)
    assert high.dtype == torch.bfloat16 and rest.dtype == torch.int16
    assert torch.equal(joined(high, rest).view(torch.int32), x.view(torch.int32))
    nearest = x.bfloat16()
    same = (high.double() - x.double()).abs() == (nearest.double() - x.double()).abs()
    assert (same | (high == nearest)).all()
    assert (high.abs() >= nearest.abs()).all() and (high != nearest).any()  # only ties differ, away from zero


def trained(made, settings: recipe.OptimizerConfig, narrow: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The float32 weights after three steps with gradients that bfloat16 can hold."""
    finetune.freeze(made, ("tubelets",))
    wide = Masters(made) if narrow else None
    optimizer = make_optimizer(made, settings, layer_decay=0.7, wide=wide)
    generator = torch.Generator().manual_seed(5)
    for number in range(3):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * group["scale"] / (number + 1)
        optimizer.zero_grad()
        assert all(p.grad is None for p in made.parameters())
        for p in made.parameters():
            noise = torch.randn(p.shape, generator=generator).to(torch.bfloat16)
            if p.requires_grad:
                p.grad = noise.to(dtype)
        optimizer.step()
    return dict((wide or made).state_dict())


@pytest.mark.parametrize("kernel", ["loop", "foreach", "fused"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_is_that_of_float32_parameters(name, kernel, monkeypatch):
    """To the bit, one tensor after another or some at once; a frozen parameter's master stays."""
    settings = recipe.OptimizerConfig(name, lr=1e-3, weight_decay=0.1, kernel=kernel)
    torch.manual_seed(0)
    made = small()
    wanted = trained(copy.deepcopy(made), settings, False, torch.float32)
    for chunk in (1 if kernel == "loop" else 4096, 1 << 24):
        monkeypatch.setattr(masters, "CHUNK", chunk)
        one = copy.deepcopy(made)
        found = trained(one, settings, True, torch.bfloat16)
        assert found.keys() == wanted.keys()
        for key, p in one.named_parameters():
            assert torch.equal(found[key], wanted[key].detach()), key
            assert p.dtype == torch.bfloat16 and torch.equal(p.detach(), split(wanted[key])[0])
        assert torch.equal(found["tubelet_weight"], made.tubelet_weight)


def test_steps_too_small_for_bfloat16_are_kept():
    layer = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.ones_(layer.weight)
    wide = Masters(layer)
    optimizer = masters.SGD([{"params": [layer.weight]}], wide, lr=1e-4)
    for _ in range(100):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    assert (wide.value(layer.weight) - 0.99).abs().max() < 1e-5 and (layer.weight == 0.98828125).all()


def test_the_state_of_a_step_is_small():
    """Between steps: 2 bytes beside a parameter and the optimiser's own states in float32."""
    made = small()
    wide = Masters(made)
    optimizer = make_optimizer(made, recipe.OptimizerConfig("adamw"), wide=wide)
    for p in made.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    count = sum(p.numel() for p in made.parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sum(p.untyped_storage().nbytes() for p in held) == 0 and all(p.grad is None for p in held)
    states = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    assert sum(v.nbytes for v in states) == 8 * count
    assert sum(rest.nbytes for rest in wide.rest.values()) == sum(p.nbytes for p in made.parameters()) == 2 * count


def test_norms_of_bfloat16_gradients_are_float32(device):
    layer = torch.nn.Linear(300, 200).to(device, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(device, torch.bfloat16)
    exact = torch.stack([p.grad.double().square().sum() for p in layer.parameters()]).sum().sqrt()
    before = layer.weight.grad.double()
    norm = clip(layer.parameters(), 0)
    assert norm.dtype == torch.float32 and (norm - exact).abs() < 64 * torch.finfo(torch.float32).eps * exact
    assert torch.equal(layer.weight.grad.double(), before)
    clip(layer.parameters(), 0.5)
    assert (layer.weight.grad.double() - before * 0.5 / exact).abs().max() <= BF16 * (before * 0.5 / exact).abs().max()
    layer.bias.grad[3] = torch.inf
    assert not clip(layer.parameters(), 0.5).isfinite()


def test_eight_bits_and_masters_are_refused():
    with pytest.raises(ValueError, match=r"optimizer.parameters='bfloat16' goes with states = 'float32'"):
        recipe.OptimizerConfig("adamw", states="torchao", parameters="bfloat16")
    with pytest.raises(ValueError, match=r"optimizer.parameters='bf16' is not known"):
        recipe.OptimizerConfig(parameters="bf16")


# ---- runs ----


@pytest.mark.full
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_run_learns(tmp_path, name):
    changes = {**NARROW, "optimizer__name": name, "init__freeze": [], "epochs": 6}
    assert Run(config(**changes), Noise(40), tmp_path).fit(Noise(16), quiet=True)["val_top1"] > 0.9


def test_a_run_exports_its_masters(tmp_path):
    """The running mean is one of masters; what is frozen is exported as it came."""
    from vivit import weights

    first = Run(config(**NARROW, epochs=1), Noise(8), tmp_path)
    frozen = first.weights.state_dict()["tubelet_weight"]
    first.fit(Noise(4), quiet=True)
    assert {p.dtype for p in first.model.parameters()} == {torch.bfloat16}
    exported = weights.load(tmp_path / "model.safetensors")
    stored = checkpoint_of(tmp_path)
    for name, p in exported.named_parameters():
        assert torch.equal(p.detach(), stored["average"][name]) and p.dtype == torch.float32
    assert torch.equal(exported.tubelet_weight.detach(), frozen) and not torch.equal(frozen, frozen.bfloat16().float())


def test_the_curve_is_that_of_float32_but_for_bfloat16(tmp_path):
    """Five steps of SGD: (loss, rate, norm); the parts of a batch add up, and autocast has nothing left to do."""

    def told(name: str, **changes):
        values = steps(tmp_path / name, 5, optimizer__name="sgd", optimizer__lr=0.05, **changes)[1]
        return torch.tensor(values, dtype=torch.float64)

    wide, usual = told("wide"), told("usual", autocast=True)
    narrow = told("narrow", optimizer__parameters="bfloat16")
    parts = told("parts", optimizer__parameters="bfloat16", accumulate=2)

    def off(found: torch.Tensor) -> torch.Tensor:
        """Of each of the three, the most in all steps, whose errors add up."""
        return ((found - wide).abs() / wide.abs().clamp(min=0.1)).amax(0)

    for found in (narrow, parts):
        assert off(found)[0] > 0 and (off(found) <= 3 * off(usual) + BF16).all(), (off(found), off(usual))
    assert torch.equal(told("autocast", optimizer__parameters="bfloat16", autocast=True), narrow)


def test_the_mean_is_that_of_masters():
    """Steps that a bfloat16 does not show move it; in the model it is rounded, and all comes back to the bit."""
    torch.manual_seed(0)
    made = small()
    wide = Masters(made)
    average = Average(made, 0.5, masters=wide)
    started = wide.state_dict()
    for p in made.parameters():
        wide.put(p, wide.value(p) + 1e-6)
    average.update(made)
    own, rests = wide.state_dict(), [rest.clone() for rest in wide.rest.values()]
    with average.inside(made):
        for name, p in made.named_parameters():
            mean = torch.lerp(started[name], own[name], 0.5)
            assert torch.equal(p.detach(), split(mean)[0]) and torch.equal(wide.value(p), mean)
    assert all(torch.equal(value, own[name]) for name, value in wide.state_dict().items())
    assert all(torch.equal(rest, before) for rest, before in zip(wide.rest.values(), rests, strict=True))


def test_a_step_without_a_number_leaves_masters_alone(tmp_path):
    one, _, (video, label) = steps(tmp_path, 1, ema=0.9, optimizer__parameters="bfloat16")
    before = one.weights.state_dict()
    backward = one._backward

    def spoilt(*batch):
        value = backward(*batch)
        one.model.head.weight.grad[0, 0] = torch.inf
        return value

    one._backward = spoilt  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(NotFinite, match="the gradient norm is inf"):
        one.train_step(video, label)
    assert all(torch.equal(value, before[name]) for name, value in one.weights.state_dict().items())
    assert all(p.grad is None for p in one.model.parameters())


@pytest.mark.full
def test_a_run_goes_on_as_fsdp_and_back(tmp_path):
    """1 -> 2 (FSDP, whose masters are its own) -> 2 (DDP) -> 1: the curve of one process but for bfloat16."""
    changes = {**CALM, "ema": 0.8, "optimizer__parameters": "bfloat16"}
    run(tmp_path / "one", changes)
    folder = tmp_path / "many"
    run(folder, changes, stop=2)
    for kind, stop in (("fsdp", 6), ("ddp", 10)):
        for result, weights in together(2, run, folder, {**changes, "parallel": kind}, 20, stop):
            assert result["step"] == stop
            assert {w.dtype for w in weights.values()} == {torch.float32 if kind == "fsdp" else torch.bfloat16}
    run(folder, changes)
    one, other = curve(tmp_path / "one"), curve(folder)
    assert len(other) == 15 and ((one - other).abs() / one.abs().clamp(min=1)).max() < 4 * BF16


@pytest.mark.full
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_resume_is_exact_with_two(tmp_path, kind):
    changes = {**EVERYTHING, "parallel": kind, "optimizer__parameters": "bfloat16"}
    together(2, run, tmp_path / "whole", changes)
    together(2, run, tmp_path / "parts", changes, 20, 4)
    together(2, run, tmp_path / "parts", changes)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(curve(tmp_path / "parts")) == 15
