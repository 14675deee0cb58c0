"""Recipes side by side: small sets of a film, an image ViT of its frames, runs by seeds that go on, table and plot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import Noise, config

from vivit import ViViT, ViViTConfig, ablation, demo, film, recipe, trials
from vivit import weights as W
from vivit.__main__ import main
from vivit.trials import Trial

ROOT = Path(__file__).resolve().parent.parent
TINY = ["embedding=16", "heads=2", "mlp=16", "depth=1", "temporal_depth=1"]
SETS = [word for change in [*(f"model.{x}" for x in TINY), "batch=4"] for word in ("--set", change)]


@pytest.fixture
def small_film(monkeypatch):
    """A film of noise, and as few clips of it as there can be."""
    frames = np.random.default_rng(0).integers(0, 256, (660, 72, 72, 3), dtype=np.uint8)
    made = film.Film(Path("noise.mp4"), frames, 2, 12.0, "noise", "nobody", (0.0, 110.0))
    monkeypatch.setattr(film, "bunny", lambda say, quiet=False: made)
    few = {"train": 8, "val": 4, "test": 4}
    for module, name, value in (
        (ablation, "FEW", few), (ablation, "FRAMES", 16), (ablation, "FRAME_EPOCHS", 1), (ablation, "EPOCHS", 1),
        (demo, "CLIPS", few), (demo, "FEW", 8), (demo, "FEW_EPOCHS", 5),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    return made


def test_a_small_set_is_the_same_clips_every_epoch(small_film):
    """But for crop and mirror; half are shuffled; another seed has others."""
    size = small_film.frames.shape[1:3]  # nothing to crop
    of = [film.FilmOrder(small_film, "train", 6, 8, 2, size, False, seed, few=True) for seed in (0, 1)]
    first, later = ([of[0][epoch, i] for i in range(6)] for epoch in (0, 5))
    for a, b in zip(first, later, strict=True):
        assert a.label == b.label and torch.equal(a.video, b.video)
    assert [sample.label for sample in first] == [0, 1] * 3
    assert not any(torch.equal(of[1][0, i].video, first[i].video) for i in range(6))
    anew = film.FilmOrder(small_film, "train", 6, 8, 2, size, False, 0)
    assert not torch.equal(anew[0, 0].video, anew[5, 0].video)


def test_frames_know_their_segment(small_film):
    frames = film.FilmFrames(small_film, 20, (72, 72), seed=0)
    spans = small_film.segments()["train"]
    for i in range(20):
        sample = frames[0, i]
        first, end = spans[sample.label]
        assert sample.video.shape == (1, 1, 72, 72, 3)
        assert (small_film.frames[first:end] == sample.video.numpy()[0]).all((1, 2, 3)).sum() == 1


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_model_of_one_frame_is_an_image_vit(pool):
    torch.manual_seed(0)
    config = ViViTConfig(
        frames=1, height=16, width=16, tubelet=(1, 8, 8), embedding=24, depth=2, heads=3, mlp=40, classes=5, pool=pool
    )
    model, other = ViViT(config).double(), ViViT(config).double()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    assert W.init_from_image_vit(other, W.image_vit_of(model)) == ["head.bias", "head.weight"]
    with torch.no_grad():
        other.head.load_state_dict(model.head.state_dict())
        video = torch.randint(0, 256, (2, 3, 1, 16, 16), dtype=torch.uint8)
        assert torch.equal(model(video), other(video))
    with pytest.raises(ValueError, match=r"image_vit_of: .* over 2 times of tubelets \(2, 8, 8\) is no image ViT"):
        W.image_vit_of(ViViT(dataclasses.replace(config, frames=4, tubelet=(2, 8, 8))))


def parts_of(config):
    return {"train": Noise(), "val": Noise(8), "test": Noise(8)}


def two():
    return [
        Trial("a", "plain", config(epochs=1)),
        Trial("b", "smooth", config(epochs=1, label_smoothing=0.3), "a", 2.0),
    ]


def test_finished_runs_are_not_run_again_and_changed_ones_are(tmp_path, monkeypatch):
    said: list[str] = []
    first = trials.series(two(), (0, 1), parts_of, tmp_path, said.append)
    assert [(r["trial"], r["seed"]) for r in first] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)] and len(said) == 4
    assert trials.read(tmp_path) == first and not list(tmp_path.rglob("checkpoint.pt"))
    ran = []
    real = trials.trained
    monkeypatch.setattr(trials, "trained", lambda *a: ran.append(a[-1]) or real(*a))
    assert trials.series(two(), (0, 1), parts_of, tmp_path, said.append) == first and not ran
    changed = [two()[0], dataclasses.replace(two()[1], config=config(epochs=1, label_smoothing=0.2))]
    again = trials.series(changed, (0,), parts_of, tmp_path, said.append)
    assert ran == ["b"] and again[0] == first[0] and again[1]["settings"] != first[1]["settings"]


def test_a_run_that_was_killed_goes_on(tmp_path, monkeypatch):
    """The record is that of a run that nobody stopped."""
    wanted = trials.series(two()[:1], (0,), parts_of, tmp_path / "whole", lambda _: None)

    class Stopped(Exception):
        pass

    def stop(self, *_):
        self.save()
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(trials.Run, "_after_step", stop)
        with pytest.raises(Stopped):
            trials.series(two()[:1], (0,), parts_of, tmp_path / "cut", lambda _: None)
    steps = []
    real = trials.Run.train_step
    monkeypatch.setattr(trials.Run, "train_step", lambda self, *a: steps.append(self.step) or real(self, *a))
    found = trials.series(two()[:1], (0,), parts_of, tmp_path / "cut", lambda _: None)
    assert steps == [1, 2, 3, 4]
    assert (found[0]["top1"], found[0]["loss"]) == (wanted[0]["top1"], wanted[0]["loss"])


def made(trial, seed, top1, against="", paper=None):
    return {
        "trial": trial, "label": trial.upper(), "against": against, "paper": paper, "seed": seed, "top1": top1,
        "loss": 0.5, "clips": 40, "classes": 2, "curve": [[1, 0.5], [2, top1]],
    }  # fmt: skip


RECORDS = [
    made("a", 0, 0.60), made("a", 1, 0.70), made("b", 0, 0.65, "a", 2.0), made("b", 1, 0.72, "a", 2.0),
    made("c", 1, 0.71, "b", 0.6), made("c", 0, 0.75, "b", 0.6),
]  # fmt: skip


def test_effects_are_seed_by_seed():
    lines = trials.table(RECORDS)
    assert "| A | **65.0%** (60.0% to 70.0%) | 2 | 0.50 |  |  |  |" in lines
    assert "| B | **68.5%** (65.0% to 72.0%) | 2 | 0.50 | +3.5 ± 1.5 (+2.0 to +5.0) | A | +2.0 |" in lines
    assert "| C | **73.0%** (71.0% to 75.0%) | 2 | 0.50 | +4.5 ± 5.5 (-1.0 to +10.0) | B | +0.6 |" in lines
    order = trials.order(RECORDS)
    assert order[0] == "Order here: C +4.5 > B +3.5." and order[1] == "Order in the paper: B +2.0 > C +0.6."
    assert order[2].startswith("Of 1 pairs") and " 0 stand " in order[2]
    assert trials.order(RECORDS[:4]) == []


def test_pictures_are_the_same_byte_for_byte(tmp_path):
    pytest.importorskip("matplotlib")
    from vivit import picture

    for draw in (picture.trials, picture.recipes):
        first, again = (draw(RECORDS, tmp_path / f"{i}.svg").read_bytes() for i in range(2))
        assert first == again and b"B" in first


def test_each_step_adds_one_thing():
    plain, full = recipe.load("demo"), ablation.changed(recipe.load("demo_full"), "init.path", "vit.npz")
    found = {trial.name: trial for trial in ablation.planned(plain, full)}
    assert list(found) == ["plain", *(step.name for step in ablation.STEPS), "frozen", "layer_decay"]
    before = plain
    for step in ablation.STEPS:
        config = found[step.name].config
        for key in step.keys:
            assert ablation.value_of(config, key) == ablation.value_of(full, key) != ablation.value_of(before, key)
            before = ablation.changed(before, key, ablation.value_of(full, key))
        assert config == before
    assert dataclasses.replace(before, init=plain.init) == dataclasses.replace(full, init=plain.init)  # nothing is left
    assert found["frozen"].against == found["layer_decay"].against == "image_vit"
    without = ablation.planned(plain, recipe.load("demo_full"))
    assert [trial.name for trial in without] == ["plain", *(step.name for step in ablation.STEPS[1:])]


def test_ablate_from_the_command_line(small_film, tmp_path, capsys):
    pytest.importorskip("kornia")
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert main(["ablate", "--seeds", "1", "--out", str(out), *SETS]) == 0
    told = capsys.readouterr().out
    rows = [line for line in told.splitlines() if line.startswith("| + ")]
    assert "image ViT: tells" in told and len(rows) == 5 and (out / "ablation.svg").stat().st_size > 0
    records = (out / "results.jsonl").read_text()
    assert len(records.splitlines()) == 8 and all(json.loads(line)["clips"] == 4 for line in records.splitlines())
    assert main(["ablate", "--report", "--out", str(out)]) == 0
    assert (out / "results.jsonl").read_text() == records
    assert main(["ablate", "--report", "--out", str(tmp_path)]) == 2
    assert main(["ablate", "--seeds", "0"]) == 2
    err = capsys.readouterr().err
    assert "no results.jsonl in it" in err and "--seeds 0: at least 1" in err


def test_demo_compares_recipes(small_film, tmp_path, capsys):
    pytest.importorskip("kornia")
    pytest.importorskip("matplotlib")
    argv = ["demo", "--recipe", "full", "--out", str(tmp_path), *SETS]
    assert main(argv) == 0
    told = capsys.readouterr().out
    assert "| full recipe | **" in told and (tmp_path / "recipes" / "recipes.svg").stat().st_size > 0
    assert main([*argv, "--data", "x"]) == 2
    assert "`vivit ablate` takes --data" in capsys.readouterr().err


@pytest.mark.parametrize("name, drawn", [("ablation", "ablation.svg"), ("recipes", "recipes.svg")])
def test_docs_say_what_the_records_say(name, drawn):
    folder = ROOT / "docs" / name
    records = trials.read(folder)
    assert records and (folder / drawn).is_file()
    text = (ROOT / "docs" / {"ablation": "training.md", "recipes": "demo.md"}[name]).read_text()
    for line in [*trials.table(records), *(trials.order(records) if name == "ablation" else [])]:
        assert line in text, line
    assert f"({name}/{drawn})" in text
