"""How many bytes a training step keeps from its forward for its backward, from the configuration alone.

Counted are tensors by their storage, each once, without the parameters: what torch.autograd.graph.saved_tensors_hooks
show. The largest moment of a step is higher by what backward works on, a block's tensors at most. tests/test_memory.py
holds these numbers to what the hooks count.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass

import torch

from vivit_kernels import low_memory

from .config import ViViTConfig, nearest
from .memory import LEVELS, LONGEST_AGAIN, check

KINDS = ("video", "block inputs", "norms", "qkv", "attention", "hidden", "gelu", "dropout", "weight copies", "other")
PRECISIONS = {"float64": 8, "float32": 4, "autocast": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Step:
    """What runs: a level of memory.LEVELS, clips at once, a precision of PRECISIONS, "cpu" or "cuda".

    offload: whether the inputs of blocks wait in the host's memory, counted by `on_host` alone.
    sequence: processes that share a clip; the first is counted, whose part is the largest (sequence_parallel.py).
    """

    memory: str = "fast"
    clips: int = 1
    precision: str = "float32"
    device: str = "cpu"
    offload: bool = False
    sequence: int = 1

    def __post_init__(self):
        check(self.memory, "footprint", self.offload)
        if self.precision not in PRECISIONS:
            rule = nearest(self.precision, PRECISIONS)
            raise ValueError(f"footprint: precision={self.precision!r} is not known; {rule}")

    @property
    def size(self) -> int:
        """Bytes of a number that a product makes or reads."""
        return PRECISIONS[self.precision]

    def without_gelu(self, rows: int, config: ViViTConfig, hidden: int) -> bool:
        """Whether plain code keeps no output of the GELU: vivit_kernels.mlp, where its products are convolutions."""
        dtype = torch.bfloat16 if self.size == 2 else getattr(torch, self.precision)
        return (
            self.device == "cpu" and not config.dropout and low_memory.gelu_again(rows, config.embedding, hidden, dtype)
        )


def activations(config: ViViTConfig, step: Step) -> Counter[str]:
    """Bytes by kind (KINDS) that `ViViT(config, memory=step.memory)` in training keeps of a forward of `step.clips`.

    activations(ViViTConfig.preset("B/16x2"), Step("small", precision="autocast")).total()
    """
    E, T, cls = config.embedding, config.T, int(config.has_class_token)
    many, length = _sequences(config, step)
    kept: Counter[str] = Counter()
    kept["video"] = step.clips * config.channels * config.height * config.width * _frames(config)
    kept["dropout"] += many * length * E * _mask(config.dropout, step)
    if step.sequence > 1 and cls and config.attention != "factorized_encoder":
        kept["other"] += length * E * (4 if step.precision == "autocast" else step.size)  # positions: no view of all
    for number, over in enumerate(config.layers):
        alone = bool(cls) and number == config.depth - 1
        if not step.offload or number == config.depth - 1:
            kept += _block(config, step, over, many, length, alone, step.size, config.heads, config.mlp)
    rows = many if cls else many * length
    kept["other"] += rows * (E * _norm_size(step, step.size) + 8)
    if config.temporal_depth:
        step = dataclasses.replace(step, sequence=1)  # each process computes all of it
        size = 4 if step.precision == "autocast" else step.size  # positions are added outside of any product
        kept["dropout"] += step.clips * (T + cls) * E * _mask(config.dropout, step, size)
        heads, mlp = config.temporal_heads or config.heads, config.temporal_mlp or config.mlp
        for _ in range(config.temporal_depth):
            kept += _block(config, step, "joint", step.clips, T + cls, False, size, heads, mlp)
        kept["other"] += step.clips * (T + cls) * (E * size + 8)
    kept["other"] += step.clips * E * step.size
    kept["weight copies"] += weight_copies(config, step, inside=step.memory == "fast")
    return kept


def on_host(config: ViViTConfig, step: Step) -> int:
    """Bytes of the host's memory that the inputs of blocks take with `offload`."""
    return config.depth * block_kept(config, step).total() if step.offload else 0


def block_kept(config: ViViTConfig, step: Step) -> Counter[str]:
    """Bytes by kind that a layer in the middle keeps."""
    return _block(config, step, config.layers[0], *_sequences(config, step), False, step.size, config.heads, config.mlp)


def per_token(config: ViViTConfig, step: Step) -> float:
    """Bytes that a layer in the middle keeps of each token."""
    many, length = _sequences(config, step)
    return block_kept(config, step).total() / (many * length)


