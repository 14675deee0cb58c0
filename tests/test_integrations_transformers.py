"""integrations/transformers.py on the transformers that is installed: small models with random weights, no download."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers_models import FAMILIES, clip, exact_of, hold, make, results  # noqa: E402

from vivit_kernels.accelerate import accelerate  # noqa: E402
from vivit_kernels.integrations import transformers as ours  # noqa: E402
from vivit_kernels.integrations import transformers_attention  # noqa: E402
from vivit_kernels.integrations.transformers_embeddings import PatchConv2d, TubeletConv3d  # noqa: E402
from vivit_kernels.numerics import judge  # noqa: E402

EVERY = pytest.mark.parametrize("family", FAMILIES)
IS_4 = int(transformers.__version__.split(".")[0]) < 5
HOST_FORWARDS = {"timesformer": ("TimesformerSelfAttention", "TimesformerLayer"), "vivit": ("VivitTubeletEmbeddings",)}
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def textbook(family):
    """How a model of a family is asked for the host's textbook."""
    return None if family == "timesformer" else "eager"


def modules_of(model, *classes):
    return [module for module in model.modules() if isinstance(module, classes)]


# ---- results ----


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients(family, dtype):
    pixels = clip()
    exact = exact_of(family, pixels, dtype)
    eager = results(make(family, textbook(family)).to(dtype), pixels.to(dtype))
    model = make(family).to(dtype)
    report = accelerate(model, only="transformers")
    assert report.replaced
    hold(results(model, pixels.to(dtype)), exact, eager)


@EVERY
def test_autocast(family):
    pixels = clip()
    exact = exact_of(family, pixels, torch.float32)
    eager = results(make(family, textbook(family)), pixels, autocast=torch.bfloat16)
    model = make(family)
    accelerate(model)
    found = results(model, pixels, autocast=torch.bfloat16)
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in eager.items()}
    hold(found, exact, eager)


@EVERY
def test_nothing_of_the_host_computes_attention_or_tubelets(family, monkeypatch):
    """Were a replaced module to go the host's way, it would meet one of these."""

    def forbidden(*args, **kwargs):
        raise AssertionError("the host's own way was taken")

    model = make(family)
    accelerate(model)
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "sdpa", forbidden)
    file = sys.modules[f"transformers.models.{family}.modeling_{family}"]
    monkeypatch.setattr(file, "eager_attention_forward", forbidden, raising=False)
    monkeypatch.setattr(nn.functional, "conv3d", forbidden)
    monkeypatch.setattr(nn.functional, "conv2d", forbidden)
    for host in HOST_FORWARDS.get(family, ()):
        monkeypatch.setattr(getattr(file, host), "forward", forbidden)
    model(clip())
    with pytest.raises(AssertionError, match="own way"):
        make(family)(clip())


@EVERY
def test_restore_is_exact(family):
    model, pixels = make(family), clip()
    before, state = model(pixels).logits, model.state_dict()
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    report = accelerate(model)
    assert [type(module) for module in model.modules()] != classes
    now = model.state_dict()
    assert list(now) == list(state) and all(now[key].data_ptr() == x.data_ptr() for key, x in state.items())
    assert not torch.equal(model(pixels).logits, before) or family == "vjepa2"
    report.restore()
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(model(pixels).logits, before)


@EVERY
def test_long_sequences_are_clips(family, monkeypatch):
    monkeypatch.setattr(transformers_attention, "_SHORT", 4)
    test_outputs_and_gradients(family, torch.float32)


@pytest.mark.skipif("vjepa2" not in FAMILIES, reason="no V-JEPA 2 in this version")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_predictor_of_vjepa2(dtype):
    """Its tokens come in any order, with their places: the rotary embedding has a table for each clip."""
    places = torch.stack([torch.randperm(64) for _ in range(2)])
    masks = dict(context_mask=[places[:, :40]], target_mask=[places[:, 30:]])
    pixels, found = clip().to(dtype), []
    for one in (torch.float64, dtype, None):
        model = make("vjepa2", "eager").vjepa2.to(dtype).to(one or dtype)
        if one is None:
            assert any("rotary" in entry.why for entry in accelerate(model).replaced)
        output = model(pixels.to(one or dtype), **masks)
        found.append((output.last_hidden_state, output.predictor_output.last_hidden_state))
    for exact, eager, actual in zip(*found, strict=True):
        assert judge(actual, exact, eager, row=64).ok


