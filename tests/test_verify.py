"""Published weights: recognised, refused when damaged, in the right range, evaluated beside what was published."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flax_files import flax_bytes, nested
from parity import small
from safetensors.numpy import save_file
from test_data import write
from test_finetune import scenic_vivit

from vivit import ViViTConfig, published, verify
from vivit import weights as W
from vivit.__main__ import main

pytest.importorskip("av")

STORED = {  # of google/vivit-b-16x2-kinetics400, as section 7 of the specification reports it
    "do_normalize": True,
    "do_rescale": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "rescale_factor": 1 / 127.5,
}


def hugging_face(folder, classes=2, names=()):
    model = small(height=16, width=16, tubelet=(2, 8, 8), classes=classes)
    W.save_hf(model, model.config, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(STORED))
    if names:
        about = json.loads((folder / "config.json").read_text())
        about["id2label"] = {str(i): name for i, name in enumerate(names)}
        (folder / "config.json").write_text(json.dumps(about))
    return model


@pytest.fixture(scope="module")
def kinetics(tmp_path_factory):
    """Six videos of two classes, one of them not there, in Kinetics' format."""
    root = tmp_path_factory.mktemp("k")
    rows = ["label,youtube_id,time_start,time_end,split"]
    for i in range(6):
        rows.append(f"{('still', 'brightens')[i % 2]},v{i},0,10,val")
        if i:
            write(root / "videos" / f"v{i}_000000_000010.mp4", frames=12, brightness=12 * (i % 2))
    (root / "val.csv").write_text("\n".join(rows) + "\n")
    return root


def test_every_published_model_is_found_by_its_configuration():
    for row, size, depth in zip(published.SCENIC, "BBLLL", (0, 4, 24, 24, 4), strict=True):
        more = {"temporal_depth": depth} if depth else {}
        config = ViViTConfig.preset(f"{size}/16x2", attention=row.attention, classes=row.split or row.classes, **more)
        assert published.find(config) is row
    assert published.find(ViViTConfig(classes=401)) is None
    assert [row.top1 for row in published.SCENIC] == [79.9, 78.4, 80.3, 81.6, 43.6]


def test_hugging_faces_folder_beside_what_was_published(tmp_path, kinetics, capsys, monkeypatch):
    model = hugging_face(tmp_path, names=("still", "brightens"))
    row = published.Published("tiny", "Kinetics-2", "joint", 32, 0, 2, 61.5, (2, 3), 1, 25.0)
    monkeypatch.setattr(published, "SCENIC", (row,))
    argv = ["verify-weights", str(tmp_path), "--data", str(kinetics / "val.csv"), "--videos", str(kinetics / "videos")]
    assert main([*argv, "--workers", "0", "--out", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert "origin       Hugging Face" in out and "tiny, Kinetics-2: joint" in out
    assert f"{sum(p.numel() for p in model.parameters()):,} in 32 tensors" in out
    assert (
        "[-1, 1], Scenic's range, which these weights were trained with; preprocessor_config.json says [-3, 1]" in out
    )
    assert "published    61.5 % top-1, 2x3 views" in out
    assert "of 5 videos, 2x3 views" in out and "1 of 6 videos are not in" in err
    here = next(line for line in out.splitlines() if line.startswith("here"))
    assert main(["evaluate", "--run", str(tmp_path / "run"), *argv[2:], "--workers", "0"]) == 0
    again = capsys.readouterr().out
    assert here.split(None, 1)[1].removesuffix(", 2x3 views") in again  # the kept run gives the same numbers
    assert again.index("still") < again.index("brightens")  # classes as config.json numbers them, not alphabetical


def test_the_stored_range_is_taken_when_asked_for(tmp_path, capsys):
    model = hugging_face(tmp_path)
    assert verify.stored_range(tmp_path) == pytest.approx((-3, 1))
    assert main(["verify-weights", str(tmp_path), "--input-range", "stored"]) == 0
    out = capsys.readouterr().out
    assert "become [-3, 1], as preprocessor_config.json says; Scenic trained with [-1, 1]" in out
    config = verify.with_range(model.config, verify.stored_range(tmp_path))
    stored = np.load(Path(__file__).parent / "fixtures" / "hf_image_processor.npz")
    from vivit.losses import normalised

    cut = torch.from_numpy(stored["resize_crop_uint8"].astype(np.uint8)).permute(0, 2, 3, 1)
    found = normalised(cut, config).permute(0, 3, 1, 2)
    assert (found - torch.from_numpy(stored["default"])).abs().max() <= 16 * torch.finfo(torch.float32).eps
    for change, expected in (
        ({"do_normalize": False}, (-1, 1)),
        ({"offset": False, "rescale_factor": 1 / 255}, (-1, 1)),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(STORED | change))
        assert verify.stored_range(tmp_path) == pytest.approx(expected)
    assert main(["verify-weights", str(tmp_path)]) == 0
    assert "Scenic's range, and what preprocessor_config.json says" in capsys.readouterr().out


def test_scenics_checkpoint_with_two_heads(tmp_path, capsys, monkeypatch):
    flat = scenic_vivit()
    (tmp_path / "checkpoint").write_bytes(flax_bytes({"optimizer": {"target": nested(flat)}}))
    row = published.Published("pair", "EPIC", "joint", 16, 0, 5, 43.6, (4, 1), 1, 0.0, (3, 2))
    monkeypatch.setattr(published, "SCENIC", (row,))
    assert main(["verify-weights", str(tmp_path), "--frames", "6"]) == 0
    out = capsys.readouterr().out
    assert "origin       Scenic" in out and "published    43.6 % top-1 of actions, 4x1 views" in out
    assert "bytes 0 to 255 become [-1, 1], Scenic's range" in out and "preprocessor" not in out
    assert main(["verify-weights", str(tmp_path), "--frames", "8"]) == 2
    assert "12 positions are no square grid of 8 frames" in capsys.readouterr().err


def test_damaged_and_other_files_are_refused(tmp_path, capsys, kinetics):
    flat = scenic_vivit()
    flat["Transformer/encoderblock_1/LayerNorm_0/bias"][3] = np.nan
    file = tmp_path / "checkpoint"
    file.write_bytes(flax_bytes({"optimizer": {"target": nested(flat)}}))
    assert main(["verify-weights", str(file), "--frames", "6"]) == 2
    assert "blocks.1.norms.0.bias has 1 values that are not finite" in capsys.readouterr().err
    del flat["Transformer/encoderblock_1/LayerNorm_0/bias"]
    file.write_bytes(flax_bytes({"optimizer": {"target": nested(flat)}}))
    assert main(["verify-weights", str(file), "--frames", "6"]) == 2
    assert "LayerNorm_0/bias" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:1000])
    assert main(["verify-weights", str(file), "--frames", "6"]) == 2
    assert str(file) in capsys.readouterr().err
    W.save(small(), tmp_path / "model.safetensors")
    assert main(["verify-weights", str(tmp_path / "model.safetensors")]) == 2
    assert "vivit weights, not a ViViT of Scenic or Hugging Face" in capsys.readouterr().err
    hugging_face(tmp_path / "hf", classes=3)
    argv = [
        "verify-weights",
        str(tmp_path / "hf"),
        "--data",
        str(kinetics / "val.csv"),
        "--videos",
        str(kinetics / "videos"),
    ]
    assert main(argv) == 2
    assert "(2,) classes, the weights have (3,)" in capsys.readouterr().err


