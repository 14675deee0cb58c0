"""The command for a GPU machine, without one: its plan, its runner, its reading and its page."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_report, gpu_runner, smoke
from bench.gpu_runner import Outcome, Step
from vivit_kernels.joint_attention import composed

NO_GPU = {"torch": "2.11.0+cpu", "cuda": None, "triton": "3.6.0", "python": "3.12.3", "commit": "abc"}
A_GPU = NO_GPU | {"torch": "2.11.0", "cuda": "13.0", "gpu": "NVIDIA H100 80GB HBM3", "arch": "sm_90"}


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def step(name: str, code: str, **how) -> Step:
    return Step(name, name, lambda _: python(code), **{"least": 0.0, **how})


@pytest.fixture
def hasty(monkeypatch):
    """Limits of seconds and next to no patience beyond them."""
    shorter = [(number, min(seconds, 0.5)) for number, seconds in gpu_runner.GRACE]
    monkeypatch.setattr(gpu_runner, "GRACE", shorter)
    monkeypatch.setattr(gpu_runner, "RESERVE", 0.0)


def run(steps: list[Step], folder: Path, seconds: float = 60.0) -> dict[str, Outcome]:
    outcomes = {step.name: Outcome() for step in steps}
    log = folder / "log.txt"
    log.touch()
    gpu_runner.run_all(steps, outcomes, time.monotonic() + seconds, log, lambda: None)
    return outcomes


# ---- without a GPU ----


@pytest.mark.parametrize("stage", gpu.STAGES)
def test_without_a_gpu_it_explains_and_leaves_nothing(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "probe", lambda: NO_GPU | {"why_not": "PyTorch 2.11.0+cpu is built without CUDA"})
    folder = tmp_path / "out"
    assert gpu.main(["--stage", stage, "--out", str(folder)]) == 2
    said = capsys.readouterr().out
    assert not folder.exists()
    assert "not run here: PyTorch 2.11.0+cpu is built without CUDA" in said
    for planned in gpu.stage(stage, folder, {}):
        assert planned.name in said and planned.does in said
    assert "summary.md, log.txt" in said


def test_a_dry_run_on_a_gpu_machine_says_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "probe", lambda: A_GPU)
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out").exists()
    assert "pytest -m gpu" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_command_itself_without_a_gpu(tmp_path):
    """As a newcomer types it: the probe in its own process, no traceback."""
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path / "out")]
    answer = subprocess.run(command, cwd=gpu_runner.ROOT, capture_output=True, text=True, timeout=100)
    assert answer.returncode == 2 and not answer.stderr
    assert f"not run here: PyTorch {torch.__version__}" in answer.stdout


@pytest.mark.parametrize(
    "said, reason",
    [
        ('{"torch": "2.11.0", "cuda": "13.0"}', "sees no GPU or driver (there is no nvidia-smi)"),
        ('{"torch": "2.11.0", "cuda": null}', "is built without CUDA"),
        (
            "ModuleNotFoundError: No module named 'torch'",
            "cannot be asked: ModuleNotFoundError: No module named 'torch'",
        ),
        ("", "does not answer"),
    ],
)
def test_why_there_is_no_gpu(said, reason, monkeypatch):
    monkeypatch.setattr(gpu, "_ask", lambda command, seconds=20: said if command[0] == sys.executable else "")
    assert reason in gpu.probe()["why_not"]


def test_a_folder_with_older_files_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "probe", lambda: A_GPU)
    (tmp_path / "summary.md").write_text("old")
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "is not an empty folder" in capsys.readouterr().out
    assert (tmp_path / "summary.md").read_text() == "old"


# ---- the plan ----


@pytest.mark.parametrize("stage", gpu.STAGES)
def test_limits_add_up_to_less_than_nine_minutes(stage, tmp_path):
    steps = gpu.stage(stage, tmp_path, {})
    limits = gpu_runner.limits(steps, gpu.MOST_SECONDS)
    assert all(limit > step.least for limit, step in zip(limits, steps, strict=True) if not step.optional)
    assert sum(limits) + gpu_runner.RESERVE <= gpu.MOST_SECONDS < 9 * 60


def test_the_native_library_is_built_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert "build" not in [step.name for step in gpu.stage("check", tmp_path, {})]
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").write_text("setup(ext_modules=[...])")
    first = gpu.stage("check", tmp_path, {})[0]
    assert first.name == "build" and first.command(60)[-3:] == ["setup.py", "build_ext", "--inplace"]
    for asked, name in (([], "build"), (["triton"], "machine"), (["triton", "cuda"], "build")):
        assert gpu.stage("sanitize", tmp_path, {}, asked)[0].name == name


def test_the_benchmark_is_given_less_than_its_limit(tmp_path):
    bench = next(step for step in gpu.stage("bench", tmp_path, {}) if step.name == "bench")
    command = bench.command(300.0)
    assert 200 < int(command[command.index("--budget") + 1]) < 290
    assert command[command.index("--out") + 1] == str(tmp_path)


def test_the_sanitizer_looks_at_kernels_of_ours_where_there_are_any(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_sanitizer", lambda: "compute-sanitizer")
    ran = "smoke: 9 within the budget, 0 wrong, 0 crashed, 3 refused; backends: {}\n"
    outcomes = {"smoke": Outcome()}
    steps = {step.name: step for step in gpu.stage("sanitize", tmp_path, outcomes)}

    def backends(names: str) -> list[str]:
        outcomes["smoke"].output = ran.format(names)
        command = steps["memcheck"].command(gpu.BRIEF)
        return command[command.index("--backend") + 1 :]

    assert backends("triton torch") == ["triton"]
    assert backends("torch") == ["torch"]
    assert "--no-poison" in steps["initcheck"].command(60)  # a fill would hide what nobody wrote
    assert "--brief" in steps["racecheck"].command(gpu.BRIEF - 1)
    assert "--brief" not in steps["smoke"].command(gpu.BRIEF - 1)
    assert steps["memcheck"].env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_without_the_sanitizer_the_stage_fails_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: None)
    outcomes = {"smoke": Outcome()}
    steps = [step for step in gpu.stage("sanitize", tmp_path, outcomes) if step.name in ("memcheck", "initcheck")]
    found = run(steps, tmp_path, 300)
    assert found["memcheck"].verdict == "FAILED" and "compute-sanitizer is neither" in found["memcheck"].detail
    assert found["initcheck"].verdict == "skipped"


def test_children_see_the_tree_and_no_network(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "site")
    environment = gpu_runner.environment({"A": "1"})
    kernels, root, brought = environment["PYTHONPATH"].split(os.pathsep)
    assert Path(kernels, "vivit_kernels").is_dir() and Path(root, "bench").is_dir() and brought == "site"
    assert environment["PIP_NO_INDEX"] == environment["HF_HUB_OFFLINE"] == environment["A"] == "1"


# ---- the runner ----

HANGS = r"""
import os, signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
code = r"import os, time; os.write(1, b'child %d\n' % os.getpid()); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", code])
subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
os.write(1, b"parent %d\n" % os.getpid())  # in one piece: print would mix the lines of the three
time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def all_end(pids: list[int]) -> bool:
    """Within seconds: a signal takes its time on a busy machine."""
    for _ in range(50):
        if not any(map(is_alive, pids)):
            return True
        time.sleep(0.1)
    return False


