"""What a compiled CUDA kernel asks of a multiprocessor, read from its binary: no GPU and no driver are needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

KIB = 1 << 10


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA programming guide, compute capabilities); shared memory in bytes."""

    shared: int
    shared_per_block: int
    blocks: int = 32
    warps: int = 64
    registers: int = 65_536
    tensor_columns: int = 0  # of tensor memory


ARCHS = {
    80: Multiprocessor(164 * KIB, 163 * KIB),
    90: Multiprocessor(228 * KIB, 227 * KIB),
    100: Multiprocessor(228 * KIB, 227 * KIB, tensor_columns=512),
}
MOST_THREADS = 1024  # in a block
RESERVED = 1 * KIB  # shared memory the system takes in every block
_REGISTER_UNIT = 256  # a warp's registers are allocated in these
_SCHEDULERS = 4  # each has a quarter of the registers
_SHARED_UNIT = 128


@dataclass(frozen=True)
class Occupancy:
    """Of one multiprocessor; limits: what allows no further block (registers, shared memory, threads, blocks)."""

    blocks: int
    warps: int
    limits: tuple[str, ...]


def occupancy(arch: int, registers: int, shared: int, threads: int) -> Occupancy:
    """Blocks that fit on a multiprocessor at once, for registers a thread, bytes of shared memory and threads a block.

    0 blocks: the kernel cannot be launched.
    """
    limit, warps = ARCHS[arch], -(-threads // 32)
    per_warp = max(1, -(-registers * 32 // _REGISTER_UNIT)) * _REGISTER_UNIT
    by_registers = limit.registers // _SCHEDULERS // per_warp * _SCHEDULERS
    # a launch is refused as if every scheduler had as many warps of the block as the one with the most
    launched = per_warp * -(-warps // _SCHEDULERS) * _SCHEDULERS <= limit.registers
    block_shared = -(-(shared + RESERVED) // _SHARED_UNIT) * _SHARED_UNIT
    fits = {
        "registers": by_registers // warps if launched else 0,
        "shared memory": limit.shared // block_shared if shared <= limit.shared_per_block else 0,
        "threads": limit.warps // warps if threads <= MOST_THREADS else 0,
        "blocks": limit.blocks,
    }
    blocks = min(fits.values())
    return Occupancy(blocks, blocks * warps, tuple(name for name, count in fits.items() if count == blocks))


@dataclass(frozen=True)
class Kernel:
    """registers: a thread's. stack, local, shared: bytes; shared is the static part, without the system's.

    threads: of a block, None where the binary does not fix them. mix: instructions by opcode, see `instructions`.
    """

    name: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    threads: int | None
    mix: Counter[str]
    sass: str

    @property
    def spills(self) -> int:
        """Instructions that read or write a thread's local memory."""
        return self.mix["LDL"] + self.mix["STL"]


# An address, a predicate if any, an opcode with its modifiers: `/*01a0*/   @!P0 LDG.E.128 R4, ...`
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)", re.MULTILINE)
TENSOR_OPCODES = ("HMMA", "HGMMA", "UTCHMMA")
_MEMORY = ("LDG", "STG", "LDS", "STS", "LDGSTS")
_WIDTHS = {"128": "128", "256": "128", "64": "64", "U16": "16", "S16": "16", "U8": "8", "S8": "8"}  # not 32 bits
# The instructions worth a look; `MUFU` and those with a width stand beside the sum they are part of.
NOTABLE = (
    *("HGMMA", "HMMA", "UTCHMMA", "MUFU", "MUFU.EX2", "FFMA", "FADD", "FMUL", "HFMA2", "LDG", "LDG.128", "STG"),
    *("STG.128", "LDS", "LDS.128", "STS", "STS.128", "LDSM", "UTMALDG", "UTMASTG", "LDGSTS", "LDGSTS.128", "SHFL"),
    *("BAR", "RED", "ATOMG", "LDL", "STL"),
)


def instructions(sass: str) -> Counter[str]:
    """Counts by opcode, as written: the body of a loop once. Of them again `MUFU.EX2` and its like, `LDG.128` (or
    more bits), `LDG.64`, `LDG.16`, `LDG.8`, ..."""
    mix: Counter[str] = Counter()
    for opcode, modifiers in _INSTRUCTION.findall(sass):
        mix[opcode] += 1
        if opcode == "MUFU":
            mix[opcode + modifiers] += 1
        elif opcode in _MEMORY:
            widths = [_WIDTHS[word] for word in modifiers.split(".") if word in _WIDTHS]
            mix.update(f"{opcode}.{width}" for width in widths[:1])
    return mix


_ADDRESS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/", re.MULTILINE)
_BRANCH = re.compile(rf"{_ADDRESS.pattern}\s+(?:@!?U?P\w+\s+)?BRA\b[^;]*?\b0x([0-9a-f]+)\s*;", re.MULTILINE)


@dataclass(frozen=True)
class Loop:
    """From the instruction that a branch goes back to, up to the branch: addresses, and `instructions` of it all."""

    first: int
    last: int
    mix: Counter[str]

    def holds(self, other: Loop) -> bool:
        return self is not other and self.first <= other.first and other.last <= self.last


def loops(sass: str) -> list[Loop]:
    """Of each branch back to an earlier instruction. Not all repeat what they span: rare code that the compiler moved
    to the end returns by such a branch, too, over all that lies between."""
    starts = {int(found[1], 16): found.start() for found in _ADDRESS.finditer(sass)}
    found = []
    for branch in _BRANCH.finditer(sass):
        last, first = int(branch[1], 16), int(branch[2], 16)
        if first < last and first in starts:  # a kernel's last instruction goes to itself, and is never reached
            found.append(Loop(first, last, instructions(sass[starts[first] : branch.end()])))
    return found


def loops_with_products(kernel: Kernel) -> list[Loop]:
    """The inner ones, those that hold no other such loop; of a kernel without tensor cores those with multiply-adds."""
    opcodes = TENSOR_OPCODES if any(kernel.mix[opcode] for opcode in TENSOR_OPCODES) else ("FFMA",)
    found = [loop for loop in loops(kernel.sass) if any(loop.mix[opcode] for opcode in opcodes)]
    return [loop for loop in found if not any(loop.holds(other) for other in found)]


def local_memory(kernel: Kernel, most: int) -> list[str]:
    """What is wrong with its use of it, if `most` bytes a thread may lie there outside of loops that multiply."""
    taken, found = kernel.stack + kernel.local, []
    if not most and kernel.spills:
        found.append(f"spills: {kernel.spills} loads and stores of local memory")
    if taken > most:
        found.append(f"local memory: {taken} bytes a thread" + (f", {most} at most" if most else ""))
    for loop in loops_with_products(kernel) if most and kernel.spills else []:
        if count := loop.mix["LDL"] + loop.mix["STL"]:
            found.append(f"spills: {count} loads and stores of local memory in the loop at {loop.first:#06x}")
    return found


# ---- registers that a product still reads ----

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)([^;]*);", re.MULTILINE)
_REGISTER = re.compile(r"R(\d+)(?:\.\w+)*")
_READS_FIRST = ("BAR", "BRX", "CALL", "JMX", "NANOSLEEP", "RET", "WARPSYNC")  # their first operand is no result
_PENDING = 32  # groups; a kernel waits long before
# groups of products in flight, oldest first, each the registers that it reads; and those not yet of a group
_InFlight = tuple[tuple[frozenset[int], ...], frozenset[int]]


def _written(opcode: str, modifiers: list[str], operands: list[str]) -> range:
    """Registers of the result, which is the first operand but for predicates. Products' sums are not looked at."""
    results = [x for x in operands if not re.fullmatch(r"!?U?P[\dT]", x)]
    found = _REGISTER.fullmatch(results[0]) if results else None
    if found is None or opcode in (*_READS_FIRST, "HGMMA"):
        return range(0)
    if opcode in ("HMMA", "IMMA", "LDSM") or "128" in modifiers:
        width = 2 if "F16" in modifiers or "2" in modifiers else 4
    else:
        wide = {"64", "F64", "WIDE"} & set(modifiers) or opcode in ("DADD", "DMUL", "DFMA")
        width = 2 if wide or (opcode == "CS2R" and "32" not in modifiers) else 1
    return range(int(found[1]), int(found[1]) + width)


@dataclass(frozen=True)
class _Instruction:
    """What `overwritten` needs to know of one, found out once: ways through the code pass it many times."""

    text: str
    written: frozenset[int]
    factor: frozenset[int] | None  # registers that a product reads; None of anything else
    commits: bool  # the products so far become a group
    pending: int | None  # groups that a wait leaves in flight
    goes: tuple[int, ...]  # numbers of the instructions that may come next


def _decoded(sass: str) -> list[_Instruction]:
    lines = _LINE.findall(sass)
    index = {int(line[0], 16): i for i, line in enumerate(lines)}
    code = []
    for i, (at, guard, opcode, dotted, rest) in enumerate(lines):
        modifiers, operands = dotted.split(".")[1:], [x.strip() for x in rest.split(",")]
        product = opcode == "HGMMA"
        left = _REGISTER.fullmatch(operands[1]) if product else None
        target = re.search(r"0x([0-9a-f]+)", operands[-1]) if opcode == "BRA" else None
        goes = [index[int(target[1], 16)]] if target and int(target[1], 16) in index else []
        if guard or opcode not in ("BRA", "EXIT", "RET") or (opcode == "BRA" and len(operands) > 1):
            goes.append(i + 1)
        code.append(
            _Instruction(
                text=f"{'.'.join([opcode, *modifiers])} at {int(at, 16):#06x}",
                written=frozenset(_written(opcode, modifiers, operands)),
                factor=frozenset(range(int(left[1]), int(left[1]) + 4) if left else ()) if product else None,
                commits=product and "gsb0" in operands,
                pending=int(operands[-1], 16) if opcode == "WARPGROUP" and "DEPBAR" in modifiers else None,
                goes=tuple(goes),
            )
        )
    return code


def overwritten(sass: str) -> list[str]:
    """Instructions that write registers which a product of a warp group, issued and not waited for, may still read.

    HGMMA reads its left factor, where it lies in registers, some time after it was issued; PTX calls it undefined to
    write them before a wait. Where Triton leaves such products in flight, ptxas before CUDA 13.3 does just that
    (triton-lang/triton#9433): results are wrong, or right, with the timing. Every way through the code is followed."""
    code = _decoded(sass)
    seen: set[tuple[int, _InFlight]] = set()
    ways: list[tuple[int, _InFlight]] = [(0, ((), frozenset()))]
    found: dict[int, frozenset[int]] = {}
    while ways:
        i, flight = ways.pop()
        if i >= len(code) or (i, flight) in seen:
            continue
        seen.add((i, flight))
        step, (groups, group) = code[i], flight
        if (groups or group) and (hit := frozenset().union(group, *groups) & step.written):
            found[i] = hit
        if step.factor is not None:
            group |= step.factor
            if step.commits:
                groups, group = (*groups, group)[-_PENDING:], frozenset()
        elif step.pending is not None:
            groups = groups[max(0, len(groups) - step.pending) :]
        ways += [(following, (groups, group)) for following in step.goes]
    return [f"{code[i].text} writes {', '.join(f'R{n}' for n in sorted(found[i]))}" for i in sorted(found)]


NO_DEVICE_CODE = "does not contain device code"  # what cuobjdump says of a library built without CUDA


def cuobjdump() -> str:
    """The disassembler: of CUDA's toolkit, or the one inside Triton's wheel."""
    homes = [Path(home) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    triton = find_spec("triton")
    if triton is not None and triton.origin:
        homes.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = next((str(home / "cuobjdump") for home in homes if (home / "cuobjdump").is_file()), None)
    found = found or shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError(
            "bench static: no cuobjdump to read compiled kernels with, in $CUDA_HOME/bin, Triton's wheel or PATH\n"
            "  -> pip install triton, which carries one"
        )
    return found


def _run(option: str, path: Path, folder: Path | None = None) -> str:
    """cuobjdump's answer about one aspect. nvdisasm, which it calls, is looked for beside it and on PATH. What it
    extracts it writes to `folder`."""
    tool = cuobjdump()
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(tool).parent), os.environ.get("PATH", "")])}
    command = [tool, *option.split(), str(path.absolute())]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    if result.returncode:
        raise ValueError(f"bench static: cuobjdump {option} {path.name}: {result.stderr.strip() or result.returncode}")
    return result.stdout


