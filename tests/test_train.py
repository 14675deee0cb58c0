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
from parity import F32_BUDGET, assert_same

from vivit import checkpoint, recipe
from vivit.annotations import Heads
from vivit.data import Batch, Order, Sample, collate, evaluation_batches, training_batches
from vivit.evaluate import Result, evaluate
from vivit.optimizers import make_optimizer
from vivit.train import Interrupted, Run, TrainingError, learning_rate
from vivit.trouble import LoaderError

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
        (values.setdefault(table, {}) if table else values)[name] = value
    return recipe.parse(values, "tiny")


# everything that a step draws or carries over to the next one
EVERYTHING = {"accumulate": 2, "ema": 0.8, "augment__mixup": 0.3, "optimizer__weight_decay": 0.1}
NARROW = {**EVERYTHING, "optimizer__parameters": "bfloat16", "init__layer_decay": 0.7, "init__freeze": ["tubelets"]}


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


@pytest.mark.parametrize("stop, changes", [(1, {}), (4, EVERYTHING), (7, EVERYTHING), (4, NARROW)])
def test_resume_is_exact(tmp_path, stop, changes):
    """The signal arrives during a step: the step ends, is saved, and a second process would see the rest."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    Run(config(**changes), Noise(), whole).fit(quiet=True)

    sent = []  # a second signal would stop at once

    class Interrupting(Noise):
        def __getitem__(self, key):
            if run.step + 1 == stop and not sent:
                sent.append(key)
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(key)

    run = Run(config(**changes), Interrupting(), parts)
    with pytest.raises(Interrupted) as stopped:
        run.fit(quiet=True)
    assert stopped.value.code == 128 + signal.SIGTERM and len(losses(parts)) == stop
    torch.manual_seed(999)  # what a new process has is not what the old one had
    resumed = Run(config(**changes), Noise(), parts, resume=True)
    assert resumed.step == stop
    resumed.fit(quiet=True)
    assert losses(parts) == losses(whole)
    kept = "average" if changes else "model"
    assert all(
        torch.equal(a, b) for a, b in zip(*(checkpoint_of(p)[kept].values() for p in (whole, parts)), strict=True)
    )


def checkpoint_of(folder):
    return checkpoint.load(folder / "checkpoint.pt")


CHILD = """
import sys, pathlib
sys.path[:0] = {paths!r}
from test_train import Noise, Run, config
Run(config(**{changes!r}), Noise(delay=0.004), pathlib.Path(sys.argv[1]), resume=True).fit(quiet=True)
"""


@pytest.mark.parametrize("changes", [EVERYTHING, pytest.param(NARROW, marks=pytest.mark.full)], ids=["", "bfloat16"])
def test_sigkill_and_resume_give_the_same_curve(tmp_path, changes):
    """Killed again and again, at whatever it is doing, until it is done: the curve is that of an undisturbed run."""
    Run(config(**changes), Noise(), tmp_path / "whole").fit(quiet=True)
    paths = [str(ROOT / d) for d in ("kernels", "", "tests")]
    child = [sys.executable, "-c", CHILD.format(paths=paths, changes=changes)]
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


def test_weights_that_are_not_finite_stop_the_run(tmp_path):
    run = Run(config(), Noise(), tmp_path)
    with torch.no_grad():
        run.model.head.bias[0] = math.inf
    weights = run.model.tubelet_weight.detach().clone()
    with pytest.raises(TrainingError, match=r"(?s)step 3: the loss is nan at learning rate .*lower optimizer.lr"):
        run.fit(quiet=True)
    assert torch.equal(run.model.tubelet_weight.detach(), weights)


def test_memory_levels_train_and_may_change_on_resume(tmp_path):
    Run(config(epochs=1, memory="smallest"), Noise(), tmp_path / "a").fit(quiet=True)
    Run(config(epochs=1, memory="balanced"), Noise(), tmp_path / "b").fit(quiet=True)
    for one, other in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True):
        assert_same(torch.tensor(one), torch.tensor(other), F32_BUDGET)
    run = Run(config(epochs=1, memory="small"), Noise(), tmp_path / "a", resume=True)
    assert {block.memory for block in run.model.blocks} == {"small"}
    with pytest.raises(ValueError, match="memory='tiny' is not known"):
        config(memory="tiny")


def test_bf16_autocast_trains(tmp_path):
    result = Run(config(autocast=True, epochs=1), Noise(8), tmp_path).fit(Noise(8), quiet=True)
    assert math.isfinite(result["val_loss"])


def test_workers_do_not_change_the_curve(tmp_path):
    Run(config(epochs=1), Noise(), tmp_path / "a").fit(quiet=True)
    Run(config(epochs=1, data__workers=2), Noise(), tmp_path / "b").fit(quiet=True)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


class Hanging(Noise):
    """A clip of the third step takes for ever in a worker, as a decoder may."""

    def __getitem__(self, key):
        if key in THIRD and torch.utils.data.get_worker_info() is not None:
            time.sleep(600)
        return super().__getitem__(key)


THIRD = list(Order(20, 4, 3, 7))[2]


def test_a_worker_that_hangs_is_one_message_and_the_run_goes_on(tmp_path):
    Run(config(), Noise(), tmp_path / "whole").fit(quiet=True)
    run = Run(config(data__workers=1, data__timeout=2.0), Hanging(), tmp_path / "a")
    with pytest.raises(LoaderError, match=r"(?s)a loader process took longer than data\.timeout.*--resume goes on"):
        run.fit(quiet=True)
    again = Run(config(), Noise(), tmp_path / "a", resume=True)
    assert again.step == 2
    again.fit(quiet=True)
    assert losses(tmp_path / "a") == losses(tmp_path / "whole")


class Bus:
    """Notes what tensors are moved to the model's device, and how."""

    def __init__(self, monkeypatch):
        self.moved = []
        real = torch.Tensor.to

        def to(x, *args, **keywords):
            if keywords.get("non_blocking"):
                self.moved.append((x.dtype, x.dim()))
            return real(x, *args, **keywords)

        monkeypatch.setattr(torch.Tensor, "to", to)


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_bytes_cross_the_bus_and_floats_do_not(tmp_path, monkeypatch, mixup):
    """In training and in evaluation, with mixup, which makes floats, too; from pinned memory where there is a GPU."""
    bus = Bus(monkeypatch)
    run = Run(config(epochs=1, augment__mixup=mixup), Noise(), tmp_path)
    run.fit(Noise(8), quiet=True)
    videos = [dtype for dtype, dims in bus.moved if dims > 2]
    assert len(videos) == 5 + 2 and set(videos) == {torch.uint8}
    assert {dtype for dtype, dims in bus.moved if dims <= 2} == {torch.int64}  # labels


