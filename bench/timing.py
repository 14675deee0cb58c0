"""Time of one call: on a GPU between events, on a CPU by the clock; the last cache is flushed before each call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

FEWEST, MOST = 3, 500  # calls in one turn
_CYCLES = 2e9  # a second of a GPU's clock, about: of waiting, not of measuring


def last_level_cache(device: torch.device) -> int:
    """Bytes of the device's last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


class Timer:
    """Times calls on a device. `calls(fn, seconds)` gives one time in ms per call, never fewer than three.

    host_ms: on a GPU, how long the host took over one call of the last `calls`, the least of them.
    """

    def __init__(self, device: torch.device):
        self.device, self.host_ms = device, 0.0
        self.flush = torch.empty(2 * last_level_cache(device), dtype=torch.uint8, device=device)
        self.flush_ms = min(self.once(self.flush.zero_) for _ in range(3))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def once(self, fn: Callable[[], object]) -> float:
        """One call in ms, by the clock, including whatever it compiles."""
        self.synchronize()
        began = time.perf_counter()
        fn()
        self.synchronize()
        return (time.perf_counter() - began) * 1e3

    def calls(self, fn: Callable[[], object], seconds: float, estimate_ms: float, fewest: int = FEWEST) -> list[float]:
        """Times of as many calls as fit in `seconds`, each with its flush, by the estimate of one."""
        count = max(fewest, min(MOST, int(seconds * 1e3 / (estimate_ms + self.flush_ms))))
        if self.device.type == "cuda":
            return self._on_gpu(fn, count)
        times = []
        for _ in range(count):
            self.flush.zero_()
            began = time.perf_counter()
            fn()
            times.append((time.perf_counter() - began) * 1e3)
        return times

    def _on_gpu(self, fn: Callable[[], object], count: int) -> list[float]:
        """The device's time. Before each call it is kept busy for as long as the host needs to launch the call: what a
        host that lags behind adds is no property of the kernels, and is told as `host_ms`."""
        starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(count)] for _ in range(2))
        self.synchronize()
        began = time.perf_counter()
        fn()
        launching = time.perf_counter() - began
        cycles, hosts = int(1.5 * launching * _CYCLES), []
        self.synchronize()
        for start, end in zip(starts, ends, strict=True):
            self.flush.zero_()
            torch.cuda._sleep(cycles)
            start.record()
            began = time.perf_counter()
            fn()
            hosts.append(time.perf_counter() - began)
            end.record()
        self.synchronize()
        self.host_ms = min(hosts) * 1e3
        return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def in_turns(
    timer: Timer,
    functions: dict[str, Callable[[], object]],
    rounds: int,
    seconds: float,
    of: Callable[[list[float]], float] = statistics.median,
) -> dict[str, list[float]]:
    """Ms of each function in every round, by `of` the median of its calls: in a round each has its turn, so a busy
    machine slows all alike.

    seconds: of one function's turn. The first call of each is not counted: it may compile.
    """
    for fn in functions.values():
        timer.once(fn)
    estimates = {name: timer.once(fn) for name, fn in functions.items()}
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, fn in functions.items():
            found[name].append(of(timer.calls(fn, seconds, estimates[name], fewest=1)))
    return found


def summary(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile (nearest rank) and count."""
    ordered = sorted(times)

    def rank(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {"median": statistics.median(ordered), "p20": rank(0.2), "p80": rank(0.8), "n": len(ordered)}
