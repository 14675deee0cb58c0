"""Backend `torch` of tubelet_embedding: gather the tubelets once, one matrix product, one pass of epilogue.

With uint8 pixels u and the affine normalisation a*u + o per channel, W(a*u + o) + b = a*(W u') + (b + W o'): the
product runs on u' = u - 128 (exact in every dtype, and small, so little is lost to rounding), a common scale a goes
into the epilogue, and only a per-channel one into the weights. Backward gathers again: no im2col is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._attention.options import without_autocast

# oneDNN's product, called by name: PyTorch's float32 linear goes through MKL, which reaches 45 % of an AMD core (Zen 5:
# 158 against 269 GFLOP/s); on an Intel one they are equal. It has no autograd, and needs none inside this op.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product_dtype(weight: Tensor) -> torch.dtype:
    """float32 where a CPU has no products in the weight's 16 bits: 248 -> 84 ms for a clip of ViT-B, bf16, Ice Lake."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float16, torch.bfloat16):
        return weight.dtype
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return weight.dtype if native and weight.dtype == torch.bfloat16 else torch.float32


def _product(matrix: Tensor, weight: Tensor) -> Tensor:
    """matrix `[M, K]`, weight `[E, K]` -> `[M, E]`."""
    if matrix.device.type == "cpu" and matrix.dtype == torch.float32 and _ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(matrix, weight, None, "none", [], "")
    return matrix @ weight.T


def _pixels(
    video: Tensor, scale: list[float], shift: list[float], wide: torch.dtype
) -> tuple[Tensor, list[float], list[float]]:
    """What the product runs on, and the (scale, shift) still to apply to it.

    uint8 becomes int8, 128 less: flipping the top bit is exact and one byte per pixel. Floating-point video is
    normalised right away: its products would lose digits to a mean that the shift then takes off."""
    if video.dtype == torch.uint8:
        centred = [o + 128 * a for a, o in zip(scale, shift, strict=True)]
        return video.bitwise_xor(128).view(torch.int8), scale, centred
    if any(shift) or set(scale) != {1.0}:
        per_channel = [torch.tensor(x, dtype=wide, device=video.device).view(-1, 1, 1, 1) for x in (scale, shift)]
        video = video.to(wide) * per_channel[0] + per_channel[1]
    return video, [1.0] * len(scale), [0.0] * len(shift)


def _channels_last(video: Tensor) -> bool:
    return video.stride(1) == 1 and video.shape[1] > 1


def _gather(video: Tensor, tubelet: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, tuple[int, int, int]]:
    """Tubelets as rows `[B*T*S, K]` and the grid; columns in (C, f, y, x) or, for channels-last video, (f, y, x, C)
    order, so that runs of pixels stay whole."""
    B, C = video.shape[:2]
    f, y, x = tubelet
    T, rows, columns = video.shape[2] // f, video.shape[3] // y, video.shape[4] // x
    video = video[:, :, : T * f, : rows * y, : columns * x]
    cut = (
        video.unflatten(4, (columns, x)).unflatten(3, (rows, y)).unflatten(2, (T, f))
    )  # [B, C, T, f, rows, y, columns, x]
    order = (0, 2, 4, 6, 3, 5, 7, 1) if _channels_last(video) else (0, 2, 4, 6, 1, 3, 5, 7)
    cut = cut.permute(order)
    matrix = torch.empty(cut.shape, dtype=dtype, device=video.device).copy_(cut)
    return matrix.view(B * T * rows * columns, C * f * y * x), (T, rows, columns)


def _columns(weight: Tensor, video: Tensor) -> Tensor:
    """weight `[E, C, f, y, x]` as `[E, K]`, its columns in the order of `_gather`."""
    return (weight.permute(0, 2, 3, 4, 1) if _channels_last(video) else weight).flatten(1)


def _uncolumns(matrix: Tensor, weight: Tensor, video: Tensor) -> Tensor:
    E, C, f, y, x = weight.shape
    if _channels_last(video):
        return matrix.view(E, f, y, x, C).permute(0, 4, 1, 2, 3)
    return matrix.view(E, C, f, y, x)


def _affine(scale: list[float], like: Tensor) -> tuple[float, Tensor | None]:
    """A scale common to all channels as a number, or 1 and the per-channel scales `[C, 1, 1, 1]`."""
    if len(set(scale)) == 1:
        return scale[0], None
    return 1.0, torch.tensor(scale, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)


