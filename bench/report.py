"""`python -m bench report`: the records become tables in Markdown, and figures beside them.

README's tables stand between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`, NAME one of `ops`, `models`, `memory`,
`gains`, `bytes`, `levels` and `figures`; every other case and dtype goes to a README.md in the folder of the records.
The same records give the same text, byte for byte; `--check` compares and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vivit.config import nearest
from vivit_kernels import gains

from . import gain_tables, kept, kept_tables, level_tables, plots, tables
from .record import RESULTS, ROOT, Record, read

_NOTHING = {
    "ops": "No record yet: `python -m bench --out bench/results` measures.",
    "models": "No record of a whole model yet: `python -m bench models --out bench/results` measures.",
    "memory": "No record of memory yet: `python -m bench memory --out bench/results` measures.",
    "gains": "No record yet: `python -m bench accelerate --keep` measures.",
    "bytes": "No record yet: `python -m bench kept --keep` measures.",
    "levels": "No record of them in turns yet: `python -m bench models --step train --out bench/results` measures.",
    "figures": "No figure yet: there is no record to draw.",
}
_MARKER = re.compile(r"^<!-- (/?)bench:(\S+) -->$")


def sections(records: list[Record], figures: str, details: str, counted: Sequence[Any] = ()) -> dict[str, list[str]]:
    """Lines for every marker. figures, details: the folder of figures and the file of all tables, as README links;
    counted: the records of kept.py."""
    ops = tables.ops(records)
    found = {
        "ops": [*ops, "", f"All cases, dtypes and figures: [{details}]({details})."] if ops else [],
        "models": tables.models(records),
        "memory": tables.memory(records),
        "gains": gain_tables.lines(gains.records()),
        "bytes": kept_tables.lines(counted, figures),
        "levels": level_tables.lines(records),
        "figures": _pictures(records, figures),
    }
    return {name: lines or [_NOTHING[name]] for name, lines in found.items()}


def everything(records: list[Record], figures: str, root: str) -> list[str]:
    """The file of all tables. root: of the repository, as it links."""
    parts = {
        "Operations": tables.all_ops(records, root),
        "Whole models": tables.all_models(records),
        "Memory": tables.all_memory(records),
        "Figures": [f"- [{figure.caption}]({figures}/{figure.name}.svg)" for figure in plots.planned(records)],
    }
    lines = ["# Records", "", "Written by `python -m bench report` from the .jsonl files beside it; edit nothing here."]
    for title, found in parts.items():
        lines += ["", f"## {title}", "", *found] if found else []
    return lines


def _pictures(records: list[Record], folder: str) -> list[str]:
    """Of each device its first roofline, and memory against frames and clips."""
    shown: dict[tuple[str, str], plots.Planned] = {}
    for figure in plots.planned(records):
        if figure.kind != "bars":
            shown.setdefault((figure.device, figure.kind), figure)
    lines = [line for x in shown.values() for line in ("", f"![{x.caption}]({folder}/{x.name}.svg)")]
    return lines[1:]


def filled(text: str, contents: dict[str, list[str]], where: str = "README.md") -> str:
    """`text` with what stands between its markers replaced. Raises ValueError for markers that are not in pairs."""
    lines, opened = [], ""
    for number, line in enumerate(text.splitlines(), 1):
        match = _MARKER.match(line)
        closes, name = match.groups() if match else ("", "")
        if match and name not in contents:
            raise ValueError(f"bench report: {where}:{number}: no table {name!r}; {nearest(name, contents)}")
        if match and (name != opened if closes else opened):
            expected = f"<!-- /bench:{opened} -->" if opened else f"<!-- bench:{name} --> before it"
            raise ValueError(f"bench report: {where}:{number}: found {line}, expected {expected}")
        if not opened or match:
            lines.append(line)
        if match:
            opened = "" if closes else name
            lines += [] if closes else contents[name]
    if opened:
        raise ValueError(f"bench report: {where}: no <!-- /bench:{opened} --> after <!-- bench:{opened} -->")
    return "\n".join(lines) + "\n"


def first_difference(old: str, new: str, where: str) -> str:
    """Names the first line that is not what the records give; "" if there is none."""
    before, after = old.split("\n"), new.split("\n")
    for number in range(max(len(before), len(after))):
        has, gives = (lines[number] if number < len(lines) else "(nothing)" for lines in (before, after))
        if has != gives:
            return f"bench report: {where}:{number + 1}\n  it says         {has}\n  the records say {gives}"
    return ""


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench report", description=(__doc__ or "").partition("\n")[0])
    top.add_argument(
        "--from", dest="source", type=Path, default=RESULTS, metavar="DIR", help="records, and their README"
    )
    top.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="the file with markers")
    top.add_argument("--figures", type=Path, default=RESULTS / "figures", metavar="DIR", help="where figures go")
    top.add_argument("--check", action="store_true", help="write nothing; 1 if a file is not what the records give")
    top.add_argument("--png", action="store_true", help="figures as PNG, not SVG")
    return top


def main(argv: list[str] | None = None) -> int:
    """0; 1 if `--check` finds a difference; 2 for an input that cannot be used, after saying what to do."""
    args = _parser().parse_args(argv)
    try:
        records = _records(args.source)
        texts = _texts(args, records)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.check:
        return _check(args, records, texts)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"{os.path.relpath(path)}: from {len(records)} records")
    _draw(_figures(args.source, records), args.figures, ".png" if args.png else ".svg")
    return 0


def _records(source: Path) -> list[Record]:
    if source.is_dir():
        return list(read(source))
    if source == RESULTS:  # a checkout without a measurement
        return []
    raise ValueError(f"bench report: --from {source}: no such folder; `python -m bench --out {source}` makes one")


def _texts(args: argparse.Namespace, records: list[Record]) -> dict[Path, str]:
    """What each file must say: README, and if there are records theirs."""
    details = args.source / "README.md"
    if not args.readme.is_file() or args.readme.resolve() == details.resolve():
        raise ValueError(f"bench report: --readme {args.readme}: not a file with markers; name one outside --from")
    old = args.readme.read_text(encoding="utf-8")
    if not any(map(_MARKER.match, old.splitlines())):
        names = ", ".join(_NOTHING)
        raise ValueError(
            f"bench report: {args.readme.name} has no table to fill\n"
            f"  -> write the lines <!-- bench:NAME --> and <!-- /bench:NAME --> into it, NAME one of {names}"
        )

    def link(target: Path, file: Path) -> str:
        return Path(os.path.relpath(target, file.parent)).as_posix()

    counted = kept.read(args.source / kept.FILE.name)
    contents = sections(records, link(args.figures, args.readme), link(details, args.readme), counted)
    texts = {args.readme: filled(old, contents, args.readme.name)}
    if records:
        lines = everything(records, link(args.figures, details), f"{link(ROOT, details)}/")
        texts[details] = "\n".join(lines) + "\n"
    return texts


def _check(args: argparse.Namespace, records: list[Record], texts: dict[Path, str]) -> int:
    complaints = []
    for path, text in texts.items():
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        complaints.append(first_difference(old, text, os.path.relpath(path)))
    names = [figure.name for figure in _figures(args.source, records)]
    if missing := [name for name in names if not (args.figures / f"{name}.svg").is_file()]:
        complaints.append(f"bench report: {missing[0]}.svg is linked to and not in {os.path.relpath(args.figures)}")
    complaint = next(filter(None, complaints), "")
    print(f"{complaint}\n  -> python -m bench report" if complaint else f"as the {len(records)} records give it")
    return int(bool(complaint))


def _figures(source: Path, records: list[Record]) -> list[plots.Planned]:
    return [*plots.planned(records), *kept_tables.planned(kept.read(source / kept.FILE.name))]


def _draw(figures: list[plots.Planned], folder: Path, suffix: str) -> None:
    try:
        for figure in figures:
            plots.save(figure, folder / f"{figure.name}{suffix}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        print('no figures: they need matplotlib\n  -> pip install "vivit-kernels[bench]"')
        return
    print(f"{len(figures)} figures in {os.path.relpath(folder)}" if figures else "no figures: there is nothing to draw")
    known = {f"{figure.name}{suffix}" for figure in figures}
    if old := sorted(path.name for path in folder.glob(f"*{suffix}") if path.name not in known):
        print(f"of other records, left as they are: {', '.join(old)}")
