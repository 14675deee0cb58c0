"""The benchmark harness: its arithmetic by hand, and whole runs among peers that misbehave."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import cases, ceilings, device, plan, record, run
from bench.attention import Attention
from bench.cases import AttentionCase, TubeletCase
from bench.record import Record
from bench.timing import in_turns, summary
from bench.tubelet import Tubelet
from bench.worker import explain
from bench.workers import Died, Worker
from vivit_kernels import _native, spatial_attention

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = str(Path(__file__).with_name("bench_plugin.py"))
CPU = torch.device("cpu")
# There is no GPU; what is missing is not stored.
OF_THE_LIBRARY = ({"cpu": "ok"} if _native.AVAILABLE else {}) | ({"cuda": "refused"} if _native.CUDA else {})


def case(op: str, name: str):
    return next(case for case in cases.CASES + cases.SMALL if (case.op, case.name) == (op, name))


def bench(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, **options)


# ---- the work of a case, by hand ----


@pytest.mark.parametrize(
    "op, pairs",
    [
        ("temporal", 8 * 12 * 196 * 16 * 16),
        ("spatial", 8 * 12 * 16 * 196 * 196),
        ("dot_product", 8 * 6 * 196 * 16 * 16 + 8 * 6 * 16 * 196 * 196),
        ("joint", 8 * 12 * 3136 * 3136),
    ],
)
def test_work_of_attention(op, pairs):
    one = case(op, "vivit_b_16x2.b8")
    tensor = 8 * 16 * 196 * 12 * 64
    assert one.flops("forward") == 4 * pairs * 64 and one.flops("backward") == 10 * pairs * 64
    assert one.flops("forward+backward") == 14 * pairs * 64
    assert one.exps("forward") == one.exps("backward") == pairs
    assert (one.bytes("forward", 2), one.bytes("backward", 2)) == (4 * tensor * 2, 7 * tensor * 2)


def test_work_of_a_tubelet_embedding():
    one = case("tubelet", "vivit_h_14x2.b1")
    tokens, taps = 16 * 16 * 16, 3 * 2 * 14 * 14
    assert one.flops("forward") == 2 * tokens * taps * 1280
    video, parameters = 3 * 32 * 224 * 224, 2 * (1280 * taps + 1280 + tokens * 1280)
    assert one.bytes("forward", 2) == video + parameters + 2 * tokens * 1280


def test_sequences_cross_the_grid_limit():
    """The case in which peers crash above 65,535 sequences x heads is among those that are run."""
    assert case("temporal", "vivit_b_16x2.b32").sequences == 32 * 196 * 12 > 65_535
    assert case("temporal", "animatediff.b2").sequences == 65_536


def test_cases_are_found_by_name():
    assert len({(one.op, one.name) for one in cases.CASES}) == len(cases.CASES)
    names = {one.name for one in cases.select(["joint"], ["vivit_b_16x2"], on_cpu=True)}
    assert names == {"vivit_b_16x2.b1", "vivit_b_16x2.b8", "vivit_b_16x2.b32"}
    assert max(one.B for one in cases.select([], [], on_cpu=True)) <= 4
    assert {one.S for one in cases.CASES if one.op == "joint"} >= {17, 1568, 3136, 3137, 6272, 12544}
    with pytest.raises(ValueError, match=r"did you mean 'vivit_b_16x2\.b8'"):
        cases.select(["joint"], ["vivit_b_16x2.b88"], on_cpu=True)
    with pytest.raises(ValueError, match="did you mean 'temporal'"):
        cases.select(["tempral"], [], on_cpu=True)


def test_shares_of_the_ceilings():
    """2 GB in 1 ms is 2 TB/s, half of 4 TB/s; 100 GFLOP in 1 ms is 100 TFLOP/s, an eighth of 800."""
    limits = {"copy_gbps": 4000.0, "matmul_tflops": 800.0, "exp_gops": 3700.0}
    shares, bound = ceilings.shares(1.0, 10**11, 2 * 10**9, 0, limits)
    assert shares == {"copy": 0.5, "matmul": 0.125} and bound == "copy"
    shares, bound = ceilings.shares(1.0, 10**11, 10**9, 3 * 10**9, limits)
    assert shares["exp"] == pytest.approx(3 / 3.7) and bound == "exp"


def test_summary_is_of_ranks():
    assert summary([5.0, 1.0, 4.0, 2.0, 3.0]) == {"median": 3.0, "p20": 2.0, "p80": 5.0, "n": 5}


def test_turns_alternate():
    class Clockless:
        def once(self, fn):
            fn()
            return 1.0

        def calls(self, fn, seconds, estimate_ms, fewest):
            fn()
            return [1.0, 2.0, 9.0]

    order = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    assert in_turns(Clockless(), functions, 3, 0.1) == {"a": [2.0] * 3, "b": [2.0] * 3}  # type: ignore[arg-type]
    assert order[-6:] == ["a", "b"] * 3


# ---- the right answer ----


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_know_the_right_answer(op, dtype):
    """Ours passes; two per cent more, one row forgotten, or a value that is not finite do not."""
    one = case(op, "small.b2")
    inputs = Tubelet(one, dtype, CPU) if isinstance(one, TubeletCase) else Attention(one, dtype, CPU)
    candidate = inputs.ours("torch")
    out = candidate.forward()
    gradients = candidate.gradients(list(torch.autograd.grad(out, candidate.leaves, candidate.grad_output)))
    good = inputs.verdicts(out.detach(), gradients)
    assert all(verdict.ok for verdict in good.values()), good
    assert len(good) == 4
    assert not next(iter(inputs.verdicts(out.detach() * 1.02, []).values())).ok
    for bad in (0.0, float("nan")):
        wrong = out.detach().clone()
        wrong[-1, -1, -1] = bad
        assert not next(iter(inputs.verdicts(wrong, []).values())).ok
    half = [gradients[0] * 0.5, *gradients[1:]]
    assert [verdict.ok for verdict in inputs.verdicts(out.detach(), half).values()] == [True, False, True, True]


def test_a_part_of_a_large_case_is_compared_and_said_so(monkeypatch):
    one = AttentionCase("joint", "made_up", 3, 1, 40, 4, 16)
    monkeypatch.setattr("bench.attention._MOST_FLOPS", {"cpu": 14.0 * 40 * 40 * 16 * 5})
    monkeypatch.setattr("bench.attention._MOST_BYTES", 8 * 40 * 40)  # one head at a time
    inputs = Attention(one, torch.float32, CPU)
    assert inputs.checked == [(b, slice(h, h + 1)) for b, h in [(0, 0), (2, 3), (0, 1), (2, 2), (0, 2)]]
    assert inputs.checked_share == 5 / 12
    out = inputs.ours("torch").forward().detach()
    assert inputs.verdicts(out, [])["o"].ok
    out[1, 0, 0, 0, 0] = float("inf")  # in no compared part
    assert not inputs.verdicts(out, [])["o"].ok


# ---- records ----


def made(**changes) -> Record:
    values = dict(
        run="r", date="2026-01-01T00:00:00Z", kind="op", op="joint", case="vivit_b_16x2.b1", shape="B=1",
        dtype="float32", direction="forward", backend="torch", ours=True, status="ok", error={"share": 0.5},
        ms={"median": 1.0}, machine={"device": "x"},
    )  # fmt: skip
    return Record(**(values | changes))


def test_records_come_back_as_they_were(tmp_path):
    path = tmp_path / "x.jsonl"
    records = [made(), made(status="crashed", reason="65,536 sequences", ms={}, error={}, ours=False, backend="peer")]
    for one in records:
        record.append(path, one)
    assert list(record.read(path)) == records == list(record.read(tmp_path))
    with open(path, "a") as file:
        file.write(records[0].to_json()[:40])  # a kill in the middle of a line
    assert list(record.read(path)) == records
    with open(path, "a") as file:
        file.write("\n" + records[0].to_json() + "\n")
    with pytest.raises(ValueError, match=r"x.jsonl:3: not a record"):
        list(record.read(path))


@pytest.mark.parametrize(
    "changes", [{"status": "wrong"}, {"error": {}}, {"error": {"share": 1.01}}, {"error": {"share": float("nan")}}]
)
def test_a_wrong_result_is_never_stored(tmp_path, changes):
    with pytest.raises(ValueError, match="not stored"):
        record.append(tmp_path / "x.jsonl", made(**changes))
    assert not (tmp_path / "x.jsonl").exists()


def test_the_latest_counts():
    records = [made(ms={"median": 1.0}), made(backend="peer"), made(ms={"median": 2.0}), made(machine={"device": "y"})]
    assert record.latest(records) == [records[1], records[2], records[3]]


def test_a_kernel_that_changed_makes_its_record_stale(tmp_path, monkeypatch):
    file = tmp_path / "composed.py"
    monkeypatch.setattr(record, "source_files", lambda op, backend: [file])
    file.write_text("x = 1\n")
    one = made(source=record.source_hash("joint", "torch"))
    assert not record.is_stale(one)
    file.write_text("# why\n\nx = 1\n")
    assert not record.is_stale(one)
    file.write_text("x = 2\n")
    assert record.is_stale(one)
    assert not record.is_stale(dataclasses.replace(one, ours=False))


@pytest.mark.parametrize("op", [*cases.OPS, "model"])
def test_every_kernel_has_its_source(op):
    names = {path.name for path in record.source_files(op, "torch")}
    assert "composed.py" in names and "op.py" in names
    assert ("blockwise.py" in names) == (op != "tubelet")


@pytest.fixture
def a_tree(tmp_path, monkeypatch):
    """A tree with the files that the hash of a kernel looks for."""
    package = tmp_path / "kernels" / "vivit_kernels"
    shared = ("call", "support", "options", "blockwise", "triton_grid", "cpu_launch")
    files = [package / "_attention" / f"{name}.py" for name in shared]
    own = ("op", "composed", "triton_kernels", "cpu_kernels", "cuda_kernels")
    files += [package / "joint_attention" / f"{name}.py" for name in own]
    files += [tmp_path / "csrc" / name for name in ("bindings.cpp", "build.py", "cpu/a.h", "cpu/a.cpp", "cuda/a.cu")]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "backend, its_own",
    [
        ("torch", {"composed.py", "blockwise.py"}),
        ("triton", {"triton_kernels.py", "triton_grid.py"}),
        ("cpu", {"cpu_kernels.py", "cpu_launch.py", "bindings.cpp", "build.py", "a.h", "a.cpp"}),
        ("cuda", {"cuda_kernels.py", "bindings.cpp", "build.py", "a.cu"}),
    ],
)
def test_a_record_speaks_of_the_files_of_its_backend(backend, its_own, a_tree):
    names = {path.name for path in record.source_files("joint", backend)}
    assert names == its_own | {"op.py", "call.py", "options.py"}
    everything = {path for path in record.source_files("joint", "auto")}
    assert {path.name for path in everything} >= its_own and len(everything) == 15


def test_a_changed_line_of_the_native_library_makes_its_records_stale(a_tree):
    """A # begins code there; the kernels of a GPU are another matter."""
    one, header = made(backend="cpu", source=record.source_hash("joint", "cpu"), op="joint"), a_tree / "csrc/cpu/a.h"
    (a_tree / "csrc/cuda/a.cu").write_text("x = 2\n")
    header.write_text("// why\nx = 1\n")
    assert not record.is_stale(one)
    header.write_text("#define X 1\nx = 1\n")
    assert record.is_stale(one)