@pytest.mark.skipif("videoprism" not in FAMILIES, reason="no VideoPrism in this version")
def test_the_text_of_videoprism_stays_causal():
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=2, vocab_size=50)
    model = transformers.VideoPrismTextModel(transformers.VideoPrismTextConfig(**sizes)).eval()
    tokens, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    eager = model(tokens, attention_mask=mask).last_hidden_state
    exact = copy.deepcopy(model).double()(tokens, attention_mask=mask).last_hidden_state
    accelerate(model)
    assert judge(model(tokens, attention_mask=mask).last_hidden_state, exact, eager).ok


# ---- training ----


@EVERY
def test_attention_dropout_has_the_mean_and_spread_of_the_host(family):
    rate = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.4}
    if family == "vjepa2":
        rate = {"attention_probs_dropout_prob": 0.4}
    host, pixels = make(family, textbook(family), **rate), clip(1)
    model = copy.deepcopy(host)
    accelerate(model)
    found = {}
    for name, one in (("host", host), ("ours", model)):
        layer = first_layer(one, family)
        seen: list[torch.Tensor] = []
        handle = layer.register_forward_hook(lambda *args, seen=seen: seen.append(args[-1]))
        one.train()
        with torch.no_grad():
            for _ in range(60):
                one(pixels)
        handle.remove()
        outputs = torch.stack([x[0] if isinstance(x, tuple) else x for x in seen])
        if family == "timesformer":  # ours is [..., T, S, C] there
            outputs = outputs.transpose(-2, -3) if outputs.dim() == 5 else outputs.unflatten(-2, (-1, 8))
        found[name] = outputs.flatten(1, -2)
    spread = found["ours"].var(0).mean() / found["host"].var(0).mean()
    assert 0.8 < spread < 1.25
    apart = (found["ours"].mean(0) - found["host"].mean(0)).square().mean()
    noise = (found["ours"].var(0) + found["host"].var(0)).mean() / 60
    assert apart < 2 * noise
    model.eval()
    assert torch.equal(model(pixels).logits, model(pixels).logits)


def first_layer(model, family):
    """The first module whose output has the dropout of one attention in it, and no more."""
    names = {"timesformer": "temporal_dense", "videomae": "attention.output"}
    ending = names.get(family, "attention")
    return next(module for name, module in model.named_modules() if name.endswith(ending) and ".0." in name)


@EVERY
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_gradient_checkpointing(family, rate):
    """In float64: where a gradient that checkpointing puts together is added up, is its own affair."""
    model, pixels = make(family, attention_probs_dropout_prob=rate).double(), clip().double()
    accelerate(model)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train()
        torch.manual_seed(3)
        found.append(results(model, pixels))
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    hold(found[1], found[0], found[0])


def test_stochastic_depth_drops_what_the_host_drops():
    pixels, found = clip(), []
    for dtype, is_ours in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        model = make("timesformer", **NO_DROPOUT)
        still = model(pixels).logits
        for layer in model.timesformer.encoder.layer:  # drop_path_rate of a config takes whole numbers in 5.23
            layer.drop_path = drop_path(0.5)
        if is_ours:
            accelerate(model)
        model = model.train().to(dtype)
        noise = torch.rand(4096, generator=torch.Generator().manual_seed(5))  # the host draws in the dtype of its input
        found.append(with_noise(noise, lambda model=model, dtype=dtype: results(model, pixels.to(dtype))))
    hold(found[2], found[0], found[1])
    assert not torch.equal(found[1]["logits"], still)


def drop_path(rate):
    file = importlib.import_module("transformers.models.timesformer.modeling_timesformer")
    return (getattr(file, "TimesformerDropPath", None) or file.TimeSformerDropPath)(rate)


def with_noise(noise, run):
    """torch.rand takes its numbers from `noise`, one after the other."""
    place, rand = 0, torch.rand

    def taken(shape, dtype=None, device=None):
        nonlocal place
        count = torch.Size(shape).numel()
        place += count
        return noise[place - count : place].view(shape).to(dtype=dtype, device=device)

    torch.rand = taken
    try:
        return run()
    finally:
        torch.rand = rand


# ---- what a model goes through ----


@EVERY
def test_saved_and_loaded(family, tmp_path):
    model, pixels = make(family), clip()
    before = model(pixels).logits
    report = accelerate(model)
    model.save_pretrained(tmp_path / "ours")
    now = model(pixels).logits
    report.restore()
    model.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        assert "vivit_kernels" not in (tmp_path / folder / "config.json").read_text()
        loaded = type(model).from_pretrained(tmp_path / folder).eval()
        assert torch.equal(loaded(pixels).logits, before)
        accelerate(loaded)
        assert torch.equal(loaded(pixels).logits, now)


