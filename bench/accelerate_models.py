"""The models of transformers and diffusers that `python -m bench accelerate` runs before and after accelerate().

Sizes are the published base models', with random weights. Of those of diffusers, which have billions of weights, the
first layers or resolutions, on a short clip: what a table says is of that part, and its name says which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .peers import Missing, require

Inputs = dict[str, Any]
Size = tuple[int, int, int]


class Subject(NamedTuple):
    """A model as its host has it, what it is called with, and what a record calls it."""

    host: str
    family: str  # as a record, and accelerate() who looks for it, call it
    model: nn.Module
    inputs: Inputs
    size: str
    read: str  # the attribute of its output that is compared

    def to(self, dtype: torch.dtype) -> Subject:
        """Weights and inputs in a dtype; counts, masks, times and rotation tables stay as they are."""
        inputs = {name: _cast(name, x, dtype) for name, x in self.inputs.items()}
        return self._replace(model=self.model.to(dtype).eval(), inputs=inputs)

    def run(self, model: nn.Module, inputs: Inputs | None = None) -> Tensor:
        return getattr(model(**(self.inputs if inputs is None else inputs)), self.read)


def _cast(name: str, x: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1
    return x.to(dtype) if floating and not name.endswith("mask") else x


def build(family: str, layers: int | None, clips: int, small: bool = False) -> Subject:
    """In float32. layers: fewer than the model has (of diffusers: than the two, or two resolutions, that are taken);
    small: latents of half the rows and columns, since a step of a UNet's first resolution takes 14 GB.

    Raises Missing where the host is not installed, or has no such model.
    """
    if family in _TRANSFORMERS:
        return _of_transformers(family, layers, clips)
    return _of_diffusers(family, layers, clips, small)


# -- transformers -----------------------------------------------------------------------------------------------------

# Its config and model, what differs from the published base model, the clip (F, Y, X), options of its forward
_TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], tuple[int, int, int], dict[str, Any]]] = {
    "vivit": ("VivitConfig", "VivitModel", {}, (32, 224, 224), {}),
    "videomae": ("VideoMAEConfig", "VideoMAEModel", {}, (16, 224, 224), {}),
    "timesformer": ("TimesformerConfig", "TimesformerModel", {}, (8, 224, 224), {}),
    "videoprism": ("VideoPrismVisionConfig", "VideoPrismVisionModel", {}, (16, 288, 288), {}),
    "vjepa2": (  # the published ones begin at L
        "VJEPA2Config",
        "VJEPA2Model",
        dict(hidden_size=768, num_attention_heads=12, num_hidden_layers=12, frames_per_clip=16, crop_size=224),
        (16, 224, 224),
        dict(skip_predictor=True),
    ),
}


def _of_transformers(family: str, layers: int | None, clips: int) -> Subject:
    package = require("transformers", "pip install transformers")
    config_name, name, changes, (frames, rows, columns), options = _TRANSFORMERS[family]
    _known(package, name)
    changes = dict(changes)
    if layers is not None:
        changes |= {"num_spatial_layers" if family == "videoprism" else "num_hidden_layers": layers}
    config = getattr(package, config_name)(**changes)
    torch.manual_seed(0)
    model = getattr(package, name)(config)
    pixels = torch.rand(clips, frames, 3, rows, columns) * 2 - 1
    depth = f", {layers} layers" if layers is not None else ""
    size = f"{name}, width {config.hidden_size}, {clips} clip of {frames}x{rows}x{columns}{depth}"
    first = "pixel_values_videos" if family in ("videoprism", "vjepa2") else "pixel_values"
    return Subject("transformers", family, model, {first: pixels, **options}, size, "last_hidden_state")


# -- diffusers --------------------------------------------------------------------------------------------------------


def _latte(layers: int) -> dict[str, Any]:
    """Latte-1's layers."""
    return dict(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=layers, patch_size=2,
        cross_attention_dim=1152, attention_bias=True, sample_size=32, activation_fn="gelu-approximate",
        video_length=16, num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False,
        norm_eps=1e-6, caption_channels=4096,
    )  # fmt: skip


def _motion(layers: int) -> dict[str, Any]:
    """The upper resolutions of AnimateDiff on Stable Diffusion 1.5: heads of 40 and 80."""
    return _unet("Motion", layers) | dict(num_attention_heads=8, motion_num_attention_heads=8, cross_attention_dim=768)


def _svd(layers: int) -> dict[str, Any]:
    """The upper resolutions of Stable Video Diffusion: heads of 64."""
    more = dict(num_attention_heads=(5, 10)[:layers], cross_attention_dim=1024, in_channels=8, num_frames=14)
    return _unet("SpatioTemporal", layers) | more


