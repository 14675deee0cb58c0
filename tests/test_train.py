"""Training: Scenic's schedule, both optimizers against their formulas, and runs that are killed and go on exactly."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vivit import checkpoint, recipe
from vivit.data import Sample
from vivit.evaluate import evaluate
from vivit.train import Interrupted, Run, TrainingError, learning_rate, make_optimizer

ROOT = Path(__file__).resolve().parent.parent
TINY = """
epochs = 3
batch = 4
threads = 1
seed = 7
checkpoint_every = 2
label_smoothing = 0.1
[model]
attention = "factorized_encoder"
frames = 4
height = 16
width = 16
tubelet = [2, 8, 8]
embedding = 16
depth = 2
heads = 2
mlp = 32
temporal_depth = 1
classes = 2
dropout = 0.1
drop_path = 0.2
[data]
workers = 0
[optimizer]
name = "adamw"
lr = 1e-2
warmup_epochs = 0.5
"""


class Noise:
    """Clips that are bright or dark, a function of the key; as slow as `delay` asks."""

    classes = ("dark", "bright")

    def __init__(self, count=20, delay=0.0):
        self.count, self.delay = count, delay

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        epoch, index = key
        time.sleep(self.delay)
        rng = np.random.default_rng((99 if epoch is None else epoch, index))
        label = int(rng.integers(2))
        clip = rng.integers(100 * label, 100 * label + 156, (1, 4, 16, 16, 3), dtype=np.uint8)
        return Sample(torch.from_numpy(clip), label, [])


def config(**changes):
    values = recipe.toml().loads(TINY)
    for key, value in changes.items():
        table, _, name = key.rpartition("__")
        (values[table] if table else values)[name] = value
    return recipe.parse(values, "tiny")


def losses(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in records if "loss" in r]


def test_schedule_is_scenics():
    stored = np.load(ROOT / "tests" / "fixtures" / "scenic_misc.npz")
    base, warmup, total = stored["lr/meta"].tolist()
    # scenic evaluates it in float32
    mine = [learning_rate(int(s), base, int(warmup), int(total)) for s in stored["lr/steps"] if s < total]
    theirs = [v for s, v in zip(stored["lr/steps"], stored["lr/values"], strict=True) if s < total]
    eps = torch.finfo(torch.float32).eps
    assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) <= 8 * eps * base


def test_heavy_ball_and_clipping(tmp_path):
    run = Run(config(optimizer__name="sgd", optimizer__lr=0.1, optimizer__clip_norm=0.01), Noise(), tmp_path)
    p = run.model.head.bias
    assert isinstance(run.optimizer, torch.optim.SGD)
    x = torch.stack([Noise()[0, i].video[0] for i in range(4)])
    velocity, before = torch.zeros_like(p), p.detach().clone()
    for _ in range(3):
        run.step += 1
        _, rate, norm = run.train_step(x, torch.tensor([0, 1, 1, 1]))
        clipped = torch.sqrt(sum((q.grad**2).sum() for q in run.model.parameters() if q.grad is not None))
        assert norm > 0.01 >= clipped
        velocity = 0.9 * velocity + p.grad  # m = 0.9 m + g; w -= lr m
        before = before - rate * velocity
        assert torch.equal(p.detach(), before) or float((p.detach() - before).abs().max()) < torch.finfo(p.dtype).eps


def test_adamw_decays_matrices_only(tmp_path):
    run = Run(config(optimizer__weight_decay=0.1), Noise(), tmp_path)
    decayed = {id(p) for g in run.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    names = {name for name, p in run.model.named_parameters() if id(p) in decayed}
    assert "tubelet_weight" in names and "head.weight" in names and "blocks.0.attentions.0.qkv.weight" in names
    assert not {n for n in names if "bias" in n or "norm" in n or "position" in n or "class_token" in n}
    assert len(make_optimizer(run.model, run.config.optimizer).param_groups) == 2


def test_a_run_learns_logs_and_exports(tmp_path):
    from vivit import weights

    run = Run(config(epochs=6), Noise(40), tmp_path)
    result = run.fit(Noise(16), quiet=True)
    assert result["val_top1"] > 0.9 and result["val_clips"] == 16
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"step", "epoch", "loss", "lr", "grad_norm", "clips_per_s"} <= records[0].keys()
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 61))
    assert sum("val_top1" in r for r in records) == 6
    loaded = weights.load(tmp_path / "model.safetensors")
    found = evaluate(loaded, Noise(16), 5, torch.device("cpu"))
    assert found.numbers()["val_top1"] == result["val_top1"] and int(found.confusion.sum()) == 16
    assert "bright" in found.table()


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_resume_is_exact(tmp_path, stop):
    """The signal arrives during a step: the step ends, is saved, and a second process would see the rest."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    Run(config(), Noise(), whole).fit(quiet=True)

    sent = []  # a second signal would stop at once

    class Interrupting(Noise):
        def __getitem__(self, key):
            if run.step + 1 == stop and not sent:
                sent.append(key)
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(key)

    run = Run(config(), Interrupting(), parts)
    with pytest.raises(Interrupted) as stopped:
        run.fit(quiet=True)
    assert stopped.value.code == 128 + signal.SIGTERM and len(losses(parts)) == stop
    torch.manual_seed(999)  # what a new process has is not what the old one had
    resumed = Run(config(), Noise(), parts, resume=True)
    assert resumed.step == stop
    resumed.fit(quiet=True)
    assert losses(parts) == losses(whole)
    assert all(
        torch.equal(a, b) for a, b in zip(*(checkpoint_of(p)["model"].values() for p in (whole, parts)), strict=True)
    )


