"""vivit/memory.py and footprint.py: each level has the gradients of "fast", and keeps as many bytes as is predicted."""

from __future__ import annotations

import warnings

import parity
import pytest
import torch
from parity import F64_BUDGET, assert_same
from torch import Tensor, nn

from bench import zoo_stock
from vivit import ViViT, ViViTConfig, footprint, memory
from vivit.__main__ import main
from vivit.model import Attention
from vivit_kernels.numerics import judge

MODELS = ("joint", "factorized_encoder", "factorized_self_attention", "factorized_dot_product")
MIXED = ("joint", "factorized_self_attention", "factorized_dot_product")
LESS = memory.LEVELS[1:]
PREDICTED = 0.05  # share by which a prediction may be wrong


def model(attention, level: str = "fast", p: float = 0.0, **changes) -> ViViT:
    """In training, every parameter random; the same at each call."""
    torch.manual_seed(1)
    changes.setdefault("temporal_depth", 1 if attention == "factorized_encoder" else 0)
    if isinstance(attention, tuple):
        changes |= dict(pool="mean", depth=len(attention))
    made = parity.small(attention=attention, dropout=p, attention_dropout=p, drop_path=p, **changes).train()
    made.keep(level)
    return made


def video(made: ViViT, clips: int = 2) -> Tensor:
    c = made.config
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (clips, c.channels, c.frames, c.height, c.width), generator=generator).byte()


