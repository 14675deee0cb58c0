"""Annotation files as they are published, a few lines of each: labels, files found, malformed lines, missing videos."""

import json

import numpy as np
import pytest
import torch
from test_data import SPEC, level, write
from test_train import TINY

from vivit import annotations, recipe
from vivit.__main__ import main
from vivit.annotations import DataError, Heads
from vivit.data import Problems, VideoClips, listing
from vivit.video import Segment, VideoError, open_video

pytest.importorskip("av")

KINETICS = """label,youtube_id,time_start,time_end,split,is_cc
"tasting food",--bD2BMKbTE,12,22,train,0
testifying,---QUuC4vJs,84,94,train,0
"massaging person's head",0wR5jVB-WPk,417,427,train,1
testifying,notHere0000,1,11,train,0
"""
EPIC_HEAD = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"
)
EPIC = (
    EPIC_HEAD
    + """P01_01_0,P01,P01_01,00:00:01.089,00:00:00.50,00:00:01.50,8,202,open door,open,3,door,3,['door'],[3]
P01_01_1,P01,P01_01,00:00:02.629,00:00:01.00,00:00:99.00,262,370,turn on light,turn-on,6,light,114,['light'],[114]
P01_09_1,P01,P01_09,00:00:02.629,00:00:04.37,00:00:06.17,262,370,put cup,put,1,"cup","13","['cup', 'pot']","[13, 5]"
"""
)
SSV2 = [
    {
        "id": "78687",
        "label": "holding potato next to vicks vaporub bottle",
        "template": "Holding [something] next to [something]",
        "placeholders": ["potato", "vicks vaporub bottle"],
    },
    {"id": "42326", "label": "spreading margarine", "template": "Spreading [something] onto [something]"},
    {"id": "100904", "label": "putting a box", "template": "Holding [something] next to [something]"},
]
MOMENTS = """clapping/yt-cvJ0qMpgKNc_6.mp4,clapping,3,0
adult+male+singing/getty-123.mp4,adult+male+singing,4,1
clapping/vine-Wow, what a clap_2.mp4,clapping,3,0
"""


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def found(listing):
    return [(path.name, label) for path, label in listing.items]


def test_kinetics(tmp_path):
    file = tmp_path / "train.csv"
    file.write_text(KINETICS)
    names = ("a/--bD2BMKbTE_000012_000022.mp4", "b/---QUuC4vJs.mkv", "0wR5jVB-WPk_417_427.mp4")
    videos = touch(tmp_path / "videos", *names)
    read = annotations.read(file, videos)
    assert read.classes == ("massaging person's head", "tasting food", "testifying")
    assert found(read) == [
        ("--bD2BMKbTE_000012_000022.mp4", 1), ("---QUuC4vJs.mkv", 2), ("0wR5jVB-WPk_417_427.mp4", 0)
    ]  # fmt: skip
    assert read.missing == ["notHere0000_000001_000011"]
    assert read.report(file, videos).startswith(f"{file}: 1 of 4 videos are not in {videos}, the first is notHere0000")
    file.write_text("label,youtube_id,time_start,time_end,split\nyoga,--bD2BMKbTE,12,22,validate\n")
    with pytest.raises(DataError, match=r"train\.csv:2: label 'yoga' is none of the 3 classes"):
        annotations.read(file, videos, classes=read.classes)


def test_something_something(tmp_path):
    file, labels = tmp_path / "train.json", tmp_path / "labels.json"
    file.write_text(json.dumps(SSV2))
    videos = touch(tmp_path / "20bn", "78687.webm", "42326.webm", "100904.webm")
    read = annotations.read(file, videos)
    assert read.classes == ("Holding something next to something", "Spreading something onto something")
    assert found(read) == [("78687.webm", 0), ("42326.webm", 1), ("100904.webm", 0)] and not read.missing
    order = {
        "Tipping something over": "0",
        "Spreading something onto something": "1",
        "Holding something next to something": "2",
    }
    labels.write_text(json.dumps(order))
    assert found(annotations.read(file, videos, labels=str(labels))) == [
        ("78687.webm", 2), ("42326.webm", 1), ("100904.webm", 2)
    ]  # fmt: skip
    labels.write_text('{"A": "0", "B": "2"}')
    with pytest.raises(DataError, match="2 classes are not numbered 0 to 1"):
        annotations.read(file, videos, labels=str(labels))


