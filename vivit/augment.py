"""Augmentation of a clip in training as Scenic's: scale jitter, RandAugment, colour jitter; one draw for all frames.

uint8 in, uint8 out. The image operations are kornia's: plain Python over torch, it installs beside any build of torch
(torchvision's wheels fit one build each) and runs on the clip's device. What it has not, or computes otherwise than
TensorFlow, is written here. What is drawn depends on the generator alone, never on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVELS = 10  # RandAugment's magnitude at which an operation is at its full strength; 15 and 20 go beyond
CUTOUT = 40  # half the side of the square that Cutout greys at full strength, in pixels
GREY = 128


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to a training clip beside the random crop and `data.flip`; nothing unless asked for.

    scale_jitter: [lowest, highest] factor of rows and of columns, each drawn by itself (the paper: [0.9, 1.33]).
    randaugment: [layers, magnitude] (EPIC-Kitchens [2, 15], Something-Something [2, 20]).
    color_jitter, greyscale: probabilities (Kinetics, Moments: 0.8 and 0.1).
    mixup: alpha of Beta(alpha, alpha), from which one weight is drawn for a batch; 0 for none.
    where: "loader", "model" (on the model's device), or "auto": on a GPU there, else in the loader. The draws are the
        same.
    """

    scale_jitter: tuple[float, ...] = ()
    randaugment: tuple[int, ...] = ()
    color_jitter: float = 0.0
    greyscale: float = 0.0
    mixup: float = 0.0
    where: str = "auto"

    @property
    def of_pixels(self) -> bool:
        """Whether anything but geometry and mixup changes the clip."""
        return bool(self.randaugment) or self.color_jitter > 0 or self.greyscale > 0

    def require(self) -> None:
        """Raises ModuleNotFoundError, with what to install, where kornia is needed and not here."""
        if self.of_pixels:
            _kornia()


NOTHING = AugmentConfig()


def _kornia() -> Any:
    try:
        import kornia.enhance as enhance  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise ModuleNotFoundError(
            f"augment.randaugment and augment.color_jitter need kornia, which is not installed here ({error})"
            '\n  -> pip install "vivit-kernels[augment]", or leave both out of [augment]',
            name="kornia",
        ) from error
    return enhance


def augment(clip: Tensor, config: AugmentConfig, rng: np.random.Generator) -> Tensor:
    """uint8 `[F, Y, X, 3]` -> the same shape: RandAugment, then colour jitter, then greyscale, each drawn once.

    The order is Scenic's. Its frames lie below one another as one image for RandAugment, so that statistics (equalise,
    contrast) are those of the clip; so they are here.
    """
    if not config.of_pixels:
        return clip
    if config.randaugment:
        layers, magnitude = config.randaugment
        clip = randaugment(clip, layers, magnitude, rng)
    jitter, grey = rng.random() < config.color_jitter, rng.random() < config.greyscale
    if jitter or grey:
        x = _to_unit(clip)
        x = color_jitter(x, rng) if jitter else x
        x = _luma(x).expand_as(x) if grey else x
        clip = _to_bytes(x)
    return clip


def _to_unit(clip: Tensor) -> Tensor:  # uint8 [F, Y, X, 3] -> float [F, 3, Y, X] in [0, 1]
    return clip.permute(0, 3, 1, 2).float() / 255


def _to_bytes(x: Tensor) -> Tensor:  # the other way, to the nearest
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _luma(x: Tensor) -> Tensor:  # [F, 3, Y, X] -> [F, 1, Y, X]
    weights = torch.tensor([0.2989, 0.587, 0.114], dtype=x.dtype, device=x.device)
    return (x * weights[:, None, None]).sum(1, keepdim=True)


