"""Backend `triton` of tubelet_embedding: an implicit matrix product that gathers its tubelets from the video itself.

Forward is one kernel that writes the output once, class rows included. Before it, where pixels count as scale*u + shift
or the video is channels-last, a small one reads the weight once: uint8 pixels enter the product as u - 128, in bfloat16
as (u - 128) / 64, so that W @ shift is folded into the bias in fp32 (E*4 bytes of workspace), a scale common to all
channels is applied to the fp32 products, and one per channel goes into a copy of the weight, rounded once (E*K*itemsize
bytes of workspace; a channels-last video has its weight copied in the order of its pixels). Floating-point pixels are
normalised as they are loaded.

Backward needs the same video: dW is dout^T @ tubelets in `splits` parts, added up in order (splits*E*K*4 bytes of
workspace, at most 64 MiB unless one part is more), and the rows of dout are summed once for position, class row, bias
and the shift's share of dW (at most 128*E*4 bytes). Nothing is atomic: results are the same bit for bit.
"""

# pyright: reportCallIssue=false
# (of a shape it does not know how many numbers it has)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import _triton
from . import tiles
from .triton_backward import finish_parameters, sum_rows, video_gradient, weight_gradient
from .triton_forward import forward, prepare_weight
from .triton_gather import _IN_PTX

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


def _pixels(
    video: Tensor, weight: Tensor, scale: Sequence[float], shift: Sequence[float]
) -> tuple[list[float], list[float], bool]:
    """(scale, shift) still to apply to the product of what is loaded, each one number if all are equal; and whether
    floating-point pixels are normalised when they are loaded, instead."""
    if video.dtype == torch.uint8:
        shift = [o + 128 * a for a, o in zip(scale, shift, strict=True)]
        scale = [64 * a for a in scale] if weight.dtype == torch.bfloat16 else scale
    return _short(scale), _short(shift), video.dtype != torch.uint8 and (any(shift) or set(scale) != {1.0})


def _short(values: Sequence[float]) -> list[float]:
    return list(values[:1] if len(set(values)) == 1 else values)


class Step:
    """A launch of a plan: all arguments but the tensors, which come with the call. early: beside the kernel before it,
    for which it waits itself."""

    def __init__(
        self, kernel: Any, programs: int, on_gpu: bool, num_warps: int, num_stages: int = 3, early: int = False,
        **fixed: Any,
    ):  # fmt: skip
        options = {"num_warps": num_warps, "num_stages": num_stages} | ({"launch_pdl": True} if early else {})
        self._launch = _triton.Launch(kernel, programs, on_gpu, **options)
        self._arguments = {name: fixed.get(name) for name in kernel.arg_names}  # in the kernel's order
        assert fixed.keys() <= self._arguments.keys(), fixed.keys() - self._arguments.keys()

    def __call__(self, **tensors: Tensor | TensorDescriptor) -> None:
        take = self._launch.take
        self._launch(**(self._arguments | {name: take(x) for name, x in tensors.items()}))


_PLANS = _triton.Plans()


class How(NamedTuple):
    """What decides a plan, besides the tensors; tile: of the products with the weight."""

    per_frame: bool
    scale: Sequence[float]
    shift: Sequence[float]
    tile: Any
    arch: int
    precision: str


def _plan(make: Any, direction: str, tensors: tuple[Tensor | None, ...], options: tuple, *needs: bool) -> Any:
    """What `make` prepares for a call: once for all calls that differ in the addresses of their tensors only.

    tensors: dout in a backward, video, weight, bias, position, class token; options: per_frame, scale, shift."""
    video, weight = tensors[-5:-3]
    assert video is not None and weight is not None
    per_frame, scale, shift = options
    precision, forced = _triton.precision(weight.dtype), tiles.demanded()
    seen = [None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16) for x in tensors]
    key = (make, per_frame, *scale, *shift, *needs, precision, forced, _triton.compiling_for, *seen)
    plan = _PLANS.get(key)
    if plan is None:
        arch, sizes = _triton.arch_of(video.device), (weight.element_size(), video.element_size())
        tile = tiles.current(*video.shape, tuple(weight.shape[2:]), weight.shape[0], direction, *sizes, arch)
        plan = _PLANS.keep(key, make(*tensors, How(*options, tile, arch, precision), *needs))
    return plan


