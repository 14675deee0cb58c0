"""`python -m bench gate`: whether the compiled Triton kernels are what their tiles were designed to be; no GPU needed.

Every launch must keep its values in registers (no spills, no local memory; of another compiler than the recorded one
next to none, outside of loops that multiply), fit a multiprocessor, take its products
with the instruction that the tile is for, and move memory 128 bits at a time where a thread has that much to move. What
it should be follows from Triton's own view of the kernel before any layout is chosen (its products, loads and stores
with their shapes), so that a kernel cannot declare less than it does. `--record` writes what the headline cases take,
which tests/test_triton_gate.py holds later changes to.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from . import cubin
from .cases import CASES, OPS, Case, select
from .launches import (
    BLOCKS,
    DIRECTIONS,
    PASSES,
    Compiled,
    block_launches,
    case_launches,
    has_kernel,
    pass_launches,
    unavailable,
)  # fmt: skip
from .static import table

RECORD = Path(__file__).resolve().parent / "results" / "gate.json"
ROWS = "rows"  # beside the operations: what of a block no case names


# ---- what a kernel is, in Triton's words ----


@dataclass(frozen=True)
class Product:
    """tl.dot of `[..., M, K]` and `[..., K, N]`; kind: element type of the factors, precision: of fp32 ones."""

    shape: tuple[int, ...]
    kind: str
    precision: str

    def opcode(self, arch: int, threads: int) -> str | None:
        """The instruction that takes it: of a whole warp group where it has 64 rows, else of a warp; None for IEEE."""
        *batch, M, N = self.shape
        if self.kind == "f32" and self.precision not in ("tf32", "tf32x3"):
            return None
        grouped = not batch and M % 64 == 0 and N % 8 == 0 and threads % 128 == 0
        return {90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA") if grouped else "HMMA"


@dataclass(frozen=True)
class Access:
    """A load or a store of a block by pointers (a descriptor's is one instruction); bytes: of an element."""

    kind: str
    shape: tuple[int, ...]
    bytes: int

    def bytes_of_a_thread(self, threads: int) -> float:
        return math.prod(self.shape) * self.bytes / threads

    def may_be_wide(self, threads: int) -> bool:
        """Rows that hold 128 bits, and as much for every thread to move."""
        rows = len(self.shape) > 1 and max(self.shape) * self.bytes >= 16
        return rows and self.bytes_of_a_thread(threads) >= 16

    def may_be_narrow(self, bits: int, threads: int) -> bool:
        """A vector, or too little for two elements a thread; or several narrower elements already."""
        few = len(self.shape) < 2 or self.bytes_of_a_thread(threads) < 2 * self.bytes
        return 8 * self.bytes < bits or (8 * self.bytes == bits and few)


_TENSOR = r"tensor<((?:\d+x)+)"
_PRODUCT = re.compile(rf"tt\.dot\b(.*) : {_TENSOR}(\w+)> \* tensor<\S+> -> {_TENSOR}")
_ACCESS = re.compile(rf"tt\.(load|store)\b.* : {_TENSOR}!tt\.ptr<(\w+)>")


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")[:-1]))


def products(ir: str) -> list[Product]:
    return [
        Product(_shape(shape), kind, (re.findall(r"inputPrecision = (\w+)", options) or ["ieee"])[0])
        for options, _, kind, shape in _PRODUCT.findall(ir)
    ]


def accesses(ir: str) -> list[Access]:
    return [
        Access(name, _shape(shape), max(8, int(re.sub(r"\D", "", kind)[:2])) // 8)
        for name, shape, kind in _ACCESS.findall(ir)
    ]


# ---- what is wrong with one ----


# What a compiler that the tiles were not chosen by may leave in local memory, outside of loops that multiply: Triton
# 3.9 puts up to twelve values of a thread there before a loop of thousands of cycles, and takes them up after it
_MOST_STACK = 64  # bytes


def complaints(launch: Compiled) -> list[str]:
    """What is wrong with it; of the recorded compiler nothing at all may lie in local memory."""
    import triton

    stack = 0 if recorded().get("triton") in (None, triton.__version__) else _MOST_STACK
    return [*launch.complaints_but_for(stack), *_of_products(launch), *_of_accesses(launch)]


@cache
def recorded() -> dict[str, Any]:
    """What the headline cases took when `--record` wrote it, and the compiler."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def _of_products(launch: Compiled) -> Iterator[str]:
    wanted = {product: product.opcode(launch.kernel.arch, launch.threads) for product in products(launch.ir)}
    found = {opcode for opcode in cubin.TENSOR_OPCODES if launch.kernel.mix[opcode]}
    for opcode in sorted({opcode for opcode in wanted.values() if opcode} - found):
        shapes = sorted({"x".join(map(str, product.shape)) for product in wanted if wanted[product] == opcode})
        yield f"opcode: no {opcode} for products of {', '.join(shapes)}"
    for opcode in sorted(found - set(wanted.values())):
        yield f"opcode: {launch.kernel.mix[opcode]} {opcode}, but no product of the tile is for it"


_WIDE = {"load": ("LDG.128", "LDGSTS.128", "UTMALDG"), "store": ("STG.128", "UTMASTG")}


def _of_accesses(launch: Compiled) -> Iterator[str]:
    mix, threads = launch.kernel.mix, launch.threads
    for kind, opcode in (("load", "LDG"), ("store", "STG")):
        blocks = [access for access in accesses(launch.ir) if access.kind == kind]
        if any(access.may_be_wide(threads) for access in blocks) and not any(mix[name] for name in _WIDE[kind]):
            yield f"{kind}s: none of 128 bits"
        for bits in (8, 16):
            count = mix[f"{opcode}.{bits}"]
            if count and not any(access.may_be_narrow(bits, threads) for access in blocks):
                yield f"{kind}s: {count} of {bits} bits"


# ---- what is printed and recorded ----


def tile_name(launch: Compiled) -> str:
    def text(value) -> str:
        return f"({','.join(map(text, value))})" if isinstance(value, tuple) else str(value)

    return " ".join(f"{name}={text(value)}" for name, value in launch.tile)


def distinct(launches: Iterable[tuple[str, Compiled]]) -> list[tuple[str, Compiled]]:
    """The first launch of each kernel."""
    first: dict[tuple, tuple[str, Compiled]] = {}
    for what, launch in launches:
        first.setdefault((launch.kernel.arch, launch.kernel.sass, launch.shared), (what, launch))
    return list(first.values())


def row(what: str, launch: Compiled) -> tuple[str, ...]:
    mix = launch.kernel.mix
    opcodes = " ".join(f"{name} {mix[name]}" for name in cubin.TENSOR_OPCODES if mix[name])
    loads = f"{mix['LDG.128'] + mix['LDGSTS.128'] + mix['UTMALDG']}/{mix['LDG'] + mix['LDGSTS'] + mix['UTMALDG']}"
    stores = f"{mix['STG.128'] + mix['UTMASTG']}/{mix['STG'] + mix['UTMASTG']}"
    return (
        what, f"sm_{launch.kernel.arch}", launch.kernel.name, tile_name(launch), opcodes or "-",
        str(launch.kernel.registers), str(launch.shared), str(launch.threads), str(launch.occupancy.warps),
        loads, stores, str(mix["MUFU.EX2"]),
    )  # fmt: skip


HEADER = (
    "first launched by", "arch", "kernel", "tile", "products", "registers", "shared", "threads", "warps",
    "loads", "stores", "exp2",
)  # fmt: skip


def facts(launch: Compiled) -> dict:
    return {
        "kernel": launch.kernel.name, "tile": tile_name(launch), "registers": launch.kernel.registers,
        "shared": launch.shared, "warps": launch.occupancy.warps,
    }  # fmt: skip


def headline() -> list[Case]:
    """The cases that are recorded: bfloat16 on sm_90."""
    return [case for case in CASES if case.rank == 0 and has_kernel(case.op)]


def recorded_launches(case: Case) -> dict[str, list[dict]]:
    return {
        f"{case.op} {case.name} {direction}": [
            facts(launch) for launch in case_launches(case, torch.bfloat16, direction, 90)
        ]
        for direction in DIRECTIONS
    }


def regressions(recorded: list[dict] | None, found: list[dict]) -> list[str]:
    """Where `found` is another choice than the recorded one, or the same one and takes more. Less is welcome."""
    if recorded is None:
        return ["not recorded"]
    if [(x["kernel"], x["tile"]) for x in recorded] != [(x["kernel"], x["tile"]) for x in found]:
        return [f"other kernels or tiles than recorded: {json.dumps(found)}"]
    return [
        f"{new['kernel']}: {name} {old[name]} -> {new[name]}"
        for old, new in zip(recorded, found, strict=True)
        for name, sign in (("registers", 1), ("shared", 1), ("warps", -1))
        if sign * new[name] > sign * old[name]
    ]


def write_record(path: Path = RECORD) -> None:
    import triton

    launches: dict[str, list[dict]] = {}
    for case in headline():
        launches |= recorded_launches(case)
    lines = [
        f"  {json.dumps(what)}: [\n    " + ",\n    ".join(map(json.dumps, x)) + "\n  ]" for what, x in launches.items()
    ]
    path.write_text(f'{{\n  "triton": "{triton.__version__}",\n' + ",\n".join(lines) + "\n}\n")


def _reason(error: BaseException) -> str:
    """Triton reports the line of the outermost call; what is wrong there is the last cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench gate", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("op", nargs="*", help=f"{', '.join(OPS)}, {ROWS} (of blocks, no case); all without")
    parser.add_argument("--case", nargs="+", default=[], help="names or patterns; the headline cases without")
    parser.add_argument("--arch", nargs="+", type=int, default=[90], choices=sorted(cubin.ARCHS))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}: what the headline cases take")
    return parser


def _to_compile(cases: list[Case], args: argparse.Namespace) -> Iterator[tuple[str, int, Callable]]:
    """(what launches, architecture, function from `arch` to its launches)."""
    for case in (case for case in cases if has_kernel(case.op)):
        for arch, dtype, direction in product(args.arch, args.dtype, DIRECTIONS):
            launches = partial(case_launches, case, getattr(torch, dtype), direction)
            yield f"{case.op} {case.name} {dtype} {direction}", arch, launches
    if ROWS in args.op or not (args.op or args.case):
        for arch, dtype, name in product(args.arch, args.dtype, PASSES + BLOCKS):
            launches = block_launches if name in BLOCKS else pass_launches
            yield f"{name} {dtype}", arch, partial(launches, name, getattr(torch, dtype))


def main(argv: list[str]) -> int:
    """0; 1 where a kernel is not what it should be; 2 for a name that is not known."""
    args = _parser().parse_args(argv)
    if why := unavailable():
        print(why, file=sys.stderr)
        return 1
    if args.record:
        write_record()
        return 0
    try:
        ops = [op for op in args.op if op != ROWS]
        named = select(ops, args.case, on_cpu=False) if ops or not args.op else []
        cases = [case for case in named if args.case or case.rank == 0]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    launches: list[tuple[str, Compiled]] = []
    failed = []
    for what, arch, compiled in _to_compile(cases, args):
        try:
            launches += [(what, x) for x in compiled(arch=arch)]
        except Exception as error:  # whatever a launcher or the compiler raises belongs in the report
            failed.append(f"{what} sm_{arch}: could not be compiled: {_reason(error)}")
    kernels = distinct(launches)
    failed += [f"{what} sm_{x.kernel.arch} {x.kernel.name}: {why}" for what, x in kernels for why in complaints(x)]
    print(table(HEADER, [row(*kernel) for kernel in kernels], 5))
    print("\nloads, stores: those of 128 bits of all, loop bodies once; warps: on one multiprocessor at once")
    print("\n".join(f"! {line}" for line in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
