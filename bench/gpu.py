"""One command for a GPU machine that has PyTorch, Triton and nvcc and nothing of this project installed.

    python -m bench gpu [--stage check|bench|sanitize] [--out DIR] [--seconds N] [--backend NAME ...] [--dry-run]

    check       build the native library in place if there is one, then `pytest -m gpu`
    bench       fill the time with the benchmark, then with whole models
    sanitize    compute-sanitizer's tools over the small cases of `bench.smoke`

Every stage ends in under nine minutes, writes at most eight files into DIR whatever fails, and downloads nothing.
Without a GPU it says what it would do. docs/gpu.md tells how to read what comes back.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .gpu_report import (
    backends_of,
    page,
    passed,
    read_bench,
    read_sanitizer,
    read_smoke,
    read_tests,
    record_lines,
    table,
)
from .gpu_runner import ROOT, CannotRun, Outcome, Step, environment, last_line, limits, run_all

STAGES = ("check", "bench", "sanitize")
SECONDS, MOST_SECONDS = 510, 535
MOST_FILES = 8
BRIEF = 100  # seconds: a sanitizer with less looks at every kernel, but not at each option by itself
PYTHON = [sys.executable, "-u"]
BACKENDS = ("cuda", "triton", "cpu", "torch")
NATIVE = ("native library: this tree has none to build", "native library: csrc/, built in place")
FILE_NAME = re.compile(r"[A-Za-z0-9._-]+")


# -- what a stage does ------------------------------------------------------------------------------------------------


def stage(name: str, folder: Path, outcomes: dict[str, Outcome], backends: Sequence[str] = ()) -> list[Step]:
    """The steps of a stage. outcomes: where `run_all` leaves what became of them; later steps look at earlier ones."""
    first = []
    if has_native() and (not backends or name != "sanitize" or {"cuda", "cpu"} & set(backends)):
        build = [*PYTHON, "setup.py", "build_ext", "--inplace"]
        first.append(Step("build", "the native library, in place", lambda _: build, share=0.45))
    machine = [*PYTHON, "-m", "vivit_kernels"]
    does = "what this install can run, and why not the rest"
    first.append(Step("machine", does, lambda _: machine, share=0.1, least=5, read=_read_machine))
    more = {"check": _check, "bench": _bench, "sanitize": partial(_sanitize, outcomes=outcomes, backends=backends)}
    return [*first, *more[name](folder)]


def _read_machine(outcome: Outcome) -> None:
    gpu = re.search(r"^cuda:0\s+(.*)$", outcome.output, re.MULTILINE)
    outcome.detail = gpu[1] if gpu else ""


def has_native() -> bool:
    """Whether this tree has a native library to build: csrc/, and setup.py that knows of it."""
    setup = ROOT / "setup.py"
    return (ROOT / "csrc").is_dir() and setup.is_file() and "ext_modules" in setup.read_text()


def _side_by_side() -> int:
    """Processes: nearly all of the time goes into compiling kernels, each on a core."""
    return max(1, min(15, (os.cpu_count() or 1) - 1))


def _processes() -> list[str]:
    """Tests side by side, if pytest-xdist is here."""
    count = _side_by_side()
    if count < 2 or importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(count), "--dist", "worksteal"]


def _check(folder: Path) -> list[Step]:
    def tests(name: str, which: str, does: str, **how: Any) -> Step:
        junit = folder / f"junit_{name}.xml"
        # -v, so that the log names the test that hung or took the process with it
        command = [
            *PYTHON, "-m", "pytest", "-m", which, "-v", "--tb=short", "--continue-on-collection-errors",
            "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60", f"--junitxml={junit}", *_processes(),
        ]  # fmt: skip
        return Step(name, does, lambda _: command, read=lambda outcome: read_tests(outcome, junit), **how)

    return [
        tests("tests", "gpu and not full", "pytest -m gpu, without the whole parity grids", share=0.7, least=20),
        tests("full", "gpu and full", "pytest -m gpu, the whole parity grids", least=40, optional=True),
    ]


def _bench(folder: Path) -> list[Step]:
    before: dict[Path, int] = {}

    def command(limit: float, *words: str) -> list[str]:
        before.update({path: len(lines) for path, lines in record_lines(folder).items()})
        budget = int(limit * 0.92 - 12)  # it counts from when it has started, and may overrun by one measurement
        return [*PYTHON, "-m", "bench", *words, "--budget", str(budget), "--out", str(folder)]

    def read(outcome: Outcome) -> None:
        read_bench(outcome, folder, before)

    return [
        Step("bench", "every operation against its peers and the ceilings of this machine",
             command, share=0.75, least=60, read=read),
        Step("models", "whole models", lambda limit: command(limit, "models"), least=45, optional=True, read=read),
    ]  # fmt: skip


def _sanitize(folder: Path, outcomes: dict[str, Outcome], backends: Sequence[str]) -> list[Step]:
    smoke = [*PYTHON, "-m", "bench.smoke", "--device", "cuda"]
    asked = ["--backend", *backends] if backends else []

    def command(limit: float, tool: str) -> list[str]:
        ran = backends_of(outcomes["smoke"])
        # PyTorch's own kernels are looked at only where there are no others
        kernels = [name for name in ran if name != "torch"] or ran
        chosen = ["--backend", *kernels] if kernels else asked
        # a buffer between allocations, and one bad access ends its kernel, not the run
        extra = ["--padding", "256", "--destroy-on-device-error", "kernel"] if tool == "memcheck" else []
        poison = ["--no-poison"] if tool == "initcheck" else []
        brief = ["--brief"] if limit < BRIEF else []
        return [
            _sanitizer(), "--tool", tool, "--target-processes", "application-only", "--report-api-errors", "no",
            "--show-backtrace", "device", "--print-limit", "1000", "--error-exitcode", "86", *extra,
            *smoke, *chosen, *poison, *brief,
        ]  # fmt: skip

    def tool(name: str, does: str, share: float, optional: bool = False) -> Step:
        # with PyTorch's allocator on, tensors share allocations and an access beyond one of them goes unnoticed
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Step(name, does, partial(command, tool=name), share, 20, optional, env, read_sanitizer)

    return [
        Step("smoke", "the small cases against float64, and Triton's cache filled",
             lambda _: [*smoke, *asked, "--jobs", str(_side_by_side())], share=0.3, read=read_smoke),
        tool("memcheck", "accesses out of bounds or misaligned", 0.45),
        tool("racecheck", "races in shared memory", 0.6),
        tool("synccheck", "barriers that not all threads reach", 0.6, optional=True),
        tool("initcheck", "reads of memory that nobody wrote", 1.0, optional=True),
    ]  # fmt: skip


def _sanitizer() -> str:
    homes = filter(None, [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"])
    places = [os.environ.get("PATH", ""), *(str(Path(home) / "bin") for home in homes)]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if found is None:
        raise CannotRun("compute-sanitizer is neither on PATH nor in $CUDA_HOME/bin: it comes with the CUDA toolkit")
    return found


# -- where it runs ----------------------------------------------------------------------------------------------------


def print_facts() -> None:
    """Runs in a process of its own, which may take the driver down with it: the facts as one line of JSON."""
    import torch

    from .device import _version, commit

    checked_out, dirty = commit()
    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": _version("triton")}
    facts |= {"python": sys.version.split()[0], "commit": checked_out + " with changes" * dirty}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["arch"] = "sm_" + "".join(map(str, torch.cuda.get_device_capability()))
    print(json.dumps(facts))


def probe() -> dict[str, Any]:
    """torch, cuda, triton, python, commit and, if PyTorch sees a GPU, gpu and arch; else `why_not`."""
    code = "from bench.gpu import print_facts; print_facts()"
    said = last_line(_ask([*PYTHON, "-c", code], seconds=90))
    try:
        facts = json.loads(said)
    except ValueError:
        return {"why_not": f"PyTorch cannot be asked: {said or 'it does not answer within 90 s'}"}
    if "gpu" not in facts and facts["cuda"] is None:
        facts["why_not"] = f"PyTorch {facts['torch']} is built without CUDA; install a CUDA build"
    elif "gpu" not in facts:
        smi = _ask(["nvidia-smi", "-L"]) or "there is no nvidia-smi"
        facts["why_not"] = f"PyTorch {facts['torch']} sees no GPU or driver ({smi.splitlines()[0]})"
    return facts


def _ask(command: list[str], seconds: float = 20) -> str:
    """What a command says, '' if there is none or it hangs."""
    try:
        answer = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
            timeout=seconds, cwd=ROOT, env=environment({}), errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()


def fact_lines(facts: dict[str, Any]) -> list[str]:
    smi = _ask(["nvidia-smi", "--query-gpu=memory.total,driver_version,power.limit", "--format=csv,noheader"])
    nvcc = re.search(r"release ([\d.]+)", _ask(["nvcc", "--version"]))
    return [
        f"{time.strftime('%Y-%m-%d %H:%M')}, commit {facts['commit']}",
        f"{facts['gpu']}, {facts['arch']}; memory, driver, power limit: {last_line(smi) or 'no answer of nvidia-smi'}",
        f"torch {facts['torch']}, CUDA {facts['cuda']}, Triton {facts['triton']}, "
        f"nvcc {nvcc[1] if nvcc else 'not found'}, Python {facts['python']}",
        NATIVE[has_native()],
    ]


# -- the command ------------------------------------------------------------------------------------------------------


def explain(name: str, folder: Path, seconds: float, backends: Sequence[str] = ()) -> list[str]:
    """What the stage does, in order, with the longest that each step may take."""
    steps = stage(name, folder, {}, backends)
    files = {"check": ["junit_tests.xml", "junit_full.xml"], "bench": ["<device>.jsonl"], "sanitize": []}[name]
    lines = [f"bench gpu --stage {name}: what it does on a machine with an NVIDIA GPU, in {seconds:.0f} s at most"]
    for step, limit in zip(steps, limits(steps, seconds), strict=True):
        rest = ", if time is left" if step.optional else ""
        lines.append(f"  {step.name:<10} at most {limit:3.0f} s   {step.does}{rest}")
    lines += [f"  {NATIVE[has_native()]}"]
    return [*lines, f"  and leaves in {folder}: {', '.join(['summary.md', 'log.txt', *files])}"]


def tidy(folder: Path) -> None:
    """At most eight files with plain names and no folders: whatever is beyond that goes into more.zip."""
    plain = [path for path in sorted(folder.iterdir()) if path.is_file() and FILE_NAME.fullmatch(path.name)]
    first = ("summary.md", "log.txt", "junit_tests.xml", "junit_full.xml")
    kept = sorted(plain, key=lambda path: (path.name not in first, path.suffix != ".jsonl", path.name))
    surplus = [path for path in folder.iterdir() if path not in kept]
    if len(kept) > MOST_FILES - bool(surplus):
        surplus, kept = [*surplus, *kept[MOST_FILES - 1 :]], kept[: MOST_FILES - 1]
    if not surplus:
        return
    with zipfile.ZipFile(folder / "more.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in surplus:
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    archive.write(file, file.relative_to(folder))
    for path in surplus:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, and neither is ignored, also where a shell started it in the background."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def carry_out(name: str, folder: Path, facts: list[str], deadline: float, backends: Sequence[str] = ()) -> int:
    """Runs the stage into the empty folder and prints its table last; 0 if everything passed, else 1."""
    outcomes: dict[str, Outcome] = {}
    steps = stage(name, folder, outcomes, backends)
    outcomes.update({step.name: Outcome() for step in steps})
    log, summary = folder / "log.txt", folder / "summary.md"
    log.write_text("\n".join([f"bench gpu --stage {name}", *facts, ""]))

    def write(verdict: str = "not finished") -> None:
        written = folder / "summary.md.new"
        written.write_text(page(f"bench gpu --stage {name}", facts, outcomes, verdict))
        written.replace(summary)

    verdict = "FAILED"
    try:
        with interruptible():
            run_all(steps, outcomes, deadline, log, write)
        verdict = "everything passed" if passed(outcomes) else "FAILED"
    except KeyboardInterrupt:
        verdict = "interrupted"
    finally:
        write(verdict)
        tidy(folder)
    print(f"\nbench gpu --stage {name}: {verdict}; {folder / 'summary.md'}\n")
    print("\n".join(table(outcomes)), flush=True)
    return 0 if verdict == "everything passed" else 1


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stage", choices=STAGES, default="check", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new or empty folder; default: one in runs/")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything; default and most: %(default)s")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=[], help="for sanitize; default: all")
    parser.add_argument("--dry-run", action="store_true", help="only say what the stage would do")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """0 if everything passed, 1 if something failed, 2 if the stage cannot run here."""
    began = time.monotonic()
    arguments = _arguments(argv)
    seconds = min(arguments.seconds, MOST_SECONDS)
    folder = (arguments.out or Path("runs") / f"gpu-{arguments.stage}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    if arguments.dry_run:
        print("\n".join(explain(arguments.stage, folder, seconds, arguments.backend)))
    facts = probe()
    if "why_not" in facts:
        if not arguments.dry_run:
            print("\n".join(explain(arguments.stage, folder, seconds, arguments.backend)))
        print(f"not run here: {facts['why_not']}")
        return 2
    if arguments.dry_run:
        return 0
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        print(f"bench gpu: --out {folder} is not an empty folder; name a new one, so that nothing old is taken for new")
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    return carry_out(arguments.stage, folder, fact_lines(facts), began + seconds, arguments.backend)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