def table(config: ViViTConfig, clips: int, precision: str, device: str, sequence: int = 1) -> list[str]:
    """Lines for a terminal: what each level keeps, of a token in a layer and of a batch; of a process's part of clips
    that lie on `sequence` processes."""
    what = f"{clips} clips in all" if sequence == 1 else f"its part of {clips} clips"
    lines = [f"training     kept for backward ({precision}, {device})  a token and layer  {what}"]
    for level in LEVELS:
        step = Step(level, clips, precision, device, sequence=sequence)
        total = activations(config, step).total() / 2**20
        lines.append(f"{'':<13}{f'memory = {level!r}':<37}{per_token(config, step):>12,.0f} bytes{total:>15,.0f} MiB")
    step = Step("smallest", clips, precision, device, offload=True, sequence=sequence)
    total, host = activations(config, step).total() / 2**20, on_host(config, step) / 2**20
    told = f"{total:>15,.0f} MiB, and {host:,.0f} MiB of the host's memory"
    return [
        *lines,
        f"{'':<13}{'  with offload = true':<37}{per_token(config, step) / config.depth:>12,.0f} bytes{told}",
    ]


def _sequences(config: ViViTConfig, step: Step) -> tuple[int, int]:
    """(how many, tokens of each) that a process has between attentions."""
    cls, t = int(config.has_class_token), math.ceil(config.T / step.sequence)
    if config.attention == "factorized_encoder":
        return step.clips * t, config.S + cls
    return step.clips, t * config.S + cls


def _block(
    config: ViViTConfig, step: Step, over: str, many: int, length: int, alone: bool, stream: int, heads: int, mlp: int
) -> Counter[str]:
    """`many` sequences of `length` tokens; `alone`: only the class row leaves. `stream`: bytes of a number of x."""
    E, size, fast = config.embedding, step.size, step.memory == "fast"
    tokens, rows = many * length, many if alone else many * length
    kept: Counter[str] = Counter()
    kept["block inputs"] = tokens * E * stream
    if step.memory == "smallest":
        return kept
    attentions = 2 if over in ("space_time", "time_space") else 1
    norm_input = _norm_size(step, stream) if fast else stream
    asked = tokens * attentions  # and along time, of a clip on several processes, the tokens of its positions
    if attentions == 2:
        asked = tokens + many * config.T * math.ceil(config.S / step.sequence)
    kept["block inputs"] = (tokens * attentions if fast else asked) * E * norm_input
    kept["block inputs"] += rows * E * norm_input  # the MLP's
    kept["qkv"] = asked * 3 * E * size
    if over == "dot_product" and step.sequence > 1 and step.memory != "small":
        kept["qkv"] += asked * 3 * E * size // 2  # the temporal half on its way, beside the whole
    lengths = {"joint": [length * step.sequence], "space": [length], "dot_product": [max(config.T, config.S)]}
    for keys in lengths.get(over, [config.S, config.T]):
        again = step.memory == "small" and keys <= LONGEST_AGAIN and not alone
        kept["attention"] += 0 if again else rows * E * size
        kept["attention"] += rows * heads * 8 if keys > LONGEST_AGAIN and size == 2 else 0  # a row's maximum and sum
    kept["hidden"] = 0 if step.memory == "small" else rows * mlp * size
    if fast:
        kept["norms"] = tokens * attentions * (E * size + 8) + rows * (E * size + 8)  # outputs, means and deviations
        kept["gelu"] = 0 if step.without_gelu(rows, config, mlp) else rows * mlp * size
        kept["dropout"] = rows * (E * (attentions + 1) + mlp) * _mask(config.dropout, step)
    return kept


def _frames(config: ViViTConfig) -> int:
    return config.T if config.tokenization == "uniform" else config.frames


def _norm_size(step: Step, stream: int) -> int:
    """Bytes of a number that a norm of plain code keeps of its input: under autocast a GPU's norm is float32."""
    return max(stream, 4) if step.precision == "autocast" and step.device != "cpu" else stream


def _mask(p: float, step: Step, size: int = 0) -> int:
    """Bytes of an element's mask in PyTorch's dropout: what it multiplies by, on a GPU whether it is kept."""
    return 0 if p == 0 else (size or step.size) if step.device == "cpu" else 1


def weight_copies(config: ViViTConfig, step: Step, inside: bool = True) -> int:
    """Bytes of the weights in the dtype of the products, which autocast makes once more; `inside`: those of blocks too.

    Plain code keeps them all until backward, other levels those outside of blocks.
    """
    if step.precision != "autocast":
        return 0
    E, mlp = config.embedding, config.temporal_mlp or config.mlp
    f, y, x = config.tubelet
    outside = E * config.channels * f * y * x + (config.representation or E) * sum(config.head_sizes)
    outside += E * (config.representation or 0)
    attentions = sum(2 if over in ("space_time", "time_space") else 1 for over in config.layers)
    within = attentions * 4 * E * E + config.depth * 2 * E * config.mlp
    within += config.temporal_depth * (4 * E * E + 2 * E * mlp)
    return step.size * (outside + (within if inside else 0))