def _table(weight, bias, position, class_token, shift: list[float], wide: torch.dtype) -> Tensor:
    """All that is added to the products, `[1, N(+1), E]` or `[1, 1(+1), E]`: bias, shift, position and class row."""
    shifts = torch.tensor(shift, dtype=wide, device=weight.device)
    row = weight.to(wide).sum((2, 3, 4)) @ shifts if any(shift) else weight.new_zeros(weight.shape[0], dtype=wide)
    row = (row if bias is None else row + bias).view(1, 1, -1)
    if class_token is None:
        return row if position is None else row + position
    class_row = class_token.to(wide)
    if position is None:
        return torch.cat([class_row, row], 1)
    return torch.cat([class_row + position[:, :1], row + position[:, 1:]], 1)


@without_autocast
def launch_fwd(
    video, weight, bias, position, class_token, per_frame: bool, scale: list[float], shift: list[float]
) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    narrow = _product_dtype(weight)
    pixels, scale, shift = _pixels(video, scale, shift, wide)
    common, per_channel = _affine(scale, weight.new_empty(0, dtype=wide))
    scaled = weight if per_channel is None else weight.to(wide) * per_channel
    matrix, (T, rows, columns) = _gather(pixels, weight.shape[2:], narrow)
    products = _product(matrix, _columns(scaled, pixels).to(narrow))  # [B*T*S, E]
    table = _table(weight, bias, position, class_token, shift, wide).to(wide)

    B, E, first = video.shape[0], weight.shape[0], int(class_token is not None)
    groups, tokens = (B * T, rows * columns) if per_frame else (B, T * rows * columns)
    out = weight.new_empty(groups, tokens + first, E)
    torch.add(table[:, first:], products.view(groups, tokens, E), alpha=common, out=out[:, first:])
    if first:
        out[:, :1] = table[:, :1]
    return out.view(B, T, tokens + first, E) if per_frame else out


@without_autocast
def launch_bwd(
    dout, video, weight, bias, position, class_token, per_frame: bool, scale, shift, needs: list[bool]
) -> list[Tensor]:
    """Gradients of (video, weight, bias, position, class_token); an empty tensor where `needs` says none is wanted."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    E, first, narrow = weight.shape[0], int(class_token is not None), _product_dtype(weight)
    gradients = [video.new_empty(0) for _ in needs]
    dtable = dout.flatten(0, -3).sum(0, keepdim=True, dtype=wide)  # [1, N(+1), E]
    dtokens = dout[..., first:, :].reshape(-1, E).to(narrow)  # [B*T*S, E]
    if needs[0]:
        _, per_channel = _affine([float(a) for a in scale], weight.new_empty(0, dtype=wide))
        by_pixel = weight.to(wide) * (scale[0] if per_channel is None else per_channel)
        gradients[0] = _scatter(dtokens @ by_pixel.to(narrow).flatten(1), video, weight)
    if needs[1]:
        pixels, scale, shift = _pixels(video, scale, shift, wide)
        matrix, _ = _gather(pixels, weight.shape[2:], narrow)
        common, per_channel = _affine(scale, weight.new_empty(0, dtype=wide))
        dweight = _uncolumns(dtokens.T @ matrix, weight, pixels).to(wide) * (
            common if per_channel is None else per_channel
        )
        if any(shift):
            shifts = torch.tensor(shift, dtype=wide, device=weight.device).view(-1, 1, 1, 1)
            dweight = dweight + dtable[:, first:].sum(1).view(E, 1, 1, 1, 1) * shifts
        gradients[1] = dweight.to(weight.dtype).contiguous()
    if needs[2]:
        gradients[2] = dtable[:, first:].sum((0, 1)).to(bias.dtype)
    if needs[3]:
        gradients[3] = dtable.to(position.dtype)
    if needs[4]:
        gradients[4] = dtable[:, :1].to(class_token.dtype)
    return gradients


def _scatter(dmatrix: Tensor, video: Tensor, weight: Tensor) -> Tensor:
    """Tubelet rows `[B*T*S, C*f*y*x]` back to pixels; the borders that fill no tubelet get zero."""
    B, C, F_, Y, X = video.shape
    f, y, x = weight.shape[2:]
    T, rows, columns = F_ // f, Y // y, X // x
    dvideo = torch.zeros(video.shape, dtype=video.dtype, device=video.device)
    cut = dmatrix.view(B, T, rows, columns, C, f, y, x).permute(0, 4, 1, 5, 2, 6, 3, 7)
    dvideo[:, :, : T * f, : rows * y, : columns * x] = cut.reshape(B, C, T * f, rows * y, columns * x).to(video.dtype)
    return dvideo
