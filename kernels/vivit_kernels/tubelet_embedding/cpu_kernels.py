"""Backend `cpu` of tubelet_embedding: launchers of the native library's CPU kernels (csrc/cpu/tubelet_*.h).

The kernels read pixels where they lie: no tubelet is copied to memory, tokens are written once. uint8 pixels count as
128 less, exact in every dtype; a scale common to all channels goes into the epilogue, one per channel into the packed
weight, the shift into the row that every token gets. Floating-point video is normalised when it is read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native

_BEHIND = 16  # kTapsBehind of csrc/cpu/tubelet.h: what a vector may read behind numbers per tap


class Order(NamedTuple):
    """channels_last: columns of the weight in (f, y, x, C) order, so that runs of pixels stay whole; else (C, f, y, x).
    tubelet: (f, y, x)."""

    channels_last: bool
    tubelet: tuple[int, ...]

    def cut(self, video: Tensor) -> Tensor:
        """A view `[B, T, rows, columns, taps in this order]` of a video `[B, C, F, Y, X]`."""
        (f, y, x), (F, Y, X) = self.tubelet, video.shape[2:]
        video = video[:, :, : F - F % f, : Y - Y % y, : X - X % x]
        cut = video.unflatten(4, (-1, x)).unflatten(3, (-1, y)).unflatten(2, (-1, f))
        return cut.permute(0, 2, 4, 6, *((3, 5, 7, 1) if self.channels_last else (1, 3, 5, 7)))

    def columns(self, weight: Tensor) -> Tensor:
        """weight `[E, C, f, y, x]` as `[E, K]`, contiguous."""
        return (weight.permute(0, 2, 3, 4, 1) if self.channels_last else weight).flatten(1).contiguous()

    def uncolumns(self, matrix: Tensor, weight: Tensor) -> Tensor:
        E, C, *tubelet = weight.shape
        if self.channels_last:
            return matrix.view(E, *tubelet, C).permute(0, 4, 1, 2, 3).contiguous()
        return matrix.view(weight.shape)

    def per_tap(self, values: list[float]) -> Tensor:
        """One number per channel as `[K]`, and what a vector may read behind."""
        taps, row = self.tubelet[0] * self.tubelet[1] * self.tubelet[2], torch.tensor(values, dtype=torch.float32)
        row = row.repeat(taps) if self.channels_last else row.repeat_interleave(taps)
        return torch.nn.functional.pad(row, (0, _BEHIND))


class Affine(NamedTuple):
    """What happens to pixels when they are read, and to products with them: see TubeletParams in csrc/cpu/tubelet.h."""

    pixel_scale: Tensor | None = None
    pixel_shift: Tensor | None = None
    factor: float = 1.0
    scale: Tensor | None = None
    shift: Tensor | None = None


def _affine(video: Tensor, order: Order, scale: list[float], shift: list[float]) -> Affine:
    if video.dtype != torch.uint8:
        if not any(shift) and set(scale) == {1.0}:
            return Affine()
        return Affine(order.per_tap(scale), order.per_tap(shift))
    centred = [o + 128 * a for a, o in zip(scale, shift, strict=True)]
    after = order.per_tap(centred) if any(centred) else None
    if len(set(scale)) == 1:
        return Affine(factor=scale[0], shift=after)
    return Affine(scale=order.per_tap(scale), shift=after)


def _readable(video: Tensor) -> Tensor:
    """float64 is not read by the kernels: in float32 it has more digits than any product."""
    return video.float() if video.dtype == torch.float64 else video


def _order(video: Tensor, weight: Tensor) -> Order:
    return Order(video.stride(1) == 1 and video.shape[1] > 1, tuple(weight.shape[2:]))


def launch_fwd(
    video, weight, bias, position, class_token, per_frame: bool, scale: list[float], shift: list[float]
) -> Tensor:
    video, order = _readable(video), _order(video, weight)
    pixels = order.cut(video)
    (B, T, rows, columns), E, first = pixels.shape[:4], weight.shape[0], int(class_token is not None)
    groups, tokens = (B * T, rows * columns) if per_frame else (B, T * rows * columns)
    out = weight.new_empty(groups, tokens + first, E)
    if out.numel():
        table = None if position is None else position[0, first:]
        if table is not None and (table.dtype not in (torch.float32, weight.dtype) or table.stride(1) != 1):
            table = table.float().contiguous()
        torch.ops.vivit_kernels_native.tubelet_fwd(
            pixels, order.columns(weight), None if bias is None else bias.float().contiguous(), table, out[:, first:],
            *_affine(video, order, scale, shift), _native.isa(),
        )  # fmt: skip
    if class_token is not None:
        out[:, :1] = class_token if position is None else class_token.float() + position[:, :1]
    return out.view(B, T, tokens + first, E) if per_frame else out


def launch_bwd(
    dout, video, weight, bias, position, class_token, per_frame: bool, scale, shift, needs: list[bool]
) -> list[Tensor]:
    """Gradients of (video, weight, bias, position, class_token); an empty tensor where `needs` says none is wanted."""
    first, order = int(class_token is not None), _order(video, weight)
    scale, shift = ([float(x) for x in values] for values in (scale, shift))
    gradients = [video.new_empty(0) for _ in needs]
    dtokens = dout.flatten(0, -3)[:, first:]  # [groups, tokens, E]
    dtokens = dtokens if dtokens.stride(-1) == 1 else dtokens.contiguous()
    if needs[0]:
        gradients[0] = _video_gradient(dtokens, video, weight, order, scale)
    if needs[1]:
        gradients[1], sums = _weight_gradient(dtokens, _readable(video), weight, order, scale, shift)
    else:
        sums = dtokens.sum((0, 1), dtype=torch.float32) if needs[2] else dtokens
    if needs[2]:
        gradients[2] = sums.to(bias.dtype)
    if needs[3]:
        gradients[3] = _summed(dout.flatten(0, -3), position.dtype)
    if needs[4]:
        gradients[4] = _summed(dout.flatten(0, -3)[:, :1], class_token.dtype)
    return gradients


def _summed(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Over groups, in float32; never `rows` itself."""
    if rows.shape[0] == 1:
        return rows.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return rows.sum(0, keepdim=True, dtype=torch.float32).to(dtype)


