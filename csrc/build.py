"""Builds the native library: `python csrc/build.py`, or `make build`; setup.py does the same for pip.

Ninja compiles in parallel and only what has changed. nvcc takes part where it is found and csrc/ has CUDA sources; one
printed line says what is built, and why that (toolchain.py decides).

    VIVIT_KERNELS_BUILD=auto|cuda|cpu|none   auto: the most that can be built here; cuda, cpu: that or an error
    TORCH_CUDA_ARCH_LIST="8.0 9.0a+PTX"      GPUs to compile for (default: CUDA_ARCHES in toolchain.py)
    CXX, CUDA_HOME, MAX_JOBS                 the C++ compiler, where nvcc is (bin/nvcc), how many compile at a time
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
BUILD = ROOT / "build" / "native"
sys.path.insert(0, str(CSRC))  # setup.py and tests take this file by its path
from toolchain import (  # noqa: E402
    FLAGS,
    ISA_FLAGS,
    VARIABLE,
    BuildError,
    Plan,
    answer,
    compiler_name,
    library,
    machine_flags,
    newer_flags,
    plan,
    torch_version,
    warning_flags,
)

FAST, SANITIZED = ["-O3"], ["-O2", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
SANITIZED += ["-fno-sanitize-recover=undefined"]  # the first finding ends the process, as address's does
# bindings.cpp alone sees torch, by the stable ABI of 2.10: what it compiles to runs in every later release.
TORCH_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def isa_of(source: Path) -> str:
    """The instruction set whose flags a source is compiled with; "" for any other source."""
    found = [isa for isa in ISA_FLAGS if source.stem.endswith(f"_{isa}")]
    return max(found, key=len, default="")


def sources(kind: str) -> list[Path]:
    """What the library is compiled from, in the order of linking."""
    wanted = [*CSRC.rglob("*.cpp"), *(CSRC.rglob("*.cu") if kind == "cuda" else [])]
    wanted = [source for source in wanted if isa_of(source) in ("", *machine_flags())]
    rank = ["", *ISA_FLAGS]
    return sorted(wanted, key=lambda source: (rank.index(isa_of(source)), source))


def write_changed(path: Path, text: str) -> None:
    """An unchanged file keeps its time, by which ninja goes."""
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def package_version() -> str:
    """Of pyproject.toml; "unknown" where there are only kernels/ and csrc/, as for a benchmark of another commit."""
    file = ROOT / "pyproject.toml"
    found = re.search(r'^version = "(.+)"', file.read_text() if file.is_file() else "", re.MULTILINE)
    return found.group(1) if found else "unknown"


def record_source(chosen: Plan) -> str:
    """A C++ file with the record that vivit_kernels reads out of the library."""
    record = library.Record(
        version=package_version(),
        sources=library.hash_of(CSRC),
        kind=chosen.kind,
        why=chosen.why,
        compiler=compiler_name(chosen.cxx),
        torch=torch_version(chosen.torch),
    )
    keep = 'extern "C" __attribute__((visibility("default"), used)) const char'
    return f"{keep} vivit_kernels_record[] = {json.dumps(library.record_text(record))};\n"


def words(*parts: str | Path) -> str:
    """A command's words for the shell, in a ninja file."""
    return shlex.join(str(part) for part in parts).replace("$", "$$")


def name(path: Path) -> str:
    """A file's name in a ninja file, whose commands run in ROOT: messages then hold no path of this machine."""
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return re.sub(r"([$: ])", r"$\1", str(shown))


def host_flags(chosen: Plan, source: Path, sanitize: bool) -> list[str]:
    isa = isa_of(source)
    flags = [*FLAGS, *warning_flags(chosen.cxx), *(SANITIZED if sanitize else FAST), *ISA_FLAGS.get(isa, [])]
    flags += newer_flags(chosen.cxx, isa)
    if source.name == "bindings.cpp":
        flags += [TORCH_ABI, "-isystem", str(chosen.torch / "include")]
        flags += ["-DVIVIT_CUDA"] if chosen.kind == "cuda" else []
    return flags