# ---- the plan ----

RATES = {"float32": {"copy_gbps": 40.0, "matmul_tflops": 0.2, "exp_gops": 2.0}}


def test_the_most_important_comes_first_and_what_does_not_fit_is_left_out():
    groups = plan.order([one for one in cases.CASES if one.B == 1], ["float32"], cases.DIRECTIONS)
    assert [group.case.rank for group in groups] == sorted(group.case.rank for group in groups)
    assert [group.direction for group in groups[:3]] == list(cases.DIRECTIONS)
    both = plan.order([one for one in cases.CASES if one.B == 1], ["bfloat16", "float32"], ["forward"])
    assert [group.case.rank + (group.dtype == "float32") for group in both] == (
        [0] * 5 + [1] * (8 + 5) + [2] * (22 + 8) + [3] * 22
    )
    assert plan.fitting(groups[:4], [5.0, 20.0, 3.0, 3.0], 11.0) == [True, False, True, True]
    assert plan.fitting(groups[:2], [5.0, 20.0], None) == [True, True]


def test_the_plan_learns():
    planner = plan.Planner("cpu", RATES, plan.Effort())
    small, large = (plan.Group(case("temporal", f"vivit_b_16x2.b{b}"), "float32", "forward") for b in (1, 8))
    guess = planner.seconds(large, ["torch", "sdpa"])
    assert guess > planner.seconds(small, ["torch", "sdpa"])
    assert planner.seconds(small, ["torch", "compiled"]) > planner.seconds(small, ["torch", "sdpa"])
    planner.learn(small, ["torch", "sdpa"], 3 * planner.seconds(small, ["torch", "sdpa"]))
    assert planner.seconds(large, ["torch", "sdpa"]) == 3 * guess


