"""Backend `cuda` of tubelet_embedding: launchers of the native library's CUDA C++ kernels (csrc/cuda/tubelet*.cuh).

Forward is one product that gathers its tubelets from the video and writes tokens and class rows once. Before it a small
kernel reads the weight: uint8 pixels enter as u - 128, so that W @ shift is added to the bias, in float32 (E*4 bytes of
workspace); a copy of the weight (E*K*2 bytes) is made where it cannot be read as it is: channels-last video, whose taps
come in the order of its pixels, a scale for each channel, K no multiple of 8.

On sm_90 the forward has a kernel of its own (csrc/cuda/tubelet_hopper.cuh) for tokens of 128 channels and more and runs
of even length that begin at even pixels (ViT-H's of 14 bytes, too); other calls take the one of sm_80, which runs all:
odd runs or rows, narrow tokens, tubelets of more than 34,000 taps. It is chosen at the launch, in C++.

Backward sums dout over rows for position, class row and bias (at most 128*E*4 bytes of workspace), and the weight's
gradient in `splits` parts, added up in order (splits*E*K*4 bytes, at most 64 MiB unless one part is more). Nothing is
atomic: results are the same bit for bit. The parts have a kernel of their own on sm_90, too
(csrc/cuda/tubelet_hopper_weights.cuh), for the same calls whatever the number of taps, and so has the video's gradient
(csrc/cuda/tubelet_hopper_video.cuh), for all calls of 128 channels and more.

A video of float64, or of the other 16 bits than the weight's, is copied to float32 first.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from . import tiles

_TILE, _STEP = 128, 64  # kTile, kStep of csrc/cuda/tubelet_product.cuh
_BLOCKS = 2  # on a multiprocessor
_HOPPER_E, _HOPPER_K = 128, 256  # kWeightChannels, kWeightTaps of csrc/cuda/tubelet_hopper_weights.cuh; a block each
_ROWS_OF_STRIP = 4  # at least


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


def _readable(video: Tensor, dtype: torch.dtype) -> Tensor:
    return video if video.dtype in (torch.uint8, torch.float32, dtype) else video.float()


def _fits(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels read these rows: numbers side by side, each row at a multiple of 16 bytes."""
    size = x.element_size()
    starts = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    aligned = x.data_ptr() % 16 == 0 and all(n == 1 or step * size % 16 == 0 for n, step in starts)
    return x.dtype in (torch.float32, dtype) and x.stride(-1) == 1 and aligned


