"""The command line from end to end on small real videos, and what it says to a user who is mistaken."""

import json

import numpy as np
import pytest
import torch
from test_data import broken, write
from test_train import TINY

from vivit import ViViT, ViViTConfig, demo, film
from vivit.__main__ import main
from vivit.data import DataError
from vivit.rollout import rollout

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for i in range(6):
        write(root / "brightens" / f"{i}.mp4", frames=8 + i, brightness=12)
        write(root / "still" / f"{i}.mp4", frames=8 + i, brightness=0)
    broken(root / "still" / "bad")
    return root


@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.toml").write_text(TINY)
    argv = ["train", str(folder / "tiny.toml"), "--data", str(videos), "--out", str(folder / "out")]
    assert main([*argv, "--set", "epochs=2", "--set", "data.short_side=18"]) == 0
    return folder / "out"


def test_train_survives_broken_videos_and_reports_them(trained, capsys, videos):
    about = json.loads((trained / "run.json").read_text())
    assert about["classes"] == ["brightens", "still"] and about["data"]["short_side"] == 18
    assert (trained / "model.safetensors").exists() and (trained / "checkpoint.pt").exists()
    assert main(["evaluate", "--run", str(trained), "--data", str(videos), "--views", "2x3", "--workers", "0"]) == 0
    out, err = capsys.readouterr()
    assert "of 14 videos" in out and "true \\ told" in out
    assert "7 file(s) had problems" in err and "the file is empty" in err


