"""The annotation files of Kinetics, Something-Something v2, EPIC-Kitchens and Moments in Time, as they are published.

`read(file, folder)` -> clips, class names and the files that are not there. A malformed line is an error that names
file and line; a missing video is not: downloads of these data sets are never complete, so missing ones are counted.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .config import nearest
from .video import EXTENSIONS, Segment

Source = Path | Segment
Label = int | tuple[int, int]
Items = Sequence[tuple[Source, Label]]


class DataError(Exception):
    """Data that cannot be used, with what to do about it; shown without a traceback."""


class Heads(NamedTuple):
    """Class names of EPIC-Kitchens' two heads, in the order of Scenic's model: 300 nouns, 97 verbs."""

    noun: tuple[str, ...]
    verb: tuple[str, ...]


Classes = tuple[str, ...] | Heads


def head_sizes(classes: Classes) -> int | tuple[int, int]:
    """What `ViViTConfig.classes` is for these class names."""
    return (len(classes.noun), len(classes.verb)) if isinstance(classes, Heads) else len(classes)


def from_json(names: list[Any]) -> Classes:
    """Class names as JSON keeps them: a list, or a list of lists for two heads."""
    return Heads(*map(tuple, names)) if names and isinstance(names[0], list) else tuple(names)


class Listing(NamedTuple):
    items: Items  # (file or segment, label)
    classes: Classes
    missing: list[str]  # videos that the file names and the folder lacks

    def report(self, file: str | Path, folder: str | Path) -> str:
        """One line on what is missing; empty if nothing is."""
        total = len(self.items) + len(self.missing)
        if not self.missing:
            return ""
        return f"{file}: {len(self.missing)} of {total} videos are not in {folder}, the first is {self.missing[0]}"


def read(
    file: str | Path, folder: str | Path = "", kind: str = "auto", labels: str = "", classes: Classes = ()
) -> Listing:
    """file: an annotation file as published. folder: where its videos lie, at any depth; empty: beside the file.

    kind: one of KINDS, or "auto", by what the file looks like. labels: a file with the class names, in order
        (Something-Something's labels.json, Moments' moments_categories.txt, one name a line); left out, those of `file`
        in alphabetical order, which is how Kinetics is numbered.
    classes: fixes the names: those of training, for a validation file.
    Raises DataError for malformed lines (the first ten, by number), unknown labels, a folder with none of the videos.
    """
    file, folder = Path(file), Path(folder) if folder else Path(file).parent
    if not file.is_file():
        raise DataError(f"{file}: no such annotation file")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of videos\n  -> data.videos, the folder that holds those of {file}")
    if kind == "auto":
        kind = detect(file)
    if kind not in KINDS:
        raise DataError(f"data.format={kind!r} is not known; {nearest(kind, ('auto', *KINDS))}")
    if kind == "epic":
        return _epic(file, Videos(folder), labels, classes)
    if isinstance(classes, Heads):
        raise DataError(f"{file}: {kind} has one label a video, the model has two heads")
    rows = _ROWS[kind](file)
    fixed = classes or (_label_file(Path(labels)) if labels else ())
    names = tuple(fixed) if fixed else tuple(sorted({label for _, label, _ in rows}))
    index, lines = {name: i for i, name in enumerate(names)}, Malformed(file)
    for number, label, _ in rows:
        if label not in index:
            lines.add(number, f"label {label!r} is none of the {len(names)} classes; {_near(label, names)}")
    lines.check()
    return _find(file, Videos(folder), [(candidates, index[label]) for _, label, candidates in rows], names)


def _near(label: str, names: tuple[str, ...]) -> str:
    return nearest(label, names)[:200]


class Malformed:
    """Lines that cannot be read, all of them in one error."""

    def __init__(self, file: Path):
        self.file, self.lines = file, []

    def add(self, number: int, what: str) -> None:
        self.lines.append(f"{self.file}:{number}: {what}")

    def check(self) -> None:
        if self.lines:
            more = [f"... and {len(self.lines) - 10} more"] if len(self.lines) > 10 else []
            raise DataError("\n".join([*self.lines[:10], *more]))


class Videos:
    """Files of a folder by name without extension, and by path below it; read once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.by_stem: dict[str, Path] = {}
        self.by_path: dict[str, Path] = {}
        for root, folders, names in os.walk(folder, followlinks=True):
            folders.sort()
            for name in sorted(names):
                path = Path(root, name)
                if path.suffix.lower() in EXTENSIONS:
                    self.by_stem.setdefault(path.stem, path)
                    self.by_path["/".join(path.relative_to(folder).parts)] = path

    def find(self, candidates: tuple[str, ...]) -> Path | None:
        """The first of `candidates` that is here: a path below the folder, or a file's name without extension."""
        for name in candidates:
            if found := self.by_path.get(name) or self.by_stem.get(name):
                return found
        return None


