"""`python -m bench cuda_gate`: whether the CUDA C++ kernels in the native library are what they were written to be.

No GPU is needed: what is read is the library itself, every kernel that ships in it, for each architecture that it has
machine code for. Each must keep its values in registers (no local memory in a loop that multiplies, next to none
elsewhere), fit a multiprocessor, and use the instructions that it is written for: products by tensor cores, of float32
by multiply-adds alone; memory 128 bits at a time, or 64 where a pair of lanes stores. What these are follows from the
words of the kernel's name. Shared memory that only a launch names is not in the binary: warps on a multiprocessor are
those that registers and the block's size allow.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from vivit_kernels import _library, _native

from . import cubin
from .launches import Compiled
from .static import table

# Opcodes that a kernel is written for, by the first word of its name. packed: all in registers, blocks transposed
# between lanes where a product wants them so; resident: rows copied to shared memory, from where products take them;
# hopper: products of a warp group, on sm_90 alone, and where a row lies in one slice those of single warps for the last
# rows. The last two store sums as products leave them, 64 bits a lane once pairs of lanes have traded, a sector of 32
# bytes for two pairs; and they have what packed has, for the other axis.
# pipelined: copies of boxes, products and exponentials at a time, by warps that each do one and trade registers.
# turned: rows with their rotary embedding, for pipelined.
# streaming: rows that go by through shared memory, and sums stored in the same way; nothing is transposed in registers.
# scattering: both operands by copies of boxes, sums to pixels.
# gathering: a weight, or dout, by copies of boxes, pixels from memory to registers and from there to products.
# tubelet: both operands of its products from shared memory, one of them by asynchronous copies; parameter: what is done
# around those products, with plain arithmetic.
# float32: multiply-adds of what lies in shared memory, and no tensor cores: they would round operands to tf32.
# tf32: the same by tensor cores, where that is allowed.
_PACKED = ("HMMA", "MOVM", "LDG.128", "STG.128")
WANTED = {
    "packed": _PACKED,
    "resident": (*_PACKED, "LDGSTS.128", "LDSM", "STG.64"),
    "hopper": (*_PACKED, "HGMMA", "UTMALDG", "STG.64"),
    "pipelined": ("HGMMA", "UTMALDG", "SYNCS", "USETMAXREG", "MUFU.EX2", "STG.64"),
    "turned": ("LDG.128", "STG.128"),
    "gathering": ("HGMMA", "UTMALDG", "SYNCS", "LDG", "STG.64"),
    "gathering_weight_gradient": ("HGMMA", "UTMALDG", "SYNCS", "LDG", "STG.128"),
    "scattering": ("HGMMA", "UTMALDG", "SYNCS", "STG.128", "STG.64"),
    "streaming": ("HMMA", "LDSM", "LDGSTS.128", "STG.64"),
    "streaming_delta": ("HMMA", "LDSM", "LDGSTS.128"),  # stores a number of each row alone
    "float32": ("FFMA", "LDGSTS.128", "LDS.128", "STG.128"),
    "tf32": ("HMMA", "LDGSTS.128", "LDS.128", "STG.128"),
    "tubelet": ("HMMA", "LDSM", "LDGSTS.128"),
    "parameter": ("LDG",),
}
IN_ONE_SLICE = re.compile(r"hopper_attention<\w+, [24], ")  # heads of up to 32, of 40 to 64 channels
ONLY_ON = {"hopper": 90, "pipelined": 90, "gathering": 90, "scattering": 90}  # elsewhere a kernel of that name is empty
NARROW = ("LDG.16", "STG.16", "STG.8", "LDGSTS.16", "LDGSTS.8")  # LDG.8 reads a mask
# Kernels that have to: runs of pixels that are no multiple of eight or begin anywhere, parameters of odd length. Not
# the ones whose name says (the last `true`) that every eight pixels lie side by side.
# And where a lane's share of a product are two neighbours.
NARROW_ALLOWED = ("tubelet_*false>", "tubelet_video_gradient<*", "parameter_*", "gathering_*, unsigned char[,>]*")
NARROW_ALLOWED += ("scattering_*",)
# Where every register is taken, a few kernels keep one or two values in local memory for a while, outside of the
# loops that multiply. That stays in the first-level cache and costs some cycles of a tile's thousands; in such a loop
# it would cost them at each step. More bytes would be an array that is indexed or a loop's sums, which must not be
# there.
MOST_STACK = 8  # bytes
HEADER = (
    "kernel", "arch", "registers", "shared", "threads", "warps", "HGMMA", "HMMA", "MOVM", "LDSM", "FFMA", "loads",
    "copies", "stores", "exp2",
)  # fmt: skip


def demangled(names: Iterable[str]) -> dict[str, str]:
    """C++ names as one writes them, without what is the same in all; mangled where there is no c++filt."""
    names = list(dict.fromkeys(names))
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return {name: name for name in names}
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return {name: short(line) for name, line in zip(names, text.splitlines(), strict=True)}


def short(name: str) -> str:
    """`void vivit::cuda::f<__nv_bfloat16, 2, true>(vivit::cuda::P)` -> `f<bfloat16, 2, true>`."""
    name = re.sub(r"(vivit::cuda::|\(anonymous namespace\)::|^void )", "", name)
    name = name.replace("__nv_bfloat16", "bfloat16").replace("__half", "float16")
    return name[: name.rindex(">(") + 1] if ">(" in name else name.partition("(")[0]


_ORDER = re.compile(r"(MUFU\.EX2)|WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")


def not_overlapped(kernel: cubin.Kernel) -> list[str]:
    """Loops whose exponentials do not lie between the wait for their own scores, which leaves another product running,
    and the wait for that: the compiler moves waits, and what was to run beside a product then runs after it."""
    found = []
    for loop in cubin.loops_with_products(kernel):
        text = kernel.sass[kernel.sass.index(f"/*{loop.first:04x}*/") : kernel.sass.index(f"/*{loop.last:04x}*/")]
        running, beside = 0, 0
        for exponential, wait in _ORDER.findall(text):
            beside += bool(exponential) and running > 0
            running = int(wait, 16) if wait else running
        count = loop.mix["MUFU.EX2"]
        if count and beside * 2 < count:
            found.append(f"overlap: {beside} of {count} exponentials in the loop at {loop.first:#06x} beside a product")
    return found


# Bytes that the warps of a packed kernel are to ask for in a multiprocessor, at least: twice what keeps memory busy
# (csrc/cuda/tiles.cuh), so that it is if they wait for it during half of their time.
ASKED = 2 * (32 << 10)
_PACKED_PLAIN = re.compile(r"packed_attention<\w+, \d+, true, (true|false)>")
_ASKED = re.compile(r"(LDG\.E\.128)|(HMMA\.)")


def asked_at_once(kernel: cubin.Kernel) -> tuple[int, int]:
    """Of a packed kernel without options: (runs of loads that no product lies between, bytes of a warp's rows).

    It is compiled twice into one kernel, for two sequences of up to 8 tokens and for one: two runs. A third would be
    loads that wait for products of earlier ones, and so for memory twice."""
    kinds = [bool(load) for load, _ in _ASKED.findall(kernel.sass)]
    runs = sum(kind and not (i and kinds[i - 1]) for i, kind in enumerate(kinds))
    return runs, sum(kinds) // 2 * 32 * 16


def too_little_asked(name: str, kernel: cubin.Kernel) -> list[str]:
    if not _PACKED_PLAIN.fullmatch(name):
        return []
    runs, of_warp = asked_at_once(kernel)
    warps = cubin.occupancy(kernel.arch, kernel.registers, kernel.shared, kernel.threads or 0).warps
    found = [f"loads: in {runs} runs with products between, of 2"] if runs > 2 else []
    if warps * of_warp < ASKED:
        found.append(f"loads: {warps} warps ask for {warps * of_warp:,} bytes at most, {ASKED:,} at least")
    return found


def waited_for(kernel: cubin.Kernel) -> list[str]:
    """Whether the loop's products run on while operands of the next ones are made: every wait in it is to leave some
    running. A compiler that gives up on their registers waits for each."""
    loop = min(cubin.loops_with_products(kernel), key=lambda x: x.last - x.first, default=None)
    if loop is None:
        return []
    text = kernel.sass[kernel.sass.index(f"/*{loop.first:04x}*/") : kernel.sass.index(f"/*{loop.last:04x}*/")]
    waits = [int(wait, 16) for _, wait in _ORDER.findall(text) if wait]
    left = [f"overlap: {waits.count(0)} of {len(waits)} waits in the loop at {loop.first:#06x} are for all products"]
    return left if 0 in waits or not waits else []


def complaints(name: str, kernel: cubin.Kernel) -> list[str]:
    """What is wrong with a kernel: what Triton's gate says of any but for local memory, and what its name promises."""
    mix, found = kernel.mix, []
    if kernel.threads is None:
        found.append("launch bounds: none, so nobody knows how many blocks fit")
    found += Compiled(kernel, (), kernel.threads or cubin.MOST_THREADS, kernel.shared).complaints_but_for(MOST_STACK)
    word = name.partition("_")[0]
    wanted = WANTED.get(name.partition("<")[0], WANTED.get(word))
    if ONLY_ON.get(word, kernel.arch) != kernel.arch:
        return found
    if wanted is None:
        found.append(f"name: begins with neither {' nor '.join(WANTED)}, so no opcode is asked of it")
    if IN_ONE_SLICE.match(name):
        wanted = (*(wanted or ()), "LDSM")
    if word in ("pipelined", "gathering", "scattering"):
        taken = kernel.stack + kernel.local
        found += [f"local memory: {taken} bytes a thread, none at all here"] if taken else []
        found += not_overlapped(kernel) if word == "pipelined" else waited_for(kernel)
    if word in ("pipelined", "gathering", "hopper"):
        found += [f"a product under way: {line}" for line in cubin.overwritten(kernel.sass)]
    found += [f"opcode: no {opcode}" for opcode in wanted or () if not mix[opcode]]
    if word == "float32":
        found += [
            f"opcode: {mix[opcode]} {opcode}, which is not float32" for opcode in cubin.TENSOR_OPCODES if mix[opcode]
        ]
    found += too_little_asked(name, kernel)
    if any(fnmatch.fnmatch(name, pattern) for pattern in NARROW_ALLOWED):
        return found
    return found + [f"memory: {mix[opcode]} {opcode}" for opcode in NARROW if mix[opcode]]


def row(name: str, kernel: cubin.Kernel) -> tuple[str, ...]:
    mix, threads = kernel.mix, kernel.threads or 0
    warps = cubin.occupancy(kernel.arch, kernel.registers, kernel.shared, threads).warps if threads else 0
    wide = [f"{mix[f'{opcode}.128']}/{mix[opcode]}" for opcode in ("LDG", "LDGSTS")]
    wide.append(f"{mix['STG.128']}+{mix['STG.64']}/{mix['STG']}")
    return (
        name, f"sm_{kernel.arch}", str(kernel.registers), f"{kernel.shared:,}", str(threads), str(warps),
        *(str(mix[opcode]) for opcode in ("HGMMA", "HMMA", "MOVM", "LDSM", "FFMA")), *wide, str(mix["MUFU.EX2"]),
    )  # fmt: skip


def read(path: Path) -> list[tuple[str, cubin.Kernel]]:
    """(name, kernel) of a library, an object file or a cubin, for the architectures that limits are known of."""
    found = [kernel for kernel in cubin.read(path) if kernel.arch in cubin.ARCHS]
    names = demangled(kernel.name for kernel in found)
    return sorted(((names[kernel.name], kernel) for kernel in found), key=lambda pair: (pair[1].arch, pair[0]))


def unavailable() -> str:
    """Why there are no kernels to read, or ''."""
    if not _native.AVAILABLE:
        return f"{_native.WHY}\n  -> {_native.REMEDY}"
    if not _native.CUDA:
        return f"{_native.NO_CUDA}\n  -> {_native.CUDA_REMEDY}"
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench cuda_gate", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("name", nargs="*", help="patterns of names, such as 'packed*'; all without")
    parser.add_argument("--arch", nargs="+", type=int, default=[], choices=sorted(cubin.ARCHS))
    parser.add_argument("--file", type=Path, help="a cubin or object file instead of the installed library")
    return parser


def main(argv: list[str]) -> int:
    """0; 1 where a kernel is not what it should be, or there is none."""
    args = _parser().parse_args(argv)
    if args.file is None and (why := unavailable()):
        print(why, file=sys.stderr)
        return 1
    kernels = [
        (name, kernel)
        for name, kernel in read(args.file or _library.library_path())
        if (not args.arch or kernel.arch in args.arch)
        and (not args.name or any(fnmatch.fnmatch(name, pattern) for pattern in args.name))
    ]
    failed = [f"sm_{kernel.arch} {name}: {why}" for name, kernel in kernels for why in complaints(name, kernel)]
    print(table(HEADER, [row(*pair) for pair in kernels], 1))
    print(
        "\nloads, copies (to shared memory), stores: those of 128 bits, of stores + 64 bits, of all; loop bodies once"
    )
    print("\n".join(f"! {line}" for line in failed or ["no kernel is called so"] * (not kernels)))
    return 1 if failed or not kernels else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
