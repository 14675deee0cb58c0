"""How much work one clip is, from the configuration alone: no model is built and no memory taken.

Two counts are in use. Multiply-accumulates of convolutions and matrix products are what most tools report. The paper's
"FLOPs" are half of what XLA's cost analysis counts for Scenic's model: a product of n x k by k x m counts 2nkm, every
element that an addition, product, quotient or maximum writes counts 1, a reduction counts what it removes (inputs less
outputs), and exp, tanh and rsqrt count 0. Per element that gives LayerNorm 7 (and 2 per row), GELU 8, softmax 4 (less 1
per row), 1 for each bias, residual, position and for scaling q.

XLA adds these up in float32, one instruction at a time, which at 1e12 rounds each sum to 65536. `Count.xla_flops` adds
the same numbers in the same order and so equals every entry of tests/fixtures/flops_params.json to the last bit;
`Count.flops` is the exact sum (at most 4e-6 away).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .config import ViViTConfig


class Operation(NamedTuple):
    name: str
    flops: int
    is_product: bool = False  # a convolution or matrix product


@dataclass(frozen=True)
class Count:
    """One clip, forward. macs: of convolutions and matrix products; flops: all; xla_flops: all, in XLA's float32."""

    macs: int
    flops: int
    xla_flops: float

    @property
    def paper_gflops(self) -> float:
        """The paper's GFLOPs (table 2: 455.2 for model 1 at B/16x2)."""
        return self.xla_flops / 2e9