def _unet3d(layers: int) -> dict[str, Any]:
    """The upper resolutions of ModelScope's text-to-video: heads of 64."""
    return _unet("3D", layers) | dict(attention_head_dim=64, cross_attention_dim=1024)


def _unet(kind: str, layers: int) -> dict[str, Any]:
    return dict(
        block_out_channels=(320, 640)[:layers],
        layers_per_block=1,
        down_block_types=(f"CrossAttnDownBlock{kind}",) * layers,
        up_block_types=(f"CrossAttnUpBlock{kind}",) * layers,
    )


def _wan(layers: int) -> dict[str, Any]:
    """Layers of Wan 2.1, 1.3B."""
    return dict(
        patch_size=(1, 2, 2), num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16,
        text_dim=4096, freq_dim=256, ffn_dim=8960, num_layers=layers, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )  # fmt: skip


def _cogvideox(layers: int) -> dict[str, Any]:
    """Layers of CogVideoX 2B."""
    return dict(
        num_attention_heads=30, attention_head_dim=64, in_channels=16, out_channels=16, time_embed_dim=512,
        text_embed_dim=4096, num_layers=layers, sample_width=44, sample_height=30, sample_frames=17, patch_size=2,
        max_text_seq_length=226,
    )  # fmt: skip


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _with_text(clips: int, latents: Tensor, text: Tensor) -> Inputs:
    return dict(hidden_states=latents, encoder_hidden_states=text, timestep=torch.full((clips,), 500))


# Its model, its arguments for a number of layers, frames, rows and columns of a clip's latents, and its inputs for a
# number of clips of any such size
_DIFFUSERS: dict[str, tuple[str, Callable[[int], dict[str, Any]], Size, Callable[[int, int, int, int], Inputs]]] = {
    "latte": (
        "LatteTransformer3DModel",
        _latte,
        (16, 32, 32),
        lambda B, F, Y, X: _with_text(B, _noise(B, 4, F, Y, X), _noise(B, 120, 4096)),
    ),
    "animatediff": (
        "UNetMotionModel",
        _motion,
        (16, 32, 32),
        lambda B, F, Y, X: dict(
            sample=_noise(B, 4, F, Y, X), timestep=torch.tensor(500), encoder_hidden_states=_noise(B * F, 77, 768)
        ),
    ),
    "svd": (
        "UNetSpatioTemporalConditionModel",
        _svd,
        (14, 32, 32),
        lambda B, F, Y, X: dict(
            sample=_noise(B, F, 8, Y, X),
            timestep=torch.tensor(1.5),
            encoder_hidden_states=_noise(B, 1, 1024),
            added_time_ids=torch.tensor([[6.0, 127.0, 0.02]]).expand(B, 3),
        ),
    ),
    "unet3d": (
        "UNet3DConditionModel",
        _unet3d,
        (16, 32, 32),
        lambda B, F, Y, X: dict(
            sample=_noise(B, 4, F, Y, X), timestep=torch.tensor(500), encoder_hidden_states=_noise(B, 77, 1024)
        ),
    ),
    "wan": (
        "WanTransformer3DModel",
        _wan,
        (5, 30, 52),
        lambda B, F, Y, X: _with_text(B, _noise(B, 16, F, Y, X), _noise(B, 512, 4096)),
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        _cogvideox,
        (5, 30, 44),
        lambda B, F, Y, X: _with_text(B, _noise(B, F, 16, Y, X), _noise(B, 226, 4096)),
    ),
}


def _of_diffusers(family: str, layers: int | None, clips: int, small: bool) -> Subject:
    package = require("diffusers", "pip install diffusers")
    name, arguments, (frames, rows, columns), inputs = _DIFFUSERS[family]
    _known(package, name)
    package.utils.logging.set_verbosity_error()  # it warns of every .to() that some layers are better kept in float32
    layers = min(layers or 2, 2)
    if small:
        rows, columns = (n // 4 * 2 for n in (rows, columns))  # whole patches
    torch.manual_seed(0)
    model = getattr(package, name)(**arguments(layers))
    with torch.no_grad():  # what training starts at zero would hide what comes before it
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    part = "resolution" if hasattr(model.config, "block_out_channels") else "layer"
    clip = f"{clips} clip of {frames}x{rows}x{columns} latents"
    size = f"{name}, {clip}, {layers} {part}{'s' * (layers > 1)}"
    return Subject("diffusers", name, model, inputs(clips, frames, rows, columns), size, "sample")


def _known(package: Any, name: str) -> None:
    if not hasattr(package, name):
        raise Missing(f"{package.__name__} {package.__version__} has no {name}")


FAMILIES = (*_TRANSFORMERS, *_DIFFUSERS)
