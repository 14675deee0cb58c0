"""Augmentation: Scenic's mixup and losses by their fixtures, image operations against Pillow, one draw for a clip."""

import builtins
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import SPEC, write

from vivit import ViViTConfig, losses, recipe, sampling
from vivit.augment import OPERATIONS, AugmentConfig, apply, augment, color_jitter, mixed, mixup_weight
from vivit.data import ClipSpec, VideoClips
from vivit.images import read_resized, resize
from vivit.video import open_video

FIXTURES = Path(__file__).resolve().parent / "fixtures"
EPS = torch.finfo(torch.float32).eps
needs_kornia = pytest.mark.skipif(
    importlib.util.find_spec("kornia") is None, reason="the image operations are kornia's, which is not installed"
)


def clip(frames=4, size=(24, 32)):
    """Smooth colours that move, with noise: every operation has something to do."""
    f, y, x = np.meshgrid(np.arange(frames), np.arange(size[0]), np.arange(size[1]), indexing="ij")
    colours = np.stack([40 + 4 * x + 5 * f, 200 - 5 * y, 90 + 2 * x + 2 * y], -1)
    noise = np.random.default_rng(0).integers(-20, 20, colours.shape)
    return torch.from_numpy(np.clip(colours + noise, 0, 255).astype(np.uint8))


def apart(a, b):
    """The most levels of 256 by which two images differ."""
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max())


# ---- against Scenic ----


def test_mixup_is_scenics():
    stored = np.load(FIXTURES / "scenic_misc.npz")
    weight = float(stored["mixup/weight"])
    for name in ("input", "label"):
        mine = mixed(torch.from_numpy(stored[f"mixup/{name}"]), weight)
        theirs = torch.from_numpy(stored[f"mixup/out_{name}"])
        assert (mine - theirs).abs().max() <= 2 * EPS * theirs.abs().max()
    label = torch.from_numpy(stored["mixup/label"]).argmax(1)
    (soft,) = losses.targets(label, (6,), weight)
    assert (soft - torch.from_numpy(stored["mixup/out_label"])).abs().max() <= 2 * EPS


def test_cross_entropy_with_smoothing_is_scenics():
    stored = np.load(FIXTURES / "scenic_misc.npz")
    logits, onehot = (torch.from_numpy(stored[f"ce/{name}"]) for name in ("logits", "onehot"))
    kept = torch.from_numpy(stored["ce/mask"]).bool()
    for smoothing in (0.0, 0.1, 0.3):
        for rows, name in ((torch.ones(4, dtype=torch.bool), "loss_ls"), (kept, "loss_masked_ls")):
            theirs = float(stored[f"ce/{name}{smoothing:g}"])
            for wanted in (onehot[rows], onehot[rows].argmax(1)):  # as mixtures and as class numbers
                mine = losses.classification(logits[rows], [wanted], smoothing).item()
                assert abs(mine - theirs) <= 8 * EPS * abs(theirs)


def test_two_heads_are_scenics():
    stored = np.load(FIXTURES / "scenic_misc.npz")
    logits = torch.from_numpy(stored["joint/logits"]).split([4, 3], 1)
    theirs = torch.from_numpy(stored["joint/pair_scores"])
    assert (losses.pair_scores(logits) - theirs).abs().max() <= 8 * EPS * theirs.max()
    labels = torch.from_numpy(stored["joint/labels"]).split([4, 3], 1)
    pairs = labels[0].argmax(1) * 3 + labels[1].argmax(1)
    assert torch.equal(pairs, torch.from_numpy(stored["joint/pair_onehot"]).argmax(1))
    both = torch.stack([y.argmax(1) for y in labels], 1)
    each = [losses.classification(x, [y.argmax(1)]) for x, y in zip(logits, labels, strict=True)]
    mine = losses.classification(logits, losses.targets(both, (4, 3)))
    assert abs(mine - (each[0] + each[1]) / 2) <= 4 * EPS * mine


def test_a_mixture_is_normalised_as_the_model_normalises_bytes():
    from vivit import ViViT

    config = ViViTConfig(
        frames=2, height=8, width=8, tubelet=(2, 8, 8), embedding=8, depth=1, heads=1, mlp=8, classes=3,
        pixel_mean=(0.4, 0.5, 0.6), pixel_std=(0.2, 0.25, 0.3),
    )  # fmt: skip
    model = ViViT(config).double().eval()
    torch.nn.init.normal_(model.head.weight)
    video = clip(2, (8, 8))[None]
    from_bytes, from_floats = model(video, "BFYXC"), model(losses.normalised(video, config).double(), "BFYXC")
    assert (from_bytes - from_floats).abs().max() <= 100 * EPS * from_bytes.abs().max()


def test_mixup_weights_are_a_function_of_the_step():
    weights = [mixup_weight(0.3, 7, step) for step in range(400)]
    assert weights == [mixup_weight(0.3, 7, step) for step in range(400)] and len(set(weights)) == 400
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)); four standard errors of 400 draws
    assert abs(np.mean(weights) - 0.5) < 4 * np.sqrt(1 / (4 * 1.6) / 400)
    assert abs(np.var(weights) - 1 / (4 * 1.6)) < 0.03


