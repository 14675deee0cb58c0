"""The process that runs contestants: `python -m bench.worker`, driven by run.py through JSON lines.

A peer may crash it, hang or take all memory; then run.py writes that down and starts another. One request, one answer:

    {"hello": true}                                         the machine, and the contestants of every op
    {"ceilings": [dtypes]}                                  see ceilings.py
    {"open": [op, case], "dtype": ...}                      makes the inputs
    {"try": backend, "direction": ...}                      builds, checks against float64, takes memory, warms up
    {"time": backend, "direction": ..., "seconds": ...}     times of calls, in ms
    {"clocks": true}                                        clocks, heat and power now
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from vivit_kernels import _environment
from vivit_kernels.numerics import Verdict

from . import attention_peers, ceilings, device, footprint, tubelet  # noqa: F401  registers the peers
from .attention import Attention
from .cases import CASES, OPS, SMALL
from .peers import PEERS, Candidate, Missing, Peer, Refused, load_plugin
from .timing import Timer

_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


def contestants(op: str) -> dict[str, Peer]:
    """This project's backends, then the peers."""
    ours = {name: Peer(name, _ours(name), ours=True) for name in _environment.allowed_backends()}
    return ours | PEERS.get(op, {})


def _ours(backend: str) -> Callable[[Any], Candidate]:
    return lambda inputs: inputs.ours(backend)


class Session:
    """One case at a time, its inputs and the candidates built on them."""

    def __init__(self, on: torch.device):
        self.device, self.timer = on, Timer(on)
        self.inputs: Any = None
        self.candidates: dict[str, Candidate] = {}

    def hello(self) -> dict[str, Any]:
        return {
            "machine": device.machine(self.device),
            "clocks": device.clocks(self.device),
            "contestants": {
                op: [[peer.name, peer.ours, peer.ideal] for peer in contestants(op).values()] for op in OPS
            },
        }

    def open(self, op: str, name: str, dtype: str) -> dict[str, Any]:
        self.inputs, self.candidates = None, {}
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        case = next(case for case in CASES + SMALL if (case.op, case.name) == (op, name))
        kind = tubelet.Tubelet if op == "tubelet" else Attention
        self.inputs = kind(case, getattr(torch, dtype), self.device)  # type: ignore[arg-type]
        return {}

    def attempt(self, backend: str, direction: str) -> dict[str, Any]:
        """The error of one call, its memory, and how long the next will take."""
        candidate = self.candidate(backend)
        error = self.error(candidate, direction)
        result: dict[str, Any] = {"error": error}
        if error["share"] <= 1:
            call = self.call(candidate, direction)
            result["memory"] = footprint.measure(call, self.device)
            result["estimate_ms"] = min(self.timer.once(call) for _ in range(2))
        return result

    def candidate(self, backend: str) -> Candidate:
        """What `backend` runs on the inputs that are open."""
        if backend not in self.candidates:
            self.candidates[backend] = contestants(self.inputs.case.op)[backend].build(self.inputs)
        return self.candidates[backend]

    def times(self, backend: str, direction: str, seconds: float, estimate_ms: float) -> dict[str, Any]:
        call = self.call(self.candidate(backend), direction)
        return {"ms": self.timer.calls(call, seconds, estimate_ms, fewest=1), "host_ms": self.timer.host_ms}

    def error(self, candidate: Candidate, direction: str) -> dict[str, Any]:
        """Outputs and gradients of this direction under the budget: the worst of them."""
        ask_gradients(candidate, direction)
        with torch.set_grad_enabled(direction != "forward"):
            out = candidate.forward()
        gradients: list[Tensor] = []
        if direction != "forward":
            gradients = candidate.gradients(list(torch.autograd.grad(out, candidate.leaves, candidate.grad_output)))
        verdicts = self.inputs.verdicts(candidate.output(out.detach()), gradients)
        return worst(verdicts, self.inputs.checked_share)

    def call(self, candidate: Candidate, direction: str) -> Callable[[], list[Tensor]]:
        """The call that is timed; for "backward" the graph is made here, outside it."""

        def gradients(out: Tensor, keep: bool) -> list[Tensor]:
            return list(torch.autograd.grad(out, candidate.leaves, candidate.grad_output, retain_graph=keep))

        ask_gradients(candidate, direction)
        if direction == "backward":
            out = candidate.forward()
            return lambda: gradients(out, True)
        if direction == "forward+backward":
            return lambda: gradients(candidate.forward(), False)

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [candidate.forward()]

        return forward