def test_moments_in_time(tmp_path):
    file, labels = tmp_path / "trainingSet.csv", tmp_path / "moments_categories.txt"
    file.write_text(MOMENTS.replace("vine-Wow, what a clap_2.mp4", "vine-Wow_2.mp4"))
    labels.write_text("clapping,1\nadult+male+singing,0\nyawning,2\n")
    videos = touch(
        tmp_path / "MiT", "training/clapping/yt-cvJ0qMpgKNc_6.mp4", "training/adult+male+singing/getty-123.mp4"
    )
    read = annotations.read(file, videos, labels=str(labels))
    assert read.classes == ("adult+male+singing", "clapping", "yawning")
    assert found(read) == [("yt-cvJ0qMpgKNc_6.mp4", 1), ("getty-123.mp4", 0)]
    assert read.missing == ["clapping/vine-Wow_2.mp4"]
    file.write_text("clapping/a.mp4,clapping,3,0\nlonely.mp4\n")
    with pytest.raises(DataError, match=r"trainingSet\.csv:2: 'lonely\.mp4' is not `path,label,votes,votes`"):
        annotations.read(file, videos)


def test_epic_kitchens_segments_and_heads(tmp_path):
    file = tmp_path / "EPIC_100_train.csv"
    file.write_text(EPIC)
    write(tmp_path / "videos" / "P01" / "P01_01.mp4", frames=24)  # 12 frames a second: 2 s
    touch(tmp_path / "videos", "P01/cut/P01_01_1.mp4")
    (tmp_path / "EPIC_100_verb_classes.csv").write_text(
        "id,key,instances,category\n" + "".join(f"{i},verb{i},[],x\n" for i in range(97))
    )
    read = annotations.read(file, tmp_path / "videos")
    assert isinstance(read.classes, Heads) and annotations.head_sizes(read.classes) == (300, 97)
    assert read.classes.verb[3] == "verb3" and read.classes.noun[114] == "114"  # no file names the nouns here
    (segment, first), (clip, second) = read.items
    assert (first, second) == ((3, 3), (114, 6)) and clip.name == "P01_01_1.mp4"
    assert isinstance(segment, Segment) and (segment.start, segment.stop) == (0.5, 1.5) and read.missing == ["P01_09"]
    assert annotations.from_json(json.loads(json.dumps(read.classes))) == read.classes
    video = open_video(segment)
    assert (video.frames, video.fps) == (12, 12.0)  # frames 6 to 17
    assert [round((level(f) - 20) / 5) for f in video.read([0, 11], 16, 24)] == [6, 17]
    sample = VideoClips(read.items[:1], read.classes, SPEC)[None, 0]
    assert sample.label == (3, 3) and sample.video is not None and not sample.problems
    with pytest.raises(VideoError, match=r"a segment from 9\.00 s of a video of 2\.00 s"):
        open_video(Segment(segment.path, 9.0, 10.0))


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", KINETICS + "yoga,x\n", r"a\.csv:6: 2 fields, the head has 6"),
        ("a.csv", KINETICS + "yoga,x,soon,9,val,0\n", r"a\.csv:6: time_start and time_end are 'soon' and '9', not sec"),
        ("a.csv", KINETICS + ",x,1,9,val,0\n", r"a\.csv:6: youtube_id or label is empty"),
        ("a.csv", "youtube_id,time_start,time_end,split\n", r"a\.csv:1: no column 'label'"),
        ("a.csv", "one,two\n", r"a\.csv:1: 'one,two' is the head of no known data set"),
        ("a.json", '[{"id": "1"}]', r"a\.json:1: entry 1 of the list, \{'id': '1'\}, has no 'id' or no 'template'"),
        ("a.json", '[\n{"id": 1,\n}]', r"a\.json:3: no JSON"),
        ("a.json", '{"id": 1}', "a dict, not the list"),
        ("a.csv", EPIC.replace("00:00:00.50", "half"), r"a\.csv:2: neither times hh:mm:ss nor class numbers"),
        ("a.csv", EPIC.replace("00:00:00.50", "00:00:02.50"), r"a\.csv:2: from 00:00:02\.50 to .* not valid"),
        ("a.csv", EPIC.replace(",114,", ",300,"), r"a\.csv:3: noun and verb \(300, 6\) are beyond 300 nouns"),
        ("a.csv", KINETICS, r"none of its 4 videos is in .*, for example --bD2BMKbTE_000012_000022"),
    ],
)  # fmt: skip
def test_malformed_lines_are_named_by_file_and_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        annotations.read(tmp_path / name, touch(tmp_path / "videos", "P01_01.mp4"))