def color_jitter(x: Tensor, rng: np.random.Generator) -> Tensor:
    """float `[F, 3, Y, X]` in [0, 1]: brightness +-32/255, saturation and contrast 0.6 to 1.4, hue +-0.2 of the circle.

    Saturation and contrast come in either order. Contrast is TensorFlow's: about each channel's mean of each frame.
    """
    enhance = _kornia()
    brightness, saturation = rng.uniform(-32 / 255, 32 / 255), rng.uniform(0.6, 1.4)
    contrast, hue = rng.uniform(0.6, 1.4), rng.uniform(-0.2, 0.2)
    saturation_first = rng.random() < 0.5
    x = enhance.adjust_brightness(x, brightness)
    if saturation_first:
        x = enhance.adjust_saturation(x, saturation)
    mean = x.mean((-2, -1), keepdim=True)
    x = ((x - mean) * contrast + mean).clamp(0, 1)
    if not saturation_first:
        x = enhance.adjust_saturation(x, saturation)
    return enhance.adjust_hue(x, hue * 2 * math.pi).clamp(0, 1)


# ---- RandAugment ----

OPERATIONS = (
    "identity",
    "auto_contrast",
    "equalize",
    "invert",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "cutout",
)  # none moves pixels: positions along time stay comparable


def randaugment(clip: Tensor, layers: int, magnitude: int, rng: np.random.Generator) -> Tensor:
    """uint8 `[F, Y, X, 3]`: `layers` operations in turn, each of OPERATIONS alike, at one magnitude (10 is full)."""
    for _ in range(layers):
        name = OPERATIONS[rng.integers(len(OPERATIONS))]
        clip = apply(clip, name, magnitude, rng)
    return clip


def apply(clip: Tensor, name: str, magnitude: int, rng: np.random.Generator) -> Tensor:
    """One operation of RandAugment with the strength that Scenic's magnitude stands for."""
    share = magnitude / LEVELS
    if name == "identity":
        return clip
    if name == "invert":
        return 255 - clip
    if name == "posterize":  # bits that are kept; at 20 all of them
        lost = max(8 - int(share * 4), 0)
        return clip >> lost << lost
    if name == "solarize":  # from 10 on no value reaches the threshold, which a byte cannot hold
        return torch.where(clip.to(torch.int16) < int(share * 256), clip, 255 - clip)
    if name == "solarize_add":
        added = (clip.to(torch.int16) + int(share * 110)).clamp(0, 255).to(torch.uint8)
        return torch.where(clip < GREY, added, clip)
    if name == "cutout":
        return _cutout(clip, int(share * CUTOUT), rng)
    return _to_bytes(_of_floats(_to_unit(clip), name, 1.8 * share + 0.1))


def _of_floats(x: Tensor, name: str, factor: float) -> Tensor:
    """`x`: [F, 3, Y, X] in [0, 1]; statistics are of the whole clip."""
    enhance = _kornia()
    if name == "auto_contrast":
        low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
        return torch.where(high > low, (x - low) / (high - low).clamp(min=1 / 255), x)
    if name == "equalize":
        tall = x.transpose(0, 1).flatten(1, 2)  # [3, F*Y, X]
        return enhance.equalize(tall).unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)
    if name == "color":
        return enhance.adjust_saturation_with_gray_subtraction(x, factor)
    if name == "contrast":
        mean = _luma(x).mean()  # Scenic divides the histogram's sum by 256, which is the number of pixels: a slip
        return ((x - mean) * factor + mean).clamp(0, 1)
    if name == "brightness":
        return enhance.adjust_brightness_accumulative(x, factor)
    if name == "sharpness":
        return enhance.sharpness(x, factor)
    raise ValueError(f"randaugment: no operation {name!r}; it is one of {', '.join(OPERATIONS)}")


def _cutout(clip: Tensor, half: int, rng: np.random.Generator) -> Tensor:
    """A grey square at one place of every frame. (In Scenic it falls into one or two frames of the tall image.)"""
    rows, columns = clip.shape[1:3]
    y, x = int(rng.integers(rows)), int(rng.integers(columns))
    clip = clip.clone()
    clip[:, max(y - half, 0) : y + half, max(x - half, 0) : x + half] = GREY
    return clip


# ---- mixup ----


def mixup_weight(alpha: float, seed: int, step: int) -> float:
    """The share of each clip in its mixture at this step, Beta(alpha, alpha): a function of its arguments alone."""
    return float(np.random.default_rng((seed, step, 0x4D49)).beta(alpha, alpha))


def mixed(x: Tensor, weight: float) -> Tensor:
    """weight * x + (1 - weight) * x in reverse order, over the batch: clips as floats, and one-hot labels alike."""
    return weight * x + (1 - weight) * x.flip(0)