@pytest.mark.parametrize("gpu", [False, True])
def test_batches_are_pinned_where_there_is_a_gpu(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for batches in (training_batches(Noise(), Order(20, 4, 1, 0), 0), evaluation_batches(Noise(), 4, 0)):
        assert batches.pin_memory == gpu
    pinned = torch.utils.data._utils.pin_memory.pin_memory
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *_: x.clone())
    batch = pinned(collate([Noise()[0, 0], Sample(None, 1, [("a.mp4", "empty")])]))
    assert isinstance(batch, Batch) and batch.video.dtype == torch.uint8 and batch.problems == [("a.mp4", "empty")]


# ---- what a step may do besides ----


def steps(folder, count=3, dataset=None, **changes):
    """A run without dropout, and `count` steps of it on a batch of 5."""
    dataset = dataset or Noise()
    run = Run(config(model__dropout=0.0, model__drop_path=0.0, batch=5, **changes), dataset, folder)
    torch.nn.init.normal_(run.model.head.weight, std=0.1)
    samples = [dataset[0, i] for i in range(5)]
    video, label = torch.stack([s.video[0] for s in samples]), torch.tensor([s.label for s in samples])
    told = []
    for _ in range(count):
        run.step += 1
        told.append(run.train_step(video, label))
    return run, told, (video, label)


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_parts_of_a_batch_add_up_to_its_gradient(tmp_path, mixup):
    """5 clips in 2 parts of 3 and 2: the gradient of their mean, to float32's rounding of a sum over the batch."""
    changes = {"augment__mixup": mixup, "optimizer__name": "sgd", "optimizer__lr": 1e-3}
    whole, told, _ = steps(tmp_path / "a", 1, **changes)
    parts, told_in_parts, _ = steps(tmp_path / "b", 1, accumulate=2, **changes)
    assert abs(told[0][0] - told_in_parts[0][0]) <= 8 * torch.finfo(torch.float32).eps * told[0][0]
    for (name, p), q in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        scale = max(p.grad.abs().max().item(), 1e-3 * told[0][2])
        assert (p.grad - q.grad).abs().max() <= 1e3 * torch.finfo(torch.float32).eps * scale, name


