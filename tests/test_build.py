"""How the native library is built: what is decided and said, and what is compiled again."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_tree import (
    SOURCES,
    answer_of,
    build,
    builds,
    built,
    compiled,
    library,
    run,
    run_build,
    toolchain,
    tree,
    write,
)

from vivit_kernels import _native

__all__ = ["tree"]  # a fixture


# ---- what is decided ----


def plan(**environ: str) -> str:
    """The decision's line, or the error that ends it."""
    try:
        return toolchain.plan({"PATH": os.environ["PATH"]} | environ).line()
    except toolchain.BuildError as error:
        return f"error: {error}"


@pytest.mark.parametrize(
    "mode, compiler, expected",
    [
        ("none", "", "native library: none: VIVIT_KERNELS_BUILD=none"),
        ("auto", "missing++", "native library: none: no C++ compiler is here (tried CXX=missing++) -> install g++"),
        ("cpu", "missing++", "error: VIVIT_KERNELS_BUILD=cpu: no C++ compiler is here (tried CXX=missing++)\n  -> "),
        ("cuda", "missing++", "error: VIVIT_KERNELS_BUILD=cuda: no C++ compiler is here (tried CXX=missing++)\n  -> "),
        ("auto", "false", "native library: none: false does not know this processor's instruction sets -> install g++"),
        ("gpu", "", "error: VIVIT_KERNELS_BUILD='gpu' is not known\n  -> it is one of auto, cuda, cpu, none"),
    ],
)
def test_the_decision_and_its_reason(mode, compiler, expected):
    assert plan(**{toolchain.VARIABLE: mode}, **({"CXX": compiler} if compiler else {})).startswith(expected)


@builds
def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "CSRC", tmp_path)
    assert plan().startswith("native library: CPU alone: csrc/ has no CUDA sources; ")
    (tmp_path / "kernel.cu").write_text(KERNEL)
    assert plan(CUDA_HOME=str(tmp_path)).startswith("native library: CPU alone: no nvcc is here (in CUDA_HOME=")
    asked = {toolchain.VARIABLE: "cuda", "CUDA_HOME": str(tmp_path)}
    assert plan(**asked).startswith("error: VIVIT_KERNELS_BUILD=cuda: no nvcc is here (in CUDA_HOME=")
    assert plan(**asked | {toolchain.VARIABLE: "cpu"}).startswith(
        "native library: CPU alone: VIVIT_KERNELS_BUILD=cpu; "
    )
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    assert plan() == "native library: none: PyTorch's headers are not here -> pip install 'torch>=2.11'"
    which = shutil.which
    monkeypatch.setattr(toolchain.shutil, "which", lambda name, **kw: None if name == "ninja" else which(name, **kw))
    assert plan() == "native library: none: ninja is not here -> pip install ninja"
    monkeypatch.setattr(toolchain.sys, "platform", "darwin")
    assert plan() == "native library: none: it is built on Linux only, this is darwin"


@builds
def test_an_isolated_build_takes_the_headers_of_the_environment(monkeypatch, tmp_path):
    """pip then hides the environment's packages from Python, not its folders."""
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    folder = tmp_path / "torch" / "include" / "torch" / "csrc" / "stable"
    folder.mkdir(parents=True)
    (folder / "library.h").touch()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.99.0+cpu'\n")
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    assert toolchain.plan(os.environ).torch == tmp_path / "torch"
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.10.0'\n")
    assert plan().startswith("native library: none: torch 2.10.0 is too old to build with -> ")


CODES = "sm_75\nsm_80\nsm_90\nsm_100\ncompute_75\n"


@pytest.mark.parametrize(
    "chosen, known, expected",
    [
        ("", CODES, ("sm_80", "compute_80", "sm_90a")),
        ("", "sm_75\nsm_80\n", ("sm_80", "compute_80")),
        ("8.0;9.0a+PTX", CODES, ("sm_80", "sm_90a", "compute_90a")),
        ("5.0 7.5 9.0+PTX", CODES, ("sm_90a", "compute_90")),
        ("10.0", CODES, ("sm_100",)),
        ("7.5", CODES, "no GPU of it runs the CUDA kernels"),
        ("Hopper", CODES, "'Hopper' is no GPU\n  -> write it like"),
        ("8.0 9.9", CODES, "this nvcc does not know 9.9"),
    ],
)
def test_the_list_of_gpus(chosen, known, expected):
    if isinstance(expected, tuple):
        assert toolchain.cuda_arches(chosen, known) == expected
    else:
        with pytest.raises(toolchain.BuildError) as error:
            toolchain.cuda_arches(chosen, known)
        assert f"TORCH_CUDA_ARCH_LIST={chosen!r}: " in str(error.value) and expected in str(error.value)


