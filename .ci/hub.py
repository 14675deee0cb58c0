"""Writes this package in the layout of Hugging Face's `kernels`: `make hub`, or `python .ci/hub.py`.

    build/hub/build/torch-cpu, torch-cuda     Python and Triton alone, for any machine
    build/hub/build/torch-stable-abi<xy>-...  the same with the native library, where csrc/build.py can build one
    build/hub/{build.toml,CARD.md,torch-ext}  the source layout, of the first two

Several versions of a kernel may be loaded into one process, beside an installed vivit_kernels, and PyTorch has one
table of operators. So the operators of a variant get namespaces of their own: those of Python one by the hash of its
files, those of the library one by the hash of csrc/, which two variants with the same library share.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kernels" / "vivit_kernels"
sys.path.insert(0, str(ROOT / "csrc"))
import build as native  # noqa: E402

NAME, VERSION, LICENSE = "vivit-kernels", 1, "Apache-2.0"  # VERSION is of the layers: another one where they change
FOLDER = "vivit_kernels"  # as the loader derives it from NAME
STABLE_ABI = "211"  # the oldest PyTorch of this package; the library itself asks for less
NATIVE = "vivit_kernels_native"  # the library's namespace in csrc/
OURS = re.compile(r'\bvivit_kernels(?=::)|(?<=\btorch\.ops\.)vivit_kernels\b|(?<=")vivit_kernels(?=")')
LAYERS = "\nfrom .integrations import huggingface_kernels as layers  # what `kernelize` looks up\n"


def python_files() -> dict[str, str]:
    """Of the package, by their paths in it."""
    paths = (path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__main__.py")
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in paths}


def digest_of(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def native_namespace() -> str:
    return f"{NATIVE}_{native.library.hash_of(native.CSRC)[:12]}"


def renamed(text: str, namespace: str, library: str) -> str:
    """A file of the package with its operators in other namespaces, and other names in the registries of hosts."""
    return OURS.sub(namespace, re.sub(rf"\b{NATIVE}\b", library, text))


def write_variant(folder: Path, backend: str, library: Path | None = None) -> Path:
    """One variant: the package, the layers, metadata.json and, where given, the library."""
    files = python_files()
    files["__init__.py"] += LAYERS
    own = digest_of(backend, *(x for item in files.items() for x in item), native_namespace() if library else "")
    ident = f"{FOLDER}_{backend}_{own}"
    for name, text in files.items():
        native.write_changed(folder / name, renamed(text, ident, native_namespace()))
    if library:
        shutil.copyfile(library, folder / native.library.NAME)
    metadata = {
        "id": ident,
        "name": NAME,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests(folder)},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return folder


def digests(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in paths
        if path.name != "metadata.json"
    }


# ---- the native library, with a namespace of its own ----


def build_library(chosen: native.Plan) -> Path:
    """The library of `make build`, linked once more with bindings whose operators have another namespace."""
    with native.made(chosen, native.BUILD / chosen.kind) as built:
        folder, namespace = built.parent / "hub", native_namespace()
        objects = []
        for source in [built.parent / "record.cpp", *native.sources(chosen.kind)]:
            inside = source.relative_to(native.CSRC) if source.is_relative_to(native.CSRC) else Path(source.name)
            if source.name == "bindings.cpp":
                objects.append(compiled(chosen, source, folder / inside, namespace))
            else:
                objects.append(Path(f"{built.parent / inside}.o"))
        output = folder / native.library.NAME
        link = native.link_command(chosen, sanitize=False)
        link = link.replace("$in", native.words(*objects)).replace("$out", native.words(output))
        run(["sh", "-c", link.replace("$$", "$")])
    if re.search(rb"vivit_kernels_native(?!_[0-9a-f]{12})", output.read_bytes()):
        raise native.BuildError(f"a file of csrc/ that is no bindings.cpp has {NATIVE} in it, {namespace} is meant")
    return output


def compiled(chosen: native.Plan, source: Path, copy: Path, namespace: str) -> Path:
    """The object of a bindings.cpp, again only after a change of csrc/."""
    object_file = Path(f"{copy}.o")
    before = copy.read_text() if copy.is_file() else ""
    native.write_changed(copy, re.sub(rf"\b{NATIVE}\b", namespace, source.read_text()))
    if not object_file.is_file() or copy.read_text() != before:
        flags = [*native.host_flags(chosen, source, False), "-iquote", str(source.parent)]
        run([*chosen.cxx, *flags, "-c", str(copy), "-o", str(object_file)])
    return object_file


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise native.BuildError(f"{command[0]} failed:\n{done.stderr[-2000:]}")


def cuda_version(nvcc: str) -> str:
    """ "130" of CUDA 13.0: the loader takes it where the PyTorch is of 13.0 or later."""
    found = re.search(r"release (\d+)\.(\d+)", native.answer([nvcc, "--version"]))
    if not found:
        raise native.BuildError(f"{nvcc} does not tell its version")
    return "".join(found.groups())


# ---- all of it ----

MANIFEST = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = ["cpu", "cuda"]

[torch-noarch]
"""

CARD = f"""\
---
library_name: kernels
license: {LICENSE.lower()}
---
# {NAME}

Fast attention and tubelet embedding for video transformers. Its layers, and the classes whose forward they can take:

"""


def card() -> str:
    """CARD.md: every layer with the first line of its text."""
    text = (PACKAGE / "integrations" / "huggingface_kernels.py").read_text()
    found = re.findall(r'^class (\w+)\(nn\.Module\):\n    """(.+?)"""', text, re.MULTILINE | re.DOTALL)
    return CARD + "".join(f"- `{name}`: {' '.join(what.split())}\n" for name, what in found)


def write(folder: Path, chosen: native.Plan | None) -> list[Path]:
    """The layout in `folder`, which is emptied; its variants. chosen: how to build the library; None: without."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "build.toml").is_file():
        raise native.BuildError(f"{folder} holds something else than a kernel, and would be emptied", "another --out")
    shutil.rmtree(folder, ignore_errors=True)
    native.write_changed(folder / "build.toml", MANIFEST)  # first: the folder of a build that failed is known by it
    variants = [write_variant(folder / "build" / f"torch-{backend}", backend) for backend in ("cpu", "cuda")]
    if chosen and chosen.kind != "none":
        library = build_library(chosen)
        backends = {"cpu": "cpu"}
        if chosen.kind == "cuda":  # the same file runs where there is no GPU
            backends["cuda"] = f"cu{cuda_version(chosen.nvcc)}"
        for backend, tag in backends.items():
            name = f"torch-stable-abi{STABLE_ABI}-{tag}-{platform.machine()}-{sys.platform}"
            variants.append(write_variant(folder / "build" / name, backend, library))
    shutil.copytree(variants[0], folder / "torch-ext" / FOLDER, ignore=shutil.ignore_patterns("metadata.json"))
    (folder / "CARD.md").write_text(card())
    shutil.copy(ROOT / "LICENSE", folder)
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "hub", help="the folder, which is emptied")
    parser.add_argument("--no-library", action="store_true", help="only the variants of Python and Triton")
    arguments = parser.parse_args()
    try:
        chosen = None if arguments.no_library else native.plan()
        if chosen:
            print(chosen.line(), flush=True)
        for variant in write(arguments.out.absolute(), chosen):
            print(variant.relative_to(ROOT) if variant.is_relative_to(ROOT) else variant)
    except native.BuildError as error:
        sys.exit(f"hub: {error}")


if __name__ == "__main__":
    main()