def test_mixup_mixes_clips_and_labels_of_the_step(tmp_path):
    from vivit.augment import mixup_weight

    run, told, (video, label) = steps(tmp_path, 1, augment__mixup=0.5, optimizer__lr=1e-9, optimizer__weight_decay=0.0)
    weight = mixup_weight(0.5, run.config.seed, 1)
    clips = video.float() / 127.5 - 1
    clips = weight * clips + (1 - weight) * clips.flip(0)
    rows = torch.eye(2)[label]
    rows = weight * rows + (1 - weight) * rows.flip(0)
    rows = rows * 0.9 + 0.1 / 2  # label smoothing comes after mixup
    expected = -(rows * run.model(clips, "BFYXC").log_softmax(-1)).sum(-1).mean()
    assert abs(told[0][0] - expected.item()) <= 100 * torch.finfo(torch.float32).eps * expected.item()


def test_the_mean_of_the_weights_is_what_is_evaluated_and_exported(tmp_path):
    from vivit import weights

    run, _, _ = steps(tmp_path, 0, ema=0.75)
    expected = {name: value.clone() for name, value in run.average.values.items()}
    video, label = torch.stack([Noise()[0, i].video[0] for i in range(5)]), torch.tensor([0, 1, 1, 0, 1])
    for _ in range(3):
        run.step += 1
        run.train_step(video, label)
        for name, p in run.model.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * p.detach()
    eps = torch.finfo(torch.float32).eps
    for name, value in run.average.values.items():
        assert (value - expected[name]).abs().max() <= 8 * eps * expected[name].abs().max().clamp(min=eps)
    last = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.step = run.total
    run.fit(Noise(4), quiet=True)
    exported = weights.load(tmp_path / "model.safetensors")
    for name, p in exported.named_parameters():
        assert torch.equal(p.detach(), run.average.values[name])
    assert all(torch.equal(p.detach(), last[name]) for name, p in run.model.named_parameters())
    assert any(not torch.equal(last[name], value) for name, value in run.average.values.items())


class Pairs(Noise):
    """Two heads: nouns dark and bright, verbs by the same brightness, so that both can be learnt."""

    classes = Heads(("dark", "bright", "never"), ("dim", "shine"))

    def __getitem__(self, key):
        sample = super().__getitem__(key)
        return sample._replace(label=(sample.label, sample.label))