def device_flags(chosen: Plan) -> list[str]:
    """-compress-all: machine code, too, where nvcc compresses PTX alone; a third of the size (measured: 3.6 to 1.2 MB
    of the forward in one dtype, nvcc 13.0) for a tenth of a second, unpacked when the GPU loads it."""
    codes = [f"arch=compute_{re.sub(r'^[a-z]+_', '', arch)},code={arch}" for arch in chosen.arches]
    host = ["-ccbin", chosen.cxx[-1], "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
    host += ["-DVIVIT_SM90A"] if "sm_90a" in chosen.arches else []  # launchers ask for Hopper's kernels only then
    return ["-std=c++17", "-O3", "-Xfatbin=-compress-all", *host] + [
        flag for code in codes for flag in ("-gencode", code)
    ]


def link_command(chosen: Plan, sanitize: bool) -> str:
    """-lstdc++ comes first: PyTorch's library has copies of its newer functions, but not in every release."""
    libraries = ["-lstdc++", f"-L{chosen.torch / 'lib'}", "-ltorch_cpu"]
    if chosen.kind == "cuda":  # nvcc links the CUDA runtime statically: the library loads where there is none
        linker = [chosen.nvcc, "-ccbin", chosen.cxx[-1], "-shared"]
        return f"{words(*linker)} $in -o $out {words(*libraries)} -Xlinker=-z,defs"
    extra = SANITIZED if sanitize else ["-Wl,-z,defs"]
    return f"{words(*chosen.cxx, '-shared')} $in -o $out {words(*libraries, *extra)}"


def ninja_file(chosen: Plan, folder: Path, sanitize: bool) -> str:
    """Targets: the library (by default), and `tidy`: clang-tidy on each host source, again only after a change."""
    compile_with = {
        "cxx": f"{words(*chosen.cxx)} $flags -MD -MF $out.d -c $in -o $out",
        "nvcc": f"{words(chosen.nvcc)} $flags -MD -MF $out.d -c $in -o $out",
    }
    lines = ["ninja_required_version = 1.5", f"builddir = {name(folder)}"]
    for rule, command in compile_with.items():
        lines += [f"rule {rule}", f"  command = {command}", "  depfile = $out.d", "  deps = gcc", "  description = $in"]
    lines += ["rule link", f"  command = {link_command(chosen, sanitize)}", "  description = $out"]
    tidy = f"{words(*clang_tidy())} $in -- $flags -Wno-unknown-warning-option && touch $out"
    lines += ["rule tidy", f"  command = {tidy}", "  description = clang-tidy $in"]
    objects, stamps = [], []
    for source in [folder / "record.cpp", *sources(chosen.kind)]:
        on_device = source.suffix == ".cu"
        flags = device_flags(chosen) if on_device else host_flags(chosen, source, sanitize)
        stem = folder / (source.relative_to(CSRC) if source.is_relative_to(CSRC) else source.name)
        objects.append(name(Path(f"{stem}.o")))
        lines += [f"build {objects[-1]}: {'nvcc' if on_device else 'cxx'} {name(source)}", f"  flags = {words(*flags)}"]
        if not on_device and source.is_relative_to(CSRC):
            stamps.append(name(Path(f"{stem}.tidy")))
            lines += [f"build {stamps[-1]}: tidy {name(source)} | {objects[-1]} {name(ROOT / '.clang-tidy')}"]
            lines += [f"  flags = {words(*flags)}"]
    target = name(folder / library.NAME)
    lines += [f"build {target}: link {' '.join(objects)}", f"build tidy: phony {' '.join(stamps)}", f"default {target}"]
    return "\n".join(lines) + "\n"


def clang_tidy() -> list[str]:
    beside = Path(sys.executable).with_name("clang-tidy")
    return [str(beside) if beside.exists() else "clang-tidy", "--quiet"]


def run_ninja(chosen: Plan, folder: Path, targets: tuple[str, ...]) -> None:
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    keep_going = ["-k", "0"] if targets else []  # every finding of clang-tidy, but the first error of a compiler
    command = [chosen.ninja, "-f", str(folder / "build.ninja"), *jobs, *keep_going, *targets]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if "no work to do" not in line:
                print(line, end="", flush=True)
    if process.returncode:
        raise BuildError(
            "failed, see above", "" if targets else f"{VARIABLE}=none installs without it, =cpu without nvcc"
        )


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One build at a time in a folder; another process waits."""
    import fcntl  # not on Windows, where nothing is built

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def allowed_symbols() -> set[str]:
    lines = (CSRC / "torch_symbols.txt").read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def torch_symbols(path: Path) -> set[str]:
    """What a library asks of PyTorch: undefined symbols without a version, which those of glibc and libstdc++ have."""
    lines = (line.split() for line in answer(["nm", "-D", "--undefined-only", str(path)]).splitlines())
    return {line[1] for line in lines if line[0] == "U" and "@" not in line[1]}


def contents() -> dict[Path, tuple[int, bytes]]:
    """What decides what the library does, file by file. Where a time alone changes, there may have been something else
    in between."""
    files = (file for file in CSRC.rglob("*") if file.suffix in library.SUFFIXES)
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def forget_made_of(changed: set[Path], chosen: Plan, folder: Path) -> None:
    """Removes the objects that one of these files is a part of. Of all others ninja knows that none is: they stay."""
    command = [chosen.ninja, "-f", str(folder / "build.ninja"), "-t", "deps"]
    listed = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
    parts: dict[Path, set[Path]] = {}
    of: set[Path] = set()
    for line in listed.splitlines():
        if line and not line[0].isspace():  # an object, and then what it was compiled from
            of = parts.setdefault(ROOT / line.partition(": #deps ")[0], set())
        elif line:
            of.add((ROOT / line.strip()).resolve())
    for made_of_either in folder.rglob("*.o"):
        if not parts.get(made_of_either) or parts[made_of_either] & changed:
            made_of_either.unlink()


@contextlib.contextmanager
def made(chosen: Plan, folder: Path, sanitize: bool = False, targets: tuple[str, ...] = ()) -> Iterator[Path]:
    """The library in `folder`, or other targets, up to date and nobody else's until the end of the block.

    Raises BuildError if csrc/ is edited meanwhile. By their times, objects of what was edited would count as made from
    what it is then, so those alone go: also after an error, and when the user stops it."""
    with alone(folder):
        before = contents()
        try:
            write_changed(folder / "record.cpp", record_source(chosen))
            write_changed(folder / "build.ninja", ninja_file(chosen, folder, sanitize))
            run_ninja(chosen, folder, targets)
        finally:
            if changed := {file for file, _ in before.items() ^ contents().items()}:
                forget_made_of(changed, chosen, folder)
        if changed:
            raise BuildError("csrc/ has changed while it was compiled", "build again")
        yield folder / library.NAME


def build(output: Path, chosen: Plan) -> None:
    """Puts the library at `output`, compiling what has changed; or beside it the reason why none is built.

    Raises BuildError when a compiler fails.
    """
    if chosen.kind == "none":
        write_note(chosen, output.parent)
        return
    with made(chosen, BUILD / chosen.kind) as built:
        if not output.is_file() or not filecmp.cmp(built, output, shallow=False):
            if unknown := torch_symbols(built) - allowed_symbols():
                print(f"native library: may not load in another PyTorch, it uses {', '.join(sorted(unknown))}")
            output.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(built, output.with_suffix(".new"))
            output.with_suffix(".new").replace(output)  # who has the old one loaded keeps it
    output.with_name(library.NOTE).unlink(missing_ok=True)


def write_note(chosen: Plan, package: Path) -> None:
    """Why there is no library, for `python -m vivit_kernels`; one that is there from an earlier build stays."""
    if not (package / library.NAME).exists():
        package.mkdir(parents=True, exist_ok=True)
        (package / library.NOTE).write_text(f"{chosen.why}\n{chosen.remedy}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", action="store_true", help="with ASan and UBSan, in build/native/sanitized")
    parser.add_argument("--tidy", action="store_true", help="run clang-tidy instead")
    arguments = parser.parse_args()
    try:
        chosen = plan()
        print(chosen.line(), flush=True)
        if not (arguments.sanitize or arguments.tidy):
            build(library.PACKAGE / library.NAME, chosen)
        elif chosen.kind == "none" and arguments.tidy:
            print("LEFT OUT: clang-tidy, which needs what a build needs")
        elif chosen.kind == "none":
            raise BuildError("it has to be built for that", chosen.remedy)
        elif arguments.sanitize:
            with made(chosen, BUILD / "sanitized", sanitize=True) as built:
                print(f"native library: {built.relative_to(ROOT)}")
        elif not shutil.which(clang_tidy()[0]):
            raise BuildError("clang-tidy is not here", "pip install clang-tidy")
        else:
            with made(chosen, BUILD / chosen.kind, targets=("tidy",)):
                pass
    except BuildError as error:
        sys.exit(f"native library: {error}")


if __name__ == "__main__":
    main()
