"""tubelet_embedding, defined: unoptimised PyTorch, any dtype, device and size. The truth for every backend."""

from __future__ import annotations

import torch
from torch import Tensor


def tubelet_embedding(
    video: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, class_token: Tensor | None,
    per_frame: bool, scale: list[float], shift: list[float],
) -> Tensor:  # fmt: skip
    """video `[B, C, F, Y, X]`, weight `[E, C, f, y, x]` -> tokens, see api.py.

    A pixel u of channel c counts as scale[c]*u + shift[c].
    """
    B, C = video.shape[:2]
    f, y, x = weight.shape[2:]
    T, rows, columns = video.shape[2] // f, video.shape[3] // y, video.shape[4] // x
    wide = torch.promote_types(weight.dtype, torch.float32)
    per_channel = [torch.tensor(values, dtype=wide, device=video.device).view(-1, 1, 1, 1) for values in (scale, shift)]
    pixels = (video.to(wide) * per_channel[0] + per_channel[1]).to(weight.dtype)
    pixels = pixels[:, :, : T * f, : rows * y, : columns * x].reshape(B, C, T, f, rows, y, columns, x)
    tubelets = pixels.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(B, T, rows * columns, C * f * y * x)
    tokens = tubelets @ weight.flatten(1).T
    if bias is not None:
        tokens = tokens + bias.to(tokens.dtype)
    if not per_frame:
        tokens = tokens.flatten(1, 2).unsqueeze(1)  # one row of all tokens
    if class_token is not None:
        tokens = torch.cat([class_token.to(tokens.dtype).expand(*tokens.shape[:2], 1, -1), tokens], 2)
    if position is not None:
        tokens = tokens + position.to(tokens.dtype).unsqueeze(1)
    return tokens if per_frame else tokens.squeeze(1)