def worst(verdicts: dict[str, Verdict], checked: float) -> dict[str, Any]:
    """A record's `error`: the worst of the tensors, by its name; checked: the share of them that was compared."""
    name = max(verdicts, key=lambda name: verdicts[name].share)
    found = verdicts[name]
    return {"share": found.share, "max": found.max_error, "rms": found.rms_error, "of": name, "checked": checked}


def ask_gradients(candidate: Candidate, direction: str) -> None:
    """Inference asks none of its inputs; torch.no_grad() alone would not do: views of such an input ask, too."""
    for leaf in candidate.leaves:
        leaf.requires_grad_(direction != "forward")


def explain(error: BaseException) -> tuple[str, str]:
    """(status of a record, one line of reason)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if "cannot run this call" in text and len(lines) > 2:  # a refusal of ours: then the call, then the backend's reason
        text = f"{text.removesuffix('.')}: {lines[2].partition(' ')[2].strip()}"
    if isinstance(error, Missing):
        return "missing", text
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(x in text.lower() for x in _NO_MEMORY):
        return "out of memory", text[:200]
    if "this release has no" in str(error):  # a backend of ours that is still to be written
        found = next(line for line in str(error).splitlines() if "this release has no" in line)
        return "missing", found.strip().partition("this")[1] + found.partition("this")[2]
    for why in (device.without_library(), device.without_cuda()):
        if why and why.partition("; ")[0] in str(error):
            return "missing", why
    if isinstance(error, Refused | NotImplementedError) or "No available kernel" in text:
        return "refused", text
    return "crashed", f"{type(error).__name__}: {text[:200]}"


def answer(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "hello" in request:
            return session.hello()
        if "ceilings" in request:
            return ceilings.measure(session.device, [getattr(torch, name) for name in request["ceilings"]])
        if "clocks" in request:
            return {"clocks": device.clocks(session.device)}
        if "open" in request:
            op, name = request["open"]
            return session.open(op, name, request["dtype"])
        if "try" in request:
            return session.attempt(request["try"], request["direction"])
        return session.times(request["time"], request["direction"], request["seconds"], request["estimate_ms"])
    except Exception as error:  # whatever a contestant throws is its result
        status, reason = explain(error)
        return {"status": status, "reason": reason}


def usable(on: torch.device) -> bool:
    """Whether the device still answers: an illegal access leaves a CUDA context that fails every later call."""
    try:
        if on.type == "cuda":
            torch.cuda.synchronize(on)
            torch.empty(1, device=on).zero_()
        return True
    except Exception:
        return False


def limit_memory() -> None:
    """On a CPU an allocation beyond what is free fails here and now, so that the kernel need not kill something."""
    with open("/proc/meminfo") as file:
        facts = {line.partition(":")[0]: int(line.split()[1]) << 10 for line in file if len(line.split()) > 1}
    with open("/proc/self/statm") as file:
        data = int(file.read().split()[5]) * resource.getpagesize()
    limit = data + int(0.85 * facts["MemAvailable"])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def serve(on: torch.device, begin: Callable[[], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Answers requests from standard input until it ends or the device is lost. begin: gives the function from a
    request to its answer; whatever it and the libraries print goes to standard error, never between the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    respond = begin()
    for line in sys.stdin:
        reply = respond(json.loads(line))
        reply["usable"] = "status" not in reply or usable(on)
        print(json.dumps(reply), file=answers, flush=True)
        if not reply["usable"]:
            break


def main() -> None:
    on = torch.device(sys.argv[1])

    def begin() -> Callable[[dict[str, Any]], dict[str, Any]]:
        torch._functorch.config.donated_buffer = False  # a compiled peer's backward is timed repeatedly on one graph
        for path in sys.argv[2:]:
            load_plugin(path)
        session = Session(on)
        if on.type == "cpu":
            limit_memory()
        return lambda request: answer(session, request)

    serve(on, begin)


if __name__ == "__main__":
    main()
