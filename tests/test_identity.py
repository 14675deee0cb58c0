"""Resuming in another version: settings that one side does not know, in checkpoints of real runs."""

from __future__ import annotations

import json

import pytest
from test_train import Noise, config, losses

from vivit import checkpoint, identity
from vivit.recipe import TrainConfig
from vivit.train import Interrupted, Run, TrainingError

SHORT = dict(epochs=2, model__depth=1)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that was stopped after its fifth step of ten."""
    run = Run(config(**SHORT), Noise(), tmp_path / "run")
    monkeypatch.setattr(type(run.world), "signal", lambda world, caught: 15 if run.step == 5 else 0)
    with pytest.raises(Interrupted):
        run.fit(quiet=True)
    monkeypatch.undo()
    return tmp_path / "run"


def rewrite(run, without=(), more=None, changed=()) -> None:
    """The checkpoint as another version would have written it; changed: None for one that does not say."""
    state = checkpoint.load(run / "checkpoint.pt")
    found = json.loads(state["config"])
    for key in without:
        del found[key]
    state["config"] = json.dumps(found | (more or {}))
    state["changed"] = json.dumps([key for key in json.loads(state["changed"]) if key in found] + list(changed or ()))
    if changed is None:
        del state["changed"]
    checkpoint.save(state, run / "checkpoint.pt")


def test_what_an_older_version_did_not_know_has_its_default(stopped, tmp_path):
    rewrite(stopped, without=["ema", "optimizer.states", "augment.mixup", "data.resize", "model.eps"], changed=None)
    again = Run(config(**SHORT), Noise(), stopped, resume=True)
    assert again.step == 5
    again.fit(quiet=True)
    Run(config(**SHORT), Noise(), tmp_path / "whole").fit(quiet=True)
    assert losses(stopped) == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    "key, said",
    [
        ("label_smoothing", "label_smoothing was 0.0 (its default: the version that wrote it had no such setting)"),
        ("optimizer.name", "optimizer.name was sgd (its default: the version that wrote it had no such setting)"),
        ("classes", "classes was None"),
    ],
)
def test_a_setting_that_came_since_and_is_used_is_refused(stopped, key, said):
    rewrite(stopped, without=[key])
    with pytest.raises(TrainingError) as error:
        Run(config(**SHORT), Noise(), stopped, resume=True)
    assert said in str(error.value) and "-> resume with the config it was started with" in str(error.value)


def test_a_setting_that_differs_is_refused_as_before(stopped):
    rewrite(stopped, without=["ema"])
    with pytest.raises(TrainingError, match=r"other settings: optimizer.lr was 0.01, is 0.5\n  -> resume with the con"):
        Run(config(**SHORT, optimizer__lr=0.5), Noise(), stopped, resume=True)


def test_a_checkpoint_says_what_is_no_default(stopped):
    state = checkpoint.load(stopped / "checkpoint.pt")
    changed, found = json.loads(state["changed"]), json.loads(state["config"])
    assert {"label_smoothing", "optimizer.name", "model.frames"} <= set(changed) < set(found)
    assert not {"ema", "optimizer.states", "data.fps", "data.decoder", "classes", "model.eps"} & set(changed)


def test_a_default_of_a_version_to_come_is_nothing(stopped):
    rewrite(stopped, more={"optimizer.nesterov": False, "model.gates": "none"})
    assert Run(config(**SHORT), Noise(), stopped, resume=True).step == 5


@pytest.mark.parametrize(
    "changed, why", [(["model.gates"], "not its default\n"), (None, "which may not be its default: the checkpoint is")]
)
def test_another_value_of_a_setting_that_is_not_known_is_refused(stopped, changed, why):
    rewrite(stopped, more={"optimizer.nesterov": False, "model.gates": 4}, changed=changed)
    with pytest.raises(TrainingError) as error:
        Run(config(**SHORT), Noise(), stopped, resume=True)
    said = str(error.value)
    assert "a setting that this version does not know" in said and why in said
    assert "-> resume with the version that wrote it" in said


def test_what_is_free_now_may_have_been_part_of_it(stopped):
    rewrite(stopped, more={"memory": "small", "data.workers": 9}, changed=None)
    assert Run(config(**SHORT), Noise(), stopped, resume=True).step == 5


def test_every_free_setting_is_one():
    values = TrainConfig().to_dict()
    for key in identity.FREE:
        table, _, name = key.rpartition(".")
        assert name in (values[table] if table else values), key
    assert not identity.FREE & set(identity.settings(TrainConfig()))