def test_many_malformed_lines_are_one_error(tmp_path):
    (tmp_path / "a.csv").write_text(KINETICS + "x\n" * 30)
    with pytest.raises(DataError, match=r"(?s)a\.csv:6: .*a\.csv:15: .*\.\.\. and 20 more"):
        annotations.read(tmp_path / "a.csv", tmp_path)


def test_a_recipe_takes_annotation_files(tmp_path):
    rows = ["label,youtube_id,time_start,time_end,split"]
    for i in range(4):
        write(tmp_path / "videos" / f"id{i}_000000_000010.mp4", frames=20)
        rows.append(f"{('run', 'jump')[i % 2]},id{i},0,10,train")
    for name in ("train", "val"):
        (tmp_path / f"{name}.csv").write_text("\n".join([*rows, f"run,gone_{name},0,10,{name}", ""]))
    changes = [f"data.{k}={tmp_path / v}" for k, v in (("path", "train.csv"), ("val", "val.csv"), ("videos", "videos"))]
    training, validation, config = recipe.datasets(recipe.load("demo", changes))
    assert validation is not None and len(training) == len(validation) == 4 and config.model.classes == 2
    assert training.note.count("1 of 5 videos are not in") == 2 and "gone_train_000000_000010" in training.note
    problems = Problems(note=training.note)
    assert "gone_val" in str(problems)
    whole, held, _ = recipe.datasets(recipe.load("demo", [changes[0], changes[2]]))
    assert held is not None and (len(whole), len(held)) == (2, 2)  # of each class one is held out
    with pytest.raises(DataError, match=r"data.format='folder', but .* is a file"):
        listing(tmp_path / "train.csv", kind="folder")