def test_instruction_sets_are_compiled_for_their_processors_and_linked_in_rising_order(monkeypatch):
    """The linker keeps the first copy of an inline function, and that must be the one that runs everywhere."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    names = [path.stem for path in build.sources("cpu")]
    sets = ["isa_portable", "isa_avx2", "isa_avx512", "isa_avx512_bf16", "isa_avx512_amx"]
    assert names[-5:] == sets and {"bindings", "dispatch"} <= set(names[:-5])
    some = toolchain.Plan("cpu", "", cxx=("g++",))
    flags = [build.host_flags(some, path, sanitize=False) for path in build.sources("cpu")[-5:]]
    assert ["-mavx2" in f for f in flags] == [False, True, True, True, True]
    assert ["-mavx512bf16" in f for f in flags] == [False, False, False, True, True]
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert [path.stem for path in build.sources("cpu") if path.stem.startswith("isa_")] == ["isa_portable"]


@builds
@pytest.mark.skipif("avx512_amx" not in toolchain.machine_flags(), reason="its flags are of another processor")
def test_a_compiler_without_amx_builds_the_rest(tmp_path):
    """Its file is empty then, and says so by a null name."""
    compiler = tmp_path / "old-g++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    cxx = toolchain.find_cxx({"CXX": str(compiler)})
    source = build.CSRC / "cpu" / "isa_avx512_amx.cpp"
    flags = build.host_flags(toolchain.Plan("cpu", "", cxx=cxx), source, sanitize=False)
    assert "-mavx512bf16" in flags and not any(flag.startswith("-mamx") for flag in flags)
    subprocess.run([*cxx, *flags, "-c", str(source), "-o", str(tmp_path / "empty.o")], check=True)
    assert not toolchain.newer_flags(cxx, "avx512_bf16")


def test_files_named_bindings_see_torch_and_know_whether_there_are_cuda_kernels():
    for kind in ("cpu", "cuda"):
        some = toolchain.Plan(kind, "", cxx=("g++",), torch=Path("torch"))
        for name, sees in (
            ("bindings.cpp", True),
            ("cuda/bindings.cpp", True),
            ("cuda/joint/bindings.cpp", True),
            ("cpu/dispatch.cpp", False),
        ):
            assert build.CSRC / name in build.sources(kind)
            flags = build.host_flags(some, build.CSRC / name, sanitize=False)
            assert (str(Path("torch/include")) in flags) == (build.TORCH_ABI in flags) == sees
            assert ("-DVIVIT_CUDA" in flags) == (sees and kind == "cuda")


# ---- what is built, and built again ----


@builds
def test_a_second_build_compiles_nothing_and_a_change_only_what_it_touches(tree):
    (tree / "pyproject.toml").unlink()  # a benchmark's checkout of another commit has none
    first = run_build(tree)
    isas = {"isa_portable.cpp", "isa_avx2.cpp"} if len(toolchain.machine_flags()) > 1 else {"isa_portable.cpp"}
    assert compiled(first) == {"bindings.cpp", "record.cpp", "_C.so"} | isas
    assert first.stdout.splitlines()[0].startswith("native library: CPU alone: csrc/ has no CUDA sources; ")
    assert answer_of(built(tree)) == 42
    assert library.problem_of(built(tree), tree) is None
    assert str(tree).encode() not in built(tree).read_bytes(), "messages would show where it was built"

    second = run_build(tree)
    assert compiled(second) == set() and len(second.stdout.splitlines()) == 1

    write(tree, {"cpu/numbers.h": SOURCES["cpu/numbers.h"].replace("40", "50")})
    stale = library.problem_of(built(tree), tree)
    assert stale and "is stale: csrc/ has changed since it was built" in stale.reason and "make build" in stale.remedy
    assert compiled(run_build(tree)) == {"bindings.cpp", "record.cpp", "_C.so"}
    shutil.copy(built(tree), tree / "again.so")  # the loader knows the first one by its name
    assert library.problem_of(built(tree), tree) is None and answer_of(tree / "again.so") == 52


@builds
def test_a_build_that_fails_says_so_and_leaves_the_old_library(tree):
    assert run_build(tree).returncode == 0
    before = built(tree).read_bytes()
    write(tree, {"cpu/isa_portable.cpp": "int portable_number() { return missing; }\n"})
    done = run_build(tree)
    assert done.returncode == 1 and "'missing'" in done.stdout.replace("‘", "'").replace("’", "'")
    assert "native library: failed, see above\n  -> VIVIT_KERNELS_BUILD=none installs without it" in done.stderr
    assert built(tree).read_bytes() == before


EDITING = """#!/bin/sh
g++ "$@" || exit
[ ! -e over ] || exit 0
case " $* " in
    *" -c csrc/bindings.cpp "*) {edit}; touch edited;;
    *" -c csrc/cpu/isa_portable.cpp "*) while [ ! -e edited ]; do sleep 0.05; done; exit {other};;