# ---- whole runs ----


@pytest.mark.parametrize(
    "error, status",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("No available kernel. Aborting execution."), "refused"),
        (NotImplementedError("joint: backend 'cuda' cannot run this call.\n  cuda  this release has no x"), "missing"),
        (RuntimeError("CUDA error: invalid configuration argument"), "crashed"),
    ],
)
def test_every_failure_has_a_status_and_a_reason(error, status):
    found, reason = explain(error)
    assert found == status in record.STATUSES and reason and "\n" not in reason


def test_a_backend_without_its_library_is_missing_and_says_what_to_do(monkeypatch):
    monkeypatch.setattr(_native, "AVAILABLE", False)
    monkeypatch.setattr(_native, "WHY", "the native library is not built (_C.so is missing): no g++")
    monkeypatch.setattr(_native, "REMEDY", "make build")
    grid = torch.zeros(1, 3, 4, 3, 2, 16)
    with pytest.raises(NotImplementedError) as error:
        spatial_attention(grid, backend="cpu")
    assert explain(error.value) == ("missing", f"{_native.WHY}; make build")
    with pytest.raises(NotImplementedError) as error:
        spatial_attention(grid, backend="triton")
    assert explain(error.value)[0] == "refused"


def test_cuda_kernels_that_a_library_has_not_are_missing(monkeypatch):
    monkeypatch.setattr(_native, "AVAILABLE", True)
    monkeypatch.setattr(_native, "CUDA", False)
    monkeypatch.setattr(_native, "NO_CUDA", "the native library has no CUDA kernels, it is built for the CPU alone (x)")
    with pytest.raises(NotImplementedError) as error:
        spatial_attention(torch.zeros(1, 3, 4, 3, 2, 16), backend="cuda")
    assert explain(error.value) == ("missing", f"{_native.NO_CUDA}; {_native.CUDA_REMEDY}")