def test_videos_of_a_varying_rate_are_read_by_frame_or_by_the_clock(tmp_path):
    """Frames 0..9 a tenth of a second apart, 10..19 half a second: by the clock the second half is shown longer."""
    import av

    path = tmp_path / "varies.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(20):
            picture = np.full((32, 48, 3), 10 * i + 20, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i if i < 10 else 10 + 5 * (i - 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    video = open_video(path)
    assert video.frames == 20 and [video.at(s) for s in (0, 0.55, 0.9, 1.2, 1.5, 99)] == [0, 5, 9, 10, 11, 19]
    clock = open_video(path, fps=2)
    shown = [round((level(f) - 20) / 10) for f in clock.read(range(clock.frames), 16, 24)]
    assert shown == [0, 5, *range(10, 20)] and clock.at(1.0) == 2


def test_short_videos_are_counted_apart(tmp_path):
    path = write(tmp_path / "a.mp4", frames=6)  # a clip of SPEC takes 7
    clips, problems = VideoClips([(path, 0)], ("x",), SPEC), Problems()
    for key in ((0, 0), (None, 0)):
        sample = clips[key]
        problems.add(sample.problems)
        assert isinstance(sample.video, torch.Tensor)
    told = "1 video(s) are shorter than a clip: they go on from their first frame"
    assert not problems.files and str(problems) == told


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match=r"pipe\.mp4: not a file"):
        open_video(tmp_path / "pipe.mp4")


def test_epic_kitchens_from_the_command_line(tmp_path, capsys):
    """Two heads from the annotation file to the table of an evaluation and the words of a prediction."""
    write(tmp_path / "videos" / "P01_01.mp4", frames=48)  # 4 s
    rows = [
        f"P01_01_{i},P01,P01_01,0,00:00:{0.25 * i:05.2f},00:00:{0.25 * i + 1:05.2f},1,2,x,x,{i % 2},x,{i % 3},[],[]\n"
        for i in range(8)
    ]
    (tmp_path / "EPIC_100_train.csv").write_text(EPIC_HEAD + "".join(rows))
    for head, count in (("noun", 3), ("verb", 2)):
        names = "".join(f"{i},{head}{i},[]\n" for i in range(count))
        (tmp_path / f"EPIC_100_{head}_classes.csv").write_text("id,key,instances\n" + names)
    (tmp_path / "tiny.toml").write_text(TINY)
    file, videos, out = str(tmp_path / "EPIC_100_train.csv"), str(tmp_path / "videos"), str(tmp_path / "out")
    argv = ["train", str(tmp_path / "tiny.toml"), "--data", file, "--val", file, "--videos", videos, "--out", out]
    assert main([*argv, "--set", "epochs=1", "--set", "augment.mixup=0.2", "--set", "data.stride=1"]) == 0
    told = capsys.readouterr().out
    assert "8 videos of (3, 2) classes, 8 held out" in told and "video is decoded by" in told
    assert (tmp_path / "out" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert main(["evaluate", "--run", out, "--data", file, "--videos", videos, "--workers", "0"]) == 0
    told = capsys.readouterr().out
    assert "action top-1" in told and "noun top-1" in told and "of 8 videos" in told and "verb1" in told
    assert main(["predict", str(tmp_path / "videos" / "P01_01.mp4"), "--run", out, "-k", "2"]) == 0
    assert "verb" in capsys.readouterr().out.split()[0]
    assert main(["train", str(tmp_path / "tiny.toml"), "--data", file, "--videos", str(tmp_path / "out")]) == 2
    assert "none of its 8 videos is in" in capsys.readouterr().err


def test_torchcodec_is_taken_where_it_loads_and_gives_the_same_video(tmp_path, monkeypatch):
    """By a stand-in with its interface: torchcodec's wheels load with few builds of torch."""
    import sys
    import types

    from vivit import video

    path = write(tmp_path / "a.mp4", frames=24)

    class VideoDecoder:
        def __init__(self, file):
            self.frames = torch.from_numpy(open_video(file, "pyav").read(range(24), 32, 48)).permute(0, 3, 1, 2)
            self.metadata = types.SimpleNamespace(
                num_frames=24, average_fps=12.0, height=32, width=48, duration_seconds=2.0
            )

        def get_frames_at(self, indices):
            return types.SimpleNamespace(data=self.frames[indices])

    assert "pyav" in video.decoder_line("pyav")
    module = types.ModuleType("torchcodec.decoders")
    monkeypatch.setattr(module, "VideoDecoder", VideoDecoder, raising=False)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    video.which_decoder.cache_clear()
    try:
        assert video.decoder_line("auto") == "video is decoded by torchcodec"
        for source in (path, Segment(path, 0.5, 1.5)):
            theirs, ours = open_video(source, "auto"), open_video(source, "pyav")
            assert (theirs.frames, theirs.fps, theirs.height) == (ours.frames, ours.fps, ours.height)
            assert [theirs.at(s) for s in (0.0, 0.5, 9.0)] == [ours.at(s) for s in (0.0, 0.5, 9.0)]
            assert (theirs.read([5, 0, 5], 32, 48) == ours.read([5, 0, 5], 32, 48)).all()
            assert theirs.read([1], 16, 24).shape == (1, 16, 24, 3)
    finally:
        video.which_decoder.cache_clear()
