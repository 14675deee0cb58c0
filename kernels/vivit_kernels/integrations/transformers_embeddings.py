"""transformers: its tubelet and patch embeddings through tubelet_embedding, and the GELUs that it spells out.

A model's own code around a convolution cuts a clip into tubelets by `projection(x).flatten(2).transpose(1, 2)`, with
checks and permutations that differ from model to model and from version to version. So the convolution alone changes
its class, and gives back its tokens as they lie, `[B, T, Y, X, E]` in memory, in the shape of a convolution: what
follows is a view. Source: transformers 5.23, `VivitTubeletEmbeddings`, `VideoMAEPatchEmbeddings`,
`VJEPA2PatchEmbeddings3D`, `VideoPrismTubeletEmbeddings`, `TimesformerPatchEmbeddings`, `FastGELUActivation`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..linear import autocast_dtype, unwatched
from ..tubelet_embedding.api import tubelet_embedding
from ._mixin import Mixin


class TubeletConv3d(nn.Conv3d):
    """A `Conv3d` whose stride is its kernel, as tubelet_embedding: `[B, C, F, Y, X]` -> `[B, E, T, Y, X]`, channels
    last in memory. Input that a convolution refuses, or takes without a batch, goes the way of `Conv3d`."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 5 or not _fits(self, input):
            return super().forward(input)
        return _as_convolution(tubelet_embedding(input, self.weight, self.bias), self, input)


class PatchConv2d(nn.Conv2d):
    """A `Conv2d` whose stride is its kernel, as tubelet_embedding of one frame: `[B, C, Y, X]` -> `[B, E, Y, X]`."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4 or not _fits(self, input):
            return super().forward(input)
        tokens = tubelet_embedding(input.unsqueeze(2), self.weight.unsqueeze(2), self.bias)
        return _as_convolution(tokens, self, input)


OURS: dict[type[nn.Module], type[nn.Module]] = {nn.Conv3d: TubeletConv3d, nn.Conv2d: PatchConv2d}


def _fits(convolution: nn.Conv2d | nn.Conv3d, x: Tensor) -> bool:
    cells = zip(x.shape[2:], convolution.kernel_size, strict=True)
    return x.is_floating_point() and x.shape[1] == convolution.in_channels and all(n >= size for n, size in cells)


def _as_convolution(tokens: Tensor, convolution: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    grid = [n // size for n, size in zip(x.shape[2:], convolution.kernel_size, strict=True)]
    return tokens.transpose(1, 2).unflatten(2, grid)


def why_not(convolution: nn.Module | None) -> str:
    """Why a projection does not cut its input into tubelets; "" if it does."""
    if not isinstance(convolution, nn.Conv3d | nn.Conv2d) or type(convolution) not in OURS:
        return f"its projection is a {type(convolution).__name__}, which may do more than a convolution"
    if convolution.stride != convolution.kernel_size or convolution.groups != 1:
        return "its convolution overlaps, leaves gaps or has groups"
    if set(convolution.dilation) != {1} or set(convolution.padding) != {0}:
        return "its convolution is dilated or padded"
    return ""


class Projected(Mixin):
    """Mixed in before the class of a patch embedding, for models that are yet to be made: its projection is ours."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("projection", "proj"):
            convolution = getattr(self, name, None)
            if convolution is not None and not why_not(convolution):
                convolution.__class__ = OURS[type(convolution)]


class OurVivitEmbeddings(Mixin):
    """Mixed in before `VivitEmbeddings`: tubelets, class row and positions in one op, where its size is the model's.

    Then its patch_embeddings is not called; with hooks on it, or an adapter in its place, all is as the host does it,
    and under autocast, where the host's positions make tokens of float32 again.
    """

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        patches = self.patch_embeddings
        size = patches.image_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        bare = type(patches.projection) is TubeletConv3d and is_bare(patches, patches.projection)
        fits = pixel_values.dim() == 5 and tuple(pixel_values.shape[-2:]) == sides and pixel_values.is_floating_point()
        narrowed = autocast_dtype(pixel_values.device.type) is not None
        if interpolate_pos_encoding or narrowed or not (bare and fits and self._counts(pixel_values)):
            return super().forward(pixel_values, interpolate_pos_encoding)
        weight, bias = patches.projection.weight, patches.projection.bias
        rows = self.position_embeddings, self.cls_token
        return self.dropout(tubelet_embedding(pixel_values, weight, bias, *rows, layout="BFCYX"))

    def _counts(self, pixel_values: Tensor) -> bool:
        """As many tokens as positions: other clips the host refuses."""
        _, frames, channels, height, width = pixel_values.shape
        f, y, x = self.patch_embeddings.projection.kernel_size
        tokens = (frames // f) * (height // y) * (width // x) + 1
        return channels == self.patch_embeddings.projection.in_channels and tokens == self.position_embeddings.shape[1]


def is_bare(*modules: nn.Module) -> bool:
    """Nothing has to be called: no hook, and no forward of an instance, as offloading makes it."""
    return unwatched(*modules) and not any("forward" in module.__dict__ for module in modules)


class TanhGELU(Mixin):
    """Mixed in before `FastGELUActivation`: its five passes over memory in one, and one rounding where it has seven."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate="tanh")


class ExactGELU(Mixin):
    """Mixed in before `GELUActivation` with use_gelu_python: x/2 * (1 + erf(x/sqrt(2))) in one pass."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input)