@pytest.mark.parametrize("changes", [{}, {"augment__mixup": 0.2, "accumulate": 2}])
def test_two_heads_are_trained_and_judged_as_actions(tmp_path, changes):
    from vivit import weights

    run = Run(config(epochs=6, model__classes=[3, 2], **changes), Pairs(40), tmp_path)
    result = run.fit(Pairs(16), quiet=True)
    assert {"val_top1", "val_top5", "val_noun_top1", "val_noun_top5", "val_verb_top1"} <= result.keys()
    assert result["val_top1"] > 0.9 and result["val_top1"] <= min(result["val_noun_top1"], result["val_verb_top1"])
    assert json.loads((tmp_path / "run.json").read_text())["classes"] == [["dark", "bright", "never"], ["dim", "shine"]]
    found = evaluate(weights.load(tmp_path / "model.safetensors"), Pairs(16), 5, torch.device("cpu"))
    assert found.numbers()["val_top1"] == result["val_top1"]
    assert "action top-1" in found.summary() and "shine" in found.table() and "never" in found.table()


def test_an_action_is_right_when_both_its_parts_are():
    """Scores of pairs are products: a pair is first when both its parts are, and fifth among six in its own order."""
    found = Result.of(Heads(("a", "b", "c"), ("x", "y")))
    nouns = torch.tensor([[5.0, 0, 0], [0, 5, 0], [5, 0, 0], [0, 0, 5], [2, 1.9, 0]])
    verbs = torch.tensor([[4.0, 0], [0, 4], [0, 4], [0, 4], [1, 0]])
    label = torch.tensor([[0, 0], [1, 1], [0, 0], [1, 1], [1, 1]])
    found.add((nouns, verbs), label)
    numbers = found.numbers()
    assert (numbers["val_noun_top1"], numbers["val_verb_top1"], numbers["val_top1"]) == (3 / 5, 3 / 5, 2 / 5)
    order = losses_of_pairs(nouns, verbs)
    right = [int(pair[0] * 2 + pair[1]) for pair in label]
    assert numbers["val_top5"] == sum(r in top[:5] for r, top in zip(right, order, strict=True)) / 5


def losses_of_pairs(nouns, verbs):
    """Pairs from the most to the least probable, by the definition."""
    scores = [
        [p * q for p in torch.softmax(n, 0).tolist() for q in torch.softmax(v, 0).tolist()]
        for n, v in zip(nouns, verbs, strict=True)
    ]
    return [sorted(range(6), key=lambda i: -row[i]) for row in scores]


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Run(config(epochs=1, tensorboard=True), Noise(), tmp_path).fit(Noise(4), quiet=True)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    eps = torch.finfo(torch.float32).eps
    shown = [(e.step, e.value) for e in read.Scalars("loss")]
    logged = [(step, loss) for step, loss, _, _ in losses(tmp_path)]
    assert len(shown) == 5 and "val_top1" in read.Tags()["scalars"]
    assert all(a == c and abs(b - d) <= eps * abs(d) for (a, b), (c, d) in zip(shown, logged, strict=True))


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'(?s)tensorboard = true.*pip install "vivit-kernels\[tensorboard\]"'
    ):
        Run(config(tensorboard=True), Noise(), tmp_path)


# ---- configs ----


def test_shipped_configs_are_valid():
    names = [path.stem for path in recipe.CONFIGS.glob("*.toml")]
    assert "demo" in names
    for name in names:
        assert dataclasses.is_dataclass(recipe.load(name))


