"""Videos in, clips out: decoding against what was written, Scenic's sampling rules, a folder full of broken files."""

import numpy as np
import pytest
import torch

from vivit import sampling
from vivit.data import (
    ClipSpec,
    DataError,
    Order,
    Problems,
    VideoClips,
    evaluation_batches,
    find_splits,
    read_items,
    training_batches,
)
from vivit.film import CLASSES, Film, FilmOrder, decode, shuffled
from vivit.video import VideoError, open_video

av = pytest.importorskip("av")

SPEC = ClipSpec(frames=4, height=16, width=16, stride=2, short_side=20)


def write(path, frames=24, size=(48, 32), codec="libx264", brightness=5):
    """Frame i is grey of level brightness * i + 20, with a white square that tells left from right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=12)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 2_000_000
        for i in range(frames):
            picture = np.full((size[1], size[0], 3), brightness * i + 20, np.uint8)
            picture[8:16, :8] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def level(frame):
    return float(np.median(frame))


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.mkv", "libx264")])
def test_frames_are_the_ones_asked_for(tmp_path, name, codec):
    video = open_video(write(tmp_path / name, codec=codec))
    assert (video.frames, video.fps, video.height, video.width) == (24, 12.0, 32, 48)
    wanted = [20, 3, 3, 0, 23]
    clip = video.read(wanted, 16, 24)
    assert clip.shape == (5, 16, 24, 3) and clip.dtype == np.uint8
    for index, frame in zip(wanted, clip, strict=True):
        assert abs(level(frame) - (5 * index + 20)) <= 2.5  # half the distance of two frames: compression
    in_order = np.stack(list(video.every(1, 16, 24)))
    assert len(in_order) == 24 and (clip == in_order[wanted]).all()
    assert video.damaged == 0
    with pytest.raises(IndexError):
        video.read([24], 16, 24)
    video.close()


def broken(folder):
    """Files that give no frames, and one that gives some."""
    folder.mkdir(parents=True)
    whole = write(folder.parent / "whole.mp4").read_bytes()
    stream = write(folder.parent / "whole.mkv", frames=200, brightness=1).read_bytes()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(4000))
    (folder / "text.avi").write_text("no video at all\n" * 50)
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "header.mkv").write_bytes(stream[:200])
    (folder / "folder.mp4").mkdir()
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    with av.open(str(folder / "sound.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
    return folder


def test_broken_files_say_why(tmp_path):
    folder = broken(tmp_path / "bad")
    for path in folder.iterdir():
        with pytest.raises(VideoError, match=path.name):
            open_video(path).read([0], 8, 8)


def test_a_damaged_file_gives_the_frames_it_has(tmp_path):
    whole = write(tmp_path / "a.mkv", frames=100, brightness=2)
    noise = bytearray(whole.read_bytes())
    middle = len(noise) // 2
    noise[middle : middle + 400] = bytes(400)
    whole.write_bytes(noise)
    video = open_video(whole)
    assert video.read(range(0, video.frames, 5), 16, 24).shape[1:] == (16, 24, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_broken_videos_is_survived_and_reported(tmp_path, workers):
    root = tmp_path / "videos"
    broken(root / "bad")
    for i in range(3):
        write(root / "good" / f"{i}.mp4", frames=(1, 3, 40)[i], brightness=2)
    items, classes = read_items(root)
    assert any(path.name == "gone.mp4" for path, _ in items)  # what cannot be read is counted, not passed over
    assert classes == ("bad", "good")
    clips, problems = VideoClips(items, classes, SPEC), Problems()
    training = training_batches(clips, Order(len(clips), 3, 2, 0), workers)
    evaluation = evaluation_batches(clips, 4, workers)
    if workers:  # a fork of this process, in which other tests have left threads and their locks, can hang in FFmpeg
        training.multiprocessing_context = evaluation.multiprocessing_context = "forkserver"
    batches = list(training)
    for batch in batches:
        problems.add(batch.problems)
        assert batch.video.shape == (3, 1, 4, 16, 16, 3) and batch.video.dtype == torch.uint8
        assert (batch.label == 1).all()
    bad = {path for path, _ in items if path.parent.name == "bad"}
    assert set(problems.files) <= set(map(str, bad))
    left, reported = 0, Problems()
    for batch in evaluation:
        left += len(batch.label)
        reported.add(batch.problems)
    assert left == 3 and set(reported.files) == set(map(str, bad))
    assert f"{len(bad)} file(s) had problems" in str(reported)


def test_clips_depend_on_seed_epoch_and_index_only(tmp_path):
    path = write(tmp_path / "a.mp4", frames=40, brightness=3)
    clips = VideoClips([(path, 0)] * 8, ("x",), SPEC, seed=3)
    again = VideoClips([(path, 0)] * 8, ("x",), SPEC, seed=3)
    first = [clips[1, i].video for i in range(8)]
    assert all(torch.equal(a, again[1, i].video) for i, a in enumerate(first))
    assert len({a.numpy().tobytes() for a in first}) > 4
    assert not torch.equal(first[0], clips[2, 0].video)


def test_the_order_of_a_resumed_run_is_the_rest_of_the_whole_one():
    whole = list(Order(11, 4, 3, seed=5))
    assert len(whole) == 6 and list(Order(11, 4, 3, seed=5, first=3)) == whole[3:]
    assert len({index for batch in whole[:2] for _, index in batch}) == 8
    assert len(list(Order(2, 4, 3, seed=0))) == 3  # fewer videos than a batch


# ---- sampling rules of the specification, section 7 ----


def test_sampling_rules():
    assert sampling.test_starts(250, 32, 2, 4) == [0, 62, 124, 186]
    assert sampling.central_start(250, 32, 2) == 93 and sampling.central_start(10, 32, 2) == 0
    assert sampling.frame_indices(0, 5, 2, 3).tolist() == [0, 2, 1, 0, 2]  # short: from the start again
    rng = np.random.default_rng(0)
    starts = {sampling.random_start(10, 4, 2, rng) for _ in range(200)}
    assert starts == set(range(4))  # [0, L - (F-1)*stride)
    assert {sampling.random_start(3, 4, 2, rng) for _ in range(20)} == {0}


def test_crops():
    assert sampling.resized(480, 640, 256) == (256, 341) and sampling.resized(640, 480, 256) == (341, 256)
    boxes = sampling.test_crops((480, 640), (224, 224), 256, 3)
    assert [(b.top, b.left) for b in boxes] == [(16, 0), (16, 59), (16, 117)]
    assert [(b.top, b.left) for b in sampling.test_crops((640, 480), (224, 224), 256, 3)] == [
        (0, 16),
        (59, 16),
        (117, 16),
    ]
    assert sampling.test_crops((480, 640), (224, 224), 256, 1)[0][2:4] == (16, 59)
    rng = np.random.default_rng(0)
    for size in ((48, 32), (32, 48), (100, 20)):
        crop = sampling.random_crop(size, (24, 40), 16, True, rng)
        assert crop.top + 24 <= crop.rows and crop.left + 40 <= crop.columns  # a crop wider than the short side


# ---- data sets ----


def test_list_files(tmp_path):
    for name in ("a b.mp4", "c.mp4"):
        write(tmp_path / name, frames=2)
    file = tmp_path / "list.txt"
    file.write_text("# comment\na b.mp4 jump\n\nc.mp4 run\n")
    items, classes = read_items(file)
    assert classes == ("jump", "run") and items == [(tmp_path / "a b.mp4", 0), (tmp_path / "c.mp4", 1)]
    file.write_text("a.mp4 2\nb.mp4 0\n")
    assert read_items(file) == ([(tmp_path / "a.mp4", 2), (tmp_path / "b.mp4", 0)], ("0", "1", "2"))
    file.write_text("a.mp4 run\nlonely\n")
    with pytest.raises(DataError, match=r"list\.txt:2: 'lonely' is not"):
        read_items(file)
    file.write_text("a.mp4 fly\n")
    with pytest.raises(DataError, match=r"list\.txt:1: label 'fly' is none of the classes jump, run"):
        read_items(file, ("jump", "run"))
    with pytest.raises(DataError, match="no such folder"):
        read_items(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no videos in it"):
        read_items(tmp_path / "empty")


def test_splits_hold_out_by_name_or_by_folder(tmp_path):
    for name in ("x", "y"):
        for i in range(5):
            (tmp_path / "all" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "all" / name / f"{i}.mp4").touch()
    training, held, classes = find_splits(tmp_path / "all", 0.2)
    assert (len(training), len(held), classes) == (8, 2, ("x", "y"))
    assert not {p for p, _ in training} & {p for p, _ in held}
    (tmp_path / "both").mkdir()
    (tmp_path / "all").rename(tmp_path / "both" / "train")
    (tmp_path / "both" / "val" / "y").mkdir(parents=True)
    (tmp_path / "both" / "val" / "y" / "0.mp4").touch()
    training, held, classes = find_splits(tmp_path / "both", 0.2)
    assert (len(training), len(held), classes) == (10, 1, ("x", "y")) and held[0][1] == 1


# ---- the film of the demo ----


def test_film_clips_hold_the_same_frames_in_both_classes(tmp_path):
    film_file = write(tmp_path / "film.mp4", frames=12 * 110, brightness=0)
    film = decode(film_file, tmp_path / "cache", quiet=True)
    assert film.step == 2 and len(film.frames) == 660
    assert decode(film_file, tmp_path / "cache").frames.shape == film.frames.shape
    numbered = np.arange(660, dtype=np.int64).view(np.uint8).reshape(660, 1, 1, 8).repeat(72, 1).repeat(72, 2)
    film = Film(film.path, numbered, film.step, film.fps, "", "", film.seconds)
    parts = film.segments()
    assert {name: len(p) for name, p in parts.items()} == {"train": 3, "val": 1, "test": 1}
    seen = {name: {i for a, b in p for i in range(a, b)} for name, p in parts.items()}
    assert not (seen["train"] & seen["val"] or seen["train"] & seen["test"] or seen["val"] & seen["test"])
    test = FilmOrder(film, "test", 20, 6, 2, (64, 64), flip=True, seed=0)
    assert test.classes == CLASSES
    for i in range(0, 20, 2):
        a, b = (test[None, j].video.numpy()[0, :, 0, 0].copy().view(np.int64).ravel() for j in (i, i + 1))
        assert (np.diff(a) == 2).all() and (a != b).any() and sorted(a) == sorted(b) and set(a) <= seen["test"]
        assert (test[None, i].label, test[None, i + 1].label) == (0, 1)
    train = FilmOrder(film, "train", 20, 6, 2, (64, 64), flip=False, seed=0)
    for i in range(20):
        sample = train[0, i]
        numbers = sample.video.numpy()[0, :, 0, 0].copy().view(np.int64).ravel()
        assert set(numbers) <= seen["train"] and bool((np.diff(numbers) != 2).any()) == bool(sample.label)


def test_a_shuffle_is_never_the_order_or_its_reverse():
    rng = np.random.default_rng(0)
    drawn = {tuple(shuffled(3, rng)) for _ in range(200)}
    assert drawn == {(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)}