Row = tuple[int, str, tuple[str, ...]]  # line, label, names that the video's file may have


def _find(file: Path, videos: Videos, rows: list[tuple[tuple[str, ...], Label]], classes: Classes) -> Listing:
    items: list[tuple[Source, Label]] = []
    missing: list[str] = []
    for candidates, label in rows:
        found = videos.find(candidates)
        if found is None:
            missing.append(candidates[0])
        else:
            items.append((found, label))
    return _some(file, videos, Listing(items, classes, missing))


def _some(file: Path, videos: Videos, listing: Listing) -> Listing:
    if not listing.items:
        what = (
            f"none of its {len(listing.missing)} videos is in" if listing.missing else "no line with a video in it; of"
        )
        example = f", for example {listing.missing[0]}" if listing.missing else ""
        raise DataError(
            f"{file}: {what} {videos.folder}{example}\n  -> data.videos, the folder that holds them (at any depth)"
        )
    return listing


# ---- the formats ----


def detect(file: Path) -> str:
    """Which of KINDS (or "list": `path label` lines) a file is, by its ending and first line."""
    if file.suffix.lower() == ".json":
        return "ssv2"
    if file.suffix.lower() != ".csv":
        return "list"
    with open(file, errors="replace") as opened:
        head = next(csv.reader(opened), [])
    if "youtube_id" in head:
        return "kinetics"
    if "verb_class" in head or "narration_id" in head:
        return "epic"
    if len(head) in (2, 3, 4) and Path(head[0]).suffix.lower() in EXTENSIONS:
        return "moments"
    raise DataError(
        f"{file}:1: {','.join(head)[:80]!r} is the head of no known data set"
        f"\n  -> data.format = one of {', '.join(KINDS)}"
    )


