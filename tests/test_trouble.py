"""Long runs in trouble: numbers that are none, memory that runs out, workers that die, disks that are full."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import types

import pytest
import torch
from test_train import Noise, config

from vivit import checkpoint, trouble
from vivit.log import Log
from vivit.train import Run, TrainingError, write_json


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---- not finite ----


def spoil(run: Run, monkeypatch, steps: set[int], how=lambda run: math.nan) -> None:
    backward = run._backward
    monkeypatch.setattr(run, "_backward", lambda *a: (backward(*a), how(run))[1] if run.step in steps else backward(*a))


def test_a_bad_step_is_left_out_and_named(tmp_path, monkeypatch):
    run = Run(config(epochs=1), Noise(), tmp_path)
    spoil(run, monkeypatch, {1, 2})
    updates = []
    step = run.optimizer.step
    monkeypatch.setattr(run.optimizer, "step", lambda *a, **k: (updates.append(run.step), step(*a, **k))[1])
    run.fit(quiet=True)
    assert updates == [0, 3, 4] and run.step == 5
    bad = [r for r in records(tmp_path) if "skipped" in r]
    assert [r["step"] for r in bad] == [2, 3] and "the loss is nan" in bad[0]["skipped"]
    assert all(len(r["clips"]) == 4 and r["clips"][0].startswith("clip ") for r in bad)


def test_a_gradient_that_is_not_finite_is_left_out(tmp_path, monkeypatch):
    def infinite(run: Run) -> float:
        run.model.head.weight.grad[0, 0] = math.inf
        return 1.0

    run = Run(config(epochs=1), Noise(), tmp_path)
    spoil(run, monkeypatch, {1}, infinite)
    run.fit(quiet=True)
    assert ["the gradient norm is inf" in r["skipped"] for r in records(tmp_path) if "skipped" in r] == [True]
    assert all(p.isfinite().all() for p in run.model.parameters())


@pytest.mark.parametrize("most", [0, 2])
def test_too_many_in_a_row_end_the_run_with_a_checkpoint(tmp_path, monkeypatch, most):
    run = Run(config(epochs=1, skip_not_finite=most), Noise(), tmp_path)
    spoil(run, monkeypatch, set(range(1, 9)))
    with pytest.raises(TrainingError, match=rf"(?s)step {1 + most}: the loss is nan .*clips: clip .*-> a lower"):
        run.fit(quiet=True)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 1 + most
    again = Run(
        config(epochs=1, skip_not_finite=9), Noise(), tmp_path, resume=True
    )  # the bound is no part of the curve
    again.fit(quiet=True)
    assert again.step == 5 and all(p.isfinite().all() for p in again.model.parameters())


def test_bad_steps_with_good_ones_between_do_not_add_up():
    skips = trouble.Skips(1)
    for _ in range(3):
        skips.bad(trouble.NotFinite("x"), ["a"])
        skips.good()
    skips.bad(trouble.NotFinite("x"), ["a"])
    with pytest.raises(TrainingError, match="2 steps in a row, skip_not_finite = 1 may be"):
        skips.bad(trouble.NotFinite("x"), ["a"])


def test_clips_are_named_by_their_files():
    dataset = types.SimpleNamespace(items=[("a.mp4", 0), ("b.mp4", 1)])
    assert trouble.names(dataset, [(0, 1), (0, 0)]) == ["b.mp4", "a.mp4"]
    assert trouble.listed([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


# ---- memory, workers ----


@pytest.mark.parametrize(
    "level, accumulate, advice",
    [
        ("fast", 1, "-> memory = 'balanced'\n  -> accumulate = 2"),
        ("small", 4, "-> memory = 'smallest'\n  -> smaller clips"),
        ("smallest", 2, "memory = 'smallest'\n  -> accumulate = 4"),
    ],
)
def test_out_of_memory_names_the_next_level(level, accumulate, advice):
    with (
        pytest.raises(TrainingError, match="step 7: out of memory; batch = 4 in ") as caught,
        trouble.explained(config(memory=level, accumulate=accumulate), 7, []),
    ):
        torch.empty(1 << 55)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    "level, offload, error, advice",
    [
        ("smallest", False, torch.OutOfMemoryError, ["offload = true (the inputs", "accumulate = 2", "smaller clips"]),
        ("smallest", True, torch.OutOfMemoryError, ["accumulate = 2", "smaller clips"]),
        ("smallest", False, MemoryError, ["accumulate = 2", "smaller clips"]),  # the host's, where inputs would wait
        ("small", False, torch.OutOfMemoryError, ["memory = 'smallest'", "accumulate = 2", "smaller clips"]),
    ],
)
def test_out_of_memory_of_a_device_names_the_host(level, offload, error, advice):
    values = config(memory=level, offload=offload)
    with pytest.raises(TrainingError) as caught, trouble.explained(values, 7, []):
        raise error("none left")
    found, *remedies = str(caught.value).split("\n  -> ")
    assert found.endswith(f"memory = {level!r}" + ", offload = true" * offload)
    assert len(remedies) == len(advice) and all(map(str.startswith, remedies, advice)), remedies


def test_a_wide_model_does_not_wait_for_the_bus():
    for E, waits in ((2048, False), (768, True)):
        values = config(memory="smallest", model__embedding=E)
        with pytest.raises(TrainingError) as caught, trouble.explained(values, 7, []):
            raise torch.OutOfMemoryError("none left")
        assert ("for the bus" in str(caught.value)) == waits and "offload = true (" in str(caught.value)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), trouble.explained(config(), 0, []):
        torch.ones(2, 3) @ torch.ones(2, 3)


class Dies(Noise):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def __getitem__(self, key):
        if torch.utils.data.get_worker_info() is not None:
            self.how()
        return super().__getitem__(key)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def leaves():
    os._exit(3)


@pytest.mark.parametrize("how", [killed, leaves])
def test_a_dead_worker_is_named(tmp_path, how):
    said = "was killed|ended unexpectedly"  # which of the two PyTorch notices first is a matter of time
    run = Run(config(data__workers=1), Dies(how), tmp_path)
    with pytest.raises(TrainingError, match=rf"(?s)step 0: process \d+ of the workers .*({said}).*reading, .*clip \d+"):
        run.fit(quiet=True)


@pytest.mark.parametrize(
    "text, said",
    [
        ("DataLoader worker (pid 12) is killed by signal: Killed. ", r"process 12 .* was killed \(Killed: often"),
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", r"process 12, 13 .* ended unexpectedly"),
    ],
)
def test_the_worker_that_died_is_named(text, said):
    with pytest.raises(TrainingError, match=f"(?s){said}.*a\\.mp4"), trouble.explained(config(), 0, ["a.mp4"]):
        raise RuntimeError(text)


# ---- disks ----


@pytest.fixture
def full_disk():
    """From `full_disk(bytes)` on, no file of this process grows beyond: what was written stays half-written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, full_disk):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"step": 1}, path)
    full_disk(20_000)
    with pytest.raises(
        OSError, match=r"(?s)checkpoint.pt cannot be written: .*MiB free; the one before is whole\n  ->"
    ):
        checkpoint.save({"step": 2, "model": torch.zeros(100_000)}, path)
    assert checkpoint.load(path)["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_leaves_no_half_json(tmp_path, full_disk):
    full_disk(1000)
    with pytest.raises(OSError, match=r"run\.json cannot be written: File too large"):
        write_json(tmp_path / "run.json", ["x"] * 1000)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_the_log_with_words_and_what_is_there_is_read_again(tmp_path, full_disk):
    log = Log(tmp_path / "log.jsonl", 0)
    full_disk(1000)
    with pytest.raises(OSError, match=r"log\.jsonl cannot be written: File too large"):
        for step in range(100):
            log.write(step=step, loss=0.25)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    Log(tmp_path / "log.jsonl", 100).write(step=101, loss=1.0)
    assert [r["step"] for r in records(tmp_path)][-2:] == [len(records(tmp_path)) - 2, 101]