esac
"""
EDIT = "sed -i s/40/50/ csrc/cpu/numbers.h"


@builds
@pytest.mark.skipif(not shutil.which("g++"), reason="a stand-in for it calls g++")
@pytest.mark.parametrize(
    "edit, other",
    [(EDIT, 0), (f"{EDIT} && touch -d 2020-01-01 csrc/cpu/numbers.h", 0), (EDIT, 1)],
    ids=["edited", "with an old time", "and another file fails"],
)
def test_what_changes_while_it_is_compiled_is_compiled_again_and_nothing_else(edit, other, tree):
    """bindings.cpp is compiled, and the header that it includes edited before its object counts as made."""
    (tree / "edits").write_text(EDITING.format(edit=edit, other=other))
    (tree / "edits").chmod(0o755)
    options = {"CXX": str(tree / "edits"), "MAX_JOBS": "4"}
    done = run_build(tree, **options)
    assert done.returncode == 1 and not built(tree).exists()
    reason = "failed, see above" if other else "csrc/ has changed while it was compiled\n  -> build again"
    assert reason in done.stderr
    (tree / "over").touch()
    failed = {"isa_portable.cpp"} if other else set()
    assert compiled(run_build(tree, **options)) - {"isa_avx2.cpp"} == {"bindings.cpp", "record.cpp", "_C.so"} | failed
    assert answer_of(built(tree)) == 52 and compiled(run_build(tree, **options)) == set()


@builds
def test_a_change_beside_what_is_compiled_costs_nothing(tree):
    """No object is made of it, so that what was made is right, but the library says by a hash what it was made of."""
    write(tree, {"cpu/other.h": ""})
    edit = 'case " $* " in *" -c "*) [ -s csrc/cpu/other.h ] || echo "// more" > csrc/cpu/other.h;; esac'
    (tree / "edits").write_text(f'#!/bin/sh\n{edit}\nexec g++ "$@"\n')
    (tree / "edits").chmod(0o755)
    assert run_build(tree, CXX=str(tree / "edits")).returncode == 1 and not built(tree).exists()
    assert compiled(run_build(tree, CXX=str(tree / "edits"))) == {"record.cpp", "_C.so"}
    assert library.problem_of(built(tree), tree) is None


@builds
def test_builds_at_the_same_time_wait_for_each_other(tree):
    command = [sys.executable, "csrc/build.py"]
    both = [subprocess.Popen(command, cwd=tree, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    made = [process.communicate()[0].count("_C.so") for process in both]
    assert [process.returncode for process in both] == [0, 0] and sorted(made) == [0, 1]
    assert answer_of(built(tree)) == 42


UNLISTED = """
    extern "C" int torch_get_num_threads(unsigned*);
    extern "C" __attribute__((visibility("default"))) int answer() {
        unsigned count = 0;
        return torch_get_num_threads(&count);
    }
"""


@builds
def test_a_symbol_that_is_not_on_the_list_is_named(tree):
    write(tree, {"bindings.cpp": UNLISTED})
    done = run_build(tree)
    assert done.returncode == 0, done.stdout
    assert "native library: may not load in another PyTorch, it uses torch_get_num_threads\n" in done.stdout
    assert build.torch_symbols(built(tree)) == {"torch_get_num_threads"}
    write(tree, SOURCES)
    assert "may not load" not in run_build(tree).stdout


@builds
def test_without_a_compiler_the_reason_is_left_for_the_user(tree):
    done = run_build(tree, CXX="missing++")
    assert done.returncode == 0 and not built(tree).exists()
    missing = library.problem_of(built(tree), tree)
    assert missing and "_C.so is missing (no C++ compiler is here (tried CXX=missing++))" in missing.reason
    assert missing.remedy.startswith("install g++") and missing.remedy.endswith("make build (or: python csrc/build.py)")
    assert run_build(tree).returncode == 0
    assert library.problem_of(built(tree), tree) is None and not built(tree).with_name(library.NOTE).exists()


@builds
def test_where_it_can_be_built_it_is_there():
    """`make test` builds it first; without this, tests of native code would be left out and nobody would see it."""
    if os.environ.get(toolchain.VARIABLE) == "none":
        pytest.skip("VIVIT_KERNELS_BUILD=none")
    assert _native.AVAILABLE, f"{_native.WHY}\n  -> {_native.REMEDY}"


# ---- CUDA ----

KERNEL = "__global__ void twice(float* x) { x[threadIdx.x] *= 2; }\nint cuda_number() { return 1; }\n"
CUDA_BINDINGS = """
    int cuda_number();
    extern "C" __attribute__((visibility("default"))) int answer() { return cuda_number(); }
