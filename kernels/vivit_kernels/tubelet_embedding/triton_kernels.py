"""Backend `triton` of tubelet_embedding: an implicit matrix product that gathers its tubelets from the video itself.

Forward is one kernel that writes the output once, class rows included. Before it, where pixels count as scale*u + shift
or the video is channels-last, a small one reads the weight once: uint8 pixels enter the product as u - 128, so that
W @ shift is folded into the bias in fp32 (E*4 bytes of workspace), a scale common to all channels is applied to the
fp32 products, and one per channel goes into a copy of the weight, rounded once (E*K*itemsize bytes of workspace; a
channels-last video has its weight copied in the order of its pixels). Floating-point pixels are normalised as they are
loaded.

Backward needs the same video: dW is dout^T @ tubelets in `splits` parts, added up in order (splits*E*K*4 bytes of
workspace, at most 64 MiB unless one part is more), and the rows of dout are summed once for position, class row, bias
and the shift's share of dW (at most 128*E*4 bytes). Nothing is atomic: results are the same bit for bit.
"""

# pyright: reportCallIssue=false
# (of a shape it does not know how many numbers it has)

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .. import _triton
from . import tiles
from .triton_backward import finish_parameters, sum_rows, video_gradient, weight_gradient
from .triton_forward import forward, prepare_weight

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


