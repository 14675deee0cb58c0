"""Every backend of this project on the smallest cases, forward and backward, against float64: for a sanitizer.

    python -m bench.smoke [--device cpu|cuda] [--backend NAME ...] [--only TEXT] [--brief] [--jobs N] [--no-poison]

One line per call with its verdict under the error budget; exit status 0 if all of them are within it. Inputs are made
and results are judged on the CPU, so that on a GPU hardly anything runs but the kernels under test.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vivit_kernels import _environment, factorized_attention, joint_attention, rotary_tables, tubelet_embedding
from vivit_kernels._attention.options import check_options
from vivit_kernels.factorized_attention import reference as factorized_reference
from vivit_kernels.joint_attention import reference as joint_reference
from vivit_kernels.numerics import judge
from vivit_kernels.tubelet_embedding import api as tubelet_api
from vivit_kernels.tubelet_embedding import reference as tubelet_reference

from .cases import SMALL, AttentionCase, Case, TubeletCase

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EVERYTHING = ("mask", "dropout", "softcap", "rotary")
# (options, layout of q, k and v, dtype): each option by itself, and all of them at once
ATTENTION: tuple[tuple[tuple[str, ...], str, torch.dtype], ...] = (
    ((), "packed", BF16),
    ((), "packed", FP16),
    ((), "packed", FP32),
    ((), "sliced", BF16),
    *(((option,), "packed", BF16) for option in EVERYTHING),
    (EVERYTHING, "heads first", FP16),
)
# (kind of video, its layout, how it lies, class row per, dtype of the tokens)
TUBELET: tuple[tuple[str, str, str, str | None, torch.dtype], ...] = (
    ("uint8", "BCFYX", "contiguous", None, BF16),
    ("uint8", "BCFYX", "contiguous", None, FP16),
    ("uint8", "BCFYX", "contiguous", None, FP32),
    ("uint8", "BFYXC", "contiguous", "frame", BF16),
    ("uint8", "BFCYX", "sliced", "clip", BF16),
    ("float video", "BCFYX", "sliced", "clip", FP16),
)
# Every kernel with its least and its most, where there is no time for each option by itself.
BRIEF = tuple(ATTENTION[i] for i in (0, 2, -1))
BRIEF_TUBELET = tuple(TUBELET[i] for i in (0, 2, 3, -1))


@dataclass(frozen=True)
class Trial:
    """One call: its inputs on the CPU in the dtype under test, how each lies in memory, and what the right answer is.

    names: of the output and of the gradients, in the order of `run`. terms, row: see `judge`.
    """

    label: str
    inputs: list[Tensor]
    layouts: list[str]
    grad_output: Tensor
    names: tuple[str, ...]
    call: Callable[[list[Tensor], str], Tensor]
    defined: Callable[[list[Tensor]], Tensor]
    terms: int = 1
    row: int = 1


class Result(NamedTuple):
    """verdict: "ok", "WRONG" (outside the error budget), "CRASHED" or "refused" (no kernel for this call)."""

    verdict: str
    backend: str
    label: str
    detail: str

    def __str__(self) -> str:
        return f"{self.verdict:<8}{self.backend:<8}{self.label:<59} {self.detail}"


# -- the calls --------------------------------------------------------------------------------------------------------


def trials(brief: bool = False) -> Iterator[Trial]:
    """Every call, the plainest of all operations first: a run that is cut short has seen each of them."""
    options, videos = (BRIEF, BRIEF_TUBELET) if brief else (ATTENTION, TUBELET)
    attention = [case for case in SMALL if isinstance(case, AttentionCase)]
    tubelet = [case for case in SMALL if isinstance(case, TubeletCase)]
    for i in range(max(len(options), len(videos))):
        if i < len(options):
            yield from (_attention(case, *options[i]) for case in attention)
        if i < len(videos):
            yield from (_tubelet(case, *videos[i]) for case in tubelet)


def _label(case: Case, dtype: torch.dtype, *words: str) -> str:
    plain = ("", "packed", "contiguous", "BCFYX", "uint8")
    return " ".join([case.op, case.name, str(dtype).removeprefix("torch."), *(x for x in words if x not in plain)])


def _attention(case: AttentionCase, named: tuple[str, ...], layout: str, dtype: torch.dtype) -> Trial:
    generator = torch.Generator().manual_seed(0)
    grid = (case.S,) if case.op == "joint" else (case.T, case.S)
    shape = (case.B, *grid, case.H, case.D)
    q, k, v, do = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    options = _options(named, case, grid, generator)

    def call(x: list[Tensor], backend: str) -> Tensor:
        there = {name: _to(value, x[0].device) for name, value in options.items()}
        if case.op == "joint":
            return joint_attention(*x, backend=backend, **there)
        return factorized_attention(*x, temporal_heads=case.temporal_heads, backend=backend, **there)

    def defined(x: list[Tensor]) -> Tensor:
        q, k, v = x if len(x) == 3 else x[0].unbind(-3)
        nothing = dict.fromkeys(("scale", "key_mask", "seed", "rotary", "softcap")) | {"dropout_p": 0.0}
        checked = check_options("smoke", q, q.shape[1:-2].numel(), grid, **(nothing | options))
        if case.op == "joint":
            return joint_reference.joint_attention(q, k, v, checked)
        return factorized_reference.factorized_attention(q, k, v, case.temporal_heads, checked)

    inputs = [torch.stack([q, k, v], -3)] if layout == "packed" else [q, k, v]
    label = _label(case, dtype, "every option" if len(named) > 1 else "".join(named), layout)
    return Trial(label, inputs, [layout] * len(inputs), do, ("o", "dq", "dk", "dv"), call, defined, row=case.D)


def _options(named: tuple[str, ...], case: AttentionCase, grid: tuple[int, ...], generator) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "mask" in named:
        mask = torch.rand(case.B, *grid, generator=generator) < 0.7
        mask[..., 0] = True
        mask[0] = False  # a clip without any key: its rows are zero
        options["key_mask"] = mask
    if "dropout" in named:
        options |= {"dropout_p": 0.3, "seed": torch.tensor([2**40 + 7, 3])}
    if "softcap" in named:
        options["softcap"] = 5.0
    if "rotary" in named:
        frames, columns = grid if len(grid) == 2 else (grid[0], 1)
        tables = rotary_tables(frames, columns, 1, case.D)
        options["rotary"] = tuple(table.reshape(*grid, -1) for table in tables)
    return options


def _tubelet(case: TubeletCase, kind: str, layout: str, lies: str, per: str | None, dtype: torch.dtype) -> Trial:
    generator = torch.Generator().manual_seed(0)
    (f, y, x), E, border = case.tubelet, case.E, 3 if lies == "sliced" else 0  # a border that fills no tubelet
    rows = {"frame": case.tokens // (case.F // f), "clip": case.tokens}[per or "clip"] + (per is not None)
    size = (case.B, case.C, case.F, case.Y + border, case.X + border)
    video = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    order = tubelet_api._LAYOUTS[layout]
    video = video.permute([order.index(i) for i in range(5)]).contiguous()
    uint8 = kind == "uint8"

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(dtype)

    weight = normal(E, case.C, f, y, x, std=case.taps**-0.5)
    inputs = [video if uint8 else (video / 255).to(dtype), weight, normal(E, std=0.02), normal(1, rows, E, std=0.02)]
    inputs += [normal(1, 1, E, std=0.02)] if per else []
    frames = (case.F // f,) if per == "frame" else ()

    def call(given: list[Tensor], backend: str) -> Tensor:
        return tubelet_embedding(*given, class_token_per=per or "clip", layout=layout, backend=backend)

    def defined(given: list[Tensor]) -> Tensor:
        video, weight, bias, position, *class_row = given
        pixels, class_token = video.permute(order), class_row[0] if class_row else None
        scale, shift = tubelet_api._normalisation(pixels, None, None)
        return tubelet_reference.tubelet_embedding(
            pixels, weight, bias, position, class_token, per == "frame", scale, shift
        )

    names = ("tokens", *(() if uint8 else ("dvideo",)), "dweight", "dbias", "dposition", *(("dclass",) if per else ()))
    label = _label(case, dtype, kind, layout, lies, f"class row per {per}" if per else "")
    layouts = [lies] + ["contiguous"] * (len(inputs) - 1)
    do = normal(case.B, *frames, rows, E, std=1.0)
    return Trial(label, inputs, layouts, do, names, call, defined, terms=case.taps)


# -- one call ---------------------------------------------------------------------------------------------------------


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_to(x, device) for x in value)
    return value.to(device) if isinstance(value, Tensor) else value


def place(x: Tensor, layout: str, device: torch.device) -> Tensor:
    """x on the device, with the strides that the layout asks for."""
    if layout == "heads first":  # [..., H, D] whose heads lie apart
        return x.movedim(-2, 1).contiguous().to(device).movedim(1, -2)
    if layout == "sliced":  # rows within a wider buffer: what lies around them must not be read
        width = x.shape[-1]
        wide = x.new_full((*x.shape[:-1], width + 8), float("nan") if x.is_floating_point() else 255)
        wide[..., :width] = x
        return wide.to(device)[..., :width]
    return x.to(device)


def run(function: Callable[[list[Tensor]], Tensor], inputs: list[Tensor], grad_output: Tensor) -> list[Tensor]:
    """[output, *gradients of the floating-point inputs]; the gradient of a packed projection in its three parts."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    output = function(leaves)
    gradients = torch.autograd.grad(output, [x for x in leaves if x.requires_grad], grad_output)
    packed = len(inputs) == 1
    return [output.detach(), *(gradients[0].unbind(-3) if packed else gradients)]


