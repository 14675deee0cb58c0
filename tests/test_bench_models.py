"""Whole models of the bench: the same weights for all, planted errors found, the flow of a run, its tables."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vivit.model
from bench import compare, memory, model_tables, model_worker, models, record, zoo
from bench.peers import Missing
from bench.record import Record
from bench.workers import Died
from bench.zoo import Spec
from vivit import ViViTConfig, flops
from vivit.config import MODELS, SIZES
from vivit_kernels import _dispatch, _native, joint_attention
from vivit_kernels.numerics import judge

TINY = Spec("joint", "torch", "XS/16x2", frames=4)
CEILINGS = {"copy_gbps": 10.0, "matmul_tflops": {"float32": 0.1, "bfloat16": 0.2}}


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """A tiny size; no limit on the test's own memory, no references kept in the tree, no seconds for ceilings."""
    monkeypatch.setitem(SIZES, "XS", (64, 3, 4, 128))
    monkeypatch.setattr(model_worker.Memory, "allow", lambda *_: None)
    monkeypatch.setattr(models, "EXPECTED", tmp_path / "exact")
    monkeypatch.setattr(models.ceilings, "measure", lambda *_: CEILINGS)


def session(spec: Spec) -> model_worker.Session:
    made = model_worker.Session(torch.device("cpu"))
    made.build(asdict(spec))
    return made


# ---- the models ----


@pytest.mark.parametrize("model", MODELS)
def test_everybody_has_the_same_model(model):
    """This project, stock PyTorch and transformers: one set of weights, logits within the budget."""
    spec = replace(TINY, model=model, contestant="reference")
    reference = zoo.build(spec)
    with torch.no_grad():
        eager = reference.call(reference.video)
        exact = reference.module.double()(reference.video)
    assert exact.std() > 0  # a zero head would make everybody equal
    for contestant in ("torch", *(name for name in zoo.peers_of(model) if name not in zoo.GPU_PEERS)):
        other = zoo.build(replace(spec, contestant=contestant))
        with torch.no_grad():
            verdict = judge(other.call(other.video), exact, eager, terms=spec.longest_sum)
        assert verdict.ok, f"{contestant}: {verdict}"


def test_ligers_layer_norm_takes_the_place_of_pytorchs(monkeypatch):
    """With a stand-in for its kernel: every LayerNorm calls it, with its own parameters; on a CPU it says why not."""
    seen = []

    class Function:
        @staticmethod
        def apply(x, weight, bias, eps):
            seen.append(eps)
            return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)

    monkeypatch.setitem(sys.modules, "liger_kernel.ops", SimpleNamespace(LigerLayerNormFunction=Function))
    stock = zoo.build(replace(TINY, contestant="stock"))
    liger = zoo.build(replace(TINY, contestant="stock_liger", device="cuda"))  # only said: it stays on the CPU
    with torch.no_grad():
        assert torch.equal(stock.call(stock.video), liger.call(liger.video))
    norms = [part for part in stock.module.modules() if isinstance(part, torch.nn.LayerNorm)]
    assert seen == [norm.eps for norm in norms]
    with pytest.raises(Missing, match="GPUs only"):
        zoo.build(replace(TINY, contestant="stock_liger"))


