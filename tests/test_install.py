"""The install script's decisions, and what the wheel holds."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("install", ROOT / ".ci" / "install.py")
assert spec and spec.loader
install = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)
sys.path.insert(0, str(ROOT / ".ci"))
import stand_ins  # noqa: E402

PIP = [sys.executable, "-m", "pip"]


def report(*packages: str) -> dict:
    pairs = (package.split("==") for package in packages)
    return {"version": "1", "install": [{"metadata": {"name": name, "version": version}} for name, version in pairs]}


def make_wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
    """A wheel with nothing in it but its requirements."""
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def only_folder(monkeypatch, tmp_path):
    """pip options by which nothing but the wheels in tmp_path can be found, whatever this machine's pip is set to."""
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return ["--no-index", "--find-links", str(tmp_path), "--ignore-installed"]


@pytest.mark.parametrize(
    "packages, found",
    [
        (["torch==2.13.0+cpu", "numpy==2.4.6", "sympy==1.14.0"], []),
        (["torch==2.13.0", "filelock==4.2.11"], []),  # what macOS and a CPU mirror without local versions give
        (["torch==2.13.0", "nvidia-cublas==13.1.1.3", "triton==3.7.1"], ["nvidia-cublas==13.1.1.3"]),
        (["torch==2.13.0", "Nvidia_NCCL.cu13==2.29.7"], ["nvidia-nccl-cu13==2.29.7"]),
        (["cuda-toolkit==13.0.3.0", "cuda-bindings==13.4.4"], ["cuda-toolkit==13.0.3.0", "cuda-bindings==13.4.4"]),
        (["torch==2.13.0+cu130"], ["torch==2.13.0+cu130"]),
        ([], []),  # everything is there already
    ],
)
def test_cuda_is_found_in_a_report(packages, found):
    assert install.cuda_packages(report(*packages)) == found


def test_cuda_is_found_in_what_pip_reports(tmp_path, only_folder):
    """pip itself resolves a torch that requires CUDA packages, from a folder of empty wheels; nothing is installed."""
    make_wheel(tmp_path, "torch", "2.13.0", ("nvidia-cublas; platform_system != 'Nowhere'",))
    make_wheel(tmp_path, "nvidia_cublas", "13.1.1.3")
    assert install.cuda_packages(install.resolve(PIP, [*only_folder, "torch==2.13.0"])) == ["nvidia-cublas==13.1.1.3"]
    make_wheel(tmp_path, "torch", "2.13.0+cpu")  # pip prefers it: a local version counts as newer
    assert install.cuda_packages(install.resolve(PIP, [*only_folder, "torch==2.13.0"])) == []


def test_a_resolution_that_fails_stops_with_pips_reason(only_folder):
    with pytest.raises(install.Stop, match=r"No matching distribution found for torch==2\.13\.0"):
        install.resolve(PIP, [*only_folder, "torch==2.13.0"])


def test_packages_are_resolved_without_the_native_library(monkeypatch):
    """VIVIT_KERNELS_BUILD=cpu asks for it, and there is no torch yet to build it with."""
    monkeypatch.setenv("VIVIT_KERNELS_BUILD", "cpu")
    seen = []

    def run(command, **options):
        seen.append(options["env"]["VIVIT_KERNELS_BUILD"])
        Path(command[command.index("--report") + 1]).write_text("{}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(install, "run", run)
    assert install.resolve(PIP, ["torch"]) == {} and seen == ["none"]


def test_the_stop_message_says_what_to_run():
    found = [f"nvidia-{i}==1.0" for i in range(18)]
    text = install.cuda_message(found, "3.12.3", "demo", "  ERROR: no answer")
    assert "Python 3.12.3" in text and "18 packages" in text and "nvidia-2==1.0, ..." in text and "no answer" in text
    assert install.CPU_INDEX in text
    for remedy in ("VIVIT_TORCH_INDEX=", "PIP_FIND_LINKS=", "make demo VENV= PYTHON=", "VIVIT_CUDA=1 make demo"):
        assert remedy in text


def test_old_pythons_are_refused():
    install.require_python((3, 10, 0), "python3")
    with pytest.raises(SystemExit, match=r"Python >= 3.10 is needed, python3 is 3.9.\n.*PYTHON=python3.12"):
        install.require_python((3, 9, 18), "python3", ["python3.12", "python3.11"])
    with pytest.raises(SystemExit, match="apt install python3"):
        install.require_python((3, 8), "python3")


def test_a_missing_venv_module_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    with pytest.raises(install.Stop, match=r"no module 'ensurepip'(.|\n)*apt install python3-venv"):
        install.make_venv(tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    "text, version",
    [("pip 23.2.1 from somewhere (python 3.11)", (23, 2, 1)), ("pip 25.0 from x", (25, 0)), ("", (0,))],
)
def test_versions_are_read(text, version):
    assert install.version_of(text) == version


@pytest.mark.parametrize("forced, expected", [("0", False), ("1", True)])
def test_the_gpu_can_be_decided_by_hand(monkeypatch, forced, expected):
    monkeypatch.setenv("VIVIT_CUDA", forced)
    assert install.has_gpu() is expected


def test_the_record_depends_on_everything_an_install_depends_on():
    one = install.fingerprint("test", "3.11.7", False)
    assert one == install.fingerprint("test", "3.11.7", False)
    others = [("demo", "3.11.7", False), ("test", "3.12.1", False), ("test", "3.11.7", True)]
    assert len({one, *(install.fingerprint(*other) for other in others)}) == 4
    for name in install.INPUTS:
        assert (ROOT / name).is_file(), f"{name} is gone; .ci/install.py would fail"


def test_a_second_call_installs_nothing(monkeypatch, tmp_path, capsys):
    commands = []
    real_run = install.run

    def run(command, **options):
        if command[1:3] != ["-m", "pip"]:
            return real_run(command, **options)
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "pip 26.3 from here", "")

    monkeypatch.setattr(install, "run", run)
    monkeypatch.setattr(install, "make_venv", lambda venv: Path(sys.executable))
    monkeypatch.setattr(install, "resolve", lambda pip, wanted: report("torch==2.13.0+cpu"))
    monkeypatch.setenv("VIVIT_CUDA", "0")
    install.install("test", tmp_path)
    assert [command for command in commands if ".[test]" in command and ".ci/constraints-cpu.txt" in command]
    commands.clear()
    install.install("test", tmp_path)
    install.install("demo", tmp_path)  # the smaller ones came with it
    install.install("build", tmp_path)
    assert not commands
    assert capsys.readouterr().out.count("is up to date") == 3


