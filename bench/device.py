"""Facts about where a measurement was made: the machine, its clocks before and after, the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

try:
    from vivit_kernels import _native
except ImportError:  # `--base` with kernels from before there was a native library
    _native = None

ROOT = Path(__file__).resolve().parent.parent
# glibc keeps freed memory in the process: page faults on fresh temporaries above 32 MB, which inflate PyTorch's own
# times two- to threefold on a CPU, are gone
TUNED_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_TOP_PAD_": "1000000000",
}
_SMI = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit", "clocks_event_reasons.active")
# reasons of the driver that mean the clocks were held back: power cap, slowdowns by heat and by hardware
_THROTTLES = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "heat", 0x40: "heat", 0x80: "power brake"}


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    name = names[0] if names else platform.processor() or platform.machine()
    extras = [
        extra
        for extra, there in (("AMX", "_is_amx_tile_supported"), ("bf16", "_is_avx512_bf16_supported"))
        if getattr(torch.cpu, there, bool)()
    ]
    forced = [f"{_native.FORCED} kernels"] if _native and _native.FORCED else []  # as another machine, in its own file
    facts = [torch.backends.cpu.get_cpu_capability(), *extras, *forced, f"{torch.get_num_threads()} threads"]
    return " ".join([name, *facts])


def without_library() -> str:
    """Why the native library is not here and how to get it; "" if it is."""
    return f"{_native.WHY}; {_native.REMEDY}" if _native and not _native.AVAILABLE else ""


def without_cuda() -> str:
    """The same of the CUDA kernels of a library that is there."""
    return f"{_native.NO_CUDA}; {_native.CUDA_REMEDY}" if _native and _native.NO_CUDA else ""


def slug(name: str) -> str:
    """A file name for a device: `NVIDIA H100 80GB HBM3` -> `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine(device: torch.device) -> dict[str, Any]:
    """What a time depends on and a reader cannot guess."""
    facts: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts |= {
            "cuda": torch.version.cuda,
            "driver": _smi(device, ("driver_version",)).get("driver_version", "unknown"),
        }
        facts["tf32"] = torch.backends.cuda.matmul.allow_tf32
    else:
        facts["malloc"] = "tuned" if os.environ.get("MALLOC_MMAP_THRESHOLD_") else "default"
    return facts


def clocks(device: torch.device) -> dict[str, Any]:
    """Clocks, heat and power now. On a CPU: frequency, load, and the time that other guests have taken from it."""
    if device.type != "cuda":
        mhz = [float(x) for x in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _text("/proc/cpuinfo"), re.MULTILINE)]
        ticks = [int(x) for x in _text("/proc/stat").partition("\n")[0].split()[1:]]
        stolen = ticks[7] if len(ticks) > 7 else 0
        return {"mhz": round(max(mhz, default=0.0)), "ticks": sum(ticks), "stolen": stolen, "load": os.getloadavg()[0]}
    found = _smi(device, _SMI)
    active = found.pop("clocks_event_reasons.active", "0x0")
    bits = int(active, 16) if active.startswith("0x") else 0
    reasons = sorted({name for bit, name in _THROTTLES.items() if bits & bit})
    return {key: _number(value) for key, value in found.items()} | {"throttled": ", ".join(reasons)}


def clocks_between(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What a record says of the clocks between two readings."""
    if "ticks" in after:
        passed = max(after["ticks"] - before["ticks"], 1)
        stolen = round((after["stolen"] - before["stolen"]) / passed, 4)
        return {"mhz": after["mhz"], "stolen": stolen, "load": after["load"]}
    throttled = ", ".join(dict.fromkeys(x["throttled"] for x in (before, after) if x.get("throttled")))
    return {**after, "sm_before": before.get("clocks.sm"), "throttled": throttled}


def commit() -> tuple[str, bool]:
    """(short hash, whether tracked files differ from it); ("unknown", True) outside a checkout."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", "kernels", "csrc", "vivit", "bench/*.py"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True
    return head.stdout.strip(), bool(status.stdout.strip())


def _smi(device: torch.device, fields: tuple[str, ...]) -> dict[str, str]:
    """nvidia-smi's answer, empty where there is none."""
    index = torch.cuda.current_device() if device.index is None else device.index
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in answer.splitlines()[0].split(",")), strict=False))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