@EVERY
def test_copied_and_compiled(family):
    model, pixels = make(family), clip()
    accelerate(model)
    expected = model(pixels).logits
    assert torch.equal(copy.deepcopy(model)(pixels).logits, expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(pixels).logits, expected)


def test_pickled_into_a_process_that_knows_neither(tmp_path):
    """Importing the integration alone does not import transformers; unpickling a model does."""
    models, pixels = {family: make(family) for family in FAMILIES}, clip()
    for model in models.values():
        accelerate(model)
    logits = {family: model(pixels).logits for family, model in models.items()}
    (tmp_path / "models").write_bytes(pickle.dumps((models, pixels, logits)))
    script = f"""
import pickle, sys
import vivit_kernels.integrations.transformers
assert "transformers" not in sys.modules
models, pixels, logits = pickle.load(open({str(tmp_path / "models")!r}, "rb"))
import torch
torch.use_deterministic_algorithms(True, warn_only=True)
for family, model in models.items():
    assert torch.equal(model(pixels).logits, logits[family]), family
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert run.returncode == 0, run.stderr


def environment():
    root = Path(__file__).resolve().parent.parent
    paths = [str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@EVERY
def test_attentions_are_still_given_by_the_textbook(family):
    model, pixels = make(family, textbook(family)), clip()
    eager = model(pixels, output_attentions=True).attentions
    exact = copy.deepcopy(model).double()(pixels.double(), output_attentions=True).attentions
    accelerate(model)
    found = model(pixels, output_attentions=True).attentions
    assert len(found) == len(exact) > 0
    for three in zip(found, exact, eager, strict=True):
        assert judge(*three).ok
    model.config.output_attentions = True
    assert len(model(pixels).attentions) == len(found)


# ---- models that are yet to be made ----


def padded(clips=2, tokens=65):
    mask = torch.ones(clips, tokens, dtype=torch.long)
    mask[0, 40:] = 0
    return mask


@pytest.mark.skipif(IS_4, reason="transformers 4 has no attention mask for Vivit")
def test_a_padding_mask_of_vivit():
    pixels, mask = clip(), padded()
    exact, eager, registered, replaced = (
        make("vivit", attention).vivit for attention in ("eager", "eager", ours.register_attention(), "sdpa")
    )
    accelerate(replaced)
    exact = exact.double()(pixels.double(), attention_mask=mask).last_hidden_state
    eager = eager(pixels, attention_mask=mask).last_hidden_state
    assert not torch.equal(eager, make("vivit", "eager").vivit(pixels).last_hidden_state)
    for model in (registered, replaced):
        assert judge(model(pixels, attention_mask=mask).last_hidden_state, exact, eager).ok


@EVERY
def test_the_name_of_the_registry(family, tmp_path):
    if family == "timesformer":
        pytest.skip("TimeSformer asks no registry")
    make(family).save_pretrained(tmp_path)
    cls = type(make(family))
    model = cls.from_pretrained(tmp_path, attn_implementation=ours.register_attention()).eval()
    stock, pixels = make(family), clip()
    exact = make(family, "eager").double()(pixels.double()).logits
    assert judge(model(pixels).logits, exact, make(family, "eager")(pixels).logits).ok
    assert not torch.equal(model(pixels).logits, stock(pixels).logits)


@pytest.mark.skipif(IS_4, reason="transformers 4 has no register_patch_mapping")
@EVERY
def test_patch_mapping(family, tmp_path):
    from transformers.monkey_patching import register_patch_mapping, unregister_patch_mapping

    make(family).save_pretrained(tmp_path)
    pixels, mapping = clip(), ours.patch_mapping(family)
    cls = type(make(family))
    register_patch_mapping(mapping)
    try:
        model = cls.from_pretrained(tmp_path).eval()
    finally:
        unregister_patch_mapping(list(mapping))
    assert modules_of(model, TubeletConv3d, PatchConv2d) and modules_of(model, ours.Mixin)
    again = cls.from_pretrained(tmp_path)
    assert not modules_of(again, TubeletConv3d, PatchConv2d, ours.Mixin)
    exact = make(family, textbook(family)).double()(pixels.double()).logits
    assert judge(model(pixels).logits, exact, make(family, textbook(family))(pixels).logits).ok
    attentions = make(family, textbook(family))(pixels, output_attentions=True).attentions
    assert len(attentions) > 0 and attentions[0] is not None


def test_patch_mapping_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="'bert' is not known; it is one of vivit"):
        ours.patch_mapping("bert")