def _blocks_of(tile: Any, video: Tensor, weight: Tensor, arch: int) -> dict[str, int]:
    stages = tile.stages(video.element_size(), weight.element_size(), arch)
    sizes = {"BLOCK_M": tile.block_m, "BLOCK_E": tile.block_e, "BLOCK_K": tile.block_k}
    return {**sizes, "num_warps": tile.num_warps, "num_stages": stages}


# ---- forward ----


class Forward(NamedTuple):
    """shape: of the output; copied: of the prepared weight, if it is not the weight itself; described: its rows and
    what TMA loads at once, if it does."""

    shape: tuple[int, ...]
    copied: tuple[int, ...] | None
    described: tuple[list[int], list[int]] | None
    prepare: Step | None
    product: Step


def launch_fwd(
    video, weight, bias, position, class_token, per_frame: bool, scale: list[float], shift: list[float]
) -> Tensor:
    weight = weight.contiguous()
    tensors = (video, weight, bias, position, class_token)
    plan = _plan(_plan_fwd, "forward", tensors, (per_frame, scale, shift))
    out, first = weight.new_empty(plan.shape), int(class_token is not None)
    with torch.cuda.device_of(video):
        operand, row = weight, bias
        if plan.prepare is not None:
            operand = weight if plan.copied is None else weight.new_empty(plan.copied)
            row = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
            plan.prepare(weight_ptr=weight, bias_ptr=row if bias is None else bias, scaled_ptr=operand, row_ptr=row)
        if plan.described is not None:
            (rows, taps), block = plan.described
            operand = TensorDescriptor(operand, [rows, taps], [taps, 1], block)
        # out stands for a tensor that is not read
        plan.product(
            video_ptr=video, weight_ptr=operand, row_ptr=out if row is None else row,
            position_ptr=out if position is None else position[:, first:],
            class_ptr=out if class_token is None else class_token, out_ptr=out[..., first:, :],
        )  # fmt: skip
    return out


def _plan_fwd(video, weight, bias, position, class_token, how: How) -> Forward:
    B, E, first = video.shape[0], weight.shape[0], int(class_token is not None)
    (T, rows, columns), tile, gathering = _grid(video, weight), how.tile, _gathering(video, weight)
    shape = (B, T, rows * columns + first, E) if how.per_frame else (B, T * rows * columns + first, E)
    scale, shift, normalised = _pixels(video, weight, how.scale, how.shift)
    after = ([1.0], [0.0]) if normalised else (scale, shift)
    copied = len(after[0]) > 1 or gathering.order["FOLDED"] > 1 or gathering.phases > 1
    described, base = None, 0 if copied else weight.data_ptr()
    if tile.described and how.arch == 90 and not base % 16 and not gathering.taps * weight.element_size() % 16:
        described = ([gathering.phases * E, gathering.taps], [tile.block_e, tile.block_k])
    # a copied weight is read from the first step on
    early = _IN_PTX.value and described is not None and not copied and any(after[1])
    prepare = _preparing(weight, bias, *after, gathering, copied, early) if copied or any(after[1]) else None
    counts, row_of = _counts(video, weight, gathering.phases), (rows * columns + first) * E
    product = Step(
        forward, _blocks(counts["M"], tile.block_m) * gathering.phases * _blocks(E, tile.block_e), video.is_cuda,
        scale=after[0][0] if len(after[0]) == 1 else 1.0, scales=tuple(scale), shifts=tuple(shift), **counts,
        stride_row=1 if prepare is not None else 0 if bias is None else bias.stride(0),
        stride_pn=0 if position is None else position.stride(1),
        stride_pe=0 if position is None else position.stride(2),
        stride_class=0 if class_token is None else class_token.stride(2),
        stride_ob=math.prod(shape[1:]), stride_ot=row_of if how.per_frame else rows * columns * E, stride_os=E,
        **gathering.keywords, NORMALISED=normalised, HAS_ROW=prepare is not None or bias is not None,
        HAS_POSITION=position is not None, HAS_CLASS=bool(first), PER_FRAME=how.per_frame, HALVED=tile.halved,
        PRECISION=how.precision, WAITS=how.arch == 90 and (normalised or video.dtype != weight.dtype), EARLY=early,
        DESCRIBED=described is not None, early=early, **_blocks_of(tile, video, weight, how.arch),
    )  # fmt: skip
    return Forward(shape, (gathering.phases, E, gathering.taps) if copied else None, described, prepare, product)