def expected(trial: Trial) -> tuple[list[Tensor], list[Tensor]]:
    """exact (the reference in float64) and eager (in the dtype under test), both on the CPU."""
    wide = [x.double() if x.is_floating_point() else x for x in trial.inputs]
    exact = run(trial.defined, wide, trial.grad_output.double())
    return exact, run(trial.defined, trial.inputs, trial.grad_output)


def attempt(trial: Trial, backend: str, device: torch.device, exact: list[Tensor], eager: list[Tensor]) -> Result:
    """The trial on one backend, judged against exact and eager."""
    inputs = [place(x, layout, device) for x, layout in zip(trial.inputs, trial.layouts, strict=True)]
    try:
        results = run(lambda x: trial.call(x, backend), inputs, trial.grad_output.to(device))
        actual = [x.cpu() for x in results]
        verdicts = {
            name: judge(x, exact[i], eager[i], gradient=i > 0, terms=1 if i else trial.terms, row=trial.row)
            for i, (name, x) in enumerate(zip(trial.names, actual, strict=True))
        }
    except NotImplementedError as error:
        lines = str(error).splitlines()
        if "cannot run this call" not in lines[0]:
            return Result("CRASHED", backend, trial.label, f"NotImplementedError: {lines[0]}")
        reason = next((line for line in lines if line.split()[:1] == [backend]), lines[0])
        return Result("refused", backend, trial.label, reason.strip().removeprefix(backend).strip())
    except Exception as error:  # whatever a kernel can do wrong is a line of the report
        return Result("CRASHED", backend, trial.label, f"{type(error).__name__}: {error}".splitlines()[0])
    worst = max(verdicts, key=lambda name: verdicts[name].share)
    if verdicts[worst].ok:
        return Result("ok", backend, trial.label, f"{verdicts[worst].share:.2f} of the error budget ({worst})")
    return Result("WRONG", backend, trial.label, f"{worst}: {verdicts[worst]}")