def test_the_reference_and_stock_do_not_run_this_projects_operations(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("an operation of this project was called")

    for name in ("joint_attention", "factorized_attention", "tubelet_embedding"):
        monkeypatch.setattr(vivit.model, name, fail)
    for contestant in ("reference", "stock"):
        other = zoo.build(replace(TINY, model="factorized_encoder", contestant=contestant))
        other.call(other.video)
    with pytest.raises(AssertionError, match="was called"):
        ours = zoo.build(TINY)
        ours.call(ours.video)


@pytest.mark.parametrize("model", [*MODELS, *zoo.OTHERS])
def test_flops_are_what_pytorch_counts(model):
    spec = replace(TINY, model=model, contestant="reference", frames=2)
    with FlopCounterMode(display=False) as counter:
        built = zoo.build(spec)
        built.call(built.video)
    if model in MODELS:
        assert counter.get_total_flops() == spec.forward_flops()
    else:
        assert spec.forward_flops() is None and session(spec).counted_flops() == counter.get_total_flops() > 0
    assert replace(spec, clips=2, step="train").step_flops(10) == 60


def test_names_of_cases_are_read_back():
    spec = Spec("factorized_encoder", "torch", "L/16x2")
    assert spec.case == "vivit_l_16x2_factorized_encoder.b1"
    assert compare.model_case(replace(spec, frames=64, clips=8).case) == ("L/16x2", "factorized_encoder", 64, 8)
    assert compare.model_case(memory.case(replace(spec, frames=32))) == ("L/16x2", "factorized_encoder", 32, 1)
    assert Spec("timesformer", "transformers_eager").case == "timesformer_b.b1"


def test_what_this_machine_can_run():
    found = zoo.own_backends(Spec("factorized_encoder", ""))
    # in float32 the class token's one query goes to torch (joint_attention/order.py): the default is a mixture
    assert found == (["auto", "cpu", "torch"] if _native.AVAILABLE else ["torch"])


@pytest.mark.parametrize("model", MODELS)
def test_a_model_asks_for_what_its_operations_will_be_asked(model):
    """The facts by which a backend is chosen are those of the calls that the model makes."""
    seen = []
    spec = replace(TINY, model=model)
    built = zoo.build(spec)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        choose = _dispatch.choose
        patch.setattr(_dispatch, "choose", lambda call, *rest: (seen.append(call), choose(call, *rest))[1])
        built.call(built.video)
    assert set(map(str, seen)) == set(map(str, zoo._calls(spec)))


def test_a_class_that_transformers_lacks_is_told():
    with pytest.raises(zoo.Missing, match=r"transformers .* has no VivitForTime"):
        zoo._transformers("VivitForTime")
    with pytest.raises(zoo.Missing, match="the joint model only"):
        zoo.build(Spec("factorized_encoder", "transformers_sdpa"))


# ---- is it right? ----


class GradientOff(torch.autograd.Function):
    """The identity, with a gradient that is 5 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0] * 1.05


def half_a_tile_short(*qkv, **_):
    """qkv: packed, or of the last block three, whose q is the class token's."""
    mask = torch.ones(qkv[-1].shape[:2], dtype=torch.bool)
    mask[:, -32:] = False
    return joint_attention(*qkv, key_mask=mask)


WRONG = {
    "keys left out": half_a_tile_short,
    "a head left out": lambda *qkv, **_: joint_attention(*qkv) * (torch.arange(4) > 0).view(-1, 1),
    "gradient off": lambda *qkv, **_: joint_attention(*map(GradientOff.apply, qkv)),
}


@pytest.mark.parametrize(
    "dtype", ["autocast", *(pytest.param(x, marks=pytest.mark.full) for x in ("float32", "bfloat16"))]
)
def test_a_wrong_kernel_is_found_in_the_whole_model(monkeypatch, tmp_path, dtype):
    spec, path = replace(TINY, dtype=dtype, step="train"), str(tmp_path / "expected.pt")
    session(zoo.reference_of(spec)).expect(path)
    assert session(spec).check(path)["error"]["share"] <= 1
    for name, wrong in WRONG.items():
        monkeypatch.setattr(vivit.model, "joint_attention", wrong)
        found = session(spec).check(path)["error"]
        assert found["share"] > 1, name
        assert (name != "gradient off") or found["of"] != "logits"


def test_gradients_of_transformers_are_compared_by_our_names(tmp_path):
    spec, path = replace(TINY, contestant="transformers_sdpa", step="train"), str(tmp_path / "expected.pt")
    session(zoo.reference_of(spec)).expect(path)
    assert {"tubelet_weight", "position", "head.weight"} < torch.load(path)["exact"].keys()
    assert session(spec).check(path)["error"]["share"] <= 1


def test_the_clips_that_are_compared():
    spec = Spec("joint", "torch", clips=5)
    most = model_worker._MOST_FLOPS["cpu"]
    assert model_worker.checked_clips(spec, 1) == [0, 1, 2, 3, 4]
    assert model_worker.checked_clips(spec, int(most / 3)) == [0, 1, 4]
    assert model_worker.checked_clips(spec, int(most * 2)) == [0]


def test_a_batch_is_checked_as_it_is_timed(monkeypatch, tmp_path):
    """Two clips run together; a part of them compared gives the same gradients as that part alone."""
    spec, path = replace(TINY, clips=2, step="train"), str(tmp_path / "expected.pt")
    monkeypatch.setitem(model_worker._MOST_FLOPS, "cpu", 1)
    session(zoo.reference_of(spec)).expect(path)
    error = session(spec).check(path)["error"]
    assert error["checked"] == 0.5 and error["share"] <= 1


# ---- memory of a process ----


def test_peak_memory_is_that_of_the_steps():
    meter, size = model_worker.Memory(torch.device("cpu")), 256 << 20
    before = meter.now()
    torch.ones(size, dtype=torch.uint8)
    assert meter.peak() > before + size // 2
    meter.reset()
    assert meter.peak() < before + size // 2


def test_out_of_memory_is_an_answer():
    """A process that may take 700 MB says so instead of dying, or taking the machine along."""
    big = Spec("joint", "torch", "Ti/16x2", clips=64, step="train")
    worker = model_worker.ModelWorker(big)
    try:
        built = worker.ask({"build": asdict(big), "limit": 700_000_000}, 60.0)
        answer = built if "status" in built else worker.ask({"warm": True}, 60.0)
    finally:
        worker.stop()
    assert answer["status"] == "out of memory", answer


# ---- the flow, with workers that only pretend ----


class Pretender:
    """Answers as a worker does; `behave` maps a contestant to what it does at a request."""

    behave: dict = {}  # noqa: RUF012
    log: list = []  # noqa: RUF012

    def __init__(self, spec: Spec, tuned_malloc: bool = False):
        self.spec = spec

    def ask(self, request: dict, seconds: float) -> dict:
        kind = next(iter(request))
        self.log.append((self.spec.contestant, kind))
        special = self.behave.get((self.spec.contestant, kind))
        if isinstance(special, Exception):
            raise special
        if special is not None:
            return special
        ms = 20.0 if self.spec.contestant == "stock" else 10.0
        peak = 1000 * self.spec.clips * (2 if self.spec.contestant == "stock" else 1)
        used = {"loaded": 50, "held": 10, "peak": peak}
        return {
            "build": {"loaded": 50},
            "expect": {},
            "check": {"error": {"share": 0.5, "max": 1.0, "rms": 1.0, "of": "logits", "checked": 1.0}, "flops": 10**9},
            "warm": {"estimate_ms": ms, "finite": True, "memory": used},
            "time": {"ms": [ms, ms + 1], "memory": used},
        }[kind]

    def stop(self) -> None:
        pass


@pytest.fixture
def pretend(monkeypatch):
    monkeypatch.setattr(models, "ModelWorker", Pretender)
    monkeypatch.setattr(zoo, "own_backends", lambda spec: ["torch"])  # whatever is built here
    monkeypatch.setattr(Pretender, "behave", {})
    monkeypatch.setattr(Pretender, "log", [])
    return Pretender


def stored(folder) -> list[Record]:
    return list(record.read(folder))


def run(tmp_path, *more: str) -> int:
    return models.main(
        ["--model", "joint", "--step", "forward", "--dtype", "float32", "--rounds", "3", "--out", str(tmp_path / "out"),
         *(more or ("--backend", "torch", "stock"))]
    )  # fmt: skip


def test_models_take_turns_and_leave_whole_records(pretend, tmp_path, capsys):
    assert run(tmp_path) == 0
    turns = [who for who, kind in pretend.log if kind == "time"]
    assert turns == ["torch", "stock"] * 3
    ours, stock = stored(tmp_path / "out")
    assert (ours.kind, ours.op, ours.direction, ours.backend, ours.ours) == (
        "model",
        "forward",
        "forward",
        "torch",
        True,
    )
    assert (ours.case, ours.dtype, stock.backend, stock.ours) == ("vivit_b_16x2_joint.b1", "float32", "stock", False)
    assert ours.ms["median"] == 10.5 and ours.ms["n"] == 6 and ours.rounds == [10.5] * 3
    assert ours.flops == 10**9 and ours.ceilings["matmul_tflops"] == 0.1
    assert ours.share["matmul"] == pytest.approx(10**9 / 10.5e-3 / 0.1e12)
    assert ours.memory == {"loaded": 50, "held": 10, "peak": 1000} and ours.error["share"] == 0.5
    assert ours.machine["torch"] == torch.__version__ and ours.commit and ours.source and not stock.source
    shown = capsys.readouterr().out
    assert "1.95  1.95-1.95" in shown  # 20.5 against 10.5, in every round


def test_levels_of_memory_take_part_in_training_steps(pretend, tmp_path):
    assert run(tmp_path, "--step", "train", "forward") == 0
    found = stored(tmp_path / "out")
    steps = {step: [made.backend for made in found if made.op == step and made.ours] for step in zoo.STEPS}
    assert steps == {"train": ["torch", *zoo.LEANER], "forward": ["torch"]}


@pytest.mark.parametrize("level", zoo.LEANER)
def test_a_level_of_memory_is_the_model_at_that_level(level):
    made = zoo.build(replace(TINY, contestant=level)).module
    blocks = [part for part in made.modules() if isinstance(part, vivit.model.Block)]
    assert len(blocks) == 3 and all(block.memory == level for block in blocks)
    assert replace(TINY, contestant=level).ours


def test_a_wrong_model_is_shown_and_not_stored(pretend, tmp_path, capsys):
    error = {"share": 3.2, "max": 1.0, "rms": 1.0, "of": "position", "checked": 1.0}
    pretend.behave["torch", "check"] = {"error": error, "flops": 10**9}
    assert run(tmp_path) == 1
    assert [made.backend for made in stored(tmp_path / "out")] == ["stock"]
    assert ("torch", "time") not in pretend.log
    assert "NOT STORED" in (shown := capsys.readouterr().out) and "position uses 3.2 of the error budget" in shown


@pytest.mark.parametrize("when", ["build", "check", "warm", "time"])
def test_a_model_that_dies_is_a_row(pretend, tmp_path, capsys, when):
    pretend.behave["stock", when] = Died("crashed", "ended by SIGSEGV")
    assert run(tmp_path) == 0
    ours, stock = stored(tmp_path / "out")
    assert (stock.status, stock.reason, stock.ms) == ("crashed", "ended by SIGSEGV", {})
    assert ours.status == "ok" and len(ours.rounds) == 3
    assert "no peer ran" in capsys.readouterr().out


def test_without_a_reference_nothing_is_timed(pretend, tmp_path):
    pretend.behave["reference", "expect"] = {"status": "out of memory", "reason": "full"}
    run(tmp_path)
    assert {made.status for made in stored(tmp_path / "out")} == {"out of memory"}
    assert not any(kind == "time" for _, kind in pretend.log)


def test_a_stopped_run_keeps_what_it_has(pretend, tmp_path, monkeypatch):
    def stop(lab, entrant, real=models.turn):
        if entrant.spec.contestant == "stock" and entrant.rounds:
            raise KeyboardInterrupt
        real(lab, entrant)

    monkeypatch.setattr(models, "turn", stop)
    assert run(tmp_path) == 130
    assert [(made.backend, len(made.rounds)) for made in stored(tmp_path / "out")] == [("torch", 2), ("stock", 1)]


def test_a_budget_that_is_over_measures_nothing_and_says_so(pretend, tmp_path, capsys):
    assert run(tmp_path, "--budget", "0") == 0
    assert "no time for 4 models" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--dtype", "float16"], "use bfloat16"),
        (["--size", "Q/16x2"], "is not SIZE/PATCHxFRAMES"),
        (["--size", "Ti/16x2", "--model", "factorized_dot_product"], "must be even"),
        (["--model", "timesformer", "--backend", "stock"], "nobody runs timesformer as stock"),
    ],
)
def test_what_cannot_be_is_said(pretend, options, message):
    with pytest.raises(SystemExit, match=message):
        models.main(["--device", "cpu", *options])