def test_a_hanging_command_ends_with_its_whole_family_and_its_output_stays(tmp_path, hasty):
    began = time.monotonic()
    outcome = run([step("hangs", HANGS)], tmp_path, 4)["hangs"]
    assert time.monotonic() - began < 12
    assert outcome.verdict == "TIMED OUT" and "its limit of" in outcome.detail
    pids = [int(line.split()[1]) for line in outcome.output.splitlines()]
    assert len(pids) == 3, outcome.output
    assert all_end(pids)
    assert "parent" in (tmp_path / "log.txt").read_text()


def test_the_group_is_killed_also_where_processes_cannot_be_listed(tmp_path, hasty, monkeypatch):
    monkeypatch.setattr(gpu_runner, "_end_marked", lambda mark: None)
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid)"
    outcome = run([step("leaves one behind", code)], tmp_path)["leaves one behind"]
    assert outcome.verdict == "ok" and all_end([int(outcome.output)])


@pytest.mark.parametrize("heard", [signal.SIG_DFL, signal.SIG_IGN], ids=["in front", "in the background"])
def test_a_command_at_its_limit_may_finish_its_report(tmp_path, request, heard):
    before = signal.signal(signal.SIGINT, heard)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    code = "import time\ntry:\n print('begun'); time.sleep(60)\nexcept KeyboardInterrupt:\n print('report written')"
    outcome = run([step("polite", code)], tmp_path, gpu_runner.RESERVE + 2)["polite"]
    assert outcome.verdict == "TIMED OUT" and outcome.output.splitlines() == ["begun", "report written"]


