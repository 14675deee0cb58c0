"""integrations/transformers.py: what it leaves, and inputs that go the way of the host."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers_models import FAMILIES, clip, make  # noqa: E402

from vivit_kernels.accelerate import accelerate  # noqa: E402
from vivit_kernels.integrations import transformers as ours  # noqa: E402
from vivit_kernels.integrations.transformers_embeddings import PatchConv2d, TubeletConv3d  # noqa: E402
from vivit_kernels.numerics import judge  # noqa: E402

EVERY = pytest.mark.parametrize("family", FAMILIES)


def left(report):
    return {entry.path: entry.why for entry in report.left}


@EVERY
def test_twice(family):
    model, pixels = make(family), clip()
    before = model(pixels).logits
    first = accelerate(model)
    once = model(pixels).logits
    second = accelerate(model)
    assert not second.replaced and all("already" in entry.why for entry in second.left)
    second.restore()
    assert torch.equal(model(pixels).logits, once)
    first.restore()
    assert torch.equal(model(pixels).logits, before)


def test_other_models_are_left_with_a_reason():
    config = transformers.ViTConfig(
        image_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.ViTModel(config)
    classes = [type(module) for module in model.modules()]
    report = accelerate(model, only="transformers")
    assert not report.replaced and "nothing to replace is known" in left(report)[""]
    assert [type(module) for module in model.modules()] == classes


def test_a_known_model_within_another():
    model = nn.ModuleDict({"a": make("vivit"), "b": nn.Linear(2, 2)})
    report = accelerate(model, only="transformers")
    assert report.replaced and all(entry.path.startswith("a.") for entry in report.replaced)


def test_an_unsupported_version(monkeypatch):
    model = make("vivit")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.40.2")  # it swaps itself there
    report = accelerate(model)
    assert not report.replaced and any("install transformers>=4.57" in entry.why for entry in report.left)
    with pytest.raises(RuntimeError, match=r"transformers 4\.40\.2 is not supported"):
        accelerate(model, only="transformers")


def test_classes_made_from_known_ones_are_left():
    model = make("vivit")
    name, module = next((n, m) for n, m in model.named_modules() if type(m).__name__ == "VivitTubeletEmbeddings")
    owner = model.get_submodule(name.rpartition(".")[0])

    class Wider(type(owner)):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    owner.__class__ = Wider
    before = owner(clip())
    report = accelerate(model)
    assert "Wider" in [entry.what for entry in report.left]
    assert "may do more" in left(report)[name.rpartition(".")[0]]
    assert type(module.projection) is TubeletConv3d  # what lies within is itself
    assert owner(clip()).shape == before.shape


@pytest.mark.parametrize("change", ["adapter", "padded", "overlapping", "groups"])
def test_projections_that_are_no_tubelets_are_left(change):
    model, pixels = make("videomae"), clip()
    patches = model.videomae.embeddings.patch_embeddings
    conv = patches.projection
    if change == "adapter":
        patches.projection = nn.Sequential(conv, nn.Identity())
    if change == "padded":
        conv.padding = (0, 1, 0)
    if change == "overlapping":
        conv.stride = (1, 8, 8)
    if change == "groups":
        patches.projection = nn.Conv3d(3, 66, (2, 8, 8), (2, 8, 8), groups=3)
    before = patches(pixels)
    report = accelerate(model)
    assert "projection" in left(report)["videomae.embeddings.patch_embeddings"] or change != "adapter"
    assert "videomae.embeddings.patch_embeddings" in left(report)
    assert torch.equal(patches(pixels), before)


def test_what_hangs_on_the_projection_of_vivit_is_called():
    model, seen = make("vivit"), []
    accelerate(model)
    patches = model.vivit.embeddings.patch_embeddings
    quick = model(clip()).logits
    for module in (patches, patches.projection):
        handle = module.register_forward_hook(lambda *args: seen.append(args[0]))
        model(clip())
        handle.remove()
    assert seen == [patches, patches.projection]
    assert quick.shape == (2, 5)


def test_sizes_that_are_not_those_of_the_model():
    wide = clip(height=32, width=48)
    for family in FAMILIES:
        stock, model = make(family), make(family)
        accelerate(model)
        outcomes = []
        for one in (stock, model):
            try:
                outcomes.append(one(wide).logits.shape)
            except (ValueError, RuntimeError, TypeError) as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]


def test_bytes_are_refused_as_before():
    for family in FAMILIES:
        stock, model = make(family), make(family)
        accelerate(model)
        pixels = torch.zeros(1, 8, 3, 32, 32, dtype=torch.uint8)
        if family == "vjepa2":  # it casts them
            assert judge(model(pixels).logits, stock.double()(pixels).logits, stock.float()(pixels).logits).ok
            continue
        for one in (stock, model):
            with pytest.raises(RuntimeError):
                one(pixels)


def test_resized_positions():
    larger = clip(height=32, width=48)
    for family in ("vivit", "videoprism"):
        if family not in FAMILIES or int(transformers.__version__.split(".")[0]) < 5:
            continue
        # as many positions as a square, which resizing asks for
        changes = dict(num_frames=2) if family == "vivit" else {}
        pixels = larger[:, :2] if family == "vivit" else larger
        options = dict(interpolate_pos_encoding=True)
        exact = make(family, "eager", **changes).double()(pixels.double(), **options).logits
        eager = make(family, "eager", **changes)(pixels, **options).logits
        model = make(family, **changes)
        accelerate(model)
        assert judge(model(pixels, **options).logits, exact, eager).ok


@pytest.mark.parametrize("kind", ["joint_space_time", "space_only"])
def test_the_other_attentions_of_timesformer(kind):
    model, pixels = make("timesformer", attention_type=kind), clip()
    eager, exact = model(pixels).logits, make("timesformer", attention_type=kind).double()(pixels.double()).logits
    report = accelerate(model)
    assert all(kind in why for path, why in left(report).items() if "layer" in path)
    assert any("SelfAttention" in entry.what for entry in report.replaced)
    assert judge(model(pixels).logits, exact, eager).ok
    assert not torch.equal(model(pixels).logits, eager)


def test_clips_that_timesformer_takes_otherwise():
    """More frames than its config says: the host resizes positions in time, and takes tokens as it does."""
    pixels = clip(frames=16)
    eager = make("timesformer")(pixels).logits
    exact = make("timesformer").double()(pixels.double()).logits
    model = make("timesformer")
    accelerate(model)
    assert judge(model(pixels).logits, exact, eager).ok


def test_a_convolution_of_ours_alone():
    conv = nn.Conv2d(3, 8, 4, 4)
    x = torch.randn(2, 3, 9, 10)
    expected = conv(x)
    conv.__class__ = PatchConv2d
    found = conv(x)
    assert found.shape == expected.shape and found.stride(1) == 1
    assert judge(found, conv.double()(x.double()), expected).ok
    conv.float()
    assert conv(x[0]).shape == expected[0].shape  # without a batch
    with pytest.raises(RuntimeError):
        conv(torch.randn(2, 4, 9, 10))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        ours.Nothing  # noqa: B018