def test_a_real_run(tmp_path, capsys):
    """Three processes: reference, this project, stock PyTorch."""
    options = ["--size", "Ti/16x2", "--frames", "2", "--rounds", "2", "--backend", "torch", "stock"]
    assert run(tmp_path, *options) == 0
    ours, stock = stored(tmp_path / "out")
    for made in (ours, stock):
        assert made.status == "ok" and 0 < made.error["share"] <= 1 and len(made.rounds) == 2
        assert made.ms["median"] > 0 and made.memory["loaded"] > made.memory["peak"] > 0
    assert "This project, by the ratio" in capsys.readouterr().out


# ---- memory against frames and clips ----


def test_memory_grows_until_it_ends(pretend, tmp_path, capsys):
    class Small(Pretender):
        def ask(self, request, seconds):
            if "warm" in request and self.spec.clips > (2 if self.spec.contestant == "torch" else 1):
                return {"status": "out of memory", "reason": "[enforce fail at somewhere]"}
            return super().ask(request, seconds)

    models.ModelWorker = Small  # the fixture puts the real one back
    options = ["--model", "joint", "--frames", "8", "--clips", "2", "4", "8", "--limit", "3", "--device", "cpu"]
    assert memory.main([*options, "--out", str(tmp_path)]) == 0
    made = {(one.case.removeprefix("vivit_b_16x2_joint"), one.backend): one for one in stored(tmp_path)}
    assert {key: one.status for key, one in made.items()} == {
        (".f8.b1", "torch"): "ok", (".f8.b1", "stock"): "ok",
        (".f32.b2", "torch"): "ok", (".f32.b2", "stock"): "out of memory",
        (".f32.b4", "torch"): "out of memory",
    }  # fmt: skip
    two = made[".f32.b2", "torch"]
    assert (two.kind, two.op, two.memory["peak"], two.error["share"]) == ("memory", "train", 2000, 0.5)
    assert two.error["checked"] == 8 / 64
    assert made[".f32.b4", "torch"].reason == "the process may take 3.0 GB"
    assert "0.50" in capsys.readouterr().out  # ours / stock at one clip