def checkpoint_of(folder):
    return checkpoint.load(folder / "checkpoint.pt")


CHILD = """
import sys, pathlib
sys.path[:0] = {paths!r}
from test_train import Noise, Run, config
Run(config(), Noise(delay=0.004), pathlib.Path(sys.argv[1]), resume=True).fit(quiet=True)
"""


def test_sigkill_and_resume_give_the_same_curve(tmp_path):
    """Killed again and again, at whatever it is doing, until it is done: the curve is that of an undisturbed run."""
    Run(config(), Noise(), tmp_path / "whole").fit(quiet=True)
    child = [sys.executable, "-c", CHILD.format(paths=[str(ROOT / d) for d in ("kernels", "", "tests")])]
    folder, kills = tmp_path / "killed", 0
    for wanted in (3, 9, 99):  # killed as soon as the log has this many lines
        process = subprocess.Popen([*child, str(folder)])
        log = folder / "log.jsonl"
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_text().count("\n") >= wanted:
                process.kill()
                kills += 1
                break
            time.sleep(0.002)
        process.wait()
    assert process.returncode == 0 and kills == 2
    assert losses(folder) == losses(tmp_path / "whole")


def test_half_a_line_in_the_log_is_dropped(tmp_path):
    run = Run(config(), Noise(), tmp_path)
    run.fit(quiet=True)
    before = losses(tmp_path)
    run.log.file.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 16, "lo')
    again = Run(config(), Noise(), tmp_path, resume=True)
    assert again.step == 15 and losses(tmp_path) == before


def test_what_cannot_be_resumed_is_refused(tmp_path):
    Run(config(), Noise(), tmp_path).fit(quiet=True)
    with pytest.raises(TrainingError, match="holds a run already"):
        Run(config(), Noise(), tmp_path)
    with pytest.raises(TrainingError, match=r"optimizer.lr was 0.01, is 0.5"):
        Run(config(optimizer__lr=0.5), Noise(), tmp_path, resume=True)
    with pytest.raises(TrainingError, match="number of training videos was 20, is 21"):
        Run(config(), Noise(21), tmp_path, resume=True)
    data = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="no checkpoint"):
        Run(config(), Noise(), tmp_path, resume=True)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_no_pickle_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"version": checkpoint.VERSION, "model": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "executed").exists()


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"step": 1}, path)

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        checkpoint.save({"step": 2}, path)
    assert checkpoint.load(path)["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = Run(config(), Noise(), tmp_path)
    with torch.no_grad():
        run.model.head.bias[0] = math.inf
    weights = run.model.tubelet_weight.detach().clone()
    with pytest.raises(TrainingError, match=r"(?s)step 0: the loss is nan at learning rate .*lower optimizer.lr"):
        run.fit(quiet=True)
    assert torch.equal(run.model.tubelet_weight.detach(), weights) and not (tmp_path / "checkpoint.pt").exists()


def test_bf16_autocast_trains(tmp_path):
    result = Run(config(autocast=True, epochs=1), Noise(8), tmp_path).fit(Noise(8), quiet=True)
    assert math.isfinite(result["val_loss"])


def test_workers_do_not_change_the_curve(tmp_path):
    Run(config(epochs=1), Noise(), tmp_path / "a").fit(quiet=True)
    Run(config(epochs=1, data__workers=2), Noise(), tmp_path / "b").fit(quiet=True)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


# ---- configs ----


def test_shipped_configs_are_valid():
    names = [path.stem for path in recipe.CONFIGS.glob("*.toml")]
    assert "demo" in names
    for name in names:
        assert dataclasses.is_dataclass(recipe.load(name))


@pytest.mark.parametrize(
    "change, message",
    [
        ("optimiser.lr=1", "unknown key 'optimiser'; did you mean 'optimizer'"),
        ("optimizer.larning_rate=1", "unknown key 'larning_rate'"),
        ("optimizer.weight_deca=1", "did you mean 'weight_decay'"),
        ("optimizer.name=adam", "optimizer.name='adam' is not known; did you mean 'adamw'"),
        ("optimizer.lr=-1", "optimizer.lr=-1 must be positive"),
        ("epochs=1.5", "epochs=1.5 must be a whole number"),
        ("autocast=1", "autocast=1 must be true or false"),
        ("model.poool=mean", "unknown key 'poool'; did you mean 'pool'"),
        ("model.pool=men", "pool='men' is not known; did you mean 'mean'"),
        ("model.classes=[2, 3]", "model.classes=.* must be one number"),
        ("data.decoder=pyva", "did you mean 'pyav'"),
        ("data.views=[4, 2]", "crops is 1 or 3"),
        ("batch=0", "batch=0 must be at least 1"),
        ("model=3", "model must be a table"),
        ("nonsense", "key=value"),
    ],
)
def test_a_wrong_key_or_value_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        recipe.load("demo", [change])


def test_configs_are_found_by_name_or_file(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'demo'"):
        recipe.load("dmeo")
    file = tmp_path / "mine.toml"
    file.write_text(TINY)
    assert recipe.load(str(file)).model.depth == 2
    file.write_text("epochs = [")
    with pytest.raises(ValueError, match=r"mine\.toml: not a TOML file"):
        recipe.load(str(file))
    file.write_text('[model]\npreset = "B/16x2"\nattention = "factorized_encoder"\n')
    assert recipe.load(str(file)).model.temporal_depth == 4
