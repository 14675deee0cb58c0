"""Small models of transformers with random weights: one of each family that accelerate() knows and the version has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vivit_kernels.numerics import judge

transformers = pytest.importorskip("transformers")

SIZES = dict(image_size=32, hidden_size=64, num_attention_heads=4, num_labels=5)
LAYERS = dict(num_hidden_layers=2, intermediate_size=96, num_frames=8)
PRISM = dict(num_spatial_layers=2, num_temporal_layers=1, num_auxiliary_layers=1, intermediate_size=96, num_frames=8)
JEPA = dict(crop_size=32, frames_per_clip=8, num_hidden_layers=2, mlp_ratio=2, num_pooler_layers=1, patch_size=8)
JEPA |= {f"pred_{k}": v for k, v in dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=1).items()}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vivit": ("VivitConfig", "VivitForVideoClassification", SIZES | LAYERS | dict(tubelet_size=[2, 8, 8])),
    "videomae": ("VideoMAEConfig", "VideoMAEForVideoClassification", SIZES | LAYERS | dict(patch_size=8)),
    "timesformer": ("TimesformerConfig", "TimesformerForVideoClassification", SIZES | LAYERS | dict(patch_size=8)),
    "videoprism": (
        "VideoPrismVisionConfig",
        "VideoPrismForVideoClassification",
        SIZES | PRISM | dict(tubelet_size=[1, 8, 8]),
    ),
    "vjepa2": ("VJEPA2Config", "VJEPA2ForVideoClassification", SIZES | JEPA),
}
FAMILIES = tuple(family for family, (_, name, _) in MODELS.items() if hasattr(transformers, name))


def make(family: str, attention: str | None = None, **changes: Any) -> Any:
    """A model in evaluation mode with weights large enough for attention to matter; the same ones for one seed."""
    config, name, arguments = MODELS[family]
    arguments = {**arguments, **changes}
    chosen = {} if attention is None else {"attn_implementation": attention}
    cls = getattr(transformers, name)
    model = cls._from_config(getattr(transformers, config)(**arguments), **chosen)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.2)
            else:
                parameter.add_(noise * 0.1)
    return model.eval()


def clip(clips: int = 2, **changes: int) -> Tensor:
    sizes = dict(frames=8, height=32, width=32) | changes
    return torch.randn(clips, sizes["frames"], 3, sizes["height"], sizes["width"])


def results(model: nn.Module, pixels: Tensor, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Logits, hidden states where the model shows them, and the gradient of every parameter and of the pixels."""
    pixels = pixels.detach().clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        output = model(pixels, output_hidden_states=True)
    found = {"logits": output.logits}
    found |= {f"hidden {i}": x for i, x in enumerate(output.hidden_states or ())}
    weights = torch.Generator().manual_seed(2)
    loss = sum((x * torch.randn(x.shape, generator=weights).to(x.dtype)).sum() for x in found.values())
    loss.backward()
    found |= {f"d {name}": x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {name: x.detach() for name, x in found.items()} | {"d pixels": pixels.grad}


def hold(actual: dict[str, Tensor], exact: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    """Every result is within the budget of numerics.py."""
    assert actual.keys() == exact.keys() == eager.keys() and len(actual) > 10
    largest = max(x.abs().max().item() for name, x in exact.items() if name.startswith("d ") and name.endswith("bias"))
    for name, x in actual.items():
        # the gradient of a key's bias is zero by mathematics: what is left of it is rounding
        scale = largest if name.endswith(("key.bias", "k_proj.bias")) else None
        verdict = judge(x, exact[name], eager[name], gradient=name.startswith("d "), scale=scale, row=x.shape[-1])
        assert verdict.ok, f"{name}: {verdict}"


def exact_of(family: str, pixels: Tensor, dtype: torch.dtype, **changes: Any) -> dict[str, Tensor]:
    """The host's textbook in float64, on weights and pixels as `dtype` has them."""
    attention = None if family == "timesformer" else "eager"
    model = copy.deepcopy(make(family, attention, **changes)).to(dtype).double()
    return results(model, pixels.to(dtype).double())