"""

FAKE_NVCC = """#!/bin/sh
echo "$@" >> {log}
case "$1" in
    --version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit;;
    --list-gpu-code) printf 'sm_80\\nsm_90\\n'; exit;;
esac
for word; do
    case "$word" in -gencode|arch=*|-ccbin|g++|-Xcompiler|-fPIC,*|-X*=*) ;; *) set -- "$@" "$word";; esac
    shift
done
case "$*" in *-shared*) exec g++ "$@";; *) exec g++ -fPIC -x c++ "$@";; esac
"""


@builds
@pytest.mark.skipif(not shutil.which("g++"), reason="the stand-in for nvcc calls g++")
def test_cuda_sources_are_compiled_by_nvcc_for_the_chosen_gpus(tree, tmp_path):
    home, log = tmp_path / "cuda", tmp_path / "log"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text(FAKE_NVCC.format(log=log))
    (home / "bin" / "nvcc").chmod(stat.S_IRWXU)
    write(tree, {"bindings.cpp": CUDA_BINDINGS, "cuda/kernel.cu": "int cuda_number() { return 1; }\n"})
    done = run_build(tree, CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX", CXX="g++")
    assert {"kernel.cu", "bindings.cpp", "_C.so"} <= compiled(done)
    line = "native library: CPU and CUDA (sm_80 sm_90a compute_90): nvcc 13.0 is here; g++"
    assert done.stdout.startswith(line)
    commands = log.read_text().splitlines()
    compiling = next(command for command in commands if "kernel.cu" in command)
    for arch in ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"):
        assert f"-gencode {arch}" in compiling
    assert "-DVIVIT_SM90A" in compiling
    assert any("-shared" in command for command in commands)
    record = library.read_record(built(tree))
    assert record and record.kind == "cuda" and answer_of(built(tree)) == 1
    assert compiled(run_build(tree, CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX", CXX="g++")) == set()
    assert "kernel.cu" in compiled(run_build(tree, CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST="8.0+PTX", CXX="g++"))
    compiling = [command for command in log.read_text().splitlines() if "kernel.cu" in command][-1]
    assert "-DVIVIT_SM90A" not in compiling  # on a Hopper its PTX has no such kernels


@pytest.mark.full
@builds
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")
def test_nvcc_itself_builds_a_library_that_loads_without_a_gpu(tree):
    write(tree, {"bindings.cpp": CUDA_BINDINGS, "cuda/kernel.cu": KERNEL})
    done = run_build(tree, VIVIT_KERNELS_BUILD="cuda")
    assert "kernel.cu" in compiled(done) and done.stdout.startswith(
        "native library: CPU and CUDA (sm_80 compute_80 sm_90a)"
    )
    assert answer_of(built(tree)) == 1
    needed = subprocess.run(["readelf", "-d", str(built(tree))], capture_output=True, text=True).stdout
    assert "libcudart" not in needed and "libcuda" not in needed


# ---- sanitizers ----


@pytest.mark.full
@builds
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here")
@pytest.mark.parametrize(
    "wrong, finding",
    [
        ("int* x = new int(1); delete x; return *x;", "heap-use-after-free"),
        ('int x = 2147483647; return x + (getenv("PATH") != nullptr);', "signed integer overflow"),
    ],
)
def test_sanitizers_find_what_is_planted(tree, wrong, finding):
    body = f'#include <cstdlib>\nextern "C" __attribute__((visibility("default"))) int answer() {{ {wrong} }}\n'
    write(tree, {"bindings.cpp": body})
    assert run_build(tree, "--sanitize", CXX="g++").returncode == 0
    ask = ["g++", "-print-file-name=libasan.so"]
    preload = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    call = "import ctypes; ctypes.CDLL('build/native/sanitized/_C.so').answer()"
    torch_lib = str(Path(torch.__file__).parent / "lib")
    options = {"LD_PRELOAD": preload, "LD_LIBRARY_PATH": torch_lib, "ASAN_OPTIONS": "detect_leaks=0"}
    done = run(tree, sys.executable, "-c", call, **options)
    assert done.returncode != 0 and finding in done.stderr
