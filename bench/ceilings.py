"""What the machine can do, measured in the run whose times are held against it: copies, matrix products, exponentials.

Each is the best that the machine's own libraries reach on an easy, large problem of ordinary (random) numbers. A time
near a ceiling cannot be improved much; a time far from all of them can.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from .timing import Timer

SECONDS = 0.4  # of measuring, for each
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
_SIZE = {"cpu": 2048, "cuda": 8192}  # of a square matrix product
_SLOW_SIZE = 512  # 16-bit products that a CPU has not run at about 1 GFLOP/s: 2048 of bfloat16 took 93 s with AVX2
_SLOW_MS = 50.0  # of a product of that size: 5 GFLOP/s


def measure(device: torch.device, dtypes: list[torch.dtype]) -> dict[str, Any]:
    """{"copy_gbps": bytes read and written, "exp_gops": fp32, "matmul_tflops": {dtype: ...}} of `device`.

    A matrix product in float32 runs as PyTorch's setting says (`tf32` is measured beside it on a GPU). exp_gops is
    absent where it cannot be measured: on a GPU without Triton.
    """
    timer = Timer(device)
    result: dict[str, Any] = {"copy_gbps": _copy(timer), "matmul_tflops": {}}
    for dtype in dict.fromkeys(dtypes):
        result["matmul_tflops"][str(dtype).removeprefix("torch.")] = _matmul(timer, dtype)
    if device.type == "cuda" and torch.float32 in dtypes:
        result["matmul_tflops"]["tf32"] = _with_tf32(timer)
    exps = _exponentials(timer)
    return result if exps is None else result | {"exp_gops": exps}


def of_dtype(measured: dict[str, Any], dtype: str) -> dict[str, float]:
    """The ceilings a record of this dtype is held against, flat."""
    rates = measured["matmul_tflops"]
    flat = {"copy_gbps": measured["copy_gbps"], "exp_gops": measured.get("exp_gops"), "matmul_tflops": rates.get(dtype)}
    return {name: value for name, value in flat.items() if value}


def shares(ms: float, flops: int, size: int, exps: int, ceilings: dict[str, float]) -> tuple[dict[str, float], str]:
    """(the share of each ceiling that a call of `ms` reached, the name of the one it is nearest to)."""
    floors = {
        "copy": size / 1e6 / ceilings["copy_gbps"] if "copy_gbps" in ceilings else 0.0,
        "matmul": flops / 1e9 / ceilings["matmul_tflops"] if "matmul_tflops" in ceilings else 0.0,
        "exp": exps / 1e6 / ceilings["exp_gops"] if "exp_gops" in ceilings else 0.0,
    }  # ms that the work takes at least
    reached = {name: floor / ms for name, floor in floors.items() if floor}
    return reached, max(reached, key=lambda name: reached[name], default="")


def _best_ms(timer: Timer, fn) -> float:
    """On a GPU the median; on a CPU, which others share, the fastest call: a ceiling is what the machine can do."""
    timer.once(fn)
    times = timer.calls(fn, SECONDS, timer.once(fn), fewest=5)
    return min(times) if timer.device.type == "cpu" else statistics.median(times)


def _copy(timer: Timer) -> float:
    count = _COPY_BYTES[timer.device.type]
    source = torch.randint(0, 256, (count,), dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return 2 * count / _best_ms(timer, lambda: target.copy_(source)) / 1e6


def _matmul(timer: Timer, dtype: torch.dtype) -> float:
    """TFLOP/s of the fastest product the installation has: on a CPU float32 PyTorch's own (MKL) or oneDNN's.

    Of a narrow dtype on a CPU that has no products of it: float32's, in which they can be computed."""
    on_cpu = timer.device.type == "cpu"

    def operands(size: int) -> list[torch.Tensor]:
        return [torch.randn(size, size, device=timer.device).to(dtype) for _ in range(3)]

    size = _SIZE[timer.device.type]
    if on_cpu and dtype.itemsize == 2:
        a, b, out = operands(_SLOW_SIZE)
        timer.once(lambda: torch.mm(a, b, out=out))
        if timer.once(lambda: torch.mm(a, b, out=out)) > _SLOW_MS:
            size = _SLOW_SIZE
    a, b, out = operands(size)
    times = [_best_ms(timer, lambda: torch.mm(a, b, out=out))]
    if on_cpu and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        times.append(_best_ms(timer, lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")))
    rate = 2 * size**3 / min(times) / 1e9
    return max(rate, _matmul(timer, torch.float32)) if on_cpu and dtype.itemsize == 2 else rate


def _with_tf32(timer: Timer) -> float:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return _matmul(timer, torch.float32)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _exponentials(timer: Timer) -> float | None:
    """Billions per second, in float32; the numbers stay on chip."""
    if timer.device.type == "cpu":
        x = torch.rand(torch.get_num_threads() << 18)  # 1 MB a core: long enough for its threads to meet once
        y = torch.empty_like(x)
        return x.numel() / _best_ms(timer, lambda: torch.exp(x, out=y)) / 1e6
    try:
        from . import exp_kernel
    except ImportError:
        return None
    x, iterations = exp_kernel.buffer(timer.device), 4096
    return iterations * x.numel() / _best_ms(timer, lambda: exp_kernel.launch(x, iterations)) / 1e6
