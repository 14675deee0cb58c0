"""Small models of diffusers with random weights, and inputs: those that accelerate() knows and the version has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vivit_kernels.numerics import judge

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: its models cannot be accelerated")

diffusers.utils.logging.set_verbosity_error()
B, T = 2, 5
_BLOCKS = dict(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8)


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _latte() -> dict[str, Any]:
    return dict(
        hidden_states=_noise(B, 4, T, 8, 8), timestep=torch.tensor([3, 7]), encoder_hidden_states=_noise(B, 6, 16)
    )


def _unet(channels: int = 4, **more: Any) -> dict[str, Any]:
    return (
        dict(sample=_noise(B, channels, T, 8, 8), timestep=torch.tensor(3), encoder_hidden_states=_noise(B, 6, 16))
        | more
    )


def _motion() -> dict[str, Any]:
    return _unet(encoder_hidden_states=_noise(B * T, 6, 16))  # its pipeline repeats a prompt for every frame


def _svd() -> dict[str, Any]:
    return dict(
        sample=_noise(B, T, 8, 8, 8), timestep=torch.tensor(3.0),
        encoder_hidden_states=_noise(B, 1, 16), added_time_ids=_noise(B, 3).abs(),
    )  # fmt: skip


def _i2vgen() -> dict[str, Any]:
    more = dict(fps=torch.tensor([8, 8]), image_latents=_noise(B, 4, T, 8, 8), image_embeddings=_noise(B, 16))
    return _unet(**more)


def _clip(channels: int, **more: Any) -> dict[str, Any]:
    return dict(hidden_states=_noise(B, channels, T, 8, 8), encoder_hidden_states=_noise(B, 6, 16)) | more


def _wan() -> dict[str, Any]:
    return _clip(4, timestep=torch.tensor([3, 7]))


def _wan_image() -> dict[str, Any]:
    more = dict(encoder_hidden_states=_noise(B, 512, 16), encoder_hidden_states_image=_noise(B, 3, 24))
    return _wan() | more


def _cogvideox() -> dict[str, Any]:
    angle = torch.rand(T * 16, 8).repeat_interleave(2, 1)
    rotary = angle.cos(), angle.sin()
    clip = dict(hidden_states=_noise(B, T, 4, 8, 8), encoder_hidden_states=_noise(B, 6, 16))
    return clip | dict(timestep=torch.tensor([3, 7]), image_rotary_emb=rotary)


def _ltx() -> dict[str, Any]:
    mask = torch.ones(B, 6)
    mask[0, 4:] = 0
    sizes = dict(num_frames=T, height=4, width=4)
    tokens = dict(hidden_states=_noise(B, T * 16, 4), encoder_hidden_states=_noise(B, 6, 16))
    return tokens | sizes | dict(timestep=torch.tensor([3, 7]), encoder_attention_mask=mask)


def _hunyuan() -> dict[str, Any]:
    mask = torch.ones(B, 6)
    mask[0, 4:] = 0
    more = dict(timestep=torch.tensor([3, 7]), pooled_projections=_noise(B, 8), encoder_attention_mask=mask)
    return _clip(4, guidance=torch.tensor([1000.0, 1000.0])) | more


def _mochi() -> dict[str, Any]:
    mask = torch.ones(B, 6, dtype=torch.bool)
    mask[0, 4:] = False
    return _clip(4, timestep=torch.tensor([3, 7]), encoder_attention_mask=mask)


def _cosmos() -> dict[str, Any]:
    return _clip(4, timestep=torch.tensor([3, 7]), fps=30)


_WAN = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=48, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
)  # fmt: skip
_MODELS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "latte": (
        "LatteTransformer3DModel",
        dict(
            num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=2, patch_size=2,
            cross_attention_dim=48, attention_bias=True, sample_size=8, activation_fn="gelu-approximate",
            video_length=T, num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False,
            caption_channels=16,
        ),
        _latte,
    ),
    "animatediff": (
        "UNetMotionModel",
        _BLOCKS | dict(
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            cross_attention_dim=16, num_attention_heads=2, motion_num_attention_heads=2, motion_max_seq_length=8,
        ),
        _motion,
    ),
    "svd": (
        "UNetSpatioTemporalConditionModel",
        dict(
            block_out_channels=(32, 64), layers_per_block=1, in_channels=8, out_channels=4, num_frames=T,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=16, num_attention_heads=2, addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=96,
        ),
        _svd,
    ),
    "unet3d": (
        "UNet3DConditionModel",
        _BLOCKS | dict(
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=16, attention_head_dim=16,
        ),
        _unet,
    ),
    "i2vgen": (
        "I2VGenXLUNet",
        _BLOCKS | dict(
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=16, attention_head_dim=16,
        ),
        _i2vgen,
    ),
    "wan": ("WanTransformer3DModel", _WAN, _wan),
    "wan image": ("WanTransformer3DModel", _WAN | dict(image_dim=24, added_kv_proj_dim=48), _wan_image),
    "wan vace": (
        "WanVACETransformer3DModel",
        _WAN | dict(vace_layers=[0], vace_in_channels=4),
        lambda: _wan() | dict(control_hidden_states=_noise(B, 4, T, 8, 8)),
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        dict(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
            text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8, sample_frames=17, patch_size=2,
            max_text_seq_length=6, use_rotary_positional_embeddings=True,
        ),
        _cogvideox,
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
            num_layers=2, caption_channels=16,
        ),
        _ltx,
    ),
    "hunyuan": (
        "HunyuanVideoTransformer3DModel",
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
            text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
        ),
        _hunyuan,
    ),
    "skyreels": ("SkyReelsV2Transformer3DModel", _WAN, _wan),
    "mochi": (
        "MochiTransformer3DModel",
        dict(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, pooled_projection_dim=16, in_channels=4,
            text_embed_dim=16, time_embed_dim=4, max_sequence_length=6,
        ),
        _mochi,
    ),
    "allegro": (
        "AllegroTransformer3DModel",
        dict(
            num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2, patch_size=2,
            cross_attention_dim=48, sample_height=8, sample_width=8, sample_frames=T, caption_channels=16,
        ),
        _wan,
    ),
    "cosmos": (
        "CosmosTransformer3DModel",
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=24, num_layers=2, mlp_ratio=2,
            text_embed_dim=16, adaln_lora_dim=4, max_size=(8, 32, 32), concat_padding_mask=False,
            extra_pos_embed_type=None,
        ),
        _cosmos,
    ),
}  # fmt: skip
FAMILIES = tuple(family for family, (name, _, _) in _MODELS.items() if hasattr(diffusers, name))
GRIDS = tuple(family for family in FAMILIES if family in ("latte", "animatediff", "svd", "unet3d", "i2vgen"))


def make(family: str, **changes: Any) -> Any:
    """A model in evaluation mode with weights large enough for attention to matter; the same ones for one seed."""
    torch.manual_seed(1)
    # where all tokens attend to all, larger weights make a softmax so sharp that it multiplies every rounding
    gain = 1.5 if family in GRIDS else 1.0
    name, arguments, _ = _MODELS[family]
    model = getattr(diffusers, name)(**{**arguments, **changes})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * (gain / parameter[0].numel() ** 0.5))
            elif not name.endswith("mix_factor"):
                parameter.add_(noise * 0.1)
    return model.eval()


def inputs(family: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(2)
    return cast(_MODELS[family][2](), dtype)


def cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, dict):
        return {name: one if name == "image_rotary_emb" else cast(one, dtype) for name, one in x.items()}
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 else x


def output(model: nn.Module, given: dict[str, Any]) -> Tensor:
    return model(**given).sample


def results(model: nn.Module, given: dict[str, Any], autocast: bool = False) -> dict[str, Tensor]:
    """The output, and the gradient of every parameter and of the latents."""
    name = "sample" if "sample" in given else "hidden_states"
    latents = given[name].detach().clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(**{**given, name: latents}).sample
    weights = torch.Generator().manual_seed(3)
    (out * torch.randn(out.shape, generator=weights).to(out.dtype)).sum().backward()
    found = {"out": out.detach(), "d latents": latents.grad}
    found |= {f"d {name}": x.grad for name, x in model.named_parameters() if x.grad is not None}
    return found


def hold(actual: dict[str, Tensor], exact: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    """Every result is within the budget of numerics.py."""
    assert actual.keys() == exact.keys() == eager.keys() and len(actual) > 10
    largest = max(x.abs().max().item() for name, x in exact.items() if name.startswith("d "))
    numbers = [name for name, x in exact.items() if x.numel() == 1]  # each alone is no statistics of its error
    three = [{name: x for name, x in one.items() if name not in numbers} for one in (actual, exact, eager)]
    if numbers:
        for some, one in zip(three, (actual, exact, eager), strict=True):
            some["d numbers"] = torch.cat([one[name].flatten() for name in numbers])
    for name, x in three[0].items():
        # of a key's bias, and of queries and keys of a context of one token, the gradient is zero by mathematics, and
        # that of a single number is a sum over all tokens that cancels: what is left is rounding
        # (in float64 every sum over tokens may cancel by more than its budget)
        known = three[1][name]
        cancels = name == "d numbers" or x.dtype == torch.float64 or known.abs().max().item() < 1e-9 * largest
        row, scale = x.shape[-1] if name != "d numbers" else 1, largest if cancels and name != "out" else None
        verdict = judge(x, known, three[2][name], gradient=name != "out", scale=scale, row=row)
        assert verdict.ok, f"{name}: {verdict}"


def exact_of(family: str, dtype: torch.dtype, **changes: Any) -> dict[str, Tensor]:
    """The host in float64, on weights and inputs as `dtype` has them."""
    model = copy.deepcopy(make(family, **changes)).to(dtype).double()
    return results(model, cast(inputs(family, dtype), torch.float64))
