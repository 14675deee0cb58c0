"""Stand-ins for shared libraries that are not here, so that what names them loads: a CUDA build of PyTorch on a CPU.

Each is a library of the right name, with the symbols and versions that are asked for; every function returns an error.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

ERROR = 999  # cudaErrorUnknown; not 0, which is success in every CUDA library
OURS = re.compile(r"lib(cu|nv|nccl)")  # CUDA's names; anything else that is missing is a mistake


def lines(*command: str | Path) -> list[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout.splitlines()


def wanted(library: Path) -> tuple[set[str], dict[str, str], set[str], set[str]]:
    """Of one library: what it needs, which of those has which version; and its symbols, undefined and defined."""
    needs = {match[1] for line in lines("readelf", "-d", library) if (match := re.search(r"NEEDED.*\[(.+)\]", line))}
    owner, file = {}, ""
    for line in lines("readelf", "-V", "-W", library):
        if match := re.search(r"File: (\S+)", line):
            file = match[1]
        elif file and (match := re.search(r"Name: (\S+)\s+Flags", line)):
            owner[match[1]] = file
    undefined = {line.split()[-1] for line in lines("nm", "-D", "--undefined-only", library)}
    defined = {re.sub("@.*", "", line.split()[-1]) for line in lines("nm", "-D", "--defined-only", library)}
    return needs, owner, undefined, defined


def make(folder: Path, libraries: list[Path]) -> list[str]:
    """Writes into `folder` what `libraries` need of CUDA and is not among them; returns the names."""
    needs, owner, undefined, defined = set(), {}, set(), set()
    for library in libraries:
        found = wanted(library)
        needs |= found[0]
        owner |= found[1]
        undefined |= found[2]
        defined |= found[3]
    missing = sorted(name for name in needs - {library.name for library in libraries} if OURS.match(name))
    symbols: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in missing}
    for version, name in owner.items():
        if name in symbols:
            symbols[name][version] = set()
    for symbol in undefined:
        bare, _, version = symbol.partition("@")
        if version and owner.get(version) in symbols:
            symbols[owner[version]][version].add(bare)
        elif missing and not version and bare not in defined and re.match(r"cu|nccl|nv", bare):
            symbols[missing[0]][""].add(bare)  # without a version any library may have it
    for name, versions in symbols.items():
        write(folder / name, versions)
    return missing


def write(library: Path, versions: dict[str, set[str]]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source, script = Path(scratch, "stand_in.c"), Path(scratch, "versions")
        names = sorted(set().union(*versions.values()))
        source.write_text("".join(f"int {name}(void) {{ return {ERROR}; }}\n" for name in names))
        globs = {version: "".join(f" {name};" for name in sorted(found)) for version, found in versions.items()}
        script.write_text("\n".join(f"{v} {{{f' global:{g}' if g else ''} }};" for v, g in globs.items() if v))
        compiler = shutil.which("gcc") or shutil.which("cc") or "cc"
        command = [compiler, "-w", "-fno-builtin", "-shared", "-fPIC", str(source), f"-Wl,-soname,{library.name}"]
        if script.read_text():
            command.append(f"-Wl,--version-script={script}")
        subprocess.run([*command, "-o", str(library)], check=True)
