"""`python -m bench static`: what the compiled kernels ask of a GPU, and the least time a case can take; no GPU needed.

Triton kernels are compiled exactly as the project's launchers would launch them for a case: the registered operation
runs on unwritten CPU tensors of the case's shapes, and every launch inside is compiled instead. Where no operation is
named, kernels of the compiled library are read from its file, which takes a minute. Beside it stands, per case, the
least time that its bytes, FLOPs and exponentials need at ceilings that are assumed and named, and the newest record of
a GPU of that architecture, if there is one.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import vivit_kernels

from . import ceilings, cubin, record
from .cases import OPS, Case, select
from .launches import DIRECTIONS, Compiled, case_launches, compile_launches, has_kernel, unavailable

CEILINGS = "ceilings"  # the kernel that measures exponentials, listed like those of an operation

# Assumed, not measured here: the best that one such GPU was seen to reach. In float32 products run in TF32, at half the
# rate of 16 bits. The bounds of other architectures wait for a measurement.
ASSUMED: dict[int, dict[str, Any]] = {
    90: {
        "device": "H100",
        "copy_gbps": 3000.0,
        "matmul_tflops": {"bfloat16": 798.0, "float16": 798.0, "float32": 399.0},
        "exp_gops": 3700.0,
    },
}


# ---- the least time of a case ----


def bounds(case: Case, dtype: str, direction: str, arch: int) -> tuple[dict[str, float], str]:
    """({"copy", "matmul", "exp"}: microseconds at the assumed ceilings, the largest one's name), if there are any."""
    if arch not in ASSUMED:
        return {}, ""
    size = case.bytes(direction, getattr(torch, dtype).itemsize)
    flat = ceilings.of_dtype(ASSUMED[arch], dtype)
    # the share of a ceiling that a call of 1 ms reaches is the time at that ceiling, in ms
    times, largest = ceilings.shares(1.0, case.flops(direction), size, case.exps(direction), flat)
    return {name: 1e3 * ms for name, ms in times.items()}, largest


def newest_records(arch: int) -> dict[tuple[str, ...], dict[str, record.Record]]:
    """By (op, case, dtype, direction): the newest time of each of this project's backends on such a GPU."""
    found: dict[tuple[str, ...], dict[str, record.Record]] = {}
    if arch not in ASSUMED or not record.RESULTS.is_dir():
        return found
    for r in sorted(record.latest(record.read(record.RESULTS)), key=lambda r: r.date):
        if r.kind == "op" and r.ours and r.status == "ok" and ASSUMED[arch]["device"] in r.machine.get("device", ""):
            found.setdefault((r.op, r.case, r.dtype, r.direction), {})[r.backend] = r
    return found


# ---- what is printed ----


def table(header: tuple[str, ...], rows: list[tuple[str, ...]], left: int) -> str:
    """Columns side by side: the first `left` begin alike, the others, numbers, end alike."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def bounds_table(cases: list[Case], dtypes: list[str], arch: int) -> str:
    assumed = ASSUMED.get(arch)
    if assumed is None:
        return f"sm_{arch}: no ceilings are assumed for this architecture, so no bounds; known: sm_90"
    names = {"float32": "float32 as TF32"}
    rates = ", ".join(f"{assumed['matmul_tflops'][dtype]:g} ({names.get(dtype, dtype)})" for dtype in dtypes)
    head = (
        f"Least time on an {assumed['device']} (sm_{arch}), in microseconds: the largest term, marked *. Assumed "
        f"ceilings, not measured here:\ncopy {assumed['copy_gbps'] / 1e3:g} TB/s (each input read once, each output "
        f"written once), matmul {rates} TFLOP/s, exp {assumed['exp_gops'] / 1e3:g}e12/s."
    )
    records, rows = newest_records(arch), []
    for case in cases:
        for dtype in dtypes:
            for direction in DIRECTIONS:
                times, largest = bounds(case, dtype, direction, arch)
                terms = [f"{'*' * (name == largest)}{_us(times.get(name, 0.0))}" for name in ("copy", "matmul", "exp")]
                what = (case.op, case.name, dtype, direction)
                for backend, found in (records.get(what) or {"-": None}).items():
                    rows.append((*what, *terms, *_measured(backend, found, times[largest])))
    header = ("op", "case", "dtype", "direction", "copy", "matmul", "exp", "backend", "date", "measured", "/ bound")
    return f"{head}\n{table(header, rows, 4)}"


def _measured(backend: str, found: record.Record | None, bound: float) -> tuple[str, ...]:
    if found is None:
        return backend, "-", "no record", "-"
    us = 1e3 * found.ms["median"]
    older = " (older kernel)" if record.is_stale(found) else ""
    return backend, found.date[:10], f"{_us(us)}{older}", f"{us / bound:.2f}"


def _us(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def describe(kernel: cubin.Kernel, launch: Compiled | None) -> str:
    """Resources and instruction mix of one kernel; without a launch only what the binary says."""
    shared, threads = (launch.shared, launch.threads) if launch else (kernel.shared, kernel.threads)
    lines = [
        f"{kernel.name}  sm_{kernel.arch}",
        f"  {kernel.registers} registers a thread, {shared:,} bytes of shared memory, {threads or '?'} threads a block"
        + (f", {launch.tensor_columns} columns of tensor memory" if launch and launch.tensor_columns else ""),
        f"  spills: {kernel.mix['LDL']} LDL, {kernel.mix['STL']} STL; stack {kernel.stack}, local {kernel.local} bytes",
    ]
    if threads and kernel.arch in cubin.ARCHS:
        fits, most = cubin.occupancy(kernel.arch, kernel.registers, shared, threads), cubin.ARCHS[kernel.arch].warps
        lines.append(
            f"  occupancy: {fits.blocks} blocks, {fits.warps} of {most} warps a multiprocessor; "
            f"limit: {', '.join(fits.limits)}{'' if launch else ' (dynamic shared memory not counted)'}"
        )
    total = sum(count for opcode, count in kernel.mix.items() if "." not in opcode) - kernel.mix["NOP"]
    mix = "  ".join(f"{opcode} {kernel.mix[opcode]}" for opcode in cubin.NOTABLE if kernel.mix[opcode])
    lines.append(f"  a tile's instructions, loop bodies once: {total}, of them {mix or 'none of note'}")
    return "\n".join(lines + [f"  ! {complaint}" for complaint in (launch.complaints if launch else [])])


def report_launches(launches: list[tuple[str, Compiled]], sass: bool) -> None:
    """launches: (what launches it, kernel). A kernel that several cases share is described once."""
    alike: dict[Any, list[tuple[str, Compiled]]] = {}
    for what, launch in launches:
        alike.setdefault((launch.kernel.sass, launch.shared), []).append((what, launch))
    for group in alike.values():
        print(f"\n{describe(group[0][1].kernel, group[0][1])}")
        for (what, grid), times in Counter((what, launch.grid) for what, launch in group).items():
            blocks = torch.Size(grid).numel()
            print(f"  grid {'x'.join(map(str, grid))} = {blocks:,} blocks{f', {times} times' * (times > 1)}: {what}")
        if sass:
            print(group[0][1].kernel.sass)


def _to_compile(op: str, cases: list[Case], args: argparse.Namespace) -> Iterator[tuple[str, Callable]]:
    """(what launches, function from an architecture to its launches)."""
    if op == CEILINGS:
        exp_kernel = importlib.import_module("bench.exp_kernel")
        x = exp_kernel.buffer(torch.device("cpu"))
        yield op, partial(compile_launches, lambda: exp_kernel.launch(x, 4096))
    for case in cases:
        for dtype in args.dtype:
            for direction in DIRECTIONS:
                what = f"{case.op} {case.name} {dtype} {direction}"
                yield what, partial(case_launches, case, getattr(torch, dtype), direction)


def _kernels(op: str, cases: list[Case], args: argparse.Namespace) -> bool:
    """Prints the Triton kernels of one operation; whether all went well."""
    if op != CEILINGS and not has_kernel(op):
        print(f"\n{op}: this release has no triton kernel for {op}")
        return True
    if why := unavailable():
        print(f"\n{op}: {why}")
        return False
    fine = True
    for arch in args.arch:
        print(f"\n{op}: Triton kernels for sm_{arch}")
        launches: list[tuple[str, Compiled]] = []
        for what, function in _to_compile(op, [case for case in cases if case.op == op], args):
            try:
                launches += [(what, launch) for launch in function(arch=arch)]
            except Exception as error:  # whatever a launcher or the compiler raises belongs in the report
                print(f"  {what} could not be compiled: {type(error).__name__}: {error}")
                fine = False
        report_launches(launches, args.sass)
        fine = fine and not any(launch.complaints for _, launch in launches)
    return fine


def _native(archs: list[int], sass: bool) -> bool:
    """Prints the kernels in the compiled library, if it was built; whether they could be read."""
    libraries = sorted(Path(vivit_kernels.__file__ or "").parent.glob("*.so"))
    if not libraries:
        print("\nnative: no compiled library beside vivit_kernels, so no CUDA C++ kernels to read")
    for library in libraries:
        try:
            kernels = [kernel for kernel in cubin.read(library) if kernel.arch in archs]
        except (OSError, ValueError) as error:
            if cubin.NO_DEVICE_CODE in str(error):
                print(f"\nnative: {library.name} holds no CUDA C++ kernels to read")
                continue
            print(f"\nnative: {library.name} cannot be read: {error}")
            return False
        print(f"\nnative: {library.name}: {len(kernels)} kernels for {', '.join(f'sm_{arch}' for arch in archs)}")
        for kernel in kernels:
            print(f"\n{describe(kernel, None)}")
            if sass:
                print(kernel.sass)
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench static", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("op", nargs="*", help=f"{', '.join(OPS)} or {CEILINGS}; without, all, and the library")
    parser.add_argument("--case", nargs="+", default=[], help="names or patterns; the headline cases without")
    parser.add_argument("--arch", nargs="+", type=int, default=[90], choices=sorted(cubin.ARCHS))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--sass", action="store_true", help="print each kernel's machine code")
    return parser


def main(argv: list[str]) -> int:
    """0; 1 where a kernel could not be compiled, spills or does not fit; 2 for a name that is not known."""
    args = _parser().parse_args(argv)
    if os.environ.get("TRITON_INTERPRET"):  # read when Triton is imported: only another process can do without
        return _without_interpreter(argv)
    ops = args.op or [*OPS, CEILINGS]
    known = [op for op in ops if op != CEILINGS]
    try:
        cases = [] if not known else select(known, args.case, on_cpu=False)
        if not args.case:
            cases = [case for case in cases if case.rank == 0]
        if cases:
            print("\n\n".join(bounds_table(cases, args.dtype, arch) for arch in args.arch))
    except ValueError as error:  # no such case, or a file of records that is none
        print(error, file=sys.stderr)
        return 2
    fine = [_kernels(op, cases, args) for op in ops]
    return 0 if all([*fine, bool(args.op) or _native(args.arch, args.sass)]) else 1


def _without_interpreter(argv: list[str]) -> int:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.run([sys.executable, "-m", "bench.static", *argv], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