def test_a_name_on_the_hub_is_fetched_or_explained(tmp_path, capsys, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name.startswith("gone/"):
            raise ConnectionError("no network here")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    hugging_face(tmp_path)
    assert main(["verify-weights", "google/vivit-tiny"]) == 0
    assert asked == [("google/vivit-tiny", verify.FILES)] and str(tmp_path) in capsys.readouterr().out
    assert main(["verify-weights", "gone/model"]) == 2
    assert "does not give it: no network here\n  -> on a machine that is online" in capsys.readouterr().err
    assert main(["verify-weights", "nowhere.bin"]) == 2
    assert "nowhere.bin: no such file or folder" in capsys.readouterr().err and len(asked) == 2


@pytest.mark.full
def test_logits_are_transformers_logits(tmp_path, capsys):
    pytest.importorskip("transformers")
    hugging_face(tmp_path)
    assert main(["verify-weights", str(tmp_path), "--reference"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("reference"))
    apart, of = float(line.split("differ by ")[1].split()[0]), float(line.rsplit(None, 1)[1])
    assert apart <= 100 * torch.finfo(torch.float32).eps * of


@pytest.mark.full
@pytest.mark.parametrize(
    "kind", ["model1_spacetime_B16x2_k400", "model2_factorized_encoder_B16x2_Lt4_k400", "huggingface"]
)
def test_the_published_layouts_in_their_true_size(tmp_path, capsys, kind):
    """All names and shapes of the files that were published, with random values: recognised, whole, run once."""
    listed = json.loads((Path(__file__).parent / "fixtures" / "state_dict_keys_B16x2.json").read_text())
    is_scenic = kind != "huggingface"
    shapes = listed["scenic"][kind] if is_scenic else listed["hf_hub_google_vivit_b_16x2_kinetics400_names"]
    rng = np.random.default_rng(0)
    flat = {name: (0.02 * rng.standard_normal(shape, dtype=np.float32)) for name, shape in shapes.items()}
    if is_scenic:
        (tmp_path / "checkpoint").write_bytes(flax_bytes({"optimizer": {"target": nested(flat)}}))
    else:
        save_file(flat, tmp_path / "model.safetensors")
        about = {"model_type": "vivit", "num_labels": 400, "tubelet_size": [2, 16, 16], "id2label": {}}
        (tmp_path / "config.json").write_text(json.dumps(about))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(STORED))
    assert main(["verify-weights", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    model, top1, count = ("FE", 78.4, "115,062,928") if "model2" in kind else ("", 79.9, "88,954,000")
    assert f"ViViT-B/16x2 {model}".strip() + ", Kinetics-400" in out and f"{count} in " in out
    assert f"published    {top1} % top-1, 4x3 views" in out and "Scenic's range" in out


# ---- the loader's speed ----


@pytest.mark.parametrize("how", ["decoder", "scenic"])
def test_the_loaders_time_is_told_by_stage(kinetics, capsys, how):
    argv = ["loader", "demo", "--data", str(kinetics / "val.csv"), "--videos", str(kinetics / "videos")]
    sets = ["--set", f"data.resize={how}", "--set", "batch=2", "--set", "model.frames=4"]
    assert main([*argv, *sets, "--clips", "8", "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "clips in one process" in out and "clips/s per core" in out and "in the training process" in out
    stages = ("open and index", "decode and resize" if how == "decoder" else "resize", "crop and copy")
    shares = [float(line.split()[-1].rstrip("%")) for line in out.splitlines() if "ms a clip" in line]
    assert all(stage in out for stage in stages) and abs(sum(shares) - 100) < 0.5
    assert main([*argv, "--workers", "two"]) == 2
    assert "--workers 'two'" in capsys.readouterr().err