def test_a_failing_step_stops_no_other(tmp_path):
    def cannot(_):
        raise gpu_runner.CannotRun("no such tool")

    def unreadable(_):
        raise KeyError("no such line")

    found = run(
        [
            step("fails", "print('a reason'); raise SystemExit(3)"),
            Step("cannot", "", cannot),
            Step("optional", "", cannot, optional=True),
            Step("missing", "", lambda _: ["no-such-command-here"]),
            step("unreadable", "print(1)", read=unreadable),
            step("crashes", "import os; print('last words'); os.abort()"),
            step("works", "print('fine')"),
        ],
        tmp_path,
    )
    assert {name: outcome.verdict for name, outcome in found.items()} == {
        "fails": "FAILED",
        "cannot": "FAILED",
        "optional": "skipped",
        "missing": "FAILED",
        "unreadable": "FAILED",
        "crashes": "FAILED",
        "works": "ok",
    }
    assert found["fails"].status == 3 and found["fails"].detail == "a reason"
    assert "no-such-command-here" in found["missing"].detail and "no such line" in found["unreadable"].detail
    assert found["crashes"].detail.startswith("ended by SIGABRT")
    assert not gpu_report.passed(found)
    assert gpu_report.passed({name: found[name] for name in ("works", "optional")})


def test_time_left_over_goes_to_the_next(tmp_path, hasty):
    steps = [step("quick", "print(1)", share=0.5), step("late", "print(1)", share=0.5), step("rest", "print(1)")]
    planned = gpu_runner.limits(steps, 40.0)
    assert planned == [20.0, 10.0, 10.0]
    found = run(steps, tmp_path, 40.0)
    assert found["late"].limit > 15 and found["rest"].limit > 35


def test_too_little_time_is_not_begun(tmp_path, hasty):
    found = run([step("long", "print(1)", least=20), step("short", "print(1)")], tmp_path, 10)
    assert found["long"].verdict == "FAILED" and "it needs 20" in found["long"].detail and not found["long"].output
    assert found["short"].verdict == "ok"


def test_a_flood_of_output_is_stopped(tmp_path, hasty, monkeypatch):
    monkeypatch.setattr(gpu_runner, "STEP_LOG_BYTES", 1 << 17)
    outcome = run([step("floods", "while True: print('x' * 1000)")], tmp_path)["floods"]
    assert outcome.verdict == "TIMED OUT" and "printed more than 128 KiB" in outcome.detail
    assert (tmp_path / "log.txt").stat().st_size < (1 << 17) + 1000


def test_a_terminals_codes_are_taken_out(tmp_path):
    outcome = run([step("bar", r"print('10 %\r20 %\r\x1b[1mdone\x1b[0m')")], tmp_path)["bar"]
    assert outcome.output == "done\n"


# ---- a whole stage ----


def stage_of(monkeypatch, *steps: Step) -> None:
    monkeypatch.setattr(gpu, "stage", lambda *_: list(steps))


def test_a_stage_leaves_log_and_summary_and_prints_its_table_last(tmp_path, monkeypatch, capsys):
    stage_of(monkeypatch, step("one", "print('first words')"), step("two", "raise SystemExit('bad luck')"))
    assert gpu.carry_out("check", tmp_path, ["a machine"], time.monotonic() + 60) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "summary.md"]
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("# bench gpu --stage check: FAILED\n") and "- a machine" in summary
    printed = capsys.readouterr().out.rstrip().splitlines()
    table = [line for line in summary.splitlines() if line.startswith("|")]
    assert printed[-len(table) :] == table
    assert "bad luck" in table[-1] and "first words" in (tmp_path / "log.txt").read_text()

    stage_of(monkeypatch, step("one", "print('first words')"))
    (tmp_path / "again").mkdir()
    assert gpu.carry_out("check", tmp_path / "again", [], time.monotonic() + 60) == 0


