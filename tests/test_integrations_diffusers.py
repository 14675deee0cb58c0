"""integrations/diffusers.py on the diffusers that is installed: small models with random weights, no download."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: its models cannot be accelerated")

from diffusers_models import FAMILIES, GRIDS, T, cast, exact_of, hold, inputs, make, output, results  # noqa: E402

from vivit_kernels import _native  # noqa: E402
from vivit_kernels.accelerate import accelerate  # noqa: E402
from vivit_kernels.integrations import diffusers as ours  # noqa: E402
from vivit_kernels.integrations import diffusers_attention  # noqa: E402
from vivit_kernels.numerics import judge  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("every_call_counts", "no_matrix_unit"),
    pytest.mark.skipif(not _native.AVAILABLE, reason=f"without kernels nothing is replaced: {_native.WHY}"),
]
EVERY = pytest.mark.parametrize("family", FAMILIES)
MASKED = ("ltx", "hunyuan")  # whose masks go to F.scaled_dot_product_attention all the same


def full(*families):
    """These in every run, the others that the version has in `make test-full`."""
    return _tiers(families, FAMILIES)


def full_grid(*families):
    return _tiers(families, GRIDS)


def _tiers(families, names):
    return pytest.mark.parametrize(
        "family", [pytest.param(name, marks=() if name in families else pytest.mark.full) for name in names]
    )


# ---- results ----


@full("latte", "animatediff", "svd", "wan", "cogvideox")
def test_outputs_and_gradients(family):
    exact = exact_of(family, torch.float32)
    model, given = make(family), inputs(family)
    eager = results(model, given)
    assert accelerate(model, only="diffusers").replaced
    found = results(model, given)
    hold(found, exact, eager)
    assert any(not torch.equal(found[name], eager[name]) for name in found)


@full("latte", "wan")
def test_outputs_and_gradients_in_bfloat16(family):
    exact = exact_of(family, torch.bfloat16)
    model, given = make(family).to(torch.bfloat16), inputs(family, torch.bfloat16)
    eager = results(model, given)
    accelerate(model)
    hold(results(model, given), exact, eager)


@full("latte")
def test_autocast(family):
    exact = exact_of(family, torch.float32)
    model, given = make(family), inputs(family)
    eager = results(model, given, autocast=True)
    accelerate(model)
    found = results(model, given, autocast=True)
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in eager.items()}
    hold(found, exact, eager)


@full_grid("latte")
def test_float64(family):
    """The same by mathematics: no rounding of a kernel hides a row in the wrong place."""
    exact = exact_of(family, torch.float32)
    model = make(family)
    accelerate(model)
    hold(results(model.double(), cast(inputs(family), torch.float64)), exact, exact)


@full("latte", "animatediff", "svd", "wan", "cogvideox")
def test_nothing_of_the_host_computes_attention_or_permutes(family, monkeypatch):
    """Were a replaced module to go the host's way, it would meet one of these."""

    def forbidden(*args, **kwargs):
        raise AssertionError("the host's own way was taken")

    if family in MASKED:
        pytest.skip("its masks of pairs stay with PyTorch")
    if family == "mochi":
        pytest.skip("the pooler of its captions is no attention module, and calls PyTorch itself")
    model = make(family)
    accelerate(model)
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", forbidden)
        for name in (*ours.TRANSFORMERS, "TemporalBasicTransformerBlock"):
            patch.setattr(host_class(name), "forward", forbidden)
        if family == "i2vgen":  # heads of 4
            patch.setattr(type(model.image_latents_temporal_encoder.attn1), "forward", lambda self, x, **_: x)
        results(model, inputs(family))
        with pytest.raises(AssertionError, match="own way"):
            results(make(family), inputs(family))


def host_class(name):
    """Of diffusers, before which ours is mixed in."""
    return next(cls for cls in getattr(ours, name).__mro__ if cls.__module__.startswith("diffusers."))


@full_grid("latte", "svd")
def test_without_gradients(family):
    """Then a context of one token is no question: every query gets its value."""
    with torch.no_grad():
        exact = output(make(family).double(), cast(inputs(family), torch.float64))
        model, given = make(family), inputs(family)
        eager = output(model, given)
        accelerate(model)
        assert judge(output(model, given), exact, eager).ok