def _preparing(
    weight, bias, scale: list[float], shift: list[float], gathering: Gathering, copied: bool, early: bool
) -> Step:
    """Writes weight `[PHASES, E, K]` in the order of the video's taps, if `copied`, and row `[E]`, to add to the
    products."""
    E, C = weight.shape[:2]
    return Step(
        prepare_weight, _blocks(E, 4), weight.is_cuda,
        scales=tuple(scale) if len(scale) > 1 else (1.0,), shifts=tuple(shift),
        stride_bias=0 if bias is None else bias.stride(0), E=E, TAPS=weight[0, 0].numel(), C=C, **gathering.order,
        HAS_BIAS=bias is not None, WRITES_SCALED=copied, EARLY=early, BLOCK_E=4, BLOCK_K=512, num_warps=4,
    )  # fmt: skip


# ---- backward ----


class Backward(NamedTuple):
    """whole: tubelets fill the video; strips: parts of the sum of dout's rows; parts: shape of those of dweight."""

    video: Step | None
    whole: bool
    rows: Step | None
    strips: int
    weight: Step | None
    parts: tuple[int, ...]
    finish: Step | None


def launch_bwd(
    dout, video, weight, bias, position, class_token, per_frame: bool, scale, shift, needs: list[bool]
) -> list[Tensor]:
    """Gradients of (video, weight, bias, position, class_token); an empty tensor where `needs` says none is wanted."""
    weight = weight.contiguous()
    tensors = (dout, video, weight, bias, position, class_token)
    plan = _plan(_plan_bwd, "backward", tensors, (per_frame, scale, shift), *needs)
    tokens = dout[..., int(class_token is not None) :, :]

    def empty(like: Tensor | None, needed: bool) -> Tensor | None:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device) if needed and like is not None else None

    found = [None, *map(empty, (weight, bias, position, class_token), needs[1:])]
    with torch.cuda.device_of(video):
        if plan.video is not None:
            found[0] = (torch.empty if plan.whole else torch.zeros)(video.shape, dtype=video.dtype, device=video.device)
            plan.video(dout_ptr=tokens, weight_ptr=weight, dvideo_ptr=found[0])
        parts = rows = weight  # stands for a tensor that is neither read nor written
        if plan.rows is not None:
            rows = torch.empty(plan.strips, weight.shape[0], dtype=torch.float32, device=weight.device)
            dposition, dclass = (rows if x is None else x for x in found[3:])
            plan.rows(dout_ptr=dout, dposition_ptr=dposition, dclass_ptr=dclass, partial_ptr=rows)
        if plan.weight is not None:
            parts = torch.empty(plan.parts, dtype=torch.float32, device=weight.device)
            plan.weight(dout_ptr=tokens, video_ptr=video, partial_ptr=parts)
        if plan.finish is not None:
            dweight, dbias = (weight if x is None else x for x in found[1:3])
            plan.finish(partial_ptr=parts, rows_ptr=rows, dweight_ptr=dweight, dbias_ptr=dbias)
    return [video.new_empty(0) if x is None else x for x in found]


def _plan_bwd(dout, video, weight, bias, position, class_token, how: How, *needs: bool) -> Backward:
    scale, shift, normalised = _pixels(video, weight, how.scale, how.shift)
    after = ([1.0], [0.0]) if normalised else (scale, shift)
    gathering, first = _gathering(video, weight), int(class_token is not None)
    strides = {"stride_db": dout.stride(0), "stride_ds": dout.stride(-2), "stride_de": dout.stride(-1)}
    strides["stride_dt"] = dout.stride(1) if how.per_frame else math.prod(_grid(video, weight)[1:]) * dout.stride(-2)
    whole = all(n % part == 0 for n, part in zip(video.shape[2:], weight.shape[2:], strict=True))
    parts, of_rows, of_weight, finish, strips = (0, 0), None, None, None, 0
    if any(needs[2:]) or (needs[1] and any(after[1])):
        strips, of_rows = _summing(dout, first, needs)
    if needs[1]:
        parts, of_weight = _weighing(strides, video, weight, scale, shift, normalised, gathering, how)
    if needs[1] or needs[2]:
        finish = _finishing(math.prod(parts[:2]), strips, weight, *after, gathering.order, needs)
    of_video = _scattering(strides, video, weight, scale, how) if needs[0] else None
    return Backward(of_video, whole, of_rows, strips, of_weight, parts, finish)