def _grid(video: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """(T, rows, columns) of tubelets."""
    T, rows, columns = (video.shape[2 + i] // weight.shape[2 + i] for i in range(3))
    return T, rows, columns


def _counts(video: Tensor, weight: Tensor, phases: int = 1) -> dict[str, int]:
    (T, rows, columns), E = _grid(video, weight), weight.shape[0]
    columns //= phases
    return {"M": video.shape[0] * T * rows * columns, "E": E, "T": T, "ROWS": rows, "COLUMNS": columns}


@dataclass(frozen=True)
class Gathering:
    """How a video is read: what the products are told; the order of its taps, for the weight; taps in all, padding
    counted."""

    keywords: dict[str, int]
    order: dict[str, int]
    taps: int

    @property
    def phases(self) -> int:
        return self.order["PHASES"]


def _gathering(video: Tensor, weight: Tensor) -> Gathering:
    (stride_b, stride_c, stride_f, stride_y, stride_x), size = video.stride(), video.element_size()
    C, (f, y, x) = video.shape[1], weight.shape[2:]
    # the channels that lie beside each other in every pixel, if they do, as in a decoder's frames
    folded = C if stride_c == 1 and stride_x == C else 1
    if folded > 1:
        C, x, stride_c, stride_x = 1, x * C, 0, 1
    align, phases = size, 1
    if stride_x == 1:
        align = math.gcd(video.data_ptr(), 16, *(size * n for n in (stride_b, stride_c, stride_f, stride_y)))
        # a neighbour's bytes are read along: they are finite, and there, where every column is one of a pair
        if video.dtype == torch.uint8 and x % 4 == 2 and align % 4 == 0 and _grid(video, weight)[2] % 2 == 0:
            align, phases = 4, 2
        align = math.gcd(align, phases * size * x)
    order = {"FOLDED": folded, "X": x + 2 * (phases - 1), "STEP": x, "PHASES": phases}
    strides = {"stride_vb": stride_b, "stride_vc": stride_c, "stride_vf": stride_f, "stride_vy": stride_y}
    keywords = {**strides, "stride_vx": stride_x, "C": C, "F": f, "Y": y, "ALIGN": align, **order}
    return Gathering(keywords, order, C * f * y * order["X"])


def _pixels(video: Tensor, scale: list[float], shift: list[float]) -> tuple[list[float], list[float], bool]:
    """(scale, shift) still to apply to the product of what is loaded, each one number if all are equal; and whether
    floating-point pixels are normalised when they are loaded, instead."""
    if video.dtype == torch.uint8:
        shift = [o + 128 * a for a, o in zip(scale, shift, strict=True)]
    return _short(scale), _short(shift), video.dtype != torch.uint8 and (any(shift) or set(scale) != {1.0})


def _short(values: list[float]) -> list[float]:
    return values[:1] if len(set(values)) == 1 else values


_LAUNCHES = _triton.Plans()


def _launch(kernel: Any, programs: int, *, num_warps: int, num_stages: int = 3, **arguments: Any) -> None:
    """Launches; again what was compiled, where nothing but addresses differs from an earlier launch."""
    given = [arguments[name] for name in kernel.arg_names]
    seen = [(x.dtype, x.device, x.data_ptr() % 16) if isinstance(x, Tensor) else x for x in given]
    key = kernel, programs, num_warps, num_stages, *seen
    launch = _LAUNCHES.get(key)
    if launch is None:
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in given)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        launch = _LAUNCHES.keep(key, _triton.Launch(kernel, programs, on_gpu, **options))
    given = [launch.take(x) if isinstance(x, Tensor) else x for x in given]
    launch(**dict(zip(kernel.arg_names, given, strict=True)))


def _tile(video: Tensor, weight: Tensor, direction: str) -> Any:
    return tiles.current(
        *video.shape, tuple(weight.shape[2:]), weight.shape[0], direction, weight.element_size(),
        _triton.arch_of(video.device),
    )  # fmt: skip


def _prepared(
    weight: Tensor, bias: Tensor | None, scale: list[float], shift: list[float], gathering: Gathering
) -> tuple[Tensor, Tensor | None]:
    """(weight `[PHASES, E, K]` in the order of the video's taps, row `[E]` to add to the products)."""
    E, C = weight.shape[:2]
    copied = len(scale) > 1 or gathering.order["FOLDED"] > 1 or gathering.phases > 1
    if not copied and not any(shift):
        return weight, bias
    scaled = weight.new_empty(gathering.phases, E, gathering.taps) if copied else weight
    row = torch.empty(E, dtype=torch.float32, device=weight.device)
    _launch(
        prepare_weight, _blocks(E, 4),
        weight_ptr=weight, bias_ptr=row if bias is None else bias, scaled_ptr=scaled, row_ptr=row,
        scales=tuple(scale) if len(scale) > 1 else (1.0,), shifts=tuple(shift),
        stride_bias=0 if bias is None else bias.stride(0), E=E, TAPS=weight[0, 0].numel(), C=C, **gathering.order,
        HAS_BIAS=bias is not None, WRITES_SCALED=copied, BLOCK_E=4, BLOCK_K=512, num_warps=4,
    )  # fmt: skip
    return scaled, row


def launch_fwd(
    video, weight, bias, position, class_token, per_frame: bool, scale: list[float], shift: list[float]
) -> Tensor:
    weight = weight.contiguous()
    B, E, first = video.shape[0], weight.shape[0], int(class_token is not None)
    T, rows, columns = _grid(video, weight)
    groups, tokens = ((B, T), rows * columns) if per_frame else ((B,), T * rows * columns)
    out = weight.new_empty(*groups, tokens + first, E)
    gathering, tile = _gathering(video, weight), _tile(video, weight, "forward")
    scale, shift, normalised = _pixels(video, scale, shift)
    after = ([1.0], [0.0]) if normalised else (scale, shift)
    with torch.cuda.device_of(video):
        operand, row = _prepared(weight, bias, *after, gathering)
        counts = _counts(video, weight, gathering.phases)
        programs = _blocks(counts["M"], tile.block_m) * gathering.phases * _blocks(E, tile.block_e)
        _launch(
            forward, programs,
            video_ptr=video, weight_ptr=operand, row_ptr=out if row is None else row,
            position_ptr=out if position is None else position[:, first:],
            class_ptr=out if class_token is None else class_token, out_ptr=out[..., first:, :],
            scale=after[0][0] if len(after[0]) == 1 else 1.0, scales=tuple(scale), shifts=tuple(shift), **counts,
            stride_row=0 if row is None else row.stride(0),
            stride_pn=0 if position is None else position.stride(1),
            stride_pe=0 if position is None else position.stride(2),
            stride_class=0 if class_token is None else class_token.stride(2),
            stride_ob=out.stride(0), stride_ot=out.stride(1) if per_frame else rows * columns * E, stride_os=E,
            **gathering.keywords, NORMALISED=normalised, HAS_ROW=row is not None, HAS_POSITION=position is not None,
            HAS_CLASS=bool(first), PER_FRAME=per_frame, HALVED=tile.halved, PRECISION=_triton.precision(weight.dtype),
            BLOCK_M=tile.block_m, BLOCK_E=tile.block_e, BLOCK_K=tile.block_k, num_warps=tile.num_warps,
            num_stages=tile.stages(video.element_size(), weight.element_size(), _triton.arch_of(video.device)),
        )  # fmt: skip
    return out


def launch_bwd(
    dout, video, weight, bias, position, class_token, per_frame: bool, scale, shift, needs: list[bool]
) -> list[Tensor]:
    """Gradients of (video, weight, bias, position, class_token); an empty tensor where `needs` says none is wanted."""
    weight = weight.contiguous()
    scale, shift, normalised = _pixels(video, scale, shift)
    tokens = {"dout_ptr": dout[..., int(class_token is not None) :, :], "stride_db": dout.stride(0)}
    tokens |= {"stride_ds": dout.stride(-2), "stride_de": dout.stride(-1)}
    tokens["stride_dt"] = dout.stride(1) if per_frame else math.prod(_grid(video, weight)[1:]) * dout.stride(-2)
    found: list[Tensor | None] = [None] * 5
    with torch.cuda.device_of(video):
        if needs[0]:
            found[0] = _dvideo(tokens, video, weight, scale)
        after = ([1.0], [0.0]) if normalised else (scale, shift)
        rows = None
        if any(needs[2:]) or (needs[1] and any(after[1])):
            rows, *found[3:] = _row_sums(dout, position if needs[3] else None, class_token, needs[4])
        if needs[1] or needs[2]:
            parts = _weight_parts(tokens, video, weight, scale, shift, normalised) if needs[1] else None
            order = _gathering(video, weight).order
            found[1:3] = _finished(parts, rows, weight, bias if needs[2] else None, *after, order)
    return [video.new_empty(0) if x is None else x for x in found]


def _dvideo(tokens: dict[str, Any], video: Tensor, weight: Tensor, scale: list[float]) -> Tensor:
    """The gradient of the video, contiguous `[B, C, F, Y, X]`; what fills no tubelet is zero."""
    (E, C, f, y, x), arch = weight.shape, _triton.arch_of(video.device)
    whole = all(n % part == 0 for n, part in zip(video.shape[2:], (f, y, x), strict=True))
    dvideo = (torch.empty if whole else torch.zeros)(video.shape, dtype=video.dtype, device=video.device)
    tile, counts = (
        tiles.scattering(C * f * y * x, E, video.element_size(), weight.element_size(), arch),
        _counts(video, weight),
    )
    programs = _blocks(counts["M"], tile.block_m) * _blocks(C * f * y * x, tile.block_k)
    _launch(
        video_gradient, programs,
        weight_ptr=weight, dvideo_ptr=dvideo, scales=tuple(scale), **counts, **tokens,
        stride_vb=dvideo.stride(0), stride_vc=dvideo.stride(1), stride_vf=dvideo.stride(2), stride_vy=dvideo.stride(3),
        C=C, F=f, Y=y, X=x, PRECISION=_triton.precision(weight.dtype),
        BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_E=tile.block_e, num_warps=tile.num_warps,
        num_stages=tile.stages(weight.element_size(), weight.element_size(), arch),
    )  # fmt: skip
    return dvideo


def _row_sums(
    dout: Tensor, position: Tensor | None, class_token: Tensor | None, needs_class: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(sums over all tokens by strips `[strips, E]`, dposition, dclass)."""
    outer, inner = dout.shape[0], dout.shape[1] if dout.dim() == 4 else 1
    table, E = dout.shape[-2:]
    dposition = None if position is None else torch.empty(position.shape, dtype=position.dtype, device=dout.device)
    dclass = None
    if class_token is not None and needs_class:
        dclass = torch.empty(class_token.shape, dtype=class_token.dtype, device=dout.device)
    tile = tiles.row_sums(outer * inner, table, E, dout.element_size())
    strips = _blocks(_blocks(table, tile.block_n), tile.per_strip)
    rows = torch.empty(strips, E, dtype=torch.float32, device=dout.device)
    _launch(
        sum_rows, strips * _blocks(E, tile.block_e),
        dout_ptr=dout, dposition_ptr=rows if dposition is None else dposition,
        dclass_ptr=rows if dclass is None else dclass, partial_ptr=rows,
        TABLE=table, OUTER=outer, INNER=inner, E=E, blocks_per_strip=tile.per_strip,
        stride_do=dout.stride(0), stride_di=dout.stride(1) if dout.dim() == 4 else 0, stride_dn=dout.stride(-2),
        stride_de=dout.stride(-1), FIRST=int(class_token is not None), HAS_POSITION=dposition is not None,
        HAS_CLASS=dclass is not None, BLOCK_G=tile.block_g, BLOCK_N=tile.block_n, BLOCK_E=tile.block_e,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return rows, dposition, dclass


def _weight_parts(
    tokens: dict[str, Any], video: Tensor, weight: Tensor, scale: list[float], shift: list[float], normalised: bool
) -> Tensor:
    """Parts of dout^T @ tubelets, fp32 `[splits, PHASES, E, K]`, in the order of the video's taps."""
    tile, gathering, E = _tile(video, weight, "backward"), _gathering(video, weight), weight.shape[0]
    counts, K = _counts(video, weight, gathering.phases), gathering.taps
    frames, rows, columns = video.shape[0] * counts["T"], counts["ROWS"], counts["COLUMNS"]
    tall, wide = tiles.abreast(frames, rows, columns, tile.block_m)
    steps = _blocks(frames, tile.block_m // (tall * wide)) * _blocks(rows, tall) * _blocks(columns, wide)
    # parts that would be left without a step are not made
    per_split = max(1, _blocks(steps, tile.splits))
    splits = max(1, _blocks(steps, per_split))
    parts = torch.empty(splits, gathering.phases, E, K, dtype=torch.float32, device=weight.device)
    programs = splits * gathering.phases * _blocks(E, tile.block_e) * _blocks(K, tile.block_k)
    _launch(
        weight_gradient, programs,
        video_ptr=video, partial_ptr=parts, scales=tuple(scale), shifts=tuple(shift), FRAMES=frames, E=E,
        T=counts["T"], ROWS=rows, COLUMNS=columns, STEPS=steps, steps_per_split=per_split, **tokens,
        ROWS_ABREAST=tall, COLUMNS_ABREAST=wide, WHOLE=rows % tall == 0 and columns % wide == 0,
        **gathering.keywords, NORMALISED=normalised,
        PRECISION=_triton.precision(weight.dtype), DTYPE=_DTYPES[weight.dtype],
        BLOCK_M=tile.block_m, BLOCK_E=tile.block_e, BLOCK_K=tile.block_k, num_warps=tile.num_warps,
        num_stages=tile.stages(video.element_size(), weight.element_size(), _triton.arch_of(video.device)),
    )  # fmt: skip
    return parts


def _finished(
    parts: Tensor | None, rows: Tensor | None, weight: Tensor, bias: Tensor | None, scale: list[float],
    shift: list[float], order: dict[str, int],
) -> list[Tensor | None]:  # fmt: skip
    """[dweight if there are parts, dbias if there is a bias]."""
    (E, C), taps = weight.shape[:2], weight[0, 0].numel()
    dweight = None if parts is None else torch.empty_like(weight)
    dbias = None if bias is None else torch.empty(E, dtype=bias.dtype, device=weight.device)
    unused = weight  # stands for a tensor that is neither read nor written
    _launch(
        finish_parameters, _blocks(E, 4) * (1 if parts is None else _blocks(C * taps, 512)),
        partial_ptr=unused if parts is None else parts, rows_ptr=unused if rows is None else rows,
        dweight_ptr=unused if dweight is None else dweight, dbias_ptr=unused if dbias is None else dbias,
        scales=tuple(scale), shifts=tuple(shift), E=E, parts=0 if parts is None else parts.shape[:2].numel(),
        strips=0 if rows is None else rows.shape[0], TAPS=taps, C=C, **order, HAS_ROWS=rows is not None,
        HAS_WEIGHT=dweight is not None, HAS_BIAS=dbias is not None, BLOCK_S=tiles.STRIPS, BLOCK_E=4, BLOCK_K=512,
        num_warps=4,
    )  # fmt: skip
    return [dweight, dbias]