def test_the_summary_is_there_from_the_first_second_on(tmp_path, monkeypatch):
    code = f"print(open({str(tmp_path / 'summary.md')!r}).read())"
    stage_of(monkeypatch, step("one", "print('out of one')"), step("two", code))
    gpu.carry_out("check", tmp_path, [], time.monotonic() + 60)
    log = (tmp_path / "log.txt").read_text()
    assert "# bench gpu --stage check: not finished" in log and "| one  | ok " in log and "| two  | not run " in log


def test_a_stage_that_is_terminated_ends_its_child_and_says_so(tmp_path):
    """SIGTERM to the command, as a job's time limit sends it."""
    code = f"""
import sys, time
from pathlib import Path
from bench import gpu, gpu_runner
child = [sys.executable, "-c", "import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)"]
gpu.stage = lambda *_: [gpu_runner.Step("long", "", lambda _: child), gpu_runner.Step("never", "", lambda _: child)]
sys.exit(gpu.carry_out("check", Path({str(tmp_path)!r}), [], time.monotonic() + 100))
"""
    process = subprocess.Popen(python(code), cwd=gpu_runner.ROOT, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "log.txt"
    for _ in range(100):
        time.sleep(0.1)
        if log.exists() and (found := re.search(r"^pid (\d+)$", log.read_text(), re.MULTILINE)):
            break
    else:
        raise AssertionError("the child did not begin")
    process.terminate()
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert all_end([int(found[1])])
    summary = (tmp_path / "summary.md").read_text()
    assert "interrupted" in summary.splitlines()[0] and "| never | not run" in summary and "| never" in printed


def test_at_most_eight_files_whatever_the_steps_leave(tmp_path, monkeypatch):
    make = f"""
from pathlib import Path
folder = Path({str(tmp_path)!r})
for i in range(12): (folder / f"h100-{{i}}.jsonl").write_text("{{}}")
(folder / "a b.txt").write_text("spaces")
(folder / "deep" / "er").mkdir(parents=True)
(folder / "deep" / "er" / "x").write_text("x")
"""
    stage_of(monkeypatch, step("untidy", make))
    gpu.carry_out("bench", tmp_path, [], time.monotonic() + 60)
    left = sorted(tmp_path.iterdir())
    assert len(left) <= 8 and all(path.is_file() and gpu.FILE_NAME.fullmatch(path.name) for path in left)
    assert {"summary.md", "log.txt", "more.zip"} <= {path.name for path in left}
    with gpu.zipfile.ZipFile(tmp_path / "more.zip") as archive:
        packed = archive.namelist()
    assert {"a b.txt", "deep/er/x"} <= set(packed)
    assert len([name for name in packed if name.endswith(".jsonl")]) + len(list(tmp_path.glob("*.jsonl"))) == 12


# ---- reading: pytest ----

JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites name="pytest tests"><testsuite name="pytest" errors="2"
failures="3" skipped="1" tests="8" time="3.1"><testcase classname="" name="tests.test_data" time="0.000"><error
message="collection failure">ImportError while importing test module 'tests/test_data.py'.
Hint: make sure your test modules/packages have valid Python names.
Traceback:
tests/test_data.py:5: in &lt;module&gt;
    import av
E   ModuleNotFoundError: No module named 'av'</error></testcase>
<testcase classname="tests.test_joint_attention" name="test_parity[cuda-D=40]" time="0.1"><failure
message="AssertionError: dq: OUT OF BUDGET: finite=True, max error 0.1&#10;assert False">tests/...</failure></testcase>
<testcase classname="tests.test_joint_attention" name="test_parity[cuda-D=64]" time="0.1"><failure
message="AssertionError: dq: OUT OF BUDGET: finite=True, max error 0.1&#10;assert False">tests/...</failure></testcase>
<testcase classname="tests.test_joint_attention" name="test_parity[cuda-D=80]" time="0.1"><failure
message="torch.AcceleratorError: CUDA error: an illegal memory access was encountered">tests/...</failure></testcase>
<testcase classname="tests.test_joint_attention" name="test_other" time="0.1"><error
message="failed on setup with &quot;RuntimeError: no&quot;">tests/...</error></testcase>
<testcase classname="tests.test_joint_attention" name="test_fine[a]" time="0.1" />
<testcase classname="tests.test_joint_attention" name="test_fine[b]" time="0.1" />
<testcase time="0.001" />
<testcase classname="tests.test_joint_attention" name="test_s" time="0.0"><skipped message="no">x</skipped></testcase>
</testsuite></testsuites>"""


def test_a_junit_report_becomes_counts_and_reasons(tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT)
    outcome = Outcome(verdict="FAILED", status=1)
    gpu_report.read_tests(outcome, tmp_path / "junit.xml")
    assert outcome.detail == "2 passed, 3 failed, 2 errors, 1 skipped"
    assert outcome.findings == [
        "tests.test_data: not collected: no module av",
        "test_joint_attention::test_parity[cuda-D=40]: AssertionError: dq: OUT OF BUDGET: finite=True, max error 0.1 "
        "(and 1 more tests of it)",
        "test_joint_attention::test_parity[cuda-D=80]: "
        "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
        'test_joint_attention::test_other: failed on setup with "RuntimeError: no"',
    ]


def test_a_collected_nothing_or_a_stopped_failure_is_not_a_pass(tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT)
    stopped = Outcome(verdict="stopped", status=2)
    gpu_report.read_tests(stopped, tmp_path / "junit.xml")
    assert stopped.verdict == "FAILED"
    (tmp_path / "junit.xml").write_text("<testsuites><testsuite/></testsuites>")
    nothing = Outcome(verdict="ok", status=0)
    gpu_report.read_tests(nothing, tmp_path / "junit.xml")
    assert nothing.verdict == "FAILED" and nothing.detail == "0 passed"


def test_a_pytest_that_died_is_read_from_its_lines(tmp_path):
    output = (
        "tests/test_a.py::test_x[cuda-1] PASSED [ 20%]\n"
        "tests/test_a.py::test_x[cuda-2] FAILED [ 40%]\n"
        "tests/test_a.py::test_x[cuda-3] Fatal Python error: Segmentation fault\n"
    )
    outcome = Outcome(verdict="FAILED", status=-11, output=output)
    gpu_report.read_tests(outcome, tmp_path / "none.xml")
    assert outcome.detail.startswith("1 passed, 1 failed, no report")
    assert outcome.detail.endswith("the last test begun: tests/test_a.py::test_x[cuda-3]")
    assert outcome.findings == ["tests/test_a.py::test_x[cuda-2]"]


def test_so_is_one_of_several_processes(tmp_path):
    """What pytest-xdist prints: a test when it begins, and again with its process when it ends."""
    (tmp_path / "test_one.py").write_text(
        "import pytest\n@pytest.mark.parametrize('a', [1, 2])\ndef test_it(a): assert a == 2\n"
    )
    command = [*(sys.executable, "-m", "pytest", "-v", "-n", "2", "-c", os.devnull, "--rootdir", str(tmp_path))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    outcome = Outcome(verdict="FAILED", status=-9, output=done.stdout[: done.stdout.index("FAILURES")])
    gpu_report.read_tests(outcome, tmp_path / "none.xml")
    assert outcome.detail.startswith("1 passed, 1 failed, no report")
    assert outcome.findings == ["test_one.py::test_it[1]"]


def test_pytest_itself_writes_what_is_read(tmp_path):
    """The runner's own command on a failing test and a file that cannot be imported."""
    (tmp_path / "test_one.py").write_text("def test_good(): pass\ndef test_bad(): raise ValueError('so')\n")
    (tmp_path / "test_two.py").write_text("import no_such_module_here\n")
    junit = tmp_path / "junit.xml"
    command = [
        *(sys.executable, "-m", "pytest", "-v", "-c", os.devnull, "-p", "no:cacheprovider", str(tmp_path)),
        *("--rootdir", str(tmp_path), "--continue-on-collection-errors", f"--junitxml={junit}"),
    ]
    tests = Step("tests", "", lambda _: command, least=0, read=lambda outcome: gpu_report.read_tests(outcome, junit))
    (tmp_path / "out").mkdir()
    outcome = run([tests], tmp_path / "out", 60)["tests"]
    assert outcome.verdict == "FAILED" and outcome.detail == "1 passed, 1 failed, 1 errors"
    assert any("no module no_such_module_here" in finding for finding in outcome.findings)
    assert any(finding.endswith("test_bad: ValueError: so") for finding in outcome.findings)


# ---- reading: compute-sanitizer ----

MEMCHECK = """========= COMPUTE-SANITIZER
ok      triton  joint small.b2 bfloat16                                     0.13 of the error budget (o)
========= Invalid __global__ read of size 4 bytes
=========     at _joint_forward+0x2f0 in triton_kernels.py:88
=========     by thread (33,0,0) in block (1,0,0)
=========     Access at 0x7f2a3c000400 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f2a3c000000 of size 1024 bytes
=========
========= Invalid __global__ read of size 4 bytes
=========     at _joint_forward+0x2f0 in triton_kernels.py:88
=========     by thread (34,0,0) in block (1,0,0)
=========     Access at 0x7f2a3c000404 is out of bounds
=========
========= Invalid __global__ write of size 16 bytes
=========     at vivit::store(vivit::Tile &, __nv_bfloat16 *)+0x90 in copy.cuh:41
=========     by thread (0,0,0) in block (7,0,0)
=========     Address 0x7f8f85400001 is misaligned
=========         Device Frame: void vivit::packed_backward<64, (int)32>(vivit::Params)+0x1a0 in packed.cu:12
=========
========= Invalid __shared__ read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4, at::native::Fill<float>>(int, T1)+0x70
=========     by thread (0,0,0) in block (0,0,0)
=========
========= Target application returned an error
========= ERROR SUMMARY: 257 errors
========= ERROR SUMMARY: 253 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at packed_forward(Params)+0x90 in packed.cu:22
=========     and Read access at packed_forward(Params)+0xf0 in packed.cu:27 [508 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
SYNCCHECK = """========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in block.
=========     at named_barrier_sync(unsigned int, unsigned int)+0x20 in barrier.cuh:9
=========     by thread (128,0,0) in block (0,0,0)
=========         Device Frame: void streaming_forward<128>(Params)+0x15520 in streaming.cu:98
=========
========= ERROR SUMMARY: 1 error
"""
INITCHECK = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0x100 in packed.cu:30:packed_backward(const int *, int *, unsigned int)
=========     by thread (98,0,0) in block (194,0,0)
=========     Address 0x7fbbca800000
=========
========= ERROR SUMMARY: 1 error
"""
CLEAN = "========= COMPUTE-SANITIZER\nsmoke: 9 within the budget\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    "output, findings, detail",
    [
        (
            MEMCHECK,
            [
                "_joint_forward: Invalid __global__ read, 2 reports",
                "vivit::packed_backward: Invalid __global__ write, 1 report",
                "at::native::vectorized_elementwise_kernel: Invalid __shared__ read, 1 report",
            ],
            "257 reports against _joint_forward, at::native::vectorized_elementwise_kernel, vivit::packed_backward",
        ),
        (RACECHECK, ["packed_forward: Race reported, 1 report"], "1 report against packed_forward"),
        (SYNCCHECK, ["streaming_forward: Barrier error detected, 1 report"], "1 report against streaming_forward"),
        (
            INITCHECK,
            ["packed_backward: Uninitialized __global__ memory read, 1 report"],
            "1 report against packed_backward",
        ),
    ],
)
def test_the_sanitizer_names_kernels_ours_first(output, findings, detail):
    outcome = Outcome(verdict="FAILED", status=86, output=output)
    gpu_report.read_sanitizer(outcome)
    assert outcome.findings == findings and outcome.detail == detail and outcome.verdict == "FAILED"


