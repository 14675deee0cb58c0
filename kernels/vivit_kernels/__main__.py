"""`python -m vivit_kernels`: what this install can run, what it cannot, and why."""

from __future__ import annotations

import platform
import signal

import torch

from . import _environment, _library, _native
from ._dispatch import Call, column, refusals
from .factorized_attention.support import SUPPORT as FACTORIZED
from .joint_attention.support import SUPPORT as JOINT
from .joint_attention.support import order as joint_order
from .temporal_block.support import SUPPORT as BLOCK
from .tubelet_embedding.support import SUPPORT as TUBELET

# One ordinary call per op: ViViT-B/16x2, one clip.
SHAPES = {
    "tubelet_embedding": (TUBELET, (1, 3, 32, 224, 224)),
    "factorized_attention": (FACTORIZED, (1, 16, 196, 12, 64)),
    "joint_attention": (JOINT, (1, 3137, 12, 64)),
    "temporal_block": (BLOCK, (1, 16, 196, 12, 64)),
}


def device_lines() -> list[str]:
    name, threads = platform.processor() or platform.machine(), torch.get_num_threads()
    lines = [f"cpu     {name}, {threads} threads, {torch.backends.cpu.get_cpu_capability()}"]
    if not torch.cuda.is_available():
        why = "PyTorch was built without CUDA" if torch.version.cuda is None else "no GPU or driver is visible"
        return [*lines, f"cuda    none: {why}"]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        lines.append(f"cuda:{i}  {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}")
    return lines


def native_lines() -> list[str]:
    """The native library: which build it is and what it uses of this processor, or why it is not used."""
    record = _native.RECORD
    if record is None:
        return [f"native  not used: {_native.WHY}", f"        -> {_native.REMEDY}"]
    return [
        f"native  {'CPU and CUDA' if record.kind == 'cuda' else 'CPU alone'}: {record.why}",
        f"        {_library.library_path()}",
        f"        built by {record.compiler}, headers of torch {record.torch}, vivit-kernels {record.version}",
        f"        instruction set {_native.isa_name()}, "
        + (f"forced by {_native.VARIABLE}" if _native.FORCED else "the best here"),
    ]


def backend_lines(device: str, dtype: torch.dtype) -> list[str]:
    lines = []
    for op, (support, shape) in SHAPES.items():
        call = Call(op, shape, dtype, device, needs_grad=True, arch=_arch(device))
        order = _environment.allowed_backends(joint_order(call) if support is JOINT else _environment.BACKENDS)
        order += tuple(name for name in support if name not in order and not _environment.RESTRICTED)
        width = column(name for name in order)
        lines.append(f"{op}  {call}")
        for backend, reasons in refusals(call, support, order).items():
            lines += [f"  {backend:<{width}}runs"] * (not reasons)
            for i, reason in enumerate(reasons):
                lines.append(f"  {'' if i else backend:<{width}}{reason.reason}")
                lines.append(f"  {'':<{width}}-> {reason.remedy}")
    return lines


def _arch(device: str) -> int:
    if device != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def main() -> None:
    triton = "installed" if _environment.HAS_TRITON else "not installed"
    print(f"vivit_kernels on Python {platform.python_version()}, torch {torch.__version__}, triton {triton}")
    flash = ", ".join(map(str, _environment.FLASH_ATTN)) or "not installed"
    print(f"FlashAttention {flash}, xformers {'installed' if _environment.HAS_XFORMERS else 'not installed'}\n")
    print("\n".join([*device_lines(), *native_lines()]) + "\n")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("\n".join(backend_lines(device, torch.bfloat16)))
    restriction = ",".join(_environment.RESTRICTED) or "not set (tried in the order shown)"
    print(f"\n{_environment.VARIABLE}: {restriction}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends this like any other command
    main()
