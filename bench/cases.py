"""What is measured, by name: shapes that real models run, and the work each one is, computed from the shape alone.

Letters as everywhere: B clips, T temporal and S spatial tokens, H heads, D head size, E = H*D; C, F, Y, X the video's
channels, frames, rows, columns and f, y, x a tubelet's. A case is `<model>.b<clips>` and belongs to one operation.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from vivit.config import nearest

DIRECTIONS = ("forward", "backward", "forward+backward")
# operation of the benchmark: the package in vivit_kernels that runs it
PACKAGES = {
    "temporal": "factorized_attention",
    "spatial": "factorized_attention",
    "dot_product": "factorized_attention",
    "joint": "joint_attention",
    "tubelet": "tubelet_embedding",
}
OPS = tuple(PACKAGES)


@dataclass(frozen=True)
class AttentionCase:
    """Attention on the grid `[B, T, S, H, D]`; joint attention is a grid of one frame (T = 1, S = N).

    rank: 0 belongs to the headline, 1 to every full run, 2 is measured when there is time left.
    """

    op: str
    name: str
    B: int
    T: int
    S: int
    H: int
    D: int
    softcap: float | None = None
    rank: int = 1

    @property
    def temporal_heads(self) -> int:
        return {"temporal": self.H, "dot_product": self.H // 2}.get(self.op, 0)

    @property
    def pairs(self) -> int:
        """Scores computed: query-key pairs over all clips and heads."""
        over_time = self.temporal_heads * self.S * self.T**2
        over_space = (self.H - self.temporal_heads) * self.T * self.S**2
        return self.B * (over_time + over_space)

    @property
    def sequences(self) -> int:
        """Sequences x heads: what peers put into a grid dimension of 65,535."""
        return self.B * (self.temporal_heads * self.S + (self.H - self.temporal_heads) * self.T)

    def flops(self, direction: str) -> int:
        """Two products forward (scores, values), five backward (the scores again, dP, dV, dK, dQ)."""
        products = {"forward": 2, "backward": 5, "forward+backward": 7}[direction]
        return products * 2 * self.pairs * self.D

    def exps(self, direction: str) -> int:
        return self.pairs * {"forward": 1, "backward": 1, "forward+backward": 2}[direction]

    def bytes(self, direction: str, itemsize: int) -> int:
        """Each input read once, each output written once: q, k, v, o forward; q, k, v, do, dq, dk, dv backward."""
        tensors = {"forward": 4, "backward": 7, "forward+backward": 11}[direction]
        return tensors * self.B * self.T * self.S * self.H * self.D * itemsize

    @property
    def shape(self) -> str:
        grid = f"N={self.S}" if self.op == "joint" else f"T={self.T} S={self.S}"
        cap = f" softcap={self.softcap:g}" if self.softcap else ""
        return f"B={self.B} {grid} H={self.H} D={self.D}{cap}"


@dataclass(frozen=True)
class TubeletCase:
    """uint8 video `[B, C, F, Y, X]` -> tokens `[B, T*S, E]`, normalised, with bias and position."""

    op: str
    name: str
    B: int
    F: int
    Y: int
    X: int
    tubelet: tuple[int, int, int]
    E: int
    C: int = 3
    rank: int = 1

    @property
    def tokens(self) -> int:
        f, y, x = self.tubelet
        return (self.F // f) * (self.Y // y) * (self.X // x)

    @property
    def taps(self) -> int:
        f, y, x = self.tubelet
        return self.C * f * y * x

    def flops(self, direction: str) -> int:
        """One product forward, one backward (dW); the video is uint8 and has no gradient."""
        products = {"forward": 1, "backward": 1, "forward+backward": 2}[direction]
        return products * 2 * self.B * self.tokens * self.taps * self.E

    def exps(self, direction: str) -> int:
        return 0

    def bytes(self, direction: str, itemsize: int) -> int:
        """The video in bytes, weight and position, tokens (forward: written, backward: their gradient read)."""
        video = self.B * self.C * self.F * self.Y * self.X
        parameters = (self.E * self.taps + self.E + self.tokens * self.E) * itemsize
        one_way = video + parameters + self.B * self.tokens * self.E * itemsize
        return one_way * (2 if direction == "forward+backward" else 1)

    @property
    def shape(self) -> str:
        return f"B={self.B} {self.F}x{self.Y}x{self.X} tubelet={'x'.join(map(str, self.tubelet))} E={self.E}"


Case = AttentionCase | TubeletCase

# model: frames' grid T, S, heads, head size, and the tubelet embedding in front of it
_VIVIT = {
    "vivit_b_16x2": (16, 196, 12, 64, (32, 224, 224, (2, 16, 16), 768)),
    "vivit_l_16x2": (16, 196, 16, 64, (32, 224, 224, (2, 16, 16), 1024)),
    "vivit_h_14x2": (16, 256, 16, 80, (32, 224, 224, (2, 14, 14), 1280)),
    "vivit_b_16x2_64f": (32, 196, 12, 64, (64, 224, 224, (2, 16, 16), 768)),
    "vivit_b_16x2_128f": (64, 196, 12, 64, (128, 224, 224, (2, 16, 16), 768)),
}


def _vivit(model: str, clips: int, rank: int):
    T, S, H, D, (frames, rows, columns, tubelet, E) = _VIVIT[model]
    name = f"{model}.b{clips}"
    for op in ("temporal", "spatial", "dot_product"):
        yield AttentionCase(op, name, clips, T, S, H, D, rank=rank)
    yield AttentionCase("joint", name, clips, 1, T * S, H, D, rank=rank)
    yield TubeletCase("tubelet", name, clips, frames, rows, columns, tubelet, E, rank=rank)


def _all():
    """Every case, the most important first within a rank."""
    yield from _vivit("vivit_b_16x2", 8, 0)
    yield from _vivit("vivit_b_16x2", 1, 0)
    yield from _vivit("vivit_b_16x2", 32, 1)
    for clips in (1, 8):
        # the factorised encoder: a class row in every frame, then one token per frame and a class row
        yield AttentionCase("spatial", f"vivit_b_16x2_fe.b{clips}", clips, 16, 197, 12, 64)
        yield AttentionCase("joint", f"vivit_b_16x2_fe.b{clips}", clips, 1, 17, 12, 64)
        yield AttentionCase("joint", f"vivit_b_16x2_cls.b{clips}", clips, 1, 3137, 12, 64, rank=0 if clips == 8 else 1)
    for model in ("vivit_l_16x2", "vivit_h_14x2"):
        yield from _vivit(model, 8, 1)
        yield from _vivit(model, 1, 2)
    for model in ("vivit_b_16x2_64f", "vivit_b_16x2_128f"):
        yield from _vivit(model, 8, 2)
        yield from _vivit(model, 1, 2)
    for clips in (1, 8):
        yield AttentionCase("joint", f"videomae_b.b{clips}", clips, 1, 1568, 12, 64)
        yield AttentionCase("temporal", f"timesformer_b.b{clips}", clips, 8, 196, 12, 64)
        yield AttentionCase("spatial", f"timesformer_b.b{clips}", clips, 8, 197, 12, 64)
        yield AttentionCase("temporal", f"videoprism_b.b{clips}", clips, 16, 256, 12, 64, softcap=50.0)
        yield AttentionCase("spatial", f"videoprism_b.b{clips}", clips, 16, 256, 12, 64, softcap=50.0)
    # frames of 160 x 160; and image towers of 72 and 80 channels, whose last block of tokens has one
    for op in ("spatial", "dot_product"):
        yield AttentionCase(op, "vivit_b_16x2_160px.b8", 8, 16, 100, 12, 64, rank=2)
    yield AttentionCase("spatial", "so400m_14_384px.b1", 1, 16, 729, 16, 72, rank=2)
    yield AttentionCase("spatial", "vit_h_14_cls.b1", 1, 16, 257, 16, 80, rank=2)
    # diffusion: two clips, one with and one without the prompt (classifier-free guidance), at the largest resolution
    yield AttentionCase("temporal", "animatediff.b2", 2, 16, 4096, 8, 40)
    yield AttentionCase("temporal", "latte.b2", 2, 16, 1024, 16, 72)
    yield AttentionCase("temporal", "svd_14f.b2", 2, 14, 9216, 5, 64)
    yield AttentionCase("temporal", "svd_25f.b2", 2, 25, 9216, 5, 64)


CASES: tuple[Case, ...] = tuple(_all())

# Small enough for an interpreter, a sanitizer or a test: never in a benchmark, only asked for by name.
SMALL: tuple[Case, ...] = (
    AttentionCase("temporal", "small.b2", 2, 8, 9, 2, 32, rank=2),
    AttentionCase("spatial", "small.b2", 2, 3, 33, 2, 32, rank=2),
    AttentionCase("dot_product", "small.b2", 2, 8, 17, 4, 32, rank=2),
    AttentionCase("joint", "small.b2", 2, 1, 65, 2, 32, rank=2),
    AttentionCase("joint", "small_streamed.b2", 2, 1, 130, 2, 32, rank=2),
    TubeletCase("tubelet", "small.b2", 2, 4, 32, 32, (2, 16, 16), 64, rank=2),
)

_BIG_FOR_A_CPU = 4  # clips; more take minutes a call


def select(ops: list[str], patterns: list[str], on_cpu: bool) -> list[Case]:
    """The cases of these operations (all if none) whose name is, begins with or matches one of the patterns.

    Without a pattern: every case on a GPU, those of up to 4 clips on a CPU. Raises ValueError for a name that fits
    nothing, with the nearest one that does.
    """
    for op in ops:
        if op not in OPS:
            raise ValueError(f"bench: operation {op!r} is not known; {nearest(op, OPS)}")
    chosen = [case for case in CASES + SMALL if not ops or case.op in ops]
    if not patterns:
        return [case for case in chosen if case not in SMALL and not (on_cpu and case.B > _BIG_FOR_A_CPU)]
    names = list(dict.fromkeys(case.name for case in chosen))
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in names):
            raise ValueError(
                f"bench: no case {pattern!r} of {', '.join(ops) or 'any operation'}; {nearest(pattern, names)}"
            )
    return [case for case in chosen if any(_fits(case.name, pattern) for pattern in patterns)]


def _fits(name: str, pattern: str) -> bool:
    return pattern in (name, name.partition(".")[0]) or fnmatch.fnmatchcase(name, pattern)