def _table(file: Path, needed: tuple[str, ...], lines: Malformed) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a CSV file with a head, rows of another length left to `lines`."""
    with open(file, newline="", errors="replace") as opened:
        reader = csv.reader(opened)
        head = [name.strip() for name in next(reader, [])]
        absent = [name for name in needed if name not in head]
        if absent:
            raise DataError(f"{file}:1: no column {absent[0]!r} in its head, {','.join(head)[:120]}")
        try:
            for row in reader:
                if len(row) != len(head):
                    if row:
                        lines.add(reader.line_num, f"{len(row)} fields, the head has {len(head)}")
                    continue
                yield reader.line_num, dict(zip(head, row, strict=True))
        except csv.Error as error:
            lines.add(reader.line_num, str(error))


def kinetics(file: Path) -> list[Row]:
    """`label,youtube_id,time_start,time_end,split[,is_cc]`; files `<id>_<start>_<end>`, six digits each, or `<id>`.

    K400, K600 and K700. A file is the trimmed clip, whatever its name.
    """
    lines, rows = Malformed(file), []
    for number, row in _table(file, ("label", "youtube_id", "time_start", "time_end"), lines):
        name, label = row["youtube_id"].strip(), row["label"].strip()
        try:
            start, end = int(float(row["time_start"])), int(float(row["time_end"]))
        except (ValueError, OverflowError):
            lines.add(number, f"time_start and time_end are {row['time_start']!r} and {row['time_end']!r}, not seconds")
            continue
        if not name or not label:
            lines.add(number, "youtube_id or label is empty")
            continue
        rows.append((number, label, (f"{name}_{start:06d}_{end:06d}", f"{name}_{start}_{end}", name)))
    lines.check()
    return rows


def ssv2(file: Path) -> list[Row]:
    """A JSON list of `{"id", "template", ...}`: the label is the template without its brackets; files `<id>.webm`."""
    try:
        entries = json.loads(file.read_text(errors="replace"))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: no JSON: {error.msg}") from error
    if not isinstance(entries, list):
        raise DataError(f"{file}: a {type(entries).__name__}, not the list of videos of Something-Something v2")
    lines, rows = Malformed(file), []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not entry.get("id") or not isinstance(entry.get("template"), str):
            lines.add(number, f"entry {number} of the list, {str(entry)[:60]}, has no 'id' or no 'template'")
            continue
        rows.append((number, _unbracketed(entry["template"]), (str(entry["id"]),)))
    lines.check()
    return rows


def _unbracketed(template: str) -> str:
    return template.replace("[", "").replace("]", "")


def moments(file: Path) -> list[Row]:
    """`<label>/<file>,<label>,<votes>,<votes>` without a head (trainingSet.csv, validationSet.csv)."""
    lines, rows = Malformed(file), []
    with open(file, newline="", errors="replace") as opened:
        reader = csv.reader(opened)
        for row in reader:
            if not row:
                continue
            if len(row) < 2 or not row[0].strip() or not row[1].strip():
                lines.add(reader.line_num, f"{','.join(row)[:60]!r} is not `path,label,votes,votes`")
                continue
            path = row[0].strip()
            below = tuple(f"{part}/{path}" for part in ("training", "validation"))
            rows.append((reader.line_num, row[1].strip(), (path, *below, Path(path).stem)))
    lines.check()
    return rows


_ROWS: dict[str, Callable[[Path], list[Row]]] = {"kinetics": kinetics, "ssv2": ssv2, "moments": moments}
KINDS = (*_ROWS, "epic")


def seconds(text: str) -> float:
    """`hh:mm:ss.ss` in seconds."""
    hours, minutes, rest = text.split(":")
    value = 3600 * int(hours) + 60 * int(minutes) + float(rest)
    if not math.isfinite(value) or value < 0:
        raise ValueError(text)
    return value


def epic_rows(file: Path) -> list[tuple[int, dict[str, str], tuple[float, float], tuple[int, int]]]:
    """(line, row, (start, stop) in seconds, (noun, verb)) of EPIC_100_train.csv or EPIC_100_validation.csv."""
    needed = ("narration_id", "video_id", "start_timestamp", "stop_timestamp", "verb_class", "noun_class")
    lines, rows = Malformed(file), []
    for number, row in _table(file, needed, lines):
        try:
            times = seconds(row["start_timestamp"]), seconds(row["stop_timestamp"])
            label = int(row["noun_class"]), int(row["verb_class"])
        except ValueError as error:
            lines.add(number, f"neither times hh:mm:ss nor class numbers where they should be ({error})")
            continue
        if times[1] <= times[0] or min(label) < 0:
            lines.add(
                number, f"from {row['start_timestamp']} to {row['stop_timestamp']}, noun and verb {label}: not valid"
            )
            continue
        rows.append((number, row, times, label))
    lines.check()
    return rows


def _epic(file: Path, videos: Videos, labels: str, classes: Classes) -> Listing:
    """Actions as segments of the videos `<video_id>`, or clips `<narration_id>` where somebody cut them beforehand.

    The label is (noun, verb), numbered as EPIC_100_noun_classes.csv and EPIC_100_verb_classes.csv, 300 and 97, whose
    names are read from beside `file`, or from the folder `labels`; without those files numbers serve as names.
    """
    rows = epic_rows(file)
    if not classes:
        beside = Path(labels) if labels else file.parent
        classes = Heads(_epic_names(beside, "noun", 300), _epic_names(beside, "verb", 97))
    if not isinstance(classes, Heads):
        raise DataError(f"{file}: EPIC-Kitchens has two heads, noun and verb; the classes given are of one head")
    items: list[tuple[Source, Label]] = []
    missing, lines = [], Malformed(file)
    for number, row, (start, stop), label in rows:
        if label[0] >= len(classes.noun) or label[1] >= len(classes.verb):
            lines.add(number, f"noun and verb {label} are beyond {len(classes.noun)} nouns, {len(classes.verb)} verbs")
        clip, whole = videos.find((row["narration_id"],)), videos.find((row["video_id"],))
        if clip is not None:
            items.append((clip, label))
        elif whole is not None:
            items.append((Segment(whole, start, stop), label))
        else:
            missing.append(row["video_id"])
    lines.check()
    return _some(file, videos, Listing(items, classes, missing))


def _epic_names(folder: Path, head: str, count: int) -> tuple[str, ...]:
    file = folder / f"EPIC_100_{head}_classes.csv"
    if not file.is_file():
        return tuple(map(str, range(count)))
    lines, names = Malformed(file), {}
    for number, row in _table(file, ("id", "key"), lines):
        if not row["id"].isdigit():
            lines.add(number, f"id {row['id']!r} is no number")
            continue
        names[int(row["id"])] = row["key"]
    lines.check()
    return tuple(names.get(i, str(i)) for i in range(max(names, default=-1) + 1))


def _label_file(file: Path) -> tuple[str, ...]:
    """Class names in order: a JSON object of name to number, `name,number` lines, or a name a line."""
    if not file.is_file():
        raise DataError(f"{file}: no such file of class names (data.labels)")
    text = file.read_text(errors="replace")
    if file.suffix.lower() == ".json":
        try:
            pairs = [(int(number), _unbracketed(name)) for name, number in json.loads(text).items()]
        except (ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{file}: no JSON object of class name to number ({error})") from error
    else:
        rows = [line.strip() for line in text.splitlines() if line.strip()]
        split = [row.rpartition(",") for row in rows]
        numbered = all(comma and number.strip().isdigit() for _, comma, number in split)
        pairs = [(int(n), name.strip()) for name, _, n in split] if numbered else list(enumerate(rows))
    names = dict(pairs)
    if sorted(names) != list(range(len(pairs))) or not pairs:
        raise DataError(f"{file}: its {len(pairs)} classes are not numbered 0 to {len(pairs) - 1}, each once")
    return tuple(names[i] for i in range(len(names)))
