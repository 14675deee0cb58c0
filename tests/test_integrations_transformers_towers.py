"""integrations/transformers_towers.py: patches and frames of the Qwen-VL-like towers, small, with random weights."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from vivit_kernels.accelerate import accelerate  # noqa: E402
from vivit_kernels.integrations import transformers_towers as towers  # noqa: E402
from vivit_kernels.numerics import judge  # noqa: E402

E, PATCH = 64, 8
CHANGES = dict(depth=2, num_heads=4, patch_size=PATCH, spatial_merge_size=2, temporal_patch_size=2)
TOWERS = {
    "qwen2_vl": ("Qwen2VLVisionConfig", "Qwen2VisionTransformerPretrainedModel", dict(embed_dim=E, hidden_size=32)),
    "qwen2_5_vl": (
        "Qwen2_5_VLVisionConfig",
        "Qwen2_5_VisionTransformerPretrainedModel",
        dict(hidden_size=E, intermediate_size=96, out_hidden_size=32, window_size=32, fullatt_block_indexes=[1]),
    ),
    "qwen3_vl": (
        "Qwen3VLVisionConfig",
        "Qwen3VLVisionModel",
        dict(hidden_size=E, intermediate_size=96, out_hidden_size=32, deepstack_visual_indexes=[1]),
    ),
    "glm4v": (
        "Glm4vVisionConfig",
        "Glm4vVisionModel",
        dict(hidden_size=E, intermediate_size=96, out_hidden_size=32, image_size=64),
    ),
}
EVERY = pytest.mark.parametrize("family", TOWERS)
FRAMES = torch.tensor([[1, 8, 8]] * 3)  # images, as GLM-4V of 5.23 has no places for a video's tokens
VIDEO, SEVERAL = torch.tensor([[3, 8, 8]]), torch.tensor([[1, 8, 8], [1, 4, 8]])


def make(family):
    config, name, changes = TOWERS[family]
    package = f"transformers.models.{family}"
    cls = getattr(importlib.import_module(f"{package}.modeling_{family}"), name)
    made = getattr(importlib.import_module(f"{package}.configuration_{family}"), config)(**CHANGES, **changes)
    generator = torch.Generator().manual_seed(1)
    model = cls._from_config(made, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2) if parameter.dim() > 1 else parameter.add_(noise * 0.1)
    return model.eval()


def patches(grid):
    return torch.randn(int(grid.prod(-1).sum()), 3 * 2 * PATCH * PATCH, generator=torch.Generator().manual_seed(2))


def results(model, pixels, grid):
    pixels = pixels.detach().clone().requires_grad_()
    model.zero_grad()
    output = model(pixels, grid_thw=grid)
    output = output if isinstance(output, torch.Tensor | tuple) else output.last_hidden_state
    output = output[0] if isinstance(output, tuple) else output
    output.square().sum().backward()
    found = {"tokens": output.detach(), "d pixels": pixels.grad}
    return found | {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the queries that our attention was called with."""
    shapes, real = [], towers.attention

    def spy(module, query, *args, **kwargs):
        shapes.append(tuple(query.shape))
        return real(module, query, *args, **kwargs)

    monkeypatch.setattr(towers, "attention", spy)
    return shapes


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients(family, dtype, calls, monkeypatch):
    model = make(family).to(dtype)
    pixels = patches(FRAMES).to(dtype)
    exact = results(copy.deepcopy(model).double(), pixels.double(), FRAMES)
    eager = results(model, pixels, FRAMES)
    report = accelerate(model, only="transformers")
    kinds = {entry.what for entry in report.replaced}
    assert len(kinds) == 2 and not report.left
    monkeypatch.setattr(nn.functional, "conv3d", None)
    found = results(model, pixels, FRAMES)
    assert (3, 4, 64, E // 4) in calls
    assert found.keys() == exact.keys()
    largest = max(x.abs().max().item() for name, x in exact.items() if name.endswith("bias"))
    for name, x in found.items():  # a third of the gradient of qkv's bias is that of keys: zero by mathematics
        scale = largest if name.endswith("qkv.bias") else None
        verdict = judge(x, exact[name], eager[name], gradient=name != "tokens", scale=scale, row=x.shape[-1])
        assert verdict.ok, f"{name}: {verdict}"


@EVERY
def test_frames_of_several_lengths_go_one_by_one(family, calls):
    model, pixels = make(family), patches(SEVERAL)
    exact = results(copy.deepcopy(model).double(), pixels.double(), SEVERAL)
    eager = results(model, pixels, SEVERAL)
    accelerate(model, only="transformers")
    found = results(model, pixels, SEVERAL)
    assert not [shape for shape in calls if shape[0] == 3]
    for name in ("tokens", "d pixels"):
        assert judge(found[name], exact[name], eager[name], gradient=name != "tokens", row=found[name].shape[-1]).ok


@EVERY
def test_restore_is_exact(family, calls):
    model, pixels = make(family), patches(FRAMES)
    state, before = model.state_dict(), results(model, pixels, FRAMES)["tokens"]
    report = accelerate(model, only="transformers")
    assert list(model.state_dict()) == list(state)
    results(model, pixels, FRAMES)
    taken = len(calls)
    report.restore()
    assert taken and torch.equal(results(model, pixels, FRAMES)["tokens"], before) and len(calls) == taken


def test_frames_of_a_video(calls):
    model, pixels = make("qwen3_vl"), patches(VIDEO)
    exact, eager = results(copy.deepcopy(model).double(), pixels.double(), VIDEO), results(model, pixels, VIDEO)
    accelerate(model, only="transformers")
    found = results(model, pixels, VIDEO)
    assert set(calls) == {(3, 4, 64, E // 4)}
    assert judge(found["tokens"], exact["tokens"], eager["tokens"], row=32).ok


def test_what_hangs_on_the_convolution_is_called():
    model, seen = make("qwen3_vl"), []
    accelerate(model, only="transformers")
    handle = model.patch_embed.proj.register_forward_hook(lambda *args: seen.append(args[0]))
    model(patches(FRAMES), grid_thw=FRAMES)
    handle.remove()
    model(patches(FRAMES), grid_thw=FRAMES)
    assert seen == [model.patch_embed.proj]