def _weight_gradient(
    dtokens: Tensor, video: Tensor, weight: Tensor, order: Order, scale: list[float], shift: list[float]
) -> tuple[Tensor, Tensor]:
    """(the weight's gradient, dtokens summed over all tokens `[E]` in float32)."""
    sums = torch.zeros(weight.shape[0])
    if not dtokens.numel():
        return torch.zeros_like(weight, memory_format=torch.contiguous_format), sums
    found = weight.new_empty(weight.shape[0], weight[0].numel())
    torch.ops.vivit_kernels_native.tubelet_weight_gradient(
        dtokens, order.cut(video), found, sums, *_affine(video, order, scale, shift), _native.isa()
    )
    return order.uncolumns(found, weight), sums


def _video_gradient(dtokens: Tensor, video: Tensor, weight: Tensor, order: Order, scale: list[float]) -> Tensor:
    """Pixels that fill no tubelet get zero."""
    whole = all(n % part == 0 for n, part in zip(video.shape[2:], weight.shape[2:], strict=True))
    dtype = torch.float32 if video.dtype == torch.float64 else video.dtype
    found = (torch.empty if whole else torch.zeros)(video.shape, dtype=dtype, device=video.device)
    # the gradient is laid out as op.py says, whatever the video's order
    order = Order(False, order.tubelet)
    if dtokens.numel():
        per_tap = None if set(scale) == {1.0} else order.per_tap(scale)
        torch.ops.vivit_kernels_native.tubelet_video_gradient(
            dtokens, order.columns(weight), order.cut(found), per_tap, _native.isa()
        )
    return found.to(video.dtype)
