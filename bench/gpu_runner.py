"""Commands one after another inside a deadline: each in a process group of its own, ended at its limit, output kept."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A command at its limit is asked twice and then ended; seconds to wait after each. SIGINT comes first because pytest
# answers it by writing its report of the tests so far.
GRACE = ((signal.SIGINT, 8.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 2.0))
RESERVE = sum(seconds for _, seconds in GRACE) + 5  # kept free at the end: ending the last command, the summary
STEP_LOG_BYTES, LOG_BYTES = 5 << 20, 15 << 20
HEARTBEAT = 30.0  # seconds between lines that say what a long command printed last
MARK = "VIVIT_BENCH_STEP"  # an environment variable by which a command's descendants are known
OFFLINE = {
    "PIP_NO_INDEX": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "NO_COLOR": "1",
    "TERM": "dumb",
    "COLUMNS": "100",
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # else PyTorch warns wherever deterministic algorithms are on
}
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class CannotRun(Exception):
    """Raised by a step's command: it cannot run here; the message says why."""


@dataclass
class Outcome:
    """
    verdict: "not run", "running", "ok", "FAILED", "TIMED OUT"; of an optional step also "skipped" (no
        time or no tool for it) and "stopped" (at its limit, nothing wrong until then).
    output: what it printed. detail: what came of it, one line. findings: what is wrong, one line each, the first first.
    """

    verdict: str = "not run"
    seconds: float = 0.0
    limit: float = 0.0
    status: int | None = None
    output: str = ""
    detail: str = ""
    findings: list[str] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)


def keep(outcome: Outcome) -> None:
    """Reads nothing out of an outcome but its last line."""
    outcome.detail = last_line(outcome.output)