def is_lost(device: torch.device) -> bool:
    """Whether a kernel has broken the GPU's context, in which no later call can succeed."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


@contextlib.contextmanager
def poisoned(on: bool) -> Iterator[None]:
    """PyTorch fills fresh memory with NaN, so that an output which nobody wrote cannot pass."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(on or before[0], warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# -- all of them ------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """only: what the labels of its trials contain."""

    device: torch.device
    backends: Sequence[str]
    only: str
    brief: bool
    poison: bool


def results(asked: Run, part: int = 0, parts: int = 1) -> Iterator[Result]:
    """Runs every parts-th trial; ends early, with a CRASHED line, where the GPU's context is lost."""
    device = asked.device
    chosen = [trial for trial in trials(asked.brief) if asked.only in trial.label]
    for trial in chosen[part::parts]:
        exact, eager = expected(trial)
        for backend in asked.backends:
            with poisoned(asked.poison):
                result = attempt(trial, backend, device, exact, eager)
            yield result
            if result.verdict == "CRASHED" and is_lost(device):
                yield Result("CRASHED", backend, "the rest", "not run: the GPU's context is lost after this crash")
                return


def _part(asked: Run, part: int, parts: int) -> list[Result]:
    torch.set_num_threads(1)
    return list(results(asked, part, parts))


def side_by_side(asked: Run, jobs: int) -> Iterator[Result]:
    """`results` of as many processes: nearly all of the time of a first run goes into compiling kernels on a core."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_part, asked, part, jobs) for part in range(jobs)]):
            try:
                yield from done.result()
            except Exception as error:  # the process went down with its kernel
                yield Result("CRASHED", "-", "the trials of a process", f"{type(error).__name__}: {error}")


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.smoke", description=(__doc__ or "").partition("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="default here: %(default)s")
    parser.add_argument("--backend", nargs="+", choices=_environment.BACKENDS, help="default: all of them")
    parser.add_argument("--only", default="", metavar="TEXT", help="calls whose description contains this")
    parser.add_argument("--brief", action="store_true", help="every kernel with its least and its most only")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes; default: %(default)s")
    parser.add_argument(
        "--no-poison", action="store_true", help="leave fresh memory as it comes: initcheck would not see it unwritten"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """0 if at least one call ran and all that ran are within the budget, 1 if not, 2 without the device."""
    arguments = _arguments(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench.smoke: --device cuda: PyTorch sees no GPU here; run it with --device cpu", file=sys.stderr)
        return 2
    backends = arguments.backend or _environment.allowed_backends()
    counts: Counter[str] = Counter()
    ran: dict[str, None] = {}
    refusals: set[tuple[str, str, str]] = set()
    asked = Run(device, backends, arguments.only, arguments.brief, not arguments.no_poison)
    for result in side_by_side(asked, arguments.jobs) if arguments.jobs > 1 else results(asked):
        counts[result.verdict] += 1
        if result.verdict == "refused":
            key = (result.backend, result.label.split()[0], result.detail)  # one line for an operation, not per call
            if key in refusals:
                continue
            refusals.add(key)
        else:
            ran[result.backend] = None
        print(result, flush=True)
    print(
        f"smoke: {counts['ok']} within the budget, {counts['WRONG']} wrong, {counts['CRASHED']} crashed, "
        f"{counts['refused']} refused; backends: {' '.join(ran) or 'none'}"
    )
    if not ran:
        print("smoke: nothing ran: no backend asked for takes any of these calls", file=sys.stderr)
    return 0 if counts["ok"] and not counts["WRONG"] and not counts["CRASHED"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