@pytest.mark.parametrize(
    "output, verdict, detail",
    [
        (CLEAN, "ok", "0 reports"),
        (CLEAN.replace("0 errors", "3 errors"), "FAILED", "3 reports"),
        (
            CLEAN.replace("smoke:", "WRONG  triton joint dq\nsmoke:"),
            "FAILED",
            "0 reports; small cases: 9 within the budget",
        ),
        (
            "========= COMPUTE-SANITIZER\n========= Error: Device not supported\n",
            "FAILED",
            "no closing count: Error: Device",
        ),
        ("", "FAILED", "no closing count"),
    ],
)
def test_a_clean_run_of_the_sanitizer_needs_its_closing_line(output, verdict, detail):
    outcome = Outcome(verdict="ok", status=0, output=output)
    gpu_report.read_sanitizer(outcome)
    assert outcome.verdict == verdict and outcome.detail.startswith(detail)


# ---- reading: the benchmark ----


def test_the_benchmarks_records_and_table(tmp_path):
    records = tmp_path / "h100.jsonl"
    records.write_text('{"status": "ok"}\n' * 2)
    before = {path: len(lines) for path, lines in gpu_report.record_lines(tmp_path).items()}
    with open(records, "a") as file:
        file.write('{"status": "ok"}\n{"status": "refused"}\n{"sta')
    table = "\n".join(f"row {i}" for i in range(99))
    outcome = Outcome(verdict="ok", status=0, output=f"{table}\n\nNot here\n  xformers: not installed\n")
    gpu_report.read_bench(outcome, tmp_path, before)
    assert outcome.detail == "3 records: 1 ok, 1 refused, 1 cut short" and outcome.verdict == "ok"
    assert outcome.tail[-1] == "row 98" and len(outcome.tail) == gpu_report.TAIL_LINES
    nothing = Outcome(verdict="ok", status=0, output="done")
    gpu_report.read_bench(nothing, tmp_path / "elsewhere", {})
    assert nothing.verdict == "FAILED" and nothing.detail == "0 records"