def test_a_wrong_gradient_has_no_memory_either(pretend, tmp_path, capsys):
    error = {"share": 3.2, "max": 1.0, "rms": 1.0, "of": "position", "checked": 1.0}
    pretend.behave["torch", "check"] = {"error": error, "flops": 10**9}
    options = ["--model", "joint", "--frames", "8", "--clips", "--limit", "3", "--device", "cpu"]
    assert memory.main([*options, "--out", str(tmp_path)]) == 1
    assert [made.backend for made in stored(tmp_path)] == ["stock"]
    assert "NOT STORED" in capsys.readouterr().out


# ---- tables ----


def forward_record(model: str, backend: str, ms: float, size: str = "B/16x2") -> Record:
    spec = Spec(model, backend, size)
    return Record(
        run="r", date="", kind="model", op="forward", case=spec.case, shape="", dtype="float32", direction="forward",
        backend=backend, ours=spec.ours, status="ok", ms={"median": ms, "p20": ms, "p80": ms, "n": 1}, rounds=[ms, ms],
        error={"share": 0.1},
    )  # fmt: skip


def test_the_papers_table_2():
    times = dict(zip(MODELS, (30.0, 10.0, 20.0, 9.0), strict=True))
    made = [forward_record(model, "torch", ms) for model, ms in times.items()]
    made += [forward_record(model, "stock", 2 * ms) for model, ms in list(times.items())[:2]]
    lines = "\n".join(model_tables.table2(compare.groups(made)))
    for model in MODELS:
        gflops = flops.count(ViViTConfig.preset("B/16x2", attention=model)).paper_gflops
        assert f"{gflops:.4g} (" in lines
    assert "3 factorized_self_attention" in lines and "20 (2.00)" in lines and "22.9 (1.32)" in lines
    assert "Model 4 against model 2: GFLOPs 0.97, TPU-v3 1.32, this project 0.90" in lines
    assert "stock" not in lines  # without model 4 it has nothing to say here
    small = model_tables.table2(compare.groups([forward_record(model, "torch", 1.0, "S/16x2") for model in MODELS]))
    assert small and not any("TPU" in line for line in small)


def test_the_table_is_sorted_by_ratio():
    made = [forward_record("joint", "torch", 10.0), forward_record("joint", "stock", 9.0)]
    made += [forward_record("factorized_encoder", "torch", 10.0), forward_record("factorized_encoder", "stock", 30.0)]
    lines = model_tables.by_ratio(compare.groups(made))
    assert "factorized_encoder" in lines[-2] and "3.00" in lines[-2] and "0.90" in lines[-1]


def test_records_are_lines_of_json(pretend, tmp_path):
    run(tmp_path)
    (file,) = (tmp_path / "out").glob("*.jsonl")
    assert all(json.loads(line)["kind"] == "model" for line in file.read_text().splitlines())