# ---- geometry and resizing ----


def test_scale_jitter_scales_rows_and_columns_apart_and_holds_the_crop():
    rng, seen = np.random.default_rng(0), []
    for _ in range(300):
        crop = sampling.random_crop((240, 320), (224, 224), 256, False, rng, (0.9, 1.33))
        assert crop.top + 224 <= crop.rows and crop.left + 224 <= crop.columns
        seen.append((crop.rows / 256, crop.columns / 341))
    rows, columns = np.array(seen).T
    assert 0.89 < rows.min() < 0.95 and 1.28 < rows.max() <= 1.33 and 0.89 < columns.min() < 0.95
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.2
    tight = sampling.random_crop((240, 320), (224, 224), 224, False, rng, (0.5, 0.5))
    assert (tight.rows, tight.columns) == (224, 224)


def test_image_processing_is_hugging_faces():
    stored = np.load(FIXTURES / "hf_image_processor.npz")
    frames = stored["frames_uint8"]
    small = resize(frames, *sampling.resized(40, 60, 32), "pillow")
    assert (small == stored["resize_only_uint8"].transpose(0, 2, 3, 1)).all()
    (box,) = sampling.test_crops((40, 60), (24, 24), 32, 1)
    cut = small[:, box.top : box.top + 24, box.left : box.left + 24]
    assert (cut == stored["resize_crop_uint8"].transpose(0, 2, 3, 1)).all()
    mine = losses.normalised(torch.from_numpy(cut), ViViTConfig()).permute(0, 3, 1, 2)
    assert (mine - torch.from_numpy(stored["offset_only"])).abs().max() <= 4 * EPS  # Scenic's range, [-1, 1]
    twice = ViViTConfig(pixel_mean=0.75, pixel_std=0.25)  # what the processor's default does, to [-3, 1]
    mine = losses.normalised(torch.from_numpy(cut), twice).permute(0, 3, 1, 2)
    assert (mine - torch.from_numpy(stored["default"])).abs().max() <= 16 * EPS


def test_scenics_resize_is_bilinear_without_antialiasing_and_cuts_off(tmp_path):
    frames = clip(2, (20, 30)).numpy()
    small = resize(frames, 10, 12, "scenic")
    y, x = (np.arange(10) + 0.5) * 2 - 0.5, (np.arange(12) + 0.5) * 2.5 - 0.5  # centres of pixels on centres
    y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
    fy, fx = (y - y0)[:, None, None], (x - x0)[None, :, None]
    picture = frames[1].astype(np.float64)
    at = lambda rows, columns: picture[np.ix_(rows, np.minimum(columns, 29))]  # noqa: E731
    upper, lower = (at(r, x0) * (1 - fx) + at(r, x0 + 1) * fx for r in (y0, y0 + 1))
    exact = upper * (1 - fy) + lower * fy
    whole = np.abs(exact - np.round(exact)) < 1e3 * EPS  # there a last bit decides
    assert (small[1] == np.floor(exact))[~whole].all() and (~whole).mean() > 0.5
    video = open_video(write(tmp_path / "a.mp4", frames=3))
    native = video.read([0, 2], video.height, video.width)
    assert (read_resized(video, np.array([0, 2]), 16, 24, "scenic") == resize(native, 16, 24, "scenic")).all()
    assert (read_resized(video, np.array([0, 2]), 16, 24) == video.read([0, 2], 16, 24)).all()


# ---- pixels ----


@needs_kornia
@pytest.mark.parametrize("magnitude", [4, 10, 15, 20])
def test_operations_are_pillows(magnitude):
    """The clip as one tall image, as Scenic stacks frames."""
    from PIL import Image, ImageEnhance, ImageOps

    video, share = clip(), magnitude / 10
    tall = Image.fromarray(video.flatten(0, 1).numpy())
    factor = 1.8 * share + 0.1
    grey = np.asarray(video, np.float64) @ [0.2989, 0.587, 0.114]
    expected = {
        "identity": tall,
        "auto_contrast": ImageOps.autocontrast(tall),
        "equalize": ImageOps.equalize(tall),
        "invert": ImageOps.invert(tall),
        "posterize": ImageOps.posterize(tall, min(int(share * 4), 8)),
        "solarize": ImageOps.solarize(tall, int(share * 256)),
        "color": ImageEnhance.Color(tall).enhance(factor),
        "contrast": (np.asarray(tall, np.float64) - grey.mean()) * factor + grey.mean(),
        "brightness": ImageEnhance.Brightness(tall).enhance(factor),
    }
    allowed = {"color": 1 + factor, "contrast": 1, "auto_contrast": 1, "brightness": 1}  # Pillow rounds grey first
    for name, theirs in expected.items():
        mine = apply(video, name, magnitude, np.random.default_rng(0))
        assert mine.dtype == torch.uint8 and mine.shape == video.shape
        same = np.clip(np.asarray(theirs), 0, 255).reshape(video.shape)
        if name == "auto_contrast":  # Pillow's is of each channel of the tall image, as ours
            assert mine.amin() == 0 and mine.amax() == 255
        assert apart(mine, same) <= allowed.get(name, 0), name
    sharp = apply(video, "sharpness", magnitude, np.random.default_rng(0))
    theirs = np.stack([np.asarray(ImageEnhance.Sharpness(Image.fromarray(f.numpy())).enhance(factor)) for f in video])
    assert apart(sharp, theirs) <= 1 + factor  # Pillow rounds the blurred image
    added = apply(video, "solarize_add", magnitude, np.random.default_rng(0)).numpy()
    levels = video.numpy().astype(int)
    assert (added == np.where(levels < 128, np.minimum(levels + int(share * 110), 255), levels)).all()