def test_cuda_without_a_gpu_stops_before_anything_is_installed(monkeypatch, tmp_path):
    commands = []

    def run(command, **options):
        commands.append(command)
        failed = "--index-url" in command
        return subprocess.CompletedProcess(
            command, int(failed), "pip 26.3", "ERROR: cannot be reached" if failed else ""
        )

    monkeypatch.setattr(install, "make_venv", lambda venv: Path(sys.executable))
    monkeypatch.setattr(install, "require_python", lambda *arguments: None)
    monkeypatch.setattr(install, "run", run)
    monkeypatch.setattr(install, "resolve", lambda pip, wanted: report("torch==2.13.0", "nvidia-cublas==13.1.1.3"))
    monkeypatch.setenv("VIVIT_CUDA", "0")
    with pytest.raises(install.Stop, match=r"no NVIDIA GPU here(.|\n)*cannot be reached"):
        install.install("test", tmp_path)
    asked = [command for command in commands if "install" in command]
    assert len(asked) == 1 and asked[0][-1].endswith("+cpu") and "--no-deps" in asked[0]
    assert not (tmp_path / install.RECORD).exists()


def test_with_a_gpu_torch_is_left_free(monkeypatch, tmp_path):
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "3.12.1" if command[1] == "-c" else "pip 26.3", "")

    monkeypatch.setattr(install, "make_venv", lambda venv: Path(sys.executable))
    monkeypatch.setattr(install, "run", run)
    monkeypatch.setenv("VIVIT_CUDA", "1")
    install.install("demo", tmp_path)
    assert ".ci/constraints-cpu.txt" not in commands[-1] and ".ci/constraints.txt" in commands[-1]
    assert json.loads((tmp_path / install.RECORD).read_text()).keys() == {"build", "demo"}


def test_the_native_library_is_left_to_make(monkeypatch, tmp_path):
    """pip builds this package before it installs torch, whose headers the library needs."""
    environments = []

    def run(command, **options):
        if command[1:4] == ["-m", "pip", "install"]:
            environments.append(options.get("env", {}).get("VIVIT_KERNELS_BUILD"))
        return subprocess.CompletedProcess(command, 0, "3.12.1" if command[1] == "-c" else "pip 26.3", "")

    monkeypatch.setattr(install, "make_venv", lambda venv: Path(sys.executable))
    monkeypatch.setattr(install, "run", run)
    monkeypatch.setenv("VIVIT_CUDA", "1")
    for goal in install.GOALS:
        install.install(goal, tmp_path)
    assert environments == ["none"] * len(install.GOALS)
    assert all(".ci/build.txt" in wanted for wanted in install.GOALS.values())