def test_a_context_of_one_token_costs_a_row_for_each_clip(monkeypatch):
    model, given, rows = make("svd"), inputs("svd"), []
    accelerate(model)
    attention = model.mid_block.attentions[0].temporal_transformer_blocks[0].attn2
    weights, real = {id(attention.to_q.weight): "queries", id(attention.to_out[0].weight): "out"}, nn.functional.linear

    def spy(x, weight, bias=None):
        if id(weight) in weights:
            rows.append((weights[id(weight)], x.shape[:-1].numel()))
        return real(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", spy)
    with torch.no_grad():
        output(model, given)
    assert rows == [("out", 2)]
    output(model, given)
    assert [name for name, _ in rows[1:]] == ["queries", "out"] and rows[2][1] > 2


@pytest.mark.parametrize("name", ["to_q", "to_k", "to_out.0"])
def test_a_hook_of_a_projection_for_one_token_is_called(name):
    model, given, shapes = make("svd"), inputs("svd"), []
    accelerate(model)
    attention = model.mid_block.attentions[0].temporal_transformer_blocks[0].attn2
    attention.get_submodule(name).register_forward_hook(lambda *args: shapes.append(args[2].shape))
    with torch.no_grad():
        output(model, given)
    output(model, given)
    assert len(shapes) == 2 and shapes[0] == shapes[1]


@full_grid("latte", "animatediff")
def test_restore_is_exact(family):
    model, given = make(family), inputs(family)
    before, state = output(model, given), model.state_dict()
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    report = accelerate(model)
    assert [type(module) for module in model.modules()] != classes
    assert [type(module).__name__ for module in model.modules()] == [cls.__name__ for cls in classes]
    now = model.state_dict()
    assert list(now) == list(state) and all(now[key].data_ptr() == x.data_ptr() for key, x in state.items())
    assert not torch.equal(output(model, given), before)
    report.restore()
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(output(model, given), before)


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_restore_gives_processors_back(family):
    model, given = make(family), inputs(family)
    before = output(model, given)
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    classes = [type(one) for one in processors]
    report = accelerate(model)
    assert not torch.equal(output(model, given), before)
    assert [module.processor for module in model.modules() if hasattr(module, "processor")] == processors
    assert all(isinstance(one, cls) and type(one) is not cls for one, cls in zip(processors, classes, strict=True))
    report.restore()
    assert [type(one) for one in processors] == classes and torch.equal(output(model, given), before)


# ---- training ----


@full_grid("latte", "svd")
def test_gradient_checkpointing(family):
    """In float64: where a gradient that checkpointing puts together is added up, is its own affair."""
    model, given, found = make(family), cast(inputs(family), torch.float64), []
    if not model._supports_gradient_checkpointing:
        pytest.skip("diffusers has no checkpointing of this model")
    accelerate(model)
    model.double()
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        found.append(results(model.train(), given))
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    hold(found[1], found[0], found[0])


@pytest.mark.full
def test_dropout_has_the_mean_and_spread_of_the_host():
    """It acts on tokens, which lie in another order here, so its random numbers meet others."""
    host, given, found = make("latte", dropout=0.3), inputs("latte"), []
    model = copy.deepcopy(host)
    accelerate(model)
    for one in (host, model):
        with torch.no_grad():
            still = output(one, given)
            found.append(torch.stack([output(one.train(), given) for _ in range(40)]))
        assert not torch.equal(found[-1][0], found[-1][1])
        assert torch.equal(output(one.eval(), given), still)
    spread = found[1].var(0).mean() / found[0].var(0).mean()
    assert 0.8 < spread < 1.25
    apart = (found[1].mean(0) - found[0].mean(0)).square().mean()
    assert apart < 2 * (found[1].var(0) + found[0].var(0)).mean() / 40


@pytest.mark.full
def test_a_step_of_training():
    """As the host's, to the budget: the weights after two steps."""
    found = []
    for dtype, is_ours in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        model, given = make("animatediff"), cast(inputs("animatediff"), dtype)
        if is_ours:
            accelerate(model)
        optimizer = torch.optim.SGD(model.to(dtype).train().parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            output(model, given).square().mean().backward()
            optimizer.step()
        found.append(torch.cat([x.detach().flatten() for x in model.parameters()]))
    assert judge(found[2], found[0], found[1]).ok


# ---- what a model goes through ----


@full("latte", "cogvideox")
def test_saved_and_loaded(family, tmp_path):
    model, given = make(family), inputs(family)
    if model._keep_in_fp32_modules:
        pytest.skip("diffusers loads this model with the package accelerate alone")
    before = output(model, given)
    report = accelerate(model)
    model.save_pretrained(tmp_path / "ours")
    now = output(model, given)
    report.restore()
    model.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        assert "vivit_kernels" not in (tmp_path / folder / "config.json").read_text()
        loaded = type(model).from_pretrained(tmp_path / folder).eval()
        assert torch.equal(output(loaded, given), before)
        accelerate(loaded)
        assert torch.equal(output(loaded, given), now)


@pytest.mark.full
@EVERY
def test_copied_and_compiled(family):
    if family == "mochi":
        pytest.skip("its processor counts the tokens of every prompt, which no graph holds")
    model, given = make(family), inputs(family)
    accelerate(model)
    with torch.no_grad():
        expected = output(model, given)
        assert torch.equal(output(copy.deepcopy(model), given), expected)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        assert torch.equal(output(compiled, given), expected)


@pytest.mark.full
def test_pickled_into_a_process_that_knows_neither(tmp_path):
    """Importing the integration alone does not import diffusers; unpickling a model does."""
    models = {family: make(family) for family in ("latte", "svd", "animatediff", "wan", "cogvideox")}
    given = {family: inputs(family) for family in models}
    for model in models.values():
        accelerate(model)
    with torch.no_grad():
        found = {family: output(model, given[family]) for family, model in models.items()}
    (tmp_path / "models").write_bytes(pickle.dumps((models, given, found)))
    script = f"""
import pickle, sys
import vivit_kernels.integrations.diffusers
assert "diffusers" not in sys.modules
models, given, found = pickle.load(open({str(tmp_path / "models")!r}, "rb"))
import torch
from vivit_kernels.integrations import diffusers_attention, pytorch
pytorch._LEAST_ELEMENTS = pytorch._LEAST_KEYS = 0
diffusers_attention.AMX = False
torch.use_deterministic_algorithms(True, warn_only=True)
with torch.no_grad():
    for family, model in models.items():
        assert torch.equal(model(**given[family]).sample, found[family]), family
"""
    root = Path(__file__).resolve().parent.parent
    paths = [str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr


def test_processors_go_and_come_back():
    """set_attn_processor, as diffusers' own tests call it: each choice gives what the host gives with it."""
    model, given = make("animatediff"), inputs("animatediff")
    host = copy.deepcopy(model)
    accelerate(model)
    now = output(model, given)
    before = dict(model.attn_processors)
    assert {name: type(x) for name, x in before.items()} == {name: type(x) for name, x in host.attn_processors.items()}
    for one in (model, host):
        one.set_default_attn_processor()
    assert torch.equal(output(model, given), output(host, given))
    model.set_attn_processor(dict(before))
    assert all(model.attn_processors[name] is x for name, x in before.items())
    assert torch.equal(output(model, given), now)


@pytest.mark.full
def test_fused_projections():
    model, given = make("animatediff"), inputs("animatediff")
    exact = exact_of("animatediff", torch.float32)["out"]
    eager = output(model, given)
    accelerate(model)
    now = output(model, given)
    model.fuse_qkv_projections()
    packed = [module for module in model.modules() if getattr(module, "fused_projections", False)]
    assert packed and not any(map(diffusers_attention.why_not, packed))
    assert judge(output(model, given), exact, eager).ok
    model.unfuse_qkv_projections()
    assert torch.equal(output(model, given), now)


@pytest.mark.full
def test_within_a_pipeline(tmp_path):
    class Pipeline(diffusers.DiffusionPipeline):
        def __init__(self, unet, transformer):
            super().__init__()
            self.register_modules(unet=unet, transformer=transformer)

    pipe = Pipeline(make("animatediff"), make("latte"))
    with pytest.raises(TypeError, match="got Pipeline; of a pipeline give a model"):
        accelerate(pipe)
    assert accelerate(pipe.unet).replaced and accelerate(pipe.transformer).replaced
    pipe.save_pretrained(tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path)
    assert type(loaded.unet) is diffusers.UNetMotionModel
    state = pipe.unet.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in loaded.unet.state_dict().items())


@pytest.mark.parametrize("size", [40, 64, 72, 80, 88, 128, 160])
@pytest.mark.parametrize("frames", [14, 16, 25])
def test_head_sizes_and_frames(size, frames):
    cls = host_class("AnimateDiffTransformer3D")
    sizes = dict(in_channels=32, num_layers=1, norm_num_groups=8)
    model = cls(2, size, **sizes, positional_embeddings="sinusoidal", num_positional_embeddings=32).eval()
    x = torch.randn(frames, 32, 2, 3)
    exact, eager = copy.deepcopy(model).double()(x.double(), num_frames=frames), model(x, num_frames=frames)
    assert accelerate(model).replaced
    found = model(x, num_frames=frames)
    assert judge(found, exact, eager).ok and not torch.equal(found, eager)


def test_frames_of_a_clip_stay_together():
    """T from the call, not from the batch: two clips of five frames are not one of ten."""
    model = make("animatediff")
    accelerate(model)
    motion = model.mid_block.motion_modules[0]
    x = torch.randn(2 * T, 64, 2, 2)
    clips = [motion(x[T * i : T * (i + 1)], num_frames=T) for i in range(2)]
    both = motion(x, num_frames=T)
    exact = copy.deepcopy(motion).double()(x.double(), num_frames=T)
    assert judge(both, exact, torch.cat(clips)).ok and not judge(motion(x, num_frames=1), exact, both).ok
