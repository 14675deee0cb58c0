"""Creates the virtual environment and installs what a make target needs: `python3 .ci/install.py test`.

Standard library only, so that it runs on a fresh machine. Without an NVIDIA GPU no CUDA package is ever downloaded: the
whole set is resolved first, and if that brings CUDA, PyTorch's CPU index is tried; when it does not answer, the script
stops and says what to run. (For `make test-full` alone, 0.5 GB: the oldest torch without its CUDA packages, if its CPU
build cannot be had.) A second call with the same inputs does nothing.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def require_python(version, program, others=()):
    """Stop unless `version` is one this project runs on. No line up to the call below may be too new for an old one."""
    if tuple(version[:2]) < (3, 10):
        hint = others[0] if others else "<Python 3.10 or newer>    (sudo apt install python3 python3-venv)"
        found = ".".join(str(part) for part in version[:2])
        sys.exit(f"install: Python >= 3.10 is needed, {program} is {found}.\n  -> run make again with PYTHON={hint}")


newer_pythons = [name for name in (f"python3.{minor}" for minor in range(14, 9, -1)) if shutil.which(name)]
require_python(sys.version_info, sys.executable, newer_pythons)

ROOT = Path(__file__).resolve().parent.parent
CI = ROOT / ".ci"
CPU_INDEX = os.environ.get("VIVIT_TORCH_INDEX") or "https://download.pytorch.org/whl/cpu"
# What each make target installs. Each goal holds the one before it, so a bigger one also serves the smaller ones.
BUILD = ["-r", ".ci/build.txt"]
GOALS = {
    "build": ["-e", ".", *BUILD],
    "demo": ["-e", ".[train]", *BUILD],
    "test": ["-e", ".[test]", *BUILD],
    "check": ["-e", ".[test]", *BUILD, "-r", ".ci/checks.txt"],
}
# Not goals of that kind: each is a folder of its own, which one make target puts on PYTHONPATH.
NEWEST, OLDEST = "newest-triton", "oldest-torch"
# The native library comes after an install, by `csrc/build.py`: pip would build it before there is a torch, and where
# VIVIT_KERNELS_BUILD asks for it, fail.
WITHOUT_LIBRARY = {"VIVIT_KERNELS_BUILD": "none"}
INPUTS = [
    "pyproject.toml",
    "setup.py",
    ".ci/install.py",
    ".ci/constraints.txt",
    ".ci/constraints-cpu.txt",
    ".ci/build.txt",
    ".ci/checks.txt",
]
RECORD = "vivit-installed.json"
# `pip install --report` came with 22.2. From 23.3 a dry run reads a package's metadata file; before, it downloads the
# package, and for a CUDA build of torch that means gigabytes.
PIP_REPORTS, PIP_READS_METADATA = (22, 2), (23, 3)


def say(text: str) -> None:
    print(f"install: {text}", flush=True)


class Stop(Exception):
    """What is wrong and what to run; shown without a traceback."""


def has_gpu() -> bool:
    """Whether to install for an NVIDIA GPU: one answers here, unless VIVIT_CUDA=0 or =1 says otherwise."""
    forced = os.environ.get("VIVIT_CUDA")
    if forced in ("0", "1"):
        return forced == "1"
    if Path("/dev/nvidia0").exists():
        return True
    if not shutil.which("nvidia-smi"):
        return False
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "GPU " in answer.stdout


def cuda_packages(report: dict) -> list[str]:
    """The packages of a `pip install --report` that make it a CUDA install, as name==version; empty for a CPU one."""
    found = []
    for item in report["install"]:
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        version = item["metadata"]["version"]
        cuda_torch = name == "torch" and re.search(r"\+cu\d", version)
        if name.startswith(("nvidia-", "cuda-")) or cuda_torch:
            found.append(f"{name}=={version}")
    return found


def cuda_message(found: list[str], python: str, goal: str, why_no_cpu: str) -> str:
    shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    return f"""no NVIDIA GPU here, but torch for Python {python} resolves to its CUDA build:
{len(found)} packages, several GB ({shown}).
The CPU build could not be had from {CPU_INDEX}:
{why_no_cpu}
Nothing of it was downloaded. What to run instead, one of:
  -> with a mirror of PyTorch's CPU wheels:                VIVIT_TORCH_INDEX=<its address> make {goal}
  -> with the CPU wheel in a folder:                       PIP_FIND_LINKS=<folder> make {goal}
  -> with a Python that has torch >= 2.11 and the tools:   make {goal} VENV= PYTHON=<that python>
  -> if the CUDA packages are welcome:                     VIVIT_CUDA=1 make {goal}"""


def version_of(text: str) -> tuple[int, ...]:
    """`pip 23.2.1 from ...` -> (23, 2, 1)"""
    match = re.search(r"(\d+(?:\.\d+)+)", text)
    return tuple(int(part) for part in match.group(1).split(".")) if match else (0,)


def fingerprint(goal: str, python: str, gpu: bool) -> str:
    """Changes whenever an install of `goal` could give something else."""
    digest = hashlib.sha256(f"{goal} {GOALS[goal]} {python} {gpu}".encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, text=True, **options)


def last_lines(text: str, count: int = 3) -> str:
    lines = [line for line in text.splitlines() if line.startswith(("ERROR", "WARNING: Retrying"))] or text.splitlines()
    return "\n".join("  " + line[:300] for line in lines[-count:]) or "  (no output)"


def make_venv(venv: Path) -> Path:
    """The environment's Python; creates the environment, or completes one whose creation was interrupted."""
    python = venv / "bin" / "python"
    if python.exists() and run([str(python), "-c", "import pip"], capture_output=True).returncode == 0:
        return python
    major, minor = sys.version_info[:2]
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise Stop(
            f"this Python {major}.{minor} has no module {missing[0]!r}, so it cannot create an environment.\n"
            f"  -> sudo apt install python3-venv    (or python{major}.{minor}-venv)"
        )
    say(f"creating {venv.name} with Python {major}.{minor}")
    if run([sys.executable, "-m", "venv", str(venv)]).returncode != 0:
        raise Stop(f"python -m venv failed, see above.\n  -> rm -r {venv.name}, then run make again")
    return python


