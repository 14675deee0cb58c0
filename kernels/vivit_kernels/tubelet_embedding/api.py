"""The public function tubelet_embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch, _native, _transforms
from .._attention.call import _arch
from . import op
from .reference import tubelet_embedding as defined
from .support import SUPPORT, decide, order  # noqa: F401  decide: for explain()

Normalisation = float | Sequence[float] | None
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_LAYOUTS = {"BCFYX": (0, 1, 2, 3, 4), "BFCYX": (0, 2, 1, 3, 4), "BFYXC": (0, 4, 1, 2, 3)}


def tubelet_embedding(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    class_token: Tensor | None = None,
    *,
    class_token_per: str = "clip",
    mean: Normalisation = None,
    std: Normalisation = None,
    layout: str = "BCFYX",
    backend: str | None = None,
) -> Tensor:
    """Cuts a clip into tubelets and embeds each: normalise, project, add bias and position, place the class row.

    One op, forward and backward.

    Equivalent to (for class_token_per="clip" and layout="BCFYX")

        x = (video / 255 - mean) / std                                        # uint8; x = video for floating point
        tokens = conv3d(x, weight, bias, stride=(f, y, x)).flatten(2).transpose(1, 2)     # [B, N, E], N = T*S
        out = cat([class_token.expand(B, 1, E), tokens], 1) + position        # [B, N+1, E]

    video: `[B, C, F, Y, X]`, or as `layout` says "BFCYX" (transformers) or "BFYXC" (decoders), any strides; uint8,
        fp16, bf16, fp32 or fp64. Frames, rows and columns beyond the last whole tubelet are dropped, and get zero
        gradient.
    weight: `[E, C, f, y, x]`; tokens run over time slowest, then rows, then columns. bias: `[E]`.
    position: `[1, N(+1), E]`; class_token: `[1, 1, E]`, becomes row 0 and gets position 0.
    class_token_per: "clip" -> `[B, T*S(+1), E]`; "frame" -> `[B, T, S(+1), E]` with a class row in every frame and
        position `[1, S(+1), E]` shared by all frames (the factorised encoder's first half).
    mean, std: one number or one per channel, in units of [0, 1]. uint8 is always normalised (default 0.5 and 0.5:
        x/127.5 - 1); floating-point video only if they are given: (x - mean) / std.
    backend: "cuda", "cpu", "torch", "triton" or None for the first that can run the call; never a silent fallback.
        Within forward-mode AD and torch.func's second derivatives it is plain PyTorch.

    Returns tokens in the weight's dtype (autocast's under autocast), contiguous. Differentiable in everything but
    uint8 video; backward keeps the video as it came and nothing else. Raises ValueError for shapes, dtypes or options
    that do not fit, NotImplementedError when no backend can run the call, or a second derivative is
    asked for outside of torch.func.
    Source: ViViT (arXiv 2103.15691) section 3.2, tubelet embedding.

        tokens = tubelet_embedding(clip_uint8, weight, bias, position, class_token)
    """
    video = _check_video(video, layout)
    _check_weight(video, weight, bias)
    grid = tuple(video.shape[2 + i] // weight.shape[2 + i] for i in range(3))
    _check_rows(weight, grid, position, class_token, class_token_per)
    scale, shift = _normalisation(video, mean, std)
    narrow = _dispatch.autocast_dtype(video.device.type)
    if narrow is not None and weight.dtype != torch.float64:
        weight = weight.to(narrow)
    parameters = (weight, bias, position, class_token)
    needs_grad = torch.is_grad_enabled() and (
        any(x is not None and x.requires_grad for x in (video, *parameters)) or _transforms.active()
    )
    device, isa = video.device.type, _native.call_isa(video.device.type)
    arch = _arch(video.device.index) if device == "cuda" else 0
    call = _dispatch.Call(
        "tubelet_embedding", tuple(video.shape), weight.dtype, device, needs_grad, arch=arch, isa=isa,
        channels=weight.shape[0], beyond_kernels=_transforms.beyond_kernels(),
    )  # fmt: skip
    chosen = _dispatch.choose(call, SUPPORT, backend, order(call))
    arguments = video, *parameters, class_token_per == "frame", scale, shift
    return defined(*arguments) if call.beyond_kernels else op.run(*arguments, chosen)


def _check_video(video: Tensor, layout: str) -> Tensor:
    """The video as a `[B, C, F, Y, X]` view."""
    if layout not in _LAYOUTS:
        raise ValueError(f"tubelet_embedding: layout={layout!r} is not known; it is one of {', '.join(_LAYOUTS)}")
    if video.dim() != 5 or video.dtype not in (torch.uint8, *_DTYPES):
        raise ValueError(
            f"tubelet_embedding: video must be {layout}, uint8 or floating point; "
            f"got {tuple(video.shape)} {video.dtype}"
        )
    return video.permute(_LAYOUTS[layout])


def _check_weight(video: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 5 or weight.shape[1] != video.shape[1] or weight.dtype not in _DTYPES:
        raise ValueError(
            f"tubelet_embedding: weight must be floating point [E, C={video.shape[1]}, f, y, x] "
            f"for video {tuple(video.shape)} [B, C, F, Y, X]; got {tuple(weight.shape)} {weight.dtype}. "
            "Name the video's layout= if its channels lie elsewhere"
        )
    if 0 in weight.shape:
        raise ValueError(
            f"tubelet_embedding: weight {tuple(weight.shape)} [E, C, f, y, x] must hold at least one number each way"
        )
    if any(video.shape[2 + i] < weight.shape[2 + i] for i in range(3)):
        raise ValueError(
            f"tubelet_embedding: a clip of {tuple(video.shape[2:])} frames, rows, columns "
            f"holds no tubelet of {tuple(weight.shape[2:])}"
        )
    if bias is not None and (tuple(bias.shape) != (weight.shape[0],) or not bias.is_floating_point()):
        raise ValueError(
            f"tubelet_embedding: bias must be [E={weight.shape[0]}], got {tuple(bias.shape)}, and floating point, "
            f"got {bias.dtype}"
        )
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.device != video.device:
            raise ValueError(
                f"tubelet_embedding: video is on {video.device}, {name} on {x.device}; move them to one device"
            )


def _check_rows(weight: Tensor, grid: tuple, position: Tensor | None, class_token: Tensor | None, per: str) -> None:
    if per not in ("clip", "frame"):
        raise ValueError(f"tubelet_embedding: class_token_per={per!r} is not known; it is 'clip' or 'frame'")
    E, (T, rows, columns) = weight.shape[0], grid
    for name, x in (("position", position), ("class_token", class_token)):
        if x is not None and not x.is_floating_point():
            raise ValueError(f"tubelet_embedding: {name} must be floating point, got {x.dtype}")
    if class_token is not None and (tuple(class_token.shape) != (1, 1, E) or class_token.device != weight.device):
        raise ValueError(
            f"tubelet_embedding: class_token must be [1, 1, E={E}] on {weight.device}, "
            f"got {tuple(class_token.shape)} on {class_token.device}"
        )
    tokens = rows * columns * (T if per == "clip" else 1) + (class_token is not None)
    if position is not None and (tuple(position.shape) != (1, tokens, E) or position.device != weight.device):
        raise ValueError(
            f"tubelet_embedding: position must be [1, {tokens}, {E}] on {weight.device} "
            f"for a grid of {T}x{rows}x{columns} tokens, class_token_per={per!r} "
            f"and {'a' if class_token is not None else 'no'} class token; "
            f"got {tuple(position.shape)} on {position.device}"
        )


def _normalisation(video: Tensor, mean: Normalisation, std: Normalisation) -> tuple[list[float], list[float]]:
    """Per channel (scale, shift): a pixel u counts as scale*u + shift."""
    channels, uint8 = video.shape[1], video.dtype == torch.uint8
    if mean is None and std is None and not uint8:
        return [1.0] * channels, [0.0] * channels
    means = _per_channel("mean", mean, 0.5 if uint8 else 0.0, channels)
    stds = _per_channel("std", std, 0.5 if uint8 else 1.0, channels)
    if not all(_LEAST <= s <= _MOST for s in stds):
        raise ValueError(f"tubelet_embedding: std={std} must be positive and finite")
    unit = 255.0 if uint8 else 1.0
    shift = [-m / s for m, s in zip(means, stds, strict=True)]
    if not all(abs(x) <= _MOST for x in shift):
        raise ValueError(f"tubelet_embedding: mean={mean} must be finite, and mean / std")
    return [1.0 / (unit * s) for s in stds], shift


def _per_channel(name: str, value: Normalisation, default: float, channels: int) -> list[float]:
    if value is None:
        value = default
    if isinstance(value, int | float):
        return [float(value)] * channels
    number: Any = value if getattr(value, "ndim", 1) == 0 else None  # numpy's, or a tensor
    values = [float(x) for x in value] if number is None else [float(number)]
    if len(values) == 1:
        return values * channels
    if len(values) != channels:
        raise ValueError(
            f"tubelet_embedding: {name} has {len(values)} numbers, the video {channels} channels: "
            "give one or one per channel"
        )
    return values