def extracted(path: Path, folder: Path) -> list[Path]:
    """The cubins in an object file or a library, one of each source file and architecture, as files in `folder`."""
    _run("-xelf all", path, folder)
    return sorted(folder.glob("*.cubin"))


def _by_kernel(text: str, header: str) -> dict[tuple[int, str], str]:
    """Sections of cuobjdump's output, by architecture and by the name that `header` captures."""
    found: dict[tuple[int, str], str] = {}
    parts = re.split(rf"^(?:\s*(?:arch = |code for |\.target\s+)sm_(\d+)\w*.*|{header})$", text, flags=re.MULTILINE)
    arch, name = 0, ""
    for new_arch, new_name, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        if new_arch:
            arch, name = int(new_arch), ""
        else:
            name = new_name
        if name:
            found[arch, name] = body
    return found


def resources(path: Path) -> dict[tuple[int, str], dict[str, int]]:
    """REG, STACK, LOCAL and SHARED by architecture and name, as `read` finds them, which disassembles for seconds."""
    usage = _by_kernel(_run("-res-usage", path), r"\s*Function (\S+):")
    return {
        key: {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", x)} for key, x in usage.items()
    }


def read(path: Path) -> list[Kernel]:
    """The kernels in a cubin, an object file or a shared library, for every architecture in it."""
    sass = _by_kernel(_run("-sass", path), r"\s+Function : (\S+)")
    archs = {arch for arch, _ in sass}
    usage = resources(path)
    info = _by_kernel(_run("-elf", path), r"\.nv\.info\.(\S+)")
    kernels = []
    for (arch, name), code in sass.items():
        # a bare cubin has one architecture, which only -sass names
        bare = [(0, name)] if len(archs) == 1 else []
        numbers = next(usage[key] for key in [(arch, name), *bare] if key in usage)
        facts = next((info[key] for key in [(arch, name), *bare] if key in info), "")
        # from sm_90 on, compilers count the system's share as part of the kernel's own
        shared = numbers["SHARED"] - (RESERVED if arch >= 90 and numbers["SHARED"] >= RESERVED else 0)
        kernels.append(
            Kernel(
                name, arch, numbers["REG"], numbers["STACK"], numbers["LOCAL"], shared,
                _threads(facts), instructions(code), code.strip("\n"),
            )
        )  # fmt: skip
    return kernels


def _threads(info: str) -> int | None:
    """From `.nv.info`: the block's size if the kernel requires one, else the most it was compiled for."""
    for attribute in ("REQNTID", "MAX_THREADS"):
        found = re.search(rf"EIATTR_{attribute}\s+Format:\s*\S+\s+Value:\s*(0x\w+) (0x\w+) (0x\w+)", info)
        if found:
            x, y, z = (int(value, 16) for value in found.groups())
            return x * y * z
    return None