def _rows(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A parameter `[1, rows, E]` or `[E]` as `[rows, E]`, copied where the kernels cannot read it as it is."""
    if x is None:
        return None
    x = x.view(1, -1) if x.dim() == 1 and x.is_contiguous() else x.reshape(-1, x.shape[-1])
    if _fits(x, dtype):
        return x
    return x.to(x.dtype if x.dtype == dtype else torch.float32).clone(memory_format=torch.contiguous_format)


@functools.lru_cache(256)
def _affine(scale: tuple[float, ...], shift: tuple[float, ...]) -> Tensor:
    """On the CPU: `[2, C]`, scale and shift by channel."""
    return torch.tensor([scale, shift], dtype=torch.float64)


def _pitch(weight: Tensor) -> int:
    return _blocks(weight[0].numel(), 8) * 8


def _operand(video: Tensor, weight: Tensor, scale: list[float], backward: bool) -> Tensor | None:
    """Memory for a copy of the weight, where the products need one: needs_operand of csrc/cuda/tubelet.h."""
    C = video.shape[1]
    copied = weight.data_ptr() % 16 != 0 or weight[0].numel() % 8 != 0
    if not backward:
        copied |= C > 1 and video.stride(1) == 1 and video.stride(4) == C
        copied |= video.dtype == torch.uint8 and len(set(scale)) > 1
    return weight.new_empty(weight.shape[0], _pitch(weight)) if copied else None


def launch_fwd(
    video, weight, bias, position, class_token, per_frame: bool, scale: list[float], shift: list[float]
) -> Tensor:
    video, weight = _readable(video, weight.dtype), weight.contiguous()
    B, E, first = video.shape[0], weight.shape[0], int(class_token is not None)
    T, rows, columns = (video.shape[2 + i] // weight.shape[2 + i] for i in range(3))
    shape = (B, T, rows * columns + first, E) if per_frame else (B, T * rows * columns + first, E)
    out = weight.new_empty(shape)
    if out.numel():
        adds = bias is not None or video.dtype == torch.uint8
        torch.ops.vivit_kernels_native.cuda_tubelet_fwd(
            video, weight, _operand(video, weight, scale, False), _rows(bias, weight.dtype),
            torch.empty(E, dtype=torch.float32, device=weight.device) if adds else None,
            _rows(position, weight.dtype), _rows(class_token, weight.dtype), out,
            _affine(tuple(scale), tuple(shift)), per_frame,
        )  # fmt: skip
    return out


def launch_bwd(
    dout, video, weight, bias, position, class_token, per_frame: bool, scale, shift, needs: list[bool]
) -> list[Tensor]:
    """Gradients of (video, weight, bias, position, class_token); an empty tensor where `needs` says none is wanted."""
    inputs, weight = (video, weight, bias, position, class_token), weight.contiguous()
    readable = _readable(video, weight.dtype)  # where it is not read, too: a launch of another dtype is an error
    if not dout.numel():
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) if need else video.new_empty(0)
                for x, need in zip(inputs, needs, strict=True)]  # fmt: skip
    if not dout.is_contiguous() or dout.data_ptr() % 16:
        dout = dout.clone(memory_format=torch.contiguous_format)
    written = [_gradient(x, weight.dtype) if need else None for x, need in zip(inputs[1:], needs[1:], strict=True)]
    dvideo = _video_gradient(readable, weight) if needs[0] else None
    wants_rows = needs[2] or (needs[1] and video.dtype == torch.uint8)
    torch.ops.vivit_kernels_native.cuda_tubelet_bwd(
        dout, readable, weight, _parts(readable, weight) if needs[1] else None,
        _strips(dout) if wants_rows else None, *written,
        _operand(readable, weight, scale, True) if needs[0] else None, dvideo,
        _affine(tuple(map(float, scale)), tuple(map(float, shift))), per_frame, class_token is not None,
    )  # fmt: skip
    found = zip(inputs, (dvideo, *written), strict=True)
    return [video.new_empty(0) if y is None else y.to(x.dtype) for x, y in found]


def _gradient(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for the gradient of a parameter, of a type that the kernels write."""
    return torch.empty(x.shape, dtype=x.dtype if x.dtype == dtype else torch.float32, device=x.device)


def _video_gradient(video: Tensor, weight: Tensor) -> Tensor:
    """Pixels that fill no tubelet get zero."""
    whole = all(n % part == 0 for n, part in zip(video.shape[2:], weight.shape[2:], strict=True))
    return (torch.empty if whole else torch.zeros)(video.shape, dtype=video.dtype, device=video.device)


def _strips(dout: Tensor) -> Tensor:
    """Memory for sums over some rows of tokens each, `[strips, E]`."""
    rows = dout.shape[-2]
    each = _blocks(rows, min(tiles.STRIPS, _blocks(rows, _ROWS_OF_STRIP)))
    return torch.empty(_blocks(rows, each), dout.shape[-1], dtype=torch.float32, device=dout.device)


def _parts(video: Tensor, weight: Tensor) -> Tensor:
    """Memory for the weight's gradient in parts, `[splits, E, pitch]`: each of some steps of 64 tubelets. Any number is
    right in either kernel."""
    E, pitch = weight.shape[0], _pitch(weight)
    M = video.shape[0] * math.prod(video.shape[2 + i] // weight.shape[2 + i] for i in range(3))
    steps, slots = _blocks(M, _STEP), _multiprocessors(weight.device)
    if E >= _HOPPER_E and _is_hopper(weight.device):
        programs = _blocks(E, _HOPPER_E) * _blocks(pitch, _HOPPER_K)
    else:
        programs, slots = _blocks(E, _TILE) * _blocks(pitch, _TILE), _BLOCKS * slots
    each = _blocks(steps, tiles.splits(M, E * pitch, _STEP, programs, slots))
    return torch.empty(_blocks(steps, each), E, pitch, dtype=torch.float32, device=weight.device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)