def count(config: ViViTConfig) -> Count:
    """The work of `ViViT(config)` for one clip.

    count(ViViTConfig.preset("B/16x2")).paper_gflops  # 455.209
    """
    work = list(operations(config))
    total = np.float32(0)
    for operation in work:
        total += np.float32(operation.flops)
    products = sum(operation.flops for operation in work if operation.is_product)
    return Count(products // 2, sum(operation.flops for operation in work), float(total))


def operations(config: ViViTConfig) -> Iterator[Operation]:
    """Every operation that counts, in the order in which Scenic's model comes to it."""
    T, S, E = config.T, config.S, config.embedding
    tubelet = config.channels * config.tubelet[0] * config.tubelet[1] * config.tubelet[2]
    per_frame, cls = config.attention == "factorized_encoder", int(config.has_class_token)
    yield from _dense("tubelets", T * S, tubelet, E)
    frames, tokens = (T, S + cls) if per_frame else (1, T * S + cls)
    yield Operation("position", frames * tokens * E)
    for over in config.layers:
        yield from _block(over, frames, tokens, (T, S), E, config.heads, config.mlp)
    yield from _layer_norm(frames * tokens, E)
    yield from _pool(config.pool, frames, tokens, E)
    if config.temporal_depth:
        heads, mlp = config.temporal_heads or config.heads, config.temporal_mlp or config.mlp
        yield Operation("position", (T + cls) * E)
        for _ in range(config.temporal_depth):
            yield from _block("joint", 1, T + cls, (T, 1), E, heads, mlp)
        yield from _layer_norm(T + cls, E)
        yield from _pool(config.pool, 1, T + cls, E)
    elif per_frame:
        yield from _pool("mean", 1, T, E)
    if config.representation:
        yield from _dense("representation", 1, E, config.representation)
    yield from _dense("head", 1, config.representation or E, sum(config.head_sizes))


def _block(
    over: str, frames: int, tokens: int, grid: tuple[int, int], E: int, heads: int, mlp: int
) -> Iterator[Operation]:
    """`frames` sequences of `tokens` each; the factorised layers see them as a grid of T x S."""
    n, (T, S) = frames * tokens, grid
    # (sequences, their length, heads that attend so)
    space, time = (T, S, heads), (S, T, heads)
    steps = {
        "joint": [[(frames, tokens, heads)]],
        "space": [[(frames, tokens, heads)]],
        "space_time": [[space], [time]],
        "time_space": [[time], [space]],
        "dot_product": [[(S, T, heads // 2), (T, S, heads // 2)]],
    }[over]
    for sequences in steps:
        yield from _layer_norm(n, E)
        yield from _attention(n, E, E // heads, sequences)
        yield Operation("residual", n * E)
    yield from _layer_norm(n, E)
    yield from _dense("fc1", n, E, mlp)
    yield from (Operation("gelu", n * mlp) for _ in range(8))  # x^3 is two products; tanh counts 0
    yield from _dense("fc2", n, mlp, E)
    yield Operation("residual", n * E)


def _attention(n: int, E: int, size: int, sequences: list[tuple[int, int, int]]) -> Iterator[Operation]:
    yield from _dense("v", n, E, E)
    yield from _dense("q", n, E, E)
    yield Operation("scale", n * E)
    yield from _dense("k", n, E, E)
    for many, length, heads in sequences:
        rows, pairs = many * length * heads, many * length * length * heads
        yield Operation("scores", 2 * pairs * size, True)
        yield Operation("softmax", pairs - rows)  # maximum of each row
        yield Operation("softmax", rows)  # and of that and its initial -inf
        yield Operation("softmax", pairs)  # subtract it; exp counts 0
        yield Operation("softmax", pairs - rows)  # sum
        yield Operation("softmax", pairs)  # divide
        yield Operation("values", 2 * pairs * size, True)
    yield from _dense("proj", n, E, E)


def _dense(name: str, rows: int, inputs: int, outputs: int) -> Iterator[Operation]:
    yield Operation(name, 2 * rows * inputs * outputs, True)
    yield Operation(f"{name} bias", rows * outputs)


def _layer_norm(rows: int, E: int) -> Iterator[Operation]:
    """flax's: mean and mean of squares, var = max(0, mean(x^2) - mean(x)^2)."""
    whole = rows * E
    per_operation = (whole - rows, rows, whole, whole - rows, rows, rows, rows, rows, whole, rows, whole, whole, whole)
    yield from (Operation("norm", flops) for flops in per_operation)


def _pool(how: str | None, many: int, tokens: int, E: int) -> Iterator[Operation]:
    if how != "cls":  # the class row is read for nothing
        yield Operation("pool", many * (tokens - 1) * E)
    if how == "mean":
        yield Operation("pool", many * E)


def parameters(config: ViViTConfig) -> int:
    """Parameters of `ViViT(config)`."""
    T, S, E = config.T, config.S, config.embedding
    cls, per_frame = int(config.has_class_token), config.attention == "factorized_encoder"
    f, y, x = config.tubelet
    attentions = sum(2 if over in ("space_time", "time_space") else 1 for over in config.layers)
    total = (config.channels * f * y * x + 1) * E
    total += ((1 if per_frame else T) * S + cls + cls) * E  # positions and the class token
    total += attentions * _attention_parameters(E) + config.depth * _mlp_parameters(E, config.mlp) + 2 * E
    if config.temporal_depth:
        layer = _attention_parameters(E) + _mlp_parameters(E, config.temporal_mlp or config.mlp)
        total += (T + cls + cls) * E + config.temporal_depth * layer + 2 * E
    width = config.representation or E
    return total + (width * (E + 1) if config.representation else 0) + (width + 1) * sum(config.head_sizes)


def block_parameters(config: ViViTConfig) -> tuple[int, int]:
    """(parameters of the largest block, of all blocks), temporal encoder included."""
    E = config.embedding
    sizes = [
        (2 if over in ("space_time", "time_space") else 1) * _attention_parameters(E) + _mlp_parameters(E, config.mlp)
        for over in config.layers
    ]
    sizes += [_attention_parameters(E) + _mlp_parameters(E, config.temporal_mlp or config.mlp)] * config.temporal_depth
    return max(sizes), sum(sizes)


def _attention_parameters(E: int) -> int:
    return 4 * E * (E + 1) + 2 * E  # with its norm


def _mlp_parameters(E: int, mlp: int) -> int:
    return 2 * E * mlp + mlp + E + 2 * E