@pytest.mark.parametrize(
    "name, epochs, lr, classes, regularisers, views",
    [
        ("kinetics400_B16x2_joint", 30, 0.1, 400, (0.8, (), 0, 0, 0), (4, 3)),
        ("kinetics400_B16x2_factorized_encoder", 30, 0.05, 400, (0.8, (), 0, 0, 0), (4, 3)),
        ("kinetics400_L16x2_factorized_encoder", 30, 0.1, 400, (0.8, (), 0, 0, 0), (4, 3)),
        ("kinetics600_L16x2_factorized_encoder", 30, 0.05, 600, (0.8, (), 0, 0, 0), (4, 3)),
        ("moments_L16x2_factorized_encoder", 10, 0.25, 339, (0.8, (), 0, 0, 0), (4, 3)),
        ("epic_kitchens_L16x2_factorized_encoder", 50, 0.5, (300, 97), (0, (2, 15), 0.2, 0.2, 0.1), (4, 1)),
        ("ssv2_L16x2_factorized_encoder", 35, 0.4, 174, (0, (2, 20), 0.3, 0.3, 0.3), (4, 3)),
    ],
)
def test_recipes_are_the_papers(name, epochs, lr, classes, regularisers, views):
    """Table 7, with Scenic's learning rates where the two differ (section 8 of the specification)."""
    c = recipe.load(name)
    assert (c.epochs, c.optimizer.lr, c.model.classes, c.batch, c.data.views) == (epochs, lr, classes, 64, views)
    found = (c.augment.color_jitter, c.augment.randaugment, c.model.drop_path, c.label_smoothing, c.augment.mixup)
    assert found == regularisers and c.augment.scale_jitter == (0.9, 1.33) and c.data.flip
    assert (c.optimizer.name, c.optimizer.momentum, c.optimizer.weight_decay) == ("sgd", 0.9, 0.0)
    assert (c.optimizer.warmup_epochs, c.optimizer.clip_norm) == (2.5, 1.0)
    assert c.data.stride == (1 if name.startswith(("epic", "ssv2")) else 2)


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
        ("augment.randaugment=2", "augment.randaugment=2 must be a list"),
        ("augment.randaugment=[2]", r"must be \[layers, magnitude\]"),
        ("augment.scale_jitter=[1.3, 0.9]", "scale_jitter=.* must be .lowest, highest. factors"),
        ("augment.color_jiter=0.8", "unknown key 'color_jiter'; did you mean 'color_jitter'"),
        ("augment.color_jitter=8", "augment.color_jitter=8 must be a probability"),
        ("augment.where=gpu", "augment.where='gpu' is not known"),
        ("accumulate=17", "is more parts than a batch of 16 has clips"),
        ("ema=1", r"ema=1 must be in \[0, 1\)"),
        ("init.kind=scenik", "init.kind='scenik' is not known; did you mean 'scenic'"),
        ("init.freeeze=[]", "unknown key 'freeeze'; did you mean 'freeze'"),
        ("init.layer_decay=1.5", r"init.layer_decay=1.5 must be in \(0, 1\]"),
        ("data.format=kinetic", "did you mean 'kinetics'"),
        ("data.resize=scenics", "did you mean 'scenic'"),
        ("data.decoder=pyva", "did you mean 'pyav'"),
        ("data.views=[4, 2]", "crops is 1 or 3"),
        ("batch=0", "batch=0 must be at least 1"),
        ("data.views=[4.5, 3]", r"data.views=\(4.5, 3\) must be a list of 2, each of it a whole number"),
        ("optimizer.betas=[0.9, 1]", r"optimizer.betas=\(0.9, 1\) must be in \[0, 1\), both"),
        ("optimizer.betas=[0.9]", "must be a list of 2, each of it a number"),
        ("optimizer.lr=inf", "optimizer.lr=inf must be a number"),
        ("augment.scale_jitter=[a, b]", "augment.scale_jitter='.a, b.' must be a list, each of it a number"),
        ("device=gpu", "device='gpu' is not known: auto, cpu, cuda"),
        ("model.tubelet=2", "tubelet=2 must be a list of 3, each of it a whole number"),
        ("model.dropout=x", "dropout='x' must be a number"),
        ("model.depth=true", "depth=True must be a positive integer"),
        ("model.classes=[3, 4, 5]", "must be a whole number or a list of 2"),
        ("model.temporal_heads=0", "temporal_heads=0 must be a positive integer, or left out"),
        ("model.temporal_depth=-1", "temporal_depth=-1 must be 0 or more layers"),
        ("model.pixel_std=0", "pixel_std=0 must be positive"),
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
