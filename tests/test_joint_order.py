"""Which backend of joint_attention comes first: the table in order.py, by hand and against every record of a GPU."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from bench.compare import groups
from bench.record import Record, is_stale, read
from vivit_kernels import _environment
from vivit_kernels._dispatch import Call
from vivit_kernels.joint_attention import order
from vivit_kernels.joint_attention.support import SUPPORT

PLAIN = Call("joint_attention", (2, 3136, 12, 64), torch.bfloat16, "cuda", True, (), 90)


def first(call: Call) -> str:
    """The backend that runs where nothing of others is installed but PyTorch."""
    return next(name for name in order.order(call) if name in SUPPORT and not SUPPORT[name](call))


def test_order_on_a_cpu_is_the_old_one():
    assert order.order(replace(PLAIN, device="cpu", arch=0)) == _environment.BACKENDS


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


def test_every_order_names_every_backend_once_and_rungs_say_why():
    for call in (PLAIN, replace(PLAIN, needs_grad=False)):
        assert sorted(order.order(call)) == sorted(_environment.NAMES)
    for rung in order.RUNGS:
        assert rung.backend in SUPPORT and "20" in rung.reason and "us" in rung.reason


# Peers of the benchmark that a backend of joint_attention runs.
OFFERED = {"sdpa": "sdpa", "sdpa_cudnn": "sdpa", "sdpa_flash": "sdpa", "xformers": "xformers"}
OFFERED |= {f"flash_attn_{version}": "flash_attn" for version in (2, 3, 4)} | {
    name: name for name in _environment.BACKENDS
}
ARCHES = {"A100": 80, "H100": 90, "H200": 90, "B200": 100}
NOTICEABLE = 1.05  # times as long: less is not worth a rung


def recorded_call(record: Record) -> Call | None:
    """What a user would have called in this record, if it was on a GPU that this file knows."""
    arch = next((arch for name, arch in ARCHES.items() if name in record.machine.get("device", "")), 0)
    if not arch or record.op != "joint" or record.kind != "op" or record.direction == "backward":
        return None
    sizes = dict(part.split("=") for part in record.shape.split())
    shape = tuple(int(sizes[name]) for name in "BNHD")
    uses = ("softcap",) if "softcap" in sizes else ()
    dtype = getattr(torch, record.dtype)
    return Call("joint_attention", shape, dtype, "cuda", record.direction == "forward+backward", uses, arch)


def contradictions(records: Iterable[Record]) -> list[str]:
    """Measurements in which a backend is noticeably faster than the one that the order puts before it."""
    found = []
    for group in groups(records):
        call = recorded_call(group.first)
        if call is None:
            continue
        times: dict[str, float] = {}
        for record in group.timed:
            name = OFFERED.get(record.backend)
            if name and not record.ideal and not is_stale(record):
                times[name] = min(record.ms["median"], times.get(name, record.ms["median"]))
        tried = [name for name in order.order(call) if name in times]
        if tried and times[tried[0]] > NOTICEABLE * min(times.values()):
            found.append(f"{group.first.case} {call}: {tried[0]} is tried first; {times}")
    return found


def made(backend: str, ms: float, device: str = "NVIDIA H200", direction: str = "forward", **changes) -> Record:
    return Record(
        run="r", date="2026-11-26T00:00:00Z", kind="op", op="joint", case="vivit_b_16x2.b2",
        shape="B=2 N=3136 H=12 D=64", dtype="bfloat16", direction=direction, backend=backend, ours=False, status="ok",
        ms={"median": ms, "p20": ms, "p80": ms, "n": 9}, machine={"device": device}, **changes,
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


def test_the_order_agrees_with_the_records():
    files = sorted((Path(__file__).resolve().parent.parent / "bench" / "results").glob("*.jsonl"))
    assert files
    for file in files:
        complaints = contradictions(read(file))
        assert not complaints, "order.py against " + file.name + "\n" + "\n".join(complaints)