# ---- the page ----


def test_many_failures_fit_one_page_and_its_table_a_screen():
    findings = [f"tests/test_x.py::test_parity[{'long-' * 40}{i}]: a|reason {'why ' * 50}" for i in range(500)]
    outcomes = {f"step{i}": Outcome("FAILED", 123.4, detail="words " * 40, findings=list(findings)) for i in range(6)}
    outcomes["bench"] = Outcome("ok", 400, tail=[f"row {'x' * 300}"] * gpu_report.TAIL_LINES)
    outcomes["fine"] = Outcome("ok", 1, detail="fine")
    table = gpu_report.table(outcomes)
    assert len(table) <= 24 and max(map(len, table)) <= 100 and len({len(line) for line in table}) == 1
    assert {line.count("|") for line in table} == {5}  # a bar in a reason would be a column
    assert all(any(line.startswith(f"| {name} ") for line in table) for name in outcomes)
    assert sum("more: log.txt" in line for line in table) == 6
    page = gpu_report.page("bench gpu", ["a machine"], outcomes, "FAILED").splitlines()
    assert len(page) <= 120 and page[-len(table) :] == table
    assert max(map(len, page)) <= 310


def test_a_few_failures_are_all_in_the_table():
    outcomes = {"tests": Outcome("FAILED", 9, detail="2 failed", findings=["test_a: why", "test_b: whynot"])}
    assert [line.split("|")[4].strip() for line in gpu_report.table(outcomes)[2:]] == [
        "2 failed",
        "- test_a: why",
        "- test_b: whynot",
    ]