def _scattering(strides: dict[str, int], video: Tensor, weight: Tensor, scale: list[float], how: How) -> Step:
    """The gradient of the video, contiguous `[B, C, F, Y, X]`; what fills no tubelet is left alone."""
    (E, C, f, y, x), (F, Y, X), counts = weight.shape, video.shape[2:], _counts(video, weight)
    tile = tiles.scattering(C * f * y * x, E, video.element_size(), weight.element_size(), how.arch)
    return Step(
        video_gradient, _blocks(counts["M"], tile.block_m) * _blocks(C * f * y * x, tile.block_k), video.is_cuda,
        scales=tuple(scale), **counts, **strides, stride_vb=C * F * Y * X, stride_vc=F * Y * X, stride_vf=Y * X,
        stride_vy=X, C=C, F=f, Y=y, X=x, PRECISION=how.precision, **_blocks_of(tile, weight, weight, how.arch),
    )  # fmt: skip


def _summing(dout: Tensor, first: int, needs: tuple[bool, ...]) -> tuple[int, Step]:
    """(strips, sums over all tokens by strips `[strips, E]`, and the gradients of positions and class row)."""
    outer, inner = dout.shape[0], dout.shape[1] if dout.dim() == 4 else 1
    table, E = dout.shape[-2:]
    tile = tiles.row_sums(outer * inner, table, E, dout.element_size())
    strips = _blocks(_blocks(table, tile.block_n), tile.per_strip)
    return strips, Step(
        sum_rows, strips * _blocks(E, tile.block_e), dout.is_cuda,
        TABLE=table, OUTER=outer, INNER=inner, E=E, blocks_per_strip=tile.per_strip,
        stride_do=dout.stride(0), stride_di=dout.stride(1) if dout.dim() == 4 else 0, stride_dn=dout.stride(-2),
        stride_de=dout.stride(-1), FIRST=first, HAS_POSITION=needs[3], HAS_CLASS=needs[4],
        WHOLE=E % tile.block_e == 0 and outer * inner % tile.block_g == 0, BLOCK_G=tile.block_g,
        BLOCK_N=tile.block_n, BLOCK_E=tile.block_e, num_warps=tile.num_warps,
    )  # fmt: skip


def _weighing(
    strides: dict[str, int], video: Tensor, weight: Tensor, scale: list[float], shift: list[float], normalised: bool,
    gathering: Gathering, how: How,
) -> tuple[tuple[int, ...], Step]:  # fmt: skip
    """(shape of the parts, parts of dout^T @ tubelets in the order of the video's taps)."""
    tile, counts, E, K = how.tile, _counts(video, weight, gathering.phases), weight.shape[0], gathering.taps
    frames, rows, columns = video.shape[0] * counts["T"], counts["ROWS"], counts["COLUMNS"]
    tall, wide = tiles.abreast(frames, rows, columns, tile.block_m)
    steps = _blocks(frames, tile.block_m // (tall * wide)) * _blocks(rows, tall) * _blocks(columns, wide)
    # parts that would be left without a step are not made
    per_split = max(1, _blocks(steps, tile.splits))
    splits = max(1, _blocks(steps, per_split))
    programs = splits * gathering.phases * _blocks(E, tile.block_e) * _blocks(K, tile.block_k)
    return (splits, gathering.phases, E, K), Step(
        weight_gradient, programs, video.is_cuda,
        scales=tuple(scale), shifts=tuple(shift), FRAMES=frames, E=E, T=counts["T"], ROWS=rows, COLUMNS=columns,
        STEPS=steps, steps_per_split=per_split, **strides, ROWS_ABREAST=tall, COLUMNS_ABREAST=wide,
        WHOLE=rows % tall == 0 and columns % wide == 0, **gathering.keywords, NORMALISED=normalised,
        PRECISION=how.precision, DTYPE=_DTYPES[weight.dtype], **_blocks_of(tile, video, weight, how.arch),
    )  # fmt: skip


def _finishing(
    parts: int, strips: int, weight: Tensor, scale: list[float], shift: list[float], order: dict[str, int],
    needs: tuple[bool, ...],
) -> Step:  # fmt: skip
    """dweight from its parts, and dbias."""
    (E, C), taps = weight.shape[:2], weight[0, 0].numel()
    return Step(
        finish_parameters, _blocks(E, 4) * (_blocks(C * taps, 512) if needs[1] else 1), weight.is_cuda,
        scales=tuple(scale), shifts=tuple(shift), E=E, parts=parts, strips=strips, TAPS=taps, C=C, **order,
        HAS_ROWS=strips > 0, HAS_WEIGHT=needs[1], HAS_BIAS=needs[2], BLOCK_S=tiles.STRIPS, BLOCK_E=4, BLOCK_K=512,
        num_warps=4,
    )  # fmt: skip
