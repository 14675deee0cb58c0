"""Resizing frames as somebody else's pipeline does, so that published weights see the pixels they were trained on."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from .video import Video

RESIZES = ("decoder", "scenic", "pillow")


def read_resized(video: Video, indices: np.ndarray, rows: int, columns: int, how: str = "decoder") -> np.ndarray:
    """uint8 `[F, rows, columns, 3]`, the frames at `indices`, resized.

    how: "decoder", by the decoder, which is fastest (areas are averaged); "scenic", bilinear without antialiasing, cut
        to whole numbers, as TensorFlow does for Scenic; "pillow", bilinear with antialiasing, as Hugging Face does.
    """
    if how == "decoder":
        return video.read(indices, rows, columns)
    return resize(video.read(indices, video.height, video.width), rows, columns, how)


def resize(frames: np.ndarray, rows: int, columns: int, how: str) -> np.ndarray:
    """uint8 `[F, Y, X, 3]` -> `[F, rows, columns, 3]`, by "scenic" or "pillow"."""
    if frames.shape[1:3] == (rows, columns):
        return frames
    if how == "scenic":
        x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, (rows, columns), mode="bilinear", align_corners=False)
        return x.permute(0, 2, 3, 1).to(torch.uint8).numpy()  # the fraction is cut off, as a cast does
    if how != "pillow":
        raise ValueError(f"resize: how={how!r} is not known; it is one of {', '.join(RESIZES[1:])}")
    from PIL import Image

    small = [Image.fromarray(f).resize((columns, rows), Image.Resampling.BILINEAR) for f in frames]
    return np.stack([np.asarray(image) for image in small])