def update_pip(pip: list[str]) -> None:
    """A pip new enough to resolve without downloading; an older one is enough when no index can be reached."""
    version = version_of(run([*pip, "--version"], capture_output=True).stdout)
    if version >= PIP_READS_METADATA:
        return
    say(f"updating pip {'.'.join(map(str, version))} in the environment")
    done = run([*pip, "install", "--quiet", "--upgrade", "pip>=23.3"], capture_output=True)
    if done.returncode != 0 and version < PIP_REPORTS:
        raise Stop(f"pip >= 22.2 is needed and cannot be had:\n{last_lines(done.stderr)}\n  -> check the network")


def resolve(pip: list[str], wanted: list[str]) -> dict:
    """pip's report of what an install of `wanted` would bring; installs nothing."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [*pip, "install", "--dry-run", "--quiet", "--report", str(report), *wanted]
        done = run(command, capture_output=True, env=os.environ | WITHOUT_LIBRARY)
        if done.returncode != 0:
            raise Stop(f"pip cannot resolve the packages:\n{last_lines(done.stderr, 12)}\n  -> {' '.join(command)}")
        return json.loads(report.read_text())


def cpu_torch() -> str:
    """The requirement for the CPU build. The `+cpu` matters: no other index that pip may know can answer with CUDA."""
    pins = (CI / "constraints-cpu.txt").read_text().splitlines()
    return next(pin for pin in pins if pin.startswith("torch==")).strip() + "+cpu"


def install_cpu_torch(pip: list[str]) -> str:
    """Install torch alone from PyTorch's CPU index; '' or why it failed. Its dependencies come with everything else."""
    say(f"torch resolves to its CUDA build; trying the CPU build from {CPU_INDEX}")
    command = [*pip, "install", "--no-deps", "--index-url", CPU_INDEX, "--timeout", "15", "--retries", "1", cpu_torch()]
    done = run(command, stderr=subprocess.PIPE)
    return "" if done.returncode == 0 else last_lines(done.stderr)