def test_predict_prints_and_draws(trained, videos, tmp_path, capsys):
    picture = tmp_path / "a.png"
    video = str(videos / "still" / "0.mp4")
    assert main(["predict", video, "--run", str(trained), "--png", str(picture), "--credit", "me"]) == 0
    out = capsys.readouterr().out
    assert "still" in out and "%" in out
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_info_counts(trained, capsys):
    assert main(["info", "kinetics400_B16x2_factorized_encoder"]) == 0
    assert "115,062,928" in capsys.readouterr().out  # the paper's 115.1M
    assert main(["info", str(trained)]) == 0
    assert "T=2 S=4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["train", "dmo"], "did you mean 'demo'?"),
        (["train", "demo"], "--data FOLDER"),
        (["train", "demo", "--data", "nowhere"], "nowhere: no such folder"),
        (["train", "demo", "--set", "optimizer.lrr=1"], "unknown key 'lrr'; did you mean 'lr'?"),
        (["predict", "x.mp4", "--run", "nowhere"], "no finished run in it"),
        (["evaluate", "--run", "nowhere", "--data", "x"], "no finished run in it"),
        (["demo", "--video", "nowhere.mp4"], "nowhere.mp4: No such file"),
        (["demo", "--data", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_mistakes_are_one_message(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_more_mistakes(trained, videos, capsys, tmp_path):
    bad = videos / "still" / "bad" / "noise.mp4"
    assert main(["predict", str(bad), "--run", str(trained)]) == 2
    assert "noise.mp4" in capsys.readouterr().err
    assert main(["predict", str(bad), "--run", str(trained), "--views", "4by3"]) == 2
    assert "--views '4by3'" in capsys.readouterr().err
    (tmp_path / "only" / "bad").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "only" / "bad" / f"{i}.mp4").write_bytes(b"x")
    assert main(["train", "demo", "--data", str(tmp_path / "only"), "--out", str(tmp_path / "o")]) == 2
    assert "none of the videos can be read" in capsys.readouterr().err


def test_a_missing_decoder_names_the_extra(monkeypatch, videos, trained, capsys):
    import importlib

    real = importlib.import_module

    def without_av(name, *rest):
        if name == "av":
            raise ImportError("No module named 'av'")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without_av)
    assert main(["predict", str(videos / "still" / "0.mp4"), "--run", str(trained)]) == 2
    assert 'pip install "vivit-kernels[video]"' in capsys.readouterr().err


# ---- the demo ----


@pytest.fixture
def small_demo(monkeypatch, tmp_path):
    monkeypatch.setenv("VIVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "CLIPS", {"train": 8, "val": 4, "test": 4})
    small = [
        "model.embedding=16",
        "model.heads=2",
        "model.mlp=16",
        "model.depth=1",
        "model.temporal_depth=1",
        "epochs=1",
    ]
    return [word for change in [*small, "batch=4"] for word in ("--set", change)]


def test_demo_on_a_film_and_again(small_demo, tmp_path, capsys):
    video = write(tmp_path / "film.mp4", frames=12 * 110, size=(96, 72), brightness=0)
    out = tmp_path / "out"
    argv = ["demo", "--video", str(video), "--out", str(out), *small_demo]
    assert main(argv) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["test_clips"] == 4 and metrics["per_frame_top1"] == 0.5
    assert {p["true"] for p in metrics["predictions"]} == {"in order", "shuffled"}
    for name in ("prediction.png", "learning_curve.png", "model.safetensors", "held_out_shuffled.mp4", "log.jsonl"):
        assert (out / name).stat().st_size > 0
    first = (out / "log.jsonl").read_text().splitlines()
    assert main(argv) == 0  # a finished run is run again, from the cache
    strip = [{k: v for k, v in json.loads(line).items() if k in ("step", "loss")} for line in first]
    again = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert strip == [{k: v for k, v in line.items() if k in ("step", "loss")} for line in again]
    assert main(["predict", str(out / "held_out_shuffled.mp4"), "--run", str(out)]) == 0


def test_demo_on_a_folder(small_demo, tmp_path, videos):
    out = tmp_path / "out"
    assert main(["demo", "--data", str(videos), "--out", str(out), *small_demo, "--set", "data.workers=0"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["test_clips"] >= 2 and (out / "prediction.png").exists()


def test_a_short_film_and_a_film_that_cannot_be_had_say_what_to_do(tmp_path, monkeypatch, small_demo, capsys):
    video = write(tmp_path / "short.mp4", frames=30)
    assert main(["demo", "--video", str(video), "--out", str(tmp_path / "o")]) == 2
    assert "five segments of 20 s are needed" in capsys.readouterr().err
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DataError, match=r"(?s)pip could not download.*--video FILE.*--data FOLDER"):
        film.fetch(cache=tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())


def test_the_per_frame_baseline_cannot_see_order():
    torch.manual_seed(0)
    config = ViViTConfig(
        frames=8, height=16, width=16, tubelet=(2, 8, 8), attention="factorized_encoder",
        embedding=16, depth=1, heads=2, mlp=16, temporal_depth=2, classes=2,
    )  # fmt: skip
    clip = torch.randint(0, 256, (2, 8, 16, 16, 3), dtype=torch.uint8)
    order = torch.from_numpy(film.shuffled(8, np.random.default_rng(0)))
    differences = []
    for c in (demo.per_frame(config), config):
        model = ViViT(c).double()
        torch.nn.init.normal_(model.head.weight)
        differences.append((model(clip, "BFYXC") - model(clip[:, order], "BFYXC")).abs().max().item())
    assert differences[0] < 1e3 * torch.finfo(torch.float64).eps < differences[1]


# ---- attention roll-out ----


@pytest.mark.parametrize(
    "attention, more",
    [
        ("joint", {}),
        ("joint", {"pool": "mean"}),
        ("factorized_encoder", {}),
        ("factorized_encoder", {"temporal_depth": 2}),
        ("factorized_encoder", {"temporal_depth": 1, "pool": "mean"}),
        ("factorized_self_attention", {}),
        ("factorized_dot_product", {}),
        (("joint", "factorized_self_attention"), {}),
    ],
)
def test_rollout_is_a_distribution_over_space_and_time(attention, more):
    config = ViViTConfig(
        frames=4, height=16, width=24, tubelet=(2, 8, 8), attention=attention,
        embedding=16, depth=2, heads=2, mlp=16, classes=3, **more,
    )  # fmt: skip
    model = ViViT(config).train()
    found = rollout(model, torch.randint(0, 256, (2, 4, 16, 24, 3), dtype=torch.uint8))
    assert found.shape == (2, 2, 2, 3) and model.training
    assert (found >= 0).all() and ((found.sum((1, 2, 3)) - 1).abs() < 100 * torch.finfo(torch.float32).eps).all()


def test_rollout_against_the_product_of_matrices():
    """Joint attention, one head: the row of prod (A + I)/2 that the class token reads, A from its definition."""
    config = ViViTConfig(
        frames=2, height=16, width=16, tubelet=(1, 8, 8), embedding=8, depth=3, heads=1, mlp=8, classes=2
    )
    model = ViViT(config).eval()
    video = torch.randint(0, 256, (1, 2, 16, 16, 3), dtype=torch.uint8)
    product = torch.eye(9)
    with torch.no_grad():
        x = model.embed(video, "BFYXC")
        for block in model.blocks:
            q, k, _ = block.attentions[0].qkv(block.norms[0](x))[0].chunk(3, -1)
            product = (torch.softmax(q @ k.T / 8**0.5, -1) + torch.eye(9)) / 2 @ product
            x = block(x)
    expected = product[0, 1:] / product[0, 1:].sum()
    found = rollout(model, video).flatten()
    assert ((found - expected).abs() < 100 * torch.finfo(torch.float32).eps).all()