def step(made: ViViT, autocast: bool = False) -> dict[str, Tensor]:
    """Logits, gradients, and the next number of the random generator."""
    torch.manual_seed(3)
    made.zero_grad()
    clip = video(made).to(made.position.device)
    with torch.autocast(clip.device.type, torch.bfloat16, enabled=autocast):
        logits = made(clip)
    logits.double().square().sum().backward()
    found = {"logits": logits.detach(), "next draw": torch.rand(3)}
    return found | {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("level", LESS)
@pytest.mark.parametrize("attention", [*MODELS, MIXED], ids=[*MODELS, "mixed"])
def test_gradients_are_those_of_fast(attention, level, p, device):
    wanted = step(model(attention, "fast", p).double().to(device))
    found = step(model(attention, level, p).double().to(device))
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_same(found[name], gradient, F64_BUDGET, name)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("level", LESS)
@pytest.mark.parametrize("attention", MODELS)
def test_gradients_are_within_the_budget(attention, level, autocast, device):
    exact = step(model(attention).double())
    eager = step(model(attention).to(device), autocast)
    found = step(model(attention, level).to(device), autocast)
    for name in exact.keys() - {"next draw"}:
        scale = exact[name.replace("qkv.bias", "qkv.weight")].abs().max().item()  # a key's bias has no gradient
        verdict = judge(found[name].cpu(), exact[name], eager[name].cpu(), gradient=True, scale=scale, row=32)
        assert verdict.ok, f"{name}: {verdict}"


def test_a_level_is_an_attribute_that_may_change_between_steps():
    made = model("joint").double()
    wanted = step(made)
    for level in memory.LEVELS:
        made.keep(level)
        assert {block.memory for block in made.blocks} == {level}
        assert_same(step(made)["blocks.0.mlp.fc1.weight"], wanted["blocks.0.mlp.fc1.weight"], F64_BUDGET, level)
    with pytest.raises(ValueError, match=r"memory='smal' is not known; did you mean 'small'\?"):
        made.keep("smal")
    with pytest.raises(ValueError, match="memory='none'"):
        ViViT(made.config, memory="none")


# ---- bytes ----


def counted(made: nn.Module, clip: Tensor, autocast: bool) -> int:
    """Bytes that stay for backward: storages, each once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in made.parameters()}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        result = made(clip)
    assert result.requires_grad
    return sum(size for pointer, size in found.items() if pointer not in own)


SIZES = dict(frames=8, height=64, width=80, tubelet=(2, 8, 8), embedding=64, mlp=256, depth=3, heads=4, classes=5)


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize(
    "precision", ["autocast", *(pytest.param(x, marks=pytest.mark.full) for x in ("float64", "float32", "bfloat16"))]
)
@pytest.mark.parametrize("level", memory.LEVELS)
@pytest.mark.parametrize("attention", MODELS)
def test_bytes_are_as_predicted(attention, level, precision, p):
    made = model(attention, level, p, **SIZES)
    made = made if precision == "autocast" else made.to(getattr(torch, precision))
    found = counted(made, video(made), precision == "autocast")
    predicted = footprint.activations(made.config, footprint.Step(level, 2, precision)).total()
    assert abs(predicted / found - 1) < PREDICTED, (predicted, found)


@pytest.mark.parametrize("level", memory.LEVELS)
def test_long_sequences_keep_what_attention_gave(level):
    """More than 512 keys: not made again, and in bfloat16 with its statistics."""
    made = model("joint", level, **{**SIZES, "frames": 16})
    found = counted(made, video(made), True)
    predicted = footprint.activations(made.config, footprint.Step(level, 2, "autocast")).total()
    assert made.config.T * made.config.S > memory.LONGEST_AGAIN
    assert abs(predicted / found - 1) < PREDICTED, (predicted, found)


@pytest.mark.parametrize("attention", MODELS)
def test_shares_of_stock_pytorch(attention):
    """The targets: half by "small", 15 % by "smallest", of permute, scaled_dot_product_attention and plain modules."""
    ours = model(attention, **{**SIZES, "frames": 32, "height": 32, "depth": 6})
    stock = zoo_stock.StockViViT(ours.config)
    clip = video(ours)
    plain = counted(stock, clip, True)
    shares = {}
    for level in memory.LEVELS:
        ours.keep(level)
        shares[level] = counted(ours, clip, True) / plain
    assert shares["smallest"] <= 0.15 and shares["small"] <= 0.5, shares
    assert shares["smallest"] < shares["small"] < shares["balanced"] < shares["fast"] < 1, shares


def test_info_shows_every_level(capsys):
    assert main(["info", "kinetics400_B16x2_factorized_encoder", "--set", "batch=8"]) == 0
    out = capsys.readouterr().out
    step = footprint.Step("small", 8, "autocast", "cuda" if torch.cuda.is_available() else "cpu")
    config = ViViTConfig.preset("B/16x2", attention="factorized_encoder")
    assert f"{footprint.per_token(config, step):,.0f} bytes" in out
    assert all(f"memory = {level!r}" in out for level in memory.LEVELS) and "8 clips" in out


# ---- what else looks at a model in training ----


@pytest.mark.parametrize("level", LESS)
def test_hooks_see_what_they_would_see(level):
    """A watched block is plain code, and says so once at the levels that have another; the gradients stay."""
    made = model("joint", level).double()
    seen = []
    made.get_submodule("blocks.0.attentions.0.qkv").register_forward_hook(
        lambda module, inputs, output: seen.append(output.detach().clone())
    )
    if level == "smallest":
        found = step(made)
        assert len(seen) == 2 and torch.equal(*seen)  # forward, and again in backward
    else:
        with pytest.warns(UserWarning, match="no effect on a block that is watched by hooks"):
            found = step(made)
        assert len(seen) == 1
    for name, gradient in step(model("joint").double()).items():
        assert_same(found[name], gradient, F64_BUDGET, name)


class Adapted(nn.Linear):
    """Twice a linear layer: what an adapter could make of it."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("level", LESS)
def test_replaced_layers_are_called(level):
    made, plain = model("factorized_encoder", level).double(), model("factorized_encoder").double()
    for one in (made, plain):
        one.get_submodule("blocks.0.attentions.0.qkv").__class__ = Adapted
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, wanted = step(made), step(plain)
    for name, gradient in wanted.items():
        assert_same(found[name], gradient, F64_BUDGET, name)


def test_without_gradients_all_levels_are_plain(monkeypatch):
    monkeypatch.setattr(memory, "_steps", lambda *_: pytest.fail("nothing is kept: there is nothing to save"))
    made = model("joint", "small").eval()
    with torch.no_grad():
        assert made(video(made)).shape == (2, 5)


@pytest.mark.parametrize("level", LESS)
def test_frozen_blocks(level):
    """Only the head learns, or only one layer."""
    for learns in ("head", "blocks.1.mlp.fc1"):
        results = []
        for one in (level, "fast"):
            made = model("joint", one).double()
            for name, parameter in made.named_parameters():
                parameter.requires_grad_(name.startswith(learns))
            results.append(step(made))
        found, wanted = results
        assert found.keys() == wanted.keys() and any(name.startswith(learns) for name in found)
        for name, gradient in wanted.items():
            assert_same(found[name], gradient, F64_BUDGET, name)


@pytest.mark.full
@pytest.mark.parametrize("level", LESS)
def test_compiled_models_have_the_same_gradients(level):
    """The compiler decides itself what is made again; no graph breaks on the way there."""
    torch._dynamo.reset()
    made = model("factorized_dot_product", level)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=level != "smallest")
    compiled(video(made)).square().sum().backward()
    wanted = step(model("factorized_dot_product"))
    for name, parameter in made.named_parameters():
        assert_same(
            parameter.grad, wanted[name], parity.F32_BUDGET * wanted[name].abs().max().clamp(min=1).item(), name
        )


@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
@pytest.mark.parametrize("level", LESS)
def test_data_parallel(level, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        made = model("joint", level).double()
        parallel = nn.parallel.DistributedDataParallel(made)
        torch.manual_seed(3)
        parallel(video(made)).square().sum().backward()
        for name, gradient in step(model("joint").double()).items():
            if name not in ("logits", "next draw"):
                assert_same(made.get_parameter(name).grad, gradient, F64_BUDGET, name)
    finally:
        torch.distributed.destroy_process_group()


def test_longest_is_what_a_query_attends_to():
    grid = torch.zeros(2, 3, 7, 8)
    lengths = {over: Attention(8, 2, over).longest(grid) for over in ("space", "time", "dot_product", "joint")}
    assert lengths == {"space": 7, "time": 3, "dot_product": 7, "joint": 21}
    assert Attention(8, 2, "joint").longest(torch.zeros(2, 5, 8)) == 5