def test_the_wheel_holds_both_packages_and_nothing_else(tmp_path):
    """Built from a copy, so that no build folder appears in the checkout."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("kernels", "vivit", "csrc", "tests", "bench"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    without_library = os.environ | {"VIVIT_KERNELS_BUILD": "none"}  # with it: test_build.py
    built = subprocess.run(command, env=without_library, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("vivit_kernels-*-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    held = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    present = {name for name in ("kernels/vivit_kernels", "vivit") if (ROOT / name / "__init__.py").exists()}
    assert held == {Path(name).name for name in present}
    for package in present:
        inside = {str(Path(package).name / path.relative_to(ROOT / package)) for path in (ROOT / package).rglob("*.py")}
        assert inside <= set(names), "a folder without __init__.py is left out of the wheel"
    assert [name for name in names if name.endswith("entry_points.txt")] and [n for n in names if n.endswith("LICENSE")]


def test_the_newest_triton_that_cannot_be_had_leaves_nothing(monkeypatch, tmp_path, only_folder):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(install.Stop, match=r"triton==3\S+ cannot be had:\n(.|\n)*No matching distribution"):
        install.install_newest_triton(tmp_path)
    assert not (tmp_path / install.NEWEST).exists()


def test_the_newest_triton_is_installed_once(monkeypatch, tmp_path):
    commands = []

    def run(command, **options):
        commands.append(command)
        Path(command[command.index("--target") + 1]).mkdir()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(install, "run", run)
    install.install_newest_triton(tmp_path)
    install.install_newest_triton(tmp_path)
    assert len(commands) == 1 and "--no-deps" in commands[0] and commands[0][-1].startswith("triton==")


@pytest.fixture
def pip_targets(monkeypatch, tmp_path):
    """What pip is asked to install aside, as the last words of each command; it succeeds where `answers` says so."""
    asked, answers = [], []

    def run(command, **options):
        if "--target" in command:
            asked.append(command[command.index("--target") + 2 :])
            (Path(command[command.index("--target") + 1]) / "torch" / "lib").mkdir(parents=True)
            return subprocess.CompletedProcess(command, int(not answers.pop(0)), "", "ERROR: no answer")
        return subprocess.CompletedProcess(command, int(not answers.pop(0)), "", "OSError: libcudart.so.13 is missing")

    monkeypatch.setattr(install, "run", run)
    return asked, answers


def test_the_oldest_torch_is_the_cpu_build_where_it_can_be_had(pip_targets, tmp_path):
    asked, answers = pip_targets
    pin = install.pin_of("constraints-oldest.txt", "torch")
    answers += [True, True]
    install.install_oldest_torch(tmp_path)
    install.install_oldest_torch(tmp_path)  # is up to date
    assert asked == [["--index-url", install.CPU_INDEX, f"{pin}+cpu"]] and not answers
    oldest = pin.replace("==", ">=").removesuffix(".0")
    assert f'"{oldest}"' in (ROOT / "pyproject.toml").read_text()


def test_the_oldest_torch_is_else_any_build_of_it(pip_targets, tmp_path):
    asked, answers = pip_targets
    answers += [False, True, True]
    install.install_oldest_torch(tmp_path)
    assert asked[1:] == [[install.pin_of("constraints-oldest.txt", "torch")]]


@pytest.mark.parametrize(
    "given, why",
    [([False, False], "cannot be had:\n  ERROR: no answer\n  ERROR"), ([True, False], "does not run here:\n  OSError")],
)
def test_an_oldest_torch_that_cannot_be_used_stops_with_the_reason(pip_targets, tmp_path, given, why):
    pip_targets[1].extend(given)
    with pytest.raises(install.Stop, match=f"torch==\\S+ {why}"):
        install.install_oldest_torch(tmp_path)
    assert not (tmp_path / install.OLDEST).exists()


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("readelf")), reason="no gcc here")
def test_stand_ins_let_a_library_load_whose_needs_are_missing(tmp_path):
    def link(name: str, code: str, *options: str) -> None:
        (tmp_path / "code.c").write_text(code)
        command = ["gcc", "-shared", "-fPIC", "code.c", "-o", name, f"-Wl,-soname,{name}", *options]
        subprocess.run(command, cwd=tmp_path, check=True)

    (tmp_path / "versions").write_text("libcublas.so.7 { global: cublasCreate; };")
    link("libcublas.so.7", "int cublasCreate(void) { return 0; }", "-Wl,--version-script=versions")
    link("libnccl.so.2", "int ncclInit(void) { return 0; }")
    code = "int cublasCreate(void); int ncclInit(void); int both(void) { return cublasCreate() + ncclInit(); }"
    link("libuser.so", code, "-L.", "-l:libcublas.so.7", "-l:libnccl.so.2", "-Wl,-rpath,$ORIGIN")
    call = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).both())"
    load = [sys.executable, "-c", call, str(tmp_path / "libuser.so")]
    for name in ("libcublas.so.7", "libnccl.so.2"):
        (tmp_path / name).unlink()
    assert subprocess.run(load, capture_output=True).returncode == 1
    assert stand_ins.make(tmp_path, [tmp_path / "libuser.so"]) == ["libcublas.so.7", "libnccl.so.2"]
    done = subprocess.run(load, capture_output=True, text=True)
    assert done.stdout == f"{2 * stand_ins.ERROR}\n", done.stderr