def test_a_forced_instruction_set_is_another_machine(monkeypatch):
    monkeypatch.setattr(_native, "FORCED", "avx2")
    assert " avx2 kernels " in device.device_name(CPU)
    monkeypatch.setattr(_native, "FORCED", "")
    assert "kernels" not in device.device_name(CPU)


def test_a_run_among_bad_peers(tmp_path):
    """Wrong ones are shown and not stored; one that takes the process along stops nobody else; all say why."""
    bad = ["scaled_by_two_percent", "one_wrong_row", "stops_the_process", "takes_all_memory", "refuses"]
    bad += ["is_not_installed", "raises"]
    done = bench(
        "temporal", "--case", "small.b2", "--dtype", "float32", "--direction", "forward+backward", "--rounds", "2",
        "--with", PLUGIN, "--peer", "eager", "sdpa*", *bad, "--device", "cpu", "--out", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.jsonl")
    stored = {one.backend: one for one in record.read(path)}
    assert {name: one.status for name, one in stored.items()} == {
        "torch": "ok", "triton": "refused", "eager": "ok", "sdpa": "ok", "sdpa_ideal": "ok", "sdpa_math": "ok",
        "stops_the_process": "crashed", "takes_all_memory": "out of memory", "refuses": "refused", "raises": "crashed",
        **OF_THE_LIBRARY,
    }  # fmt: skip
    assert "SIGSEGV" in stored["stops_the_process"].reason
    assert "invalid configuration argument: 65,536 sequences" in stored["raises"].reason
    for wrong in ("scaled_by_two_percent", "one_wrong_row"):
        assert f"{wrong}" in done.stdout and wrong not in stored
    assert done.stdout.count("NOT STORED") == 4  # as they come, and in the list at the end
    assert "thursday is not installed" in done.stdout

    ours, peers = stored["torch"], [stored["eager"], stored["sdpa"], stored["sdpa_math"]]
    best = min(peers, key=lambda one: one.ms["median"])
    rows = [line.split() for line in done.stdout.split("best peer ")[-1].splitlines() if line.startswith("temporal")]
    (row,) = (row for row in rows if row[4] == "torch")
    assert best.backend in row and f"{best.ms['median'] / ours.ms['median']:.2f}" == row[-1]
    # each number again, by hand: T=8, S=9, two clips of two heads of 32
    pairs, tensor = 2 * 2 * 9 * 8 * 8, 2 * 8 * 9 * 2 * 32
    assert (ours.flops, ours.bytes, ours.exps) == (14 * pairs * 32, 11 * tensor * 4, 2 * pairs)
    seconds, limits = ours.ms["median"] / 1e3, ours.ceilings
    shares = [ours.bytes / seconds / 1e9 / limits["copy_gbps"], ours.flops / seconds / 1e12 / limits["matmul_tflops"]]
    shares.append(ours.exps / seconds / 1e9 / limits["exp_gops"])
    assert list(ours.share.values()) == pytest.approx(shares)
    assert len(ours.rounds) == 2 and ours.memory["results"] == 3 * tensor * 4  # dqkv
    assert ours.memory["peak"] >= ours.memory["results"] + tensor * 4 and 0 < ours.error["share"] <= 1
    assert ours.source == record.source_hash("temporal", "torch") and ours.machine["torch"] == torch.__version__


@pytest.mark.full
def test_a_wrong_kernel_of_ours_fails_the_run(tmp_path):
    """A backend of this project outside the budget: nothing stored, exit status 1."""
    plugin = tmp_path / "plant.py"
    plugin.write_text(
        "from vivit_kernels.factorized_attention import composed\n"
        "right = composed.launch_fwd\n"
        "composed.launch_fwd = lambda *x: (right(*x)[0] * 1.02, None)\n"
    )
    done = bench(
        "spatial", "--case", "small.b2", "--dtype", "float32", "--direction", "forward", "--rounds", "1",
        "--with", str(plugin), "--no-peers", "--device", "cpu", "--out", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 1 and "NOT STORED" in done.stdout, done.stdout + done.stderr
    stored = [one for path in tmp_path.glob("*.jsonl") for one in record.read(path)]
    assert {one.backend: one.status for one in stored} == {"triton": "refused", **OF_THE_LIBRARY}


@pytest.mark.full
def test_a_worker_that_hangs_is_stopped_in_time():
    worker = Worker("cpu", [PLUGIN])
    try:
        worker.ask({"open": ["spatial", "small.b2"], "dtype": "float32"}, 120.0)
        began = time.monotonic()
        with pytest.raises(Died, match="no end within 1 s") as death:
            worker.ask({"try": "hangs", "direction": "forward"}, 1.0)
        assert death.value.status == "timed out" and time.monotonic() - began < 60
        assert worker.process is None
        worker.ask({"open": ["spatial", "small.b2"], "dtype": "float32"}, 120.0)  # a new process
        assert worker.ask({"try": "torch", "direction": "forward"}, 120.0)["error"]["share"] <= 1
    finally:
        worker.stop()


@pytest.mark.full
def test_a_killed_run_has_kept_its_records(tmp_path):
    command = [sys.executable, "-m", "bench", "--case", "small.b2", "--device", "cpu", "--out", str(tmp_path)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 120
    while time.monotonic() < until and not any(path.read_text().count("\n") > 3 for path in tmp_path.glob("*.jsonl")):
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    (path,) = tmp_path.glob("*.jsonl")
    assert len(list(record.read(path))) >= 3
    for line in path.read_text().splitlines():
        json.loads(line)


@pytest.mark.full
def test_a_budget_ends_the_run(tmp_path):
    """All cases of one clip would take many minutes."""
    began = time.monotonic()
    done = bench("--budget", "40", "--no-peers", "--device", "cpu", "--out", str(tmp_path))
    assert time.monotonic() - began < 80, "twice the budget"
    assert "No time for" in done.stdout and done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["spatal"], "did you mean 'spatial'"),
        (["joint", "--case", "vivit_b_16x2.b9"], "did you mean"),
        (["joint", "--peer", "spda", "--case", "small.b2"], "did you mean 'sdpa'"),
        pytest.param(
            ["joint", "--with", "nowhere.py", "--case", "small.b2"], "not a Python file", marks=pytest.mark.full
        ),
        pytest.param(
            ["joint", "--base", "no-such-ref", "--case", "small.b2"],
            "name a commit, branch or tag",
            marks=pytest.mark.full,
        ),
    ],
)
def test_mistakes_are_explained(arguments, message, tmp_path):
    with pytest.raises(SystemExit) as end:
        run.main([*arguments, "--dtype", "float32", "--device", "cpu", "--out", str(tmp_path)])
    assert message in str(end.value.code)


@pytest.mark.full
def test_a_mistake_ends_the_process_without_a_traceback(tmp_path):
    done = bench("spatal", "--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 1 and "did you mean" in done.stderr and "Traceback" not in done.stderr, done.stderr