@dataclass(frozen=True)
class Step:
    """
    does: one line for people. command: from the seconds it may take; may raise CannotRun.
    share: of the time left when it begins. least: seconds below which it is not begun.
    optional: its absence, or its end at the limit, fails nothing. read: fills in the outcome from its output.
    """

    name: str
    does: str
    command: Callable[[float], list[str]]
    share: float = 1.0
    least: float = 10.0
    optional: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[Outcome], None] = keep


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def limits(steps: list[Step], seconds: float) -> list[float]:
    """The longest each step may take when all before it take theirs whole. What one leaves over goes to the others."""
    found, left = [], seconds - RESERVE
    for step in steps:
        found.append(step.share * left)
        left -= found[-1]
    return found


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This environment for a child: the tree's packages without installing them, no network, plain text."""
    paths = [str(ROOT / "kernels"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **OFFLINE, "PYTHONPATH": os.pathsep.join(paths), **extra}


def run_all(
    steps: list[Step], outcomes: dict[str, Outcome], deadline: float, log: Path, after: Callable[[], None]
) -> None:
    """Runs the steps whatever becomes of each, and calls `after` before, between and after them.

    outcomes: one for each step's name, filled in as it goes. deadline: on time.monotonic().
    KeyboardInterrupt ends the step that runs, is noted there, and goes on to the caller.
    """
    after()
    for step in steps:
        outcome = outcomes[step.name]
        outcome.limit = step.share * (deadline - time.monotonic() - RESERVE)
        try:
            _run(step, outcome, log)
        except CannotRun as why:
            outcome.verdict, outcome.detail = "skipped" if step.optional else "FAILED", str(why)
        finally:
            print(f"{step.name}: {outcome.verdict} after {outcome.seconds:.0f} s: {outcome.detail}", flush=True)
            after()


def _run(step: Step, outcome: Outcome, log: Path) -> None:
    if outcome.limit < step.least:
        raise CannotRun(f"{max(outcome.limit, 0):.0f} s were left for it, it needs {step.least:.0f}")
    command = step.command(outcome.limit)
    title = f"{step.name}: at most {outcome.limit:.0f} s: {shlex.join(command)}"
    print(title, flush=True)
    outcome.verdict, outcome.detail = "running", ""
    with open(log, "ab") as file:
        file.write(f"\n== {title}\n".encode())
        file.flush()
        begin = file.tell()
        began = time.monotonic()
        try:
            with _group(command, file, step.env) as process:
                stopped = _wait(step, process, outcome.limit, log, begin)
                if stopped:
                    stop(process)
            outcome.status = process.returncode
        except OSError as error:  # the command itself could not be started
            raise CannotRun(f"{command[0]}: {error.strerror or error}") from error
        finally:
            outcome.seconds = time.monotonic() - began
            if log.stat().st_size > begin + _allowed(begin):
                os.truncate(log, begin + _allowed(begin))
            outcome.output = _read(log, begin)
            outcome.verdict, outcome.detail = "FAILED", "interrupted"
        if stopped:
            outcome.verdict = "stopped" if step.optional and "s is over" in stopped else "TIMED OUT"
            file.write(f"== {step.name}: {stopped}\n".encode())
        elif outcome.status == 0:
            outcome.verdict = "ok"
        _interpret(step, outcome)
        if stopped:
            outcome.detail = f"{stopped}; {outcome.detail}".rstrip("; ")
        elif outcome.status and outcome.status < 0:
            outcome.detail = f"ended by {_signal_name(-outcome.status)}; {outcome.detail}".rstrip("; ")
        file.write(f"== {step.name}: {outcome.verdict} after {outcome.seconds:.0f} s\n".encode())


def _interpret(step: Step, outcome: Outcome) -> None:
    try:
        step.read(outcome)
    except Exception as error:  # an output of unknown form fails its step, never the stage
        outcome.verdict, outcome.detail = "FAILED", f"its output could not be read: {type(error).__name__}: {error}"


@contextlib.contextmanager
def _group(command: list[str], file, env: Mapping[str, str]) -> Iterator[subprocess.Popen]:
    """The command as the leader of a process group, of which nothing is left afterwards, nor of sessions it began.

    It writes into the file itself, not through a pipe: what it printed stays, whoever is killed.
    """
    mark = f"{os.getpid()}.{time.monotonic_ns()}"
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
        env=environment({**env, MARK: mark}), start_new_session=True, preexec_fn=_hear_interrupts,
    )  # fmt: skip
    try:
        yield process
    except BaseException:
        stop(process)
        raise
    finally:
        _signal(process, signal.SIGKILL)
        _end_marked(mark)


def _hear_interrupts() -> None:
    """A shell has SIGINT ignored in what it starts in the background, and that would be inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end_marked(mark: str) -> None:
    """Kills what inherited the mark and left the group: the benchmark's workers have sessions of their own."""
    wanted = f"{MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)


def _wait(step: Step, process: subprocess.Popen, limit: float, log: Path, begin: int) -> str:
    """Waits for the end; why it has to be stopped, or ''."""
    began = beat = time.monotonic()
    allowed = _allowed(begin)
    while process.poll() is None:
        now = time.monotonic()
        if now - began > limit:
            return f"its limit of {limit:.0f} s is over"
        if log.stat().st_size - begin > allowed:
            return f"it printed more than {allowed >> 10} KiB"
        if now - beat > HEARTBEAT:
            beat = now
            print(f"  {step.name}, {now - began:.0f} s: {last_line(_read(log, begin, 2000))[:90]}", flush=True)
        time.sleep(0.1)
    return ""


def _allowed(begin: int) -> int:
    """Bytes that a command may print whose output begins there in the log."""
    return max(min(STEP_LOG_BYTES, LOG_BYTES - begin), 1 << 16)


def stop(process: subprocess.Popen) -> None:
    """Ends the whole group: politely, firmly, then for good."""
    for number, seconds in GRACE:
        _signal(process, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _read(log: Path, begin: int, most: int = STEP_LOG_BYTES) -> str:
    """What stands in the log from `begin` on, of that at most the last `most` bytes, as a terminal would show it."""
    with open(log, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(begin, end - most))
        text = _ANSI.sub("", file.read().decode(errors="replace"))
    return "".join(line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").splitlines(keepends=True))
