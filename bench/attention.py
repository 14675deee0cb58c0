"""The inputs of an attention case, what the right answer is, and how far a result is from it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from vivit_kernels import factorized_attention, joint_attention
from vivit_kernels._attention.options import Options
from vivit_kernels.factorized_attention import reference as factorized_reference
from vivit_kernels.joint_attention import reference as joint_reference
from vivit_kernels.numerics import Verdict, judge

from .cases import AttentionCase
from .peers import Candidate

NAMES = ("o", "dq", "dk", "dv")
_MOST_BYTES = 1 << 29  # of one float64 score matrix in the reference
# FLOPs of the float64 reference, forward and backward: a few seconds. Above, a part of the heads and clips is compared.
_MOST_FLOPS = {"cpu": 1.2e11, "cuda": 2e13}


class Attention:
    """Packed projections `qkv` `[B, T, S, 3, H, D]` as a linear layer writes them, and the gradient `do` of the output.

    What a model needs back is o `[B, T, S, H, D]`, contiguous, and the gradient of qkv.
    """

    def __init__(self, case: AttentionCase, dtype: torch.dtype, device: torch.device, seed: int = 0):
        self.case, self.dtype, self.device = case, dtype, device
        generator = torch.Generator(device).manual_seed(seed)
        shape = (case.B, case.T, case.S, case.H, case.D)
        self.qkv = torch.randn(*shape[:3], 3, *shape[3:], generator=generator, device=device).to(dtype)
        self.do = torch.randn(shape, generator=generator, device=device).to(dtype)

    def ours(self, backend: str) -> Candidate:
        """This project's public function on one backend."""
        case, qkv = self.case, self.qkv.detach().requires_grad_()

        def forward() -> Tensor:
            if case.op == "joint":
                return joint_attention(qkv.flatten(1, 2), softcap=case.softcap, backend=backend).unflatten(1, (1, -1))
            return factorized_attention(
                qkv, temporal_heads=case.temporal_heads, softcap=case.softcap, backend=backend
            )  # fmt: skip

        return Candidate([qkv], forward, self.do, gradients=unpacked)

    # -- the truth ----------------------------------------------------------------------------------------------------
    def _slices(self) -> Iterator[tuple[int, slice]]:
        """Every (clip, heads) that the reference computes at a time, from both ends inwards: heads of one kind."""
        case = self.case
        largest = max(case.T * case.S * (case.T if over_time else case.S) for over_time in _kinds(case))
        together = max(1, _MOST_BYTES // (8 * largest))
        heads = []
        for first, last in ((0, case.temporal_heads), (case.temporal_heads, case.H)):
            heads += [slice(h, min(h + together, last)) for h in range(first, last, together)]
        parts = [(b, h) for b in range(case.B) for h in heads]
        while parts:
            yield parts.pop(0)
            if parts:
                yield parts.pop()

    @cached_property
    def checked(self) -> list[tuple[int, slice]]:
        """The parts of the grid that are compared: all, or what the reference can do in a few seconds."""
        case, parts, flops = self.case, [], 0.0
        for clip, heads in self._slices():
            keys = case.T if heads.start < case.temporal_heads else case.S
            flops += 14 * case.T * case.S * keys * case.D * (heads.stop - heads.start)
            if parts and flops > _MOST_FLOPS[self.device.type]:
                break
            parts.append((clip, heads))
        return parts

    @property
    def checked_share(self) -> float:
        return sum(heads.stop - heads.start for _, heads in self.checked) / (self.case.B * self.case.H)

    def _reference(self, dtype: torch.dtype) -> list[Tensor]:
        """(o, dq, dk, dv) of the checked parts, end to end, by the definition in `dtype`."""
        case, results = self.case, []
        options = Options(case.D**-0.5, case.softcap or 0.0)
        for clip, heads in self.checked:
            q, k, v = (x[clip : clip + 1, :, :, heads].to(dtype).requires_grad_() for x in self.qkv.unbind(3))
            if case.op == "joint":
                q_, k_, v_ = (x.flatten(1, 2) for x in (q, k, v))  # [B, N, H, D]
                o = joint_reference.joint_attention(q_, k_, v_, options).unflatten(1, (1, -1))
            else:
                over_time = q.shape[3] if heads.start < case.temporal_heads else 0
                o = factorized_reference.factorized_attention(q, k, v, over_time, options)
            do = self.do[clip : clip + 1, :, :, heads].to(dtype)
            results.append([o.detach(), *torch.autograd.grad(o, (q, k, v), do)])
        return [torch.cat([x.flatten() for x in parts]) for parts in zip(*results, strict=True)]

    @cached_property
    def _expected(self) -> tuple[list[Tensor], list[Tensor]]:
        """exact (float64 on the same, quantised inputs) and eager (in the case's dtype) of the checked parts."""
        return self._reference(torch.float64), self._reference(self.dtype)

    def verdicts(self, output: Tensor | None, gradients: list[Tensor]) -> dict[str, Verdict]:
        """The output (None: not asked for) and gradients (none, or dq, dk, dv) of the whole case under the budget."""
        exact, eager = self._expected
        found = {"o": output} if output is not None else {}
        found |= dict(zip(NAMES[1:], gradients, strict=True)) if gradients else {}
        return {name: self._judge(name, x, exact, eager) for name, x in found.items()}

    def _judge(self, name: str, x: Tensor, exact: list[Tensor], eager: list[Tensor]) -> Verdict:
        expected = (self.case.B, self.case.T, self.case.S, self.case.H, self.case.D)
        if tuple(x.shape) != expected or x.dtype != self.dtype:
            raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}, not {expected} {self.dtype}")
        i = NAMES.index(name)
        parts = torch.cat([x[clip, :, :, heads].flatten() for clip, heads in self.checked])
        if not torch.isfinite(x).all():  # also where nothing is compared
            parts = parts.fill_(float("nan"))
        return judge(parts, exact[i], eager[i], gradient=i > 0)


def _kinds(case: AttentionCase) -> list[bool]:
    return [True] * (case.temporal_heads > 0) + [False] * (case.temporal_heads < case.H)


def unpacked(gradients: list[Tensor]) -> list[Tensor]:
    """The packed gradient `[B, T, S, 3, H, D]` as dq, dk, dv."""
    return list(gradients[0].unbind(3))
