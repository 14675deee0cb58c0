"""Tubelet embedding: its inputs, the right answer, and how others compute it."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from vivit_kernels import tubelet_embedding
from vivit_kernels.numerics import Verdict, judge
from vivit_kernels.tubelet_embedding import reference

from .cases import TubeletCase
from .peers import Candidate, peer

NAMES = ("tokens", "dweight", "dbias", "dposition")
SCALE, SHIFT = 1 / 127.5, -1.0  # ViViT's range: a pixel u counts as u / 127.5 - 1


class Tubelet:
    """A clip as decoded, uint8 `[B, C, F, Y, X]`, weight `[E, C, f, y, x]`, bias `[E]` and position `[1, N, E]` in the
    dtype, and the gradient `do` `[B, N, E]` of the tokens."""

    checked_share = 1.0

    def __init__(self, case: TubeletCase, dtype: torch.dtype, device: torch.device, seed: int = 0):
        self.case, self.dtype, self.device = case, dtype, device
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

        size = (case.B, case.C, case.F, case.Y, case.X)
        self.video = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8, device=device)
        self.parameters = [
            normal(case.E, case.C, *case.tubelet, std=case.taps**-0.5),
            normal(case.E, std=0.02),
            normal(1, case.tokens, case.E, std=0.02),
        ]
        self.do = normal(case.B, case.tokens, case.E)

    def leaves(self) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in self.parameters]

    def ours(self, backend: str) -> Candidate:
        weight, bias, position = leaves = self.leaves()
        return Candidate(
            leaves, lambda: tubelet_embedding(self.video, weight, bias, position, backend=backend), self.do
        )  # fmt: skip

    def _reference(self, dtype: torch.dtype) -> list[Tensor]:
        weight, bias, position = leaves = [x.to(dtype).detach().requires_grad_() for x in self.parameters]
        scale, shift = [SCALE] * self.case.C, [SHIFT] * self.case.C
        tokens = reference.tubelet_embedding(self.video, weight, bias, position, None, False, scale, shift)
        return [tokens.detach(), *torch.autograd.grad(tokens, leaves, self.do.to(dtype))]

    @cached_property
    def _expected(self) -> tuple[list[Tensor], list[Tensor]]:
        """exact (float64 on the same, quantised inputs) and eager (in the case's dtype)."""
        return self._reference(torch.float64), self._reference(self.dtype)

    def verdicts(self, output: Tensor | None, gradients: list[Tensor]) -> dict[str, Verdict]:
        """The tokens (None: not asked for) and gradients (none, or of weight, bias, position) under the budget."""
        exact, eager = self._expected
        found = [(0, output)] if output is not None else []
        found += list(enumerate(gradients, 1))
        rows = self.case.B * self.case.tokens
        terms = (self.case.taps, rows, rows, self.case.B)  # long sums, which the order of adding decides in float32
        return {NAMES[i]: judge(x, exact[i], eager[i], gradient=i > 0, terms=terms[i]) for i, x in found}


def _normalised(x: Tubelet) -> Tensor:
    return x.video.to(x.dtype) * SCALE + SHIFT


def _conv3d(x: Tubelet, channels_last: bool, normalise: bool) -> Candidate:
    weight, bias, position = leaves = x.leaves()
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    given = None if normalise else _normalised(x).contiguous(memory_format=layout)

    def forward() -> Tensor:
        pixels = _normalised(x) if given is None else given
        pixels, filters = (y.contiguous(memory_format=layout) for y in (pixels, weight))
        tokens = F.conv3d(pixels, filters, bias, stride=x.case.tubelet)
        return tokens.flatten(2).transpose(1, 2) + position

    return Candidate(leaves, forward, x.do)


def _linear(x: Tubelet, normalise: bool) -> Candidate:
    """im2col by a view and one copy, then one matrix product."""
    weight, bias, position = leaves = x.leaves()
    given = None if normalise else _normalised(x)
    f, y, p = x.case.tubelet

    def forward() -> Tensor:
        pixels = _normalised(x) if given is None else given
        B, C, F_, Y, X = pixels.shape
        cut = pixels.view(B, C, F_ // f, f, Y // y, y, X // p, p).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return F.linear(cut.reshape(B, -1, C * f * y * p), weight.flatten(1), bias) + position

    return Candidate(leaves, forward, x.do)


# From uint8, as the case is: these are the peers that count.
peer("tubelet", name="normalise+conv3d")(lambda x: _conv3d(x, channels_last=False, normalise=True))
peer("tubelet", name="normalise+conv3d_channels_last")(lambda x: _conv3d(x, channels_last=True, normalise=True))
peer("tubelet", name="normalise+unfold+linear")(lambda x: _linear(x, normalise=True))
# From a clip that somebody else has normalised and stored as floating point (2 to 4 times the bytes).
peer("tubelet", name="conv3d", ideal=True)(lambda x: _conv3d(x, channels_last=False, normalise=False))
peer("tubelet", name="conv3d_channels_last", ideal=True)(lambda x: _conv3d(x, channels_last=True, normalise=False))
peer("tubelet", name="unfold+linear", ideal=True)(lambda x: _linear(x, normalise=False))


@peer("tubelet", name="compiled_unfold+linear")
def compiled(x: Tubelet) -> Candidate:
    """torch.compile of normalise + unfold + linear: the copy takes the normalisation along."""
    candidate = _linear(x, normalise=True)
    candidate.forward = torch.compile(candidate.forward, dynamic=False)
    return candidate