# ---- the small cases ----


def test_the_small_cases_pass_on_a_cpu(capsys):
    assert smoke.main(["--device", "cpu", "--backend", "torch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    trials = list(smoke.trials())
    assert len(lines) == len(trials) + 1
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert lines[-1] == f"smoke: {len(trials)} within the budget, 0 wrong, 0 crashed, 0 refused; backends: torch"
    for word in ("mask", "dropout", "softcap", "rotary", "every option", "sliced", "float32", "BFYXC", "class row"):
        assert any(word in line for line in lines), word
    for op in ("temporal", "spatial", "dot_product", "joint", "tubelet"):
        assert any(f" {op} small" in line for line in lines), op


def test_the_brief_cases_are_some_of_them_and_have_every_option():
    labels, every = ([trial.label for trial in smoke.trials(brief)] for brief in (True, False))
    assert set(labels) < set(every) and 2 * len(labels) < len(every)
    for op in ("temporal", "spatial", "dot_product", "joint"):
        for kind in ("bfloat16", "float32", "float16 every option heads first"):
            assert f"{op} small.b2 {kind}" in labels
    for word in ("float32", "BFYXC", "class row per frame", "class row per clip", "float video"):
        assert any("tubelet" in label and word in label for label in labels), word


def test_processes_share_the_cases(capsys):
    asked = smoke.Run(torch.device("cpu"), ["torch"], "temporal", True, True)
    parts = [smoke.results(asked, part, 2) for part in range(2)]
    whole = [result for part in parts for result in part]
    assert sorted(whole) == sorted(smoke.results(asked)) and len(whole) == 3
    assert smoke.main(["--device", "cpu", "--backend", "torch", "--only", "temporal", "--brief", "--jobs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines[:-1]) == sorted(map(str, whole)) and lines[-1].startswith("smoke: 3 within the budget")


def planted(monkeypatch, name: str, change) -> None:
    real = getattr(composed, name)
    monkeypatch.setattr(composed, name, lambda *arguments: change(real, *arguments))


def scaled(real, *arguments):
    o, lse = real(*arguments)
    return o * 1.02, lse


def unwritten(real, *arguments):
    """A backward that forgets its gradients, where fresh memory would hold zeros."""
    torch.zeros(1000)
    assert torch.empty(1000).isnan().all(), "memory is not poisoned"


def broken(real, *arguments):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")


@pytest.mark.parametrize(
    "name, change, dtype, verdict, said",
    [
        ("launch_fwd", scaled, "float32", "WRONG", "o: OUT OF BUDGET"),
        ("launch_fwd", scaled, "bfloat16", "WRONG", "o: OUT OF BUDGET"),
        ("launch_bwd", unwritten, "float32", "WRONG", "dq: OUT OF BUDGET: finite=False"),
        ("launch_fwd", broken, "float16", "CRASHED", "RuntimeError: CUDA error: an illegal memory access"),
    ],
)
def test_a_planted_error_is_found(name, change, dtype, verdict, said, monkeypatch, capsys):
    planted(monkeypatch, name, change)
    torch.use_deterministic_algorithms(False)  # as outside of tests: the command fills fresh memory by itself
    assert smoke.main(["--device", "cpu", "--backend", "torch", "--only", f"joint small.b2 {dtype}"]) == 1
    assert not torch.are_deterministic_algorithms_enabled()
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(verdict) and said in line


def test_the_sanitizers_reader_sees_what_smoke_says(monkeypatch, capsys):
    planted(monkeypatch, "launch_fwd", scaled)
    assert smoke.main(["--device", "cpu", "--backend", "torch", "--only", "float32"]) == 1
    outcome = Outcome(verdict="FAILED", output=capsys.readouterr().out)
    gpu_report.read_smoke(outcome)
    for found, name in zip(outcome.findings, ("small", "small_streamed"), strict=True):
        assert found.startswith(f"WRONG torch joint {name}.b2 float32 o: OUT")
    assert outcome.detail == "4 within the budget, 2 wrong, 0 crashed, 0 refused; backends: torch"
    assert gpu_report.backends_of(outcome) == ["torch"]


def test_a_lost_gpu_ends_the_run(monkeypatch, capsys):
    """After an illegal access every later call fails in the same way: one crash says it."""
    planted(monkeypatch, "launch_fwd", broken)
    monkeypatch.setattr(smoke, "is_lost", lambda device: True)
    assert smoke.main(["--device", "cpu", "--backend", "torch", "--only", "joint"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "context is lost" in lines[1]


def test_a_backend_that_takes_nothing_is_no_pass(monkeypatch, capsys):
    monkeypatch.setattr(
        smoke, "attempt", lambda trial, backend, *_: smoke.Result("refused", backend, trial.label, "no")
    )
    assert smoke.main(["--device", "cpu", "--backend", "triton"]) == 1
    said = capsys.readouterr()
    assert "nothing ran" in said.err and said.out.splitlines()[-1].endswith("backends: none")
    assert len(said.out.splitlines()) == 6  # one line for each operation, and the count


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_smoke_says_where_there_is_no_gpu(capsys):
    assert smoke.main(["--device", "cuda"]) == 2
    assert "PyTorch sees no GPU here" in capsys.readouterr().err
