"""The parent's side of worker.py: start it, ask it with a time limit, learn how it died."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .device import ROOT, TUNED_MALLOC


class Died(Exception):
    """The worker is gone; `status` is what a record says of the contestant that was running."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Worker:
    """A process that runs contestants on `device`.

    kernels: the source root of the kernels to measure, this tree's unless a git ref is compared.
    """

    def __init__(self, device: str, plugins: list[str], kernels: Path = ROOT / "kernels", tuned_malloc: bool = False):
        self.command = [sys.executable, "-m", "bench.worker", device, *plugins]
        path = [str(kernels), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = os.environ | (TUNED_MALLOC if tuned_malloc else {}) | {"PYTHONPATH": os.pathsep.join(path)}
        self.opened: tuple[str, ...] = ()  # the case and dtype whose inputs it holds
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115  its standard error, read when it dies
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaints, cwd=ROOT,
            env=self.environment, start_new_session=True,
        )  # fmt: skip
        self.opened, self.unread = (), b""

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer; raises `Died` when there is none in time, or when the worker ended or cannot go on."""
        if self.process is None:
            self.start()
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            raise self._death() from None
        until = time.monotonic() + seconds
        while b"\n" not in self.unread:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                self.stop()
                raise Died("timed out", f"no end within {seconds:.0f} s")
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                raise self._death()
            self.unread += piece
        line, _, self.unread = self.unread.partition(b"\n")
        answer = json.loads(line)
        if not answer.get("usable", True):
            self.stop()
            raise Died(answer.get("status", "crashed"), f"{answer.get('reason')} (the device was lost to the process)")
        return answer

    def stop(self) -> None:
        """Ends the worker and what it started, at once."""
        if self.process is not None:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            for pipe in filter(None, (self.process.stdin, self.process.stdout)):
                with contextlib.suppress(OSError):
                    pipe.close()
        self.process, self.opened = None, ()

    def _death(self) -> Died:
        assert self.process is not None
        code = self.process.wait()
        self.complaints.seek(0)
        lines = [line for line in self.complaints.read().decode(errors="replace").splitlines() if line.strip()]
        last = next((line.strip() for line in reversed(lines) if not line.startswith("USDT")), "")
        self.stop()
        how = f"status {code}"
        if code < 0:
            how = signal.Signals(-code).name + (" (out of memory?)" if code == -signal.SIGKILL else "")
        return Died("crashed", f"ended by {how}" + (f": {last[:200]}" if last else ""))