def install(goal: str, venv: Path) -> None:
    gpu = has_gpu()
    python = make_venv(venv)
    ask = "import platform; print(platform.python_version())"
    version = run([str(python), "-c", ask], capture_output=True).stdout.strip()
    require_python(version_of(version), str(python))
    record = venv / RECORD
    done = json.loads(record.read_text()) if record.exists() else {}
    key = fingerprint(goal, version, gpu)
    if done.get(goal) == key:
        say(f"{venv.name} is up to date")
        return

    started = time.monotonic()
    pip = [str(python), "-m", "pip"]
    constraints = ["-c", ".ci/constraints.txt"] + ([] if gpu else ["-c", ".ci/constraints-cpu.txt"])
    wanted = [*constraints, *GOALS[goal]]
    say(f"for `make {goal}`: Python {version}, " + ("an NVIDIA GPU" if gpu else "no NVIDIA GPU: CPU build of torch"))
    update_pip(pip)
    if not gpu:
        say("resolving the packages first (half a minute or so, installs nothing)")
        found = cuda_packages(resolve(pip, wanted))
        if found:
            why = install_cpu_torch(pip)
            found = found if why else cuda_packages(resolve(pip, wanted))
            if found:
                raise Stop(cuda_message(found, version, goal, why or "  what it serves brings CUDA packages too"))
    say("installing (a few minutes the first time)")
    if run([*pip, "install", *wanted], env=os.environ | WITHOUT_LIBRARY).returncode != 0:
        raise Stop(f"pip failed, see above.\n  -> mend the cause, then run `make {goal}` again")
    smaller = list(GOALS)[: list(GOALS).index(goal) + 1]
    record.write_text(json.dumps(done | {name: fingerprint(name, version, gpu) for name in smaller}, indent=1) + "\n")
    say(f"done in {time.monotonic() - started:.0f} s")


def install_aside(venv: Path, name: str, pin: str, ways: dict[str, list[str]]) -> Path | None:
    """One package alone, without what it requires, into a folder of the environment; once per version.

    ways: how pip may come by it, tried in order: what to say, and pip's arguments.
    Returns the folder if it is new. Raises Stop with every way's reason if none succeeds.
    """
    folder = venv / name
    record = folder / RECORD
    if record.exists() and record.read_text() == pin:
        say(f"{folder.name} is up to date")
        return None
    failed = []
    for what, arguments in ways.items():
        shutil.rmtree(folder, ignore_errors=True)
        say(f"{what} into {folder.name}")
        options = ["--no-deps", "--quiet", "--only-binary", ":all:", "--timeout", "15", "--retries", "1"]
        command = [str(venv / "bin" / "python"), "-m", "pip", "install", *options, "--target", str(folder), *arguments]
        done = run(command, stderr=subprocess.PIPE)
        if done.returncode == 0:
            return folder
        failed.append(last_lines(done.stderr))
    shutil.rmtree(folder, ignore_errors=True)
    raise Stop(f"{pin} cannot be had:\n" + "\n".join(failed))


def pin_of(file: str, package: str) -> str:
    return next(line for line in (CI / file).read_text().splitlines() if line.startswith(f"{package}=="))


def install_newest_triton(venv: Path) -> None:
    pin = pin_of("constraints-newest.txt", "triton")
    if folder := install_aside(venv, NEWEST, pin, {f"{pin} alone (1 GB)": [pin]}):
        (folder / RECORD).write_text(pin)


def install_oldest_torch(venv: Path) -> None:
    """The CPU build where it can be had; else any build, with stand-ins for the CUDA libraries that it asks for."""
    pin = pin_of("constraints-oldest.txt", "torch")
    ways = {
        f"{pin}, the CPU build,": ["--index-url", CPU_INDEX, f"{pin}+cpu"],
        f"{pin} alone (0.5 GB)": [pin],
    }
    folder = install_aside(venv, OLDEST, pin, ways)
    if folder is None:
        return
    sys.path.insert(0, str(CI))
    import stand_ins

    try:
        if made := stand_ins.make(folder / "torch" / "lib", [*(folder / "torch" / "lib").glob("*.so*")]):
            say(f"it is a CUDA build; stand-ins for {len(made)} libraries: {', '.join(made[:3])}, ...")
        ask = [str(venv / "bin" / "python"), "-c", "import torch"]
        failed = run(ask, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True)
        why = last_lines(failed.stderr) if failed.returncode else ""
    except (OSError, subprocess.CalledProcessError) as error:  # binutils or a C compiler are missing
        why = f"  {error}"
    if why:
        shutil.rmtree(folder)
        raise Stop(f"{pin} does not run here:\n{why}")
    (folder / RECORD).write_text(pin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("goal", choices=[*GOALS, NEWEST, OLDEST])
    parser.add_argument("--venv", default=".venv", help="the environment's folder (default: %(default)s)")
    arguments = parser.parse_args()
    venv = (ROOT / arguments.venv).absolute()
    try:
        if arguments.goal == NEWEST:
            install_newest_triton(venv)
        elif arguments.goal == OLDEST:
            install_oldest_torch(venv)
        else:
            install(arguments.goal, venv)
    except Stop as stop:
        sys.exit(f"install: {stop}")


if __name__ == "__main__":
    main()
