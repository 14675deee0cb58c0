"""Which backend of an op comes first: the tables in each order.py, by hand and against every record."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.cases import PACKAGES
from bench.compare import groups
from bench.record import Record, is_stale, read
from vivit_kernels import _environment, _native, _order
from vivit_kernels._dispatch import Call
from vivit_kernels._order import MANY, Ladder, Rung
from vivit_kernels.factorized_attention import order as factorized
from vivit_kernels.factorized_attention.support import SUPPORT as FACTORIZED
from vivit_kernels.joint_attention import order
from vivit_kernels.joint_attention.support import SUPPORT
from vivit_kernels.tubelet_embedding import order as tubelet
from vivit_kernels.tubelet_embedding.support import SUPPORT as TUBELET

PLAIN = Call("joint_attention", (2, 3136, 12, 64), torch.bfloat16, "cuda", True, (), 90, keys=3136)
GRID = Call("factorized_attention", (2, 16, 196, 12, 64), torch.bfloat16, "cpu", True, temporal_heads=12, isa="avx2")
OPS = {
    "tubelet_embedding": (tubelet, TUBELET),
    "factorized_attention": (factorized, FACTORIZED),
    "joint_attention": (order, SUPPORT),
}
LADDERS = [(op, device, ladder) for op, (module, _) in OPS.items() for device, ladder in module.LADDERS.items()]


def first(call: Call) -> str:
    """The backend that runs where nothing of others is installed but PyTorch."""
    return next(name for name in order.order(call) if name in SUPPORT and not SUPPORT[name](call))


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_compiled_kernels_come_first_on_a_cpu_then_compositions(device):
    for op, (module, _) in OPS.items():
        assert module.order(replace(GRID, op=op, device=device)) == ("cpu", "torch")


def test_order_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_environment, "FLASH_ATTN", ())
    monkeypatch.setattr(_environment, "HAS_XFORMERS", False)
    monkeypatch.setattr(_environment, "HAS_TRITON", True)
    assert first(PLAIN) == "sdpa"
    for changes in (
        {"needs_grad": False},
        {"arch": 80},
        {"shape": (2, 197, 12, 64)},
        {"shape": (2, 3136, 8, 80)},
        {"uses": ("dropout",)},
        {"dtype": torch.float32},
    ):
        assert first(replace(PLAIN, **changes)) == "triton", changes
    assert order.order(replace(PLAIN, uses=("softcap",)))[0] != "sdpa"
    torch.use_deterministic_algorithms(True)
    assert first(PLAIN) == "triton"
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(_environment, "HAS_TRITON", False)
    assert first(replace(PLAIN, arch=80)) == "sdpa"
    assert first(replace(PLAIN, arch=80, dtype=torch.float32)) == "torch"


# ---- the form ----


@pytest.mark.parametrize("op, device, ladder", LADDERS)
def test_every_order_ends_with_what_runs_every_call_and_says_why(op, device, ladder):
    support = OPS[op][1]
    assert ladder.default[-1] == "torch" and len(set(ladder.default)) == len(ladder.default)
    assert set(ladder.default) <= set(_environment.NAMES) and len(ladder.reason.split()) > 10
    for rung in ladder.rungs:
        assert rung.backend in support and str(rung)
        assert re.search(r"\b20\d\d-\d\d-\d\d\b", rung.reason) and re.search(r"\d (us|ms)\b", rung.reason), rung.reason


def inside(rung: Rung, device: str, op: str, letters: tuple[str, ...]) -> Call:
    """A call that the rung describes, made from its own words."""
    sizes = {name: low for name, low, _ in rung.sizes}
    shape = tuple(sizes.get(letter, 64) for letter in letters)
    H = shape[-2]
    heads = {"time": H, "space": 0, "both": H // 2, "": None if op != "factorized_attention" else 0}[rung.axis]
    return Call(
        op, shape, (*rung.dtypes, torch.bfloat16)[0], device, bool(rung.needs_grad), (), (*rung.arches, 0)[0],
        heads, sizes.get("N_k"), (*rung.isas, "")[0],
    )  # fmt: skip


@pytest.mark.parametrize("op, device, ladder", LADDERS)
def test_every_rung_is_reached_by_a_call_that_its_backend_runs(op, device, ladder, with_kernels):
    torch.use_deterministic_algorithms(False)
    module, support = OPS[op]
    for rung in ladder.rungs:
        call = inside(rung, device, op, module.LETTERS)
        assert module.decide(call).source is rung, f"{rung} is hidden by another one before it"
        assert module.order(call)[0] == rung.backend != ladder.default[0]
        assert not support[rung.backend](call), f"{rung.backend} refuses what {rung} describes"


WHOLE = Rung(
    "torch", "why", arches=(0,), isas=("avx2",), dtypes=(torch.bfloat16,), needs_grad=True,
    sizes=(("T", 4, 16), ("D", 64, 64), ("B", 1, MANY)), axis="time", deterministic=False,
)  # fmt: skip


def test_every_word_of_a_rung_counts():
    torch.use_deterministic_algorithms(False)
    assert WHOLE.takes(GRID, factorized.LETTERS)
    for changes in (
        {"arch": 90},
        {"isa": "avx512"},
        {"dtype": torch.float32},
        {"needs_grad": False},
        {"shape": (2, 17, 196, 12, 64)},
        {"shape": (2, 3, 196, 12, 64)},
        {"shape": (2, 16, 196, 12, 80)},
        {"shape": (0, 16, 196, 12, 64)},
        {"temporal_heads": 6},
        {"temporal_heads": 0},
        {"uses": ("key_mask",)},
    ):
        assert not WHOLE.takes(replace(GRID, **changes), factorized.LETTERS), changes
    assert replace(WHOLE, options=True).takes(replace(GRID, uses=("key_mask",)), factorized.LETTERS)
    torch.use_deterministic_algorithms(True)
    assert not WHOLE.takes(GRID, factorized.LETTERS)
    assert replace(WHOLE, deterministic=True).takes(GRID, factorized.LETTERS)
    keys = Rung("torch", "why", sizes=(("N_k", 1, 100),))
    assert keys.takes(replace(PLAIN, keys=100), order.LETTERS) and not keys.takes(PLAIN, order.LETTERS)
    assert Rung("torch", "why").takes(PLAIN, order.LETTERS)


def test_a_rung_says_which_calls_it_takes():
    assert str(WHOLE) == (
        "sm_0, avx2, bfloat16, with a gradient, along time, 4 <= T <= 16, D = 64, B >= 1, without options, "
        "where results may differ from run to run"
    )
    assert str(Rung("torch", "why", options=True, sizes=(("N", 1, 9),))) == "N <= 9"


def test_the_first_rung_counts_and_the_others_keep_their_order():
    rungs = (replace(WHOLE, backend="sdpa"), replace(WHOLE, backend="torch", isas=()))
    ladders = {"cpu": Ladder(("cpu", "triton", "torch"), "why", rungs), "cuda": Ladder(("torch",), "why")}
    torch.use_deterministic_algorithms(False)
    found = _order.decide(GRID, ladders, factorized.LETTERS)
    assert found.order == ("sdpa", "cpu", "triton", "torch") and found.source is rungs[0]
    found = _order.decide(replace(GRID, isa="portable"), ladders, factorized.LETTERS)
    assert found.order == ("torch", "cpu", "triton") and found.source is rungs[1]
    assert _order.decide(replace(GRID, needs_grad=False), ladders, factorized.LETTERS).source is ladders["cpu"]


def test_rungs_are_traced():
    """A graph asks them for sizes it knows by letters only: one graph for many lengths on the same side of a rung."""
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    ladders = {"cpu": Ladder(("cpu", "torch"), "why", (replace(WHOLE, sizes=(("S", 100, MANY),)),))}

    def chosen(x):
        return x.sum() + _order.decide(replace(GRID, shape=tuple(x.shape)), ladders, factorized.LETTERS).order.index(
            "torch"
        )

    compiled = torch.compile(chosen, fullgraph=True, backend="eager", dynamic=True)
    for S in (200, 300, 50):
        x = torch.zeros(2, 16, S, 12, 64)
        assert compiled(x).item() == chosen(x).item() == (0 if S >= 100 else 1)


# ---- against the records ----

# Peers of the benchmark that a backend of joint_attention runs.
OFFERED = {"sdpa": "sdpa", "sdpa_cudnn": "sdpa", "sdpa_flash": "sdpa", "xformers": "xformers"}
OFFERED |= {f"flash_attn_{version}": "flash_attn" for version in (2, 3, 4)}
OWN = {name: name for name in _environment.BACKENDS}
ARCHES = {"A100": 80, "H100": 90, "H200": 90, "B200": 100}
ISAS = {f"{isa} kernels": isa for isa in _native.ISAS}  # forced
ISAS |= {"AVX512 bf16": "avx512_bf16", "AVX512 AMX": "avx512_amx", "AVX512": "avx512", "AVX2": "avx2"}
NOTICEABLE = 1.05  # times as long: less is not worth a rung


def recorded_call(record: Record) -> Call | None:
    """What a user would have called in this record, on a machine that this file knows."""
    device = record.machine.get("device", "")
    arch = next((arch for name, arch in ARCHES.items() if name in device), 0)
    isa = next((isa for name, isa in ISAS.items() if name in device), "")
    if not (arch or isa) or record.kind != "op" or record.direction == "backward":
        return None
    sizes = dict(re.findall(r"(\w+)=(\S+)", record.shape))
    op, heads = PACKAGES[record.op], None
    if op == "tubelet_embedding":
        shape = (int(sizes["B"]), 3, *map(int, re.findall(r" (\d+)x(\d+)x(\d+)", record.shape)[0]))
    else:
        shape = tuple(int(sizes[letter]) for letter in OPS[op][0].LETTERS)
    if op == "factorized_attention":
        heads = {"temporal": shape[3], "dot_product": shape[3] // 2, "spatial": 0}[record.op]
    keys = shape[1] if op == "joint_attention" else None
    uses = ("softcap",) if "softcap" in sizes else ()
    dtype, needs_grad = getattr(torch, record.dtype), record.direction == "forward+backward"
    return Call(op, shape, dtype, "cuda" if arch else "cpu", needs_grad, uses, arch, heads, keys, isa)


def contradictions(records: Iterable[Record]) -> list[str]:
    """Measurements in which a backend is noticeably faster than one that the order puts before it."""
    found = []
    for group in groups(records):
        call = recorded_call(group.first)
        if call is None:
            continue
        module, _ = OPS[call.op]
        offered = OWN | (OFFERED if call.op == "joint_attention" else {})
        times: dict[str, float] = {}
        for record in group.timed:
            name = offered.get(record.backend)
            if name and not record.ideal and not is_stale(record):
                times[name] = min(record.ms["median"], times.get(name, record.ms["median"]))
        tried = [name for name in module.order(call) if name in times]
        if tried and times[tried[0]] > NOTICEABLE * min(times[name] for name in tried):
            found.append(f"{group.first.case} {call}: {tried[0]} is tried first; {times}")
    return found


def made(backend: str, ms: float, device: str = "NVIDIA H200", direction: str = "forward", **changes) -> Record:
    facts = {"op": "joint", "shape": "B=2 N=3136 H=12 D=64", "ours": False} | changes
    return Record(
        run="r", date="2026-11-26T00:00:00Z", kind="op", case="vivit_b_16x2.b2", dtype="bfloat16", direction=direction,
        backend=backend, status="ok", ms={"median": ms, "p20": ms, "p80": ms, "n": 9}, machine={"device": device},
        **facts,
    )  # fmt: skip


def test_a_record_that_speaks_against_the_order_is_noticed():
    training = {"direction": "forward+backward"}
    right = [made("triton", 0.156), made("sdpa_cudnn", 0.167), made("sdpa_flash", 0.268)]
    assert contradictions(right) == []
    assert len(contradictions([made("triton", 0.268), made("sdpa_cudnn", 0.167)])) == 1
    assert contradictions([made("triton", 0.727, **training), made("sdpa_cudnn", 0.551, **training)]) == []
    assert len(contradictions([made("triton", 0.4, **training), made("sdpa_cudnn", 0.551, **training)])) == 1
    assert contradictions([made("triton", 0.268, "some CPU"), made("sdpa_cudnn", 0.167, "some CPU")]) == []
    assert contradictions([made("triton", 0.268), made("sdpa_ideal", 0.1, ideal=True)]) == []


@pytest.mark.parametrize(
    "op, shape, letters",
    [
        ("temporal", "B=2 T=16 S=196 H=12 D=64", {"temporal_heads": 12}),
        ("dot_product", "B=2 T=16 S=196 H=12 D=64 softcap=50", {"temporal_heads": 6, "uses": ("softcap",)}),
        ("spatial", "B=2 T=16 S=196 H=12 D=64", {"temporal_heads": 0}),
        ("joint", "B=2 N=3136 H=12 D=64", {"keys": 3136}),
        ("tubelet", "B=2 32x224x224 tubelet=2x16x16 E=768", {"shape": (2, 3, 32, 224, 224)}),
    ],
)
def test_records_of_every_op_on_a_cpu_are_held_against_it(op, shape, letters):
    """The peers of the bench count where a backend offers them, and only if the order has that backend."""
    cpu, of = "AMD EPYC AVX512 bf16 2 threads", {"op": op, "shape": shape}
    call = recorded_call(made("cpu", 1.0, cpu, **of))
    assert call is not None and (call.op, call.device, call.isa) == (PACKAGES[op], "cpu", "avx512_bf16")
    assert {name: getattr(call, name) for name in letters} == letters
    assert contradictions([made("cpu", 1.0, cpu, **of), made("torch", 2.0, cpu, **of)]) == []
    assert len(contradictions([made("cpu", 2.0, cpu, **of), made("torch", 1.0, cpu, **of)])) == 1
    assert contradictions([made("torch", 2.0, cpu, **of), made("sdpa", 1.0, cpu, **of)]) == []


def test_the_order_agrees_with_the_records():
    files = sorted((Path(__file__).resolve().parent.parent / "bench" / "results").glob("*.jsonl"))
    assert files
    for file in files:
        complaints = contradictions(read(file))
        assert not complaints, "order.py against " + file.name + "\n" + "\n".join(complaints)