@needs_kornia
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_frame_gets_the_same(name):
    """Of a clip that stands still, every frame stays like the first; strength grows without breaking the range."""
    still = clip(1).expand(5, -1, -1, -1).contiguous()
    for magnitude in (0, 10, 20):
        changed = apply(still, name, magnitude, np.random.default_rng(3))
        assert changed.dtype == torch.uint8 and all(torch.equal(frame, changed[0]) for frame in changed)
    if name != "identity":
        assert not torch.equal(apply(still, name, 8, np.random.default_rng(3)), still)


@needs_kornia
def test_color_jitter_is_one_draw_for_the_clip_within_its_limits():
    still = clip(1).expand(3, -1, -1, -1).contiguous()
    config, different = AugmentConfig(color_jitter=1.0), set()
    for seed in range(8):
        changed = augment(still, config, np.random.default_rng(seed))
        assert changed.dtype == torch.uint8 and all(torch.equal(frame, changed[0]) for frame in changed)
        different.add(changed.numpy().tobytes())
    assert len(different) == 8
    grey = augment(still, AugmentConfig(greyscale=1.0), np.random.default_rng(0))
    assert (grey == grey[..., :1]).all()
    flat = torch.full((1, 3, 8, 8), 0.5)  # without colour or contrast only brightness remains
    levels = [color_jitter(flat, np.random.default_rng(seed)).mean().item() - 0.5 for seed in range(200)]
    assert 0.9 * 32 / 255 < max(levels) <= 32 / 255 + EPS and -32 / 255 - EPS <= min(levels) < -0.9 * 32 / 255
    often = [augment(still, AugmentConfig(color_jitter=0.5), np.random.default_rng(s)) is still for s in range(200)]
    assert 60 < sum(often) < 140


@needs_kornia
def test_a_clip_depends_on_seed_epoch_and_index_and_is_the_same_wherever_it_is_augmented(tmp_path):
    from dataclasses import replace

    from vivit.data import augment_rng

    items = [(write(tmp_path / "a.mp4", frames=40, brightness=3), 0)] * 4
    config = AugmentConfig(randaugment=(2, 15), color_jitter=0.8, scale_jitter=(0.9, 1.33))
    spec = replace(SPEC, augment=config)
    here = VideoClips(items, ("x",), spec, seed=3)
    raw = VideoClips(items, ("x",), replace(spec, augment_here=False), seed=3)
    plain = VideoClips(items, ("x",), replace(SPEC, augment=replace(config, randaugment=(), color_jitter=0.0)), seed=3)
    changed = 0
    for i in range(4):
        one = here[1, i].video
        assert one.dtype == torch.uint8 and torch.equal(one, here[1, i].video)
        assert torch.equal(raw[1, i].video, plain[1, i].video)
        assert torch.equal(one[0], augment(raw[1, i].video[0], config, augment_rng(3, 1, i)))
        changed += not torch.equal(one, raw[1, i].video)
    assert changed >= 2  # a layer may be the identity
    assert torch.equal(here[None, 0].video, VideoClips(items, ("x",), SPEC, seed=3)[None, 0].video)


def test_without_kornia_the_extra_is_named_before_anything_is_read(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("kornia"):
            raise ImportError("No module named 'kornia'")
        return real(name, *rest)

    for i in range(2):
        write(tmp_path / "data" / "x" / f"{i}.mp4", frames=2)
    monkeypatch.setattr(builtins, "__import__", without)
    changes = [f"data.path={tmp_path / 'data'}"]
    with pytest.raises(ModuleNotFoundError, match=r'(?s)need kornia.*pip install "vivit-kernels\[augment\]"'):
        recipe.datasets(recipe.load("demo", [*changes, "augment.randaugment=[2, 15]"]))
    geometry = recipe.load("demo", [*changes, "augment.scale_jitter=[0.9, 1.33]", "augment.mixup=0.3"])
    assert isinstance(recipe.datasets(geometry)[0].spec, ClipSpec)  # these need nothing
