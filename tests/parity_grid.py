"""The parity grid: which combinations are run, how their inputs are made, and how one is judged against float64."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from vivit_kernels import rotary_tables
from vivit_kernels.numerics import judge

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ATTENTION_AXES = {
    "dtype": DTYPES,
    "D": [8, 12, 32, 40, 64, 72, 80, 96, 128, 160],
    "layout": ["packed", "separate", "heads_first", "sliced"],
    "inputs": ["normal", "large", "constant", "dominant"],
    "mask": [None, "some", "a clip has none"],
    "dropout_p": [0.0, 0.3],
    "extra": [None, "softcap", "rotary", "scale"],
}


def pairwise(axes: dict[str, list], seed: int = 0) -> list[dict]:
    """A short list of combinations in which every pair of values of two axes occurs (greedy, repeatable)."""
    names, rng = list(axes), random.Random(seed)
    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in range(len(axes[a]))
        for y in range(len(axes[b]))
    }
    cases = []
    while missing:
        best, covered = {}, set()
        for _ in range(60):
            a, x, b, y = rng.choice(sorted(missing))
            pick = {name: rng.randrange(len(axes[name])) for name in names} | {a: x, b: y}
            hits = {m for m in missing if pick[m[0]] == m[1] and pick[m[2]] == m[3]}
            if len(hits) > len(covered):
                best, covered = pick, hits
        missing -= covered
        cases.append({name: axes[name][i] for name, i in best.items()})
    return cases


def crossed(axes: dict[str, list], names: list[str]) -> list[dict]:
    """Every product of the named axes; the other axes cycle through their values, each at its own pace."""
    cases = [dict(zip(names, values, strict=True)) for values in itertools.product(*(axes[name] for name in names))]
    others = [name for name in axes if name not in names]
    rng = random.Random(0)
    return [case | {name: rng.choice(axes[name]) for name in others} for case in cases]


def _name(case: dict) -> str:
    return "-".join(f"{key}={value}".replace("torch.", "").replace(" ", "") for key, value in case.items())


def grid(axes: dict[str, list], crosses: list[list[str]], every_run: dict[str, list] | None = None) -> list:
    """pytest parameters: a pairwise cover of all axes in every run, every product of `crosses` in `make test-full`.

    every_run: shorter axes for the cover of every run, where a case takes seconds."""
    cover = [pytest.param(case, id=_name(case)) for case in pairwise(axes | (every_run or {}))]
    full = [case for names in crosses for case in crossed(axes, names)]
    return cover + [pytest.param(case, id="full-" + _name(case), marks=pytest.mark.full) for case in full]


def make_inputs(kind: str, q_shape: tuple, k_shape: tuple, device) -> list[torch.Tensor]:
    """q, k, v that are hard on a softmax: large scores, equal rows, one key far above all others."""
    q, k, v = (torch.randn(shape, device=device) for shape in (q_shape, k_shape, k_shape))
    if kind == "constant":
        q, k, v = (x[:, :1].expand(x.shape) + 0.0 for x in (q, k, v))
    if kind == "dominant":
        k[:, k_shape[1] // 2] *= 6
    return [q * 4, k * 4, v] if kind == "large" else [q, k, v]


def cancels(case: dict, keys: int) -> bool:
    """Whether the terms of dq and dk cancel down to their roundings: a single key, equal rows; and, in float32, whose
    own roundings are small enough to show it, a key with nearly all of the probability (0.98, one query of 129 keys: dq
    errs by 7e-7 with delta = sum(p * dP), by 16e-7 with the equal sum(do * o), and eager by 4e-7)."""
    hard = {torch.float64: True, torch.float32: case["inputs"] == "dominant"}
    return keys == 1 or case["inputs"] == "constant" or hard.get(case["dtype"], False)


def gradient_scales(q, k, v, do, scale: float) -> dict[str, float]:
    """The size of the terms of dq and dk, dP * k * scale, which cancel where the scores of a row hardly matter: a
    single key, equal rows, one key with all the probability."""
    size = float(do.norm(dim=-1).max() * v.norm(dim=-1).max() * max(k.abs().max(), q.abs().max()) * scale)
    return {"dq": size, "dk": size}


def lay_out(q, k, v, layout: str) -> list:
    if layout == "packed" and q.shape == k.shape:
        return [torch.stack([q, k, v], -3)]
    if layout == "heads_first":
        return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    if layout == "sliced":  # rows within a wider buffer of NaN: what lies around the tensor must not be read
        return [F.pad(x, (0, 8), value=float("nan"))[..., : x.shape[-1]] for x in (q, k, v)]
    return [q, k, v]


def make_options(case: dict, grid: tuple, key_grid: tuple, device) -> dict:
    """Keyword arguments of an attention op for a case; grid is (B, N) or (B, T, S)."""
    options = {
        "dropout_p": case["dropout_p"],
        "seed": torch.tensor([2**40 + 7, 3], device=device) if case["dropout_p"] else None,
    }
    if case["mask"]:
        options["key_mask"] = torch.rand(key_grid, device=device) < 0.7
        options["key_mask"][..., 0] = True
        if case["mask"] == "a clip has none":
            options["key_mask"][0] = False
    if case["extra"] == "softcap":
        options["softcap"] = 5.0
    if case["extra"] == "scale":
        options["scale"] = 0.3
    if case["extra"] == "rotary" and grid == key_grid:
        frames, rows, columns = (*grid[1:], 1, 1)[:3]
        tables = rotary_tables(frames, rows, columns, case["D"], device=device)
        options["rotary"] = tuple(table.reshape(*grid[1:], -1) for table in tables)
    return options


def run(function, tensors: list, do: torch.Tensor, dtype: torch.dtype, packed: bool) -> list:
    """[output, *gradients] of `function(*tensors)`, floating tensors in `dtype`; a packed gradient in its parts."""
    leaves = [x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in tensors]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, [x for x in leaves if x.requires_grad], do.to(out.dtype))
    return [out, *(gradients[0].unbind(-3) if packed else gradients)]


def check(
    actual_fn, reference_fn, tensors: list, do: torch.Tensor, dtype: torch.dtype, names: list[str], scales=None, terms=1
) -> None:
    """Output and gradients of `actual_fn` against `reference_fn` in float64, under the one error budget.

    scales: by name, and terms, of the output: see `judge`."""
    quantised = [x.to(dtype) if x.is_floating_point() else x for x in tensors]
    do = do.to(dtype)
    packed = "dq" in names and len(tensors) == 1
    exact = run(reference_fn, quantised, do, torch.float64, packed)
    eager = run(reference_fn, quantised, do, dtype, packed)
    actual = run(actual_fn, quantised, do, dtype, packed)
    for i, name in enumerate(names):
        assert actual[i].dtype == dtype
        scale, summed = (scales or {}).get(name), terms if i == 0 else 1
        row = exact[i].shape[-1] if "dq" in names else 1  # the channels of a token
        verdict = judge(actual[i], exact[i], eager[i], gradient=i > 0, scale=scale, terms=summed, row=row)
        assert verdict.ok, f"{name}: {verdict}"
