"""The report of the benchmark: what its tables say, against records whose ratios and shares are recomputed here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import compare, level_tables, plots, record, report, tables
from bench.record import Record
from bench.show import final_table

ROOT = Path(__file__).resolve().parent.parent
CPU = {"device": "Some CPU, 2 threads", "torch": "2.13.0+cpu", "malloc": "default"}
GPU = {"device": "Some GPU", "torch": "2.13.0+cu130", "triton": "3.6.0", "cuda": "13.0", "driver": "580.1"}
NOW = "source-of-now"


@pytest.fixture(autouse=True)
def source(monkeypatch):
    monkeypatch.setattr(record, "source_hash", lambda op, backend: NOW)


def made(backend: str, ms: float | None, **changes) -> Record:
    """A record of one run on the CPU: temporal attention, forward. Its work takes 1 ms of copying, 0.5 ms of products.

    1e9 bytes at 1,000 GB/s; 1e9 FLOPs at 2 TFLOP/s.
    """
    ours = backend in ("torch", "triton", "cpu") or "@" in backend
    values: dict = dict(
        run="r1", date="2026-11-24T10:00:00+00:00", kind="op", op="temporal", case="vivit_b_16x2.b1", shape="B=1",
        dtype="float32", direction="forward", backend=backend, ours=ours, status="ok", commit="abc1234567",
        machine=CPU, source=NOW if ours else "",
    )  # fmt: skip
    if ms is not None:
        values |= dict(
            ms={"median": ms, "p20": ms, "p80": 2 * ms, "n": 9}, bytes=10**9, flops=10**9,
            share={"copy": 1 / ms, "matmul": 0.5 / ms}, bound="copy", error={"share": 0.5, "checked": 1.0},
            ceilings={"copy_gbps": 1000.0, "matmul_tflops": 2.0}, memory={"peak": 3 * 2.0**20},
        )  # fmt: skip
    return Record(**(values | changes))


def failed(backend: str, status: str, reason: str, **changes) -> Record:
    return made(backend, None, status=status, reason=reason, **changes)


def run() -> list[Record]:
    """Ours takes 2 ms, the best honest peer 5 ms, one with its ideal layout 3 ms."""
    return [
        made("torch", 2.0),
        made("eager", 8.0),
        made("sdpa", 5.0),
        made("sdpa_ideal", 3.0, ideal=True),
        failed("flash_attn_2", "crashed", "RuntimeError: invalid | grid"),
    ]


def text_of(records: list[Record]) -> str:
    return "\n".join(tables.ops(records))


def rows_of(lines: list[str] | str) -> list[list[str]]:
    """Cells of the rows of tables, without heads and rules."""
    lines = lines.splitlines() if isinstance(lines, str) else lines
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in rows if row[0] not in ("operation", "model") and not row[0].startswith("---")]


# ---- what may be compared ----


def test_the_best_peer_pays_for_its_copies():
    (group,) = compare.groups(run())
    (ours,) = group.ours
    assert [peer.backend for peer in group.peers] == ["sdpa_ideal", "sdpa", "eager"]
    assert group.best_peer and group.best_peer.backend == "sdpa" and group.ratio(ours) == 5 / 2
    assert group.best_ideal and group.ratio(ours, group.best_ideal) == 3 / 2
    assert [one.backend for one in group.untimed] == ["flash_attn_2"]


def test_ratios_are_not_rounded_and_never_cross_runs():
    other = made("sdpa", 1.0, run="r2")
    first, second = compare.groups([made("torch", 3.0), made("eager", 7.0), other])
    assert first.ratio(first.ours[0]) == 7 / 3
    assert second.ours == [] and second.best_peer is other
    with pytest.raises(ValueError, match=r"from run r2, which is not of this group \(run r1\)"):
        first.ratio(first.ours[0], other)
    alone = compare.groups([made("torch", 3.0)])[0]
    assert alone.ratio(alone.ours[0]) is None


@pytest.mark.parametrize("changes", [dict(dtype="bfloat16"), dict(direction="backward"), dict(case="vivit_b_16x2.b8"),
                                     dict(machine=GPU), dict(machine=CPU | {"malloc": "tuned"})])  # fmt: skip
def test_a_group_is_one_measurement(changes):
    assert len(compare.groups([made("torch", 2.0), made("sdpa", 1.0, **changes)])) == 2


def test_an_older_kernel_beside_ours_is_not_ours_and_no_peer():
    (group,) = compare.groups([made("torch", 2.0), made("torch@v0.1", 1.0), made("sdpa", 5.0)])
    assert [one.backend for one in group.ours] == ["torch"] and [one.backend for one in group.peers] == ["sdpa"]
    assert group.ratio(group.ours[0], group.timed[0]) == 1 / 2


def test_the_spread_is_of_rounds_in_turns():
    ours, peer = made("torch", 2.0, rounds=[2.0, 1.0, 4.0]), made("sdpa", 5.0, rounds=[4.0, 5.0, 3.0])
    (group,) = compare.groups([ours, peer])
    assert group.spread(ours) == (3 / 4, 5.0)
    ours.rounds.pop()
    assert group.spread(ours) is None  # their rounds are not the same


def test_which_run_is_shown():
    old, new, alone = (made("torch", ms, run=name) for name, ms in (("r1", 2.0), ("r2", 3.0), ("r3", 4.0)))
    runs = [old, made("sdpa", 5.0), new, made("sdpa", 5.0, run="r2"), alone]
    assert compare.current(compare.groups(runs))[0].best is new  # the last with a peer beside it
    new.source = "changed since"
    assert compare.current(compare.groups(runs))[0].best is old
    old.source = "changed since"
    assert compare.current(compare.groups(runs))[0].best is alone  # a ratio of an older kernel says nothing of this one


# ---- the table of operations ----


def test_a_row_says_time_limit_error_memory_peer_and_ratio():
    assert rows_of(text_of(run())) == [
        ["temporal `vivit_b_16x2.b1`", "forward", "`torch`", "2.00 (2.00–4.00)", "50 % copy", "0.50", "3.00 MiB",
         "`sdpa` 5.00", "2.50×", "1.50×", "–"]
    ]  # fmt: skip


def test_another_backend_of_ours_is_shown_beside_our_composition():
    (row,) = rows_of(text_of([made("cpu", 0.5), *run()]))
    assert row[2:4] == ["`cpu`", "0.500 (0.500–1.00)"] and row[-3:] == ["10.0×", "6.00×", "4.00×"]
    head, cpu, torch_ = final_table(compare.groups([made("cpu", 0.5), *run()]))
    assert head.split()[-4:] == ["best", "peer", "ms", "ratio"] and "composed" in head
    assert [line.split()[-4:] for line in (cpu, torch_)] == [["4.00", "sdpa", "5", "10.00"], ["-", "sdpa", "5", "2.50"]]


def test_below_the_table_stand_source_ceilings_and_who_gave_no_time():
    text = text_of(run())
    assert "Some CPU, 2 threads; torch 2.13.0+cpu; commit abc1234567, 2026-11-24." in text
    assert "Ceilings of that run: copy 1,000 GB/s, float32 matmul 2.00 TFLOP/s." in text
    assert r"No time: `flash_attn_2` crashed (temporal): RuntimeError: invalid \| grid." in text
    assert "Slower than the best peer in 0 of 1 rows." in text
    assert "†" not in text and "‡" not in text and "§" not in text


def test_a_loss_is_said_in_words():
    records = [made("torch", 2.0, rounds=[2.0, 2.0]), made("sdpa", 1.0, rounds=[1.0, 3.0])]
    text = text_of(records)
    assert rows_of(text)[0][8] == "0.500× (0.500–1.50)"
    assert "Slower than the best peer in 1 of 1 rows: temporal forward (0.500×)." in text
    assert "In 1 the rounds do not agree who is faster." in text


def test_another_run_gives_no_ratio_but_the_row_says_so():
    (row,) = rows_of(text_of([made("torch", 2.0), made("sdpa", 5.0, run="r2")]))
    assert row[7:] == ["none", "–", "–", "–"]


def test_ours_without_a_time_is_a_row():
    records = [failed("torch", "out of memory", "13 GB"), made("sdpa", 5.0)]
    (row,) = rows_of(text_of(records))
    assert row[2:] == ["none", "–", "–", "–", "–", "`sdpa` 5.00", "–", "–", "–"]
    assert "`torch` out of memory (temporal): 13 GB." in text_of(records)


@pytest.mark.parametrize(
    "mark, changes, sentence",
    [
        ("†", dict(source="changed since"), "† Measured before this kernel last changed"),
        ("‡", dict(dirty=True), "‡ Measured with uncommitted changes"),
        ("§", dict(clocks={"throttled": "power cap"}), "§ The GPU held its clocks back"),
        ("¶", dict(host=2.1), "¶ Shorter than the host takes to launch it"),
        ("", dict(host=1.9), ""),
    ],
)
def test_a_figure_that_needs_a_caveat_is_marked(mark, changes, sentence, monkeypatch):
    host = {"host": changes.pop("host")} if "host" in changes else {}
    ours = made("torch", 2.0, **changes)
    ours.ms |= host
    text = text_of([ours, made("sdpa", 5.0)])
    assert rows_of(text)[0][2] == f"`torch`{mark}" and sentence in text
    if mark == "†":
        monkeypatch.setattr(record, "source_hash", lambda op, backend: "changed since")
        text = text_of([made("torch", 2.0, **changes), made("sdpa", 5.0)])
        assert rows_of(text)[0][2] == "`torch`" and sentence not in text


def test_only_a_part_was_compared():
    (row,) = rows_of(text_of([made("torch", 2.0, error={"share": 0.25, "checked": 0.08})]))
    assert row[5] == "0.25 (8 %)"


def test_two_runs_in_one_table_have_numbers():
    backward = [made("torch", 4.0, run="r0", direction="backward", commit="0123456789", date="2026-11-20")]
    text = text_of(run() + backward)
    assert [row[2] for row in rows_of(text)] == ["`torch` [2]", "`torch` [1]"]
    assert "[1] Some CPU, 2 threads; torch 2.13.0+cpu; commit 0123456789, 2026-11-20." in text
    assert "[2] Some CPU, 2 threads; torch 2.13.0+cpu; commit abc1234567, 2026-11-24." in text


def test_a_reader_meets_the_gpu_and_its_dtype_first():
    on_gpu = [made("triton", 1.0, machine=GPU, dtype=dtype) for dtype in ("float32", "float16", "bfloat16")]
    records = [*run(), made("torch", 2.0, dtype="bfloat16"), *on_gpu, made("torch", 1.0, case="animatediff.b2")]
    headings = re.findall(r"^\*\*(.*)\*\*$", text_of(records), re.MULTILINE)
    assert headings == ["Some GPU, bfloat16", "Some CPU, 2 threads, float32"]
    everything = "\n".join(tables.all_ops(records, "../"))
    assert (
        everything.count("**Some") == 5 and "animatediff.b2" in everything and "animatediff.b2" not in text_of(records)
    )


def test_crashes_beyond_the_table_say_how_many_sequences():
    reason = "CUDA error: invalid configuration argument"
    crash = [failed("flash_attn_2", "crashed", reason, case=case) for case in ("svd_14f.b2", "vivit_b_16x2.b32")]
    # by hand: 32 clips x 196 positions x 12 heads
    assert f"with {32 * 196 * 12:,} sequences × heads, and 1 more): {reason}." in text_of(run() + crash)


# ---- whole models and memory ----


def model(attention: str, backend: str, ms: float, **changes) -> Record:
    """A model's forward of 8 clips that reaches 40 % of the matmul ceiling and holds 2 GiB."""
    values = dict(kind="model", op="forward", direction="forward", case=f"vivit_b_16x2_{attention}.b8", bound="matmul",
                  share={"matmul": 0.4}, memory={"peak": 2.0**31})  # fmt: skip
    return made(backend, ms, **(values | changes))


def test_models_against_stock_and_transformers():
    records = [
        model("joint", "torch", 400.0),
        model("joint", "stock", 500.0, memory={"peak": 2.0**33}),
        failed("transformers_sdpa", "out of memory", "", kind="model", op="forward", case="vivit_b_16x2_joint.b8"),
    ]
    (row,) = rows_of(tables.models(records))
    assert row[:5] == ["B/16x2: 1 joint", "forward, float32", "8", "455.2", "`torch`"]
    assert row[5:10] == ["400 (400–800)", f"{8 / 0.4:.1f}", "40 %", "0.50", "2.00 GiB"]
    assert row[10:] == ["1.25× (0.250×)", "out of memory"]


def test_model_4_against_model_2():
    pair = [model("factorized_dot_product", "torch", 450.0), model("factorized_encoder", "torch", 500.0)]
    # the paper's Table 2: 277.1 and 284.4 GFLOPs, 22.9 and 17.4 ms; more digits in fixtures/flops_params.json
    expected = (
        f"measured time 0.900 (forward float32, clips: 8); FLOPs {277.128 / 284.376:.3f} (277.1 against 284.4 G); "
        f"the paper, forward on a TPU-v3: {22.9 / 17.4:.2f}."
    )
    assert expected in "\n".join(tables.models(pair))
    pair[1].run = "r2"
    assert "measured time" not in "\n".join(tables.models(pair))


def test_what_a_level_of_memory_costs():
    """Each level against the same peers of its run; a run without levels is none of this table's."""

    def step(backend: str, ms: float, peak: float, **changes) -> Record:
        kind = {"op": "train", "direction": "train", "memory": {"loaded": 2.0**30, "peak": peak * 2.0**30}}
        ours = backend not in ("stock", "transformers_sdpa")
        return model("joint", backend, ms, **(kind | dict(ours=ours, source=NOW if ours else "") | changes))

    records = [step("auto", 900.0, 2.0), step("stock", 1000.0, 4.0), step("transformers_sdpa", 1800.0, 8.0)]
    assert not level_tables.lines(records)
    records += [step("torch", 950.0, 3.0), step("smallest", 1250.0, 1.0), step("balanced", 1000.0, 1.5)]
    fast, balanced, smallest = rows_of(level_tables.lines(records))
    assert fast[2:5] == ["`fast`", "900 (900–1,800)", "2.00 GiB"]
    assert fast[5:] == ["3.00 GiB", "0.50", "1.11× (0.500×, 0.600×)", "2.00× (0.250×, 0.333×)"]
    assert balanced[2] == "`balanced`" and balanced[7:] == ["1.00× (0.375×, 0.500×)", "1.80× (0.188×, 0.278×)"]
    assert smallest[2] == "`smallest`" and smallest[7:] == ["0.800× (0.250×, 0.400×)", "1.44× (0.125×, 0.222×)"]


def memory(frames: int, clips: int, peak: float, backend: str = "torch") -> Record:
    case = f"vivit_b_16x2_joint.f{frames}.b{clips}"
    return made(backend, None, kind="memory", op="train", case=case, memory={"peak": peak}, error={"share": 0.5})


def memories() -> list[Record]:
    return [
        memory(8, 1, 2.0**29),
        memory(32, 1, 2.0**30),
        memory(32, 2, 2.0**31),
        failed("torch", "out of memory", "", kind="memory", op="train", case="vivit_b_16x2_joint.f32.b4"),
        memory(32, 1, 2.0**32, "stock"),
    ]


def test_memory_says_how_far_it_goes():
    ours, stock = rows_of(tables.memory(memories()))
    assert ours[:3] == ["B/16x2: 1 joint", "train, float32", "`torch`"]
    assert ours[3:] == ["1.00 GiB", "2: 2.00 GiB; 4: out of memory", "32: 1.00 GiB"]
    assert stock[2:] == ["`stock`", "4.00 GiB", "1: 4.00 GiB", "32: 4.00 GiB"]
    points = rows_of(tables.all_memory(memories()))[0][3]
    assert points == "8×1: 512 MiB · 32×1: 1.00 GiB · 32×2: 2.00 GiB · 32×4: out of memory"


# ---- the files ----

MARKED = """# A project

<!-- bench:ops -->
old
<!-- /bench:ops -->

between

<!-- bench:models -->
<!-- /bench:models -->

<!-- bench:figures -->
<!-- /bench:figures -->
end
"""


@pytest.fixture
def folder(tmp_path):
    """Records, and a README before its first report."""
    (tmp_path / "README.md").write_text(MARKED)
    for one in [*run(), made("torch", 4.0, direction="backward"), *memories()]:
        record.append(tmp_path / "records" / "cpu.jsonl", one)
    return tmp_path


def arguments(folder: Path) -> list[str]:
    return ["--from", f"{folder}/records", "--readme", f"{folder}/README.md", "--figures", f"{folder}/records/figures"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_report_fills_and_checks(folder, capsys):
    assert report.main([*arguments(folder), "--check"]) == 1
    assert report.main(arguments(folder)) == 0
    text = (folder / "README.md").read_text()
    assert text.startswith("# A project\n\n<!-- bench:ops -->\n*ms*: ") and text.endswith(
        "<!-- /bench:figures -->\nend\n"
    )
    assert "\n\nbetween\n\n" in text and "old" not in text
    assert "<!-- bench:models -->\nNo record of a whole model yet" in text
    linked = re.findall(r"\((records/[^)]*)\)", text)
    assert len(linked) == 3 and all((folder / path).is_file() for path in linked)  # all tables, roofline, memory
    assert report.main([*arguments(folder), "--check"]) == 0
    capsys.readouterr()


def test_an_edited_number_fails_the_check_and_nothing_is_written(folder, capsys):
    report.main(arguments(folder))
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("2.50×", "3.50×"))
    before = files(folder)
    capsys.readouterr()
    assert report.main([*arguments(folder), "--check"]) == 1
    said = capsys.readouterr().out
    number = next(n for n, line in enumerate(readme.read_text().splitlines(), 1) if "3.50×" in line)
    assert (
        f"README.md:{number}\n" in said and "3.50×" in said and "2.50×" in said and "-> python -m bench report" in said
    )
    assert files(folder) == before


def test_a_changed_kernel_or_a_lost_figure_fails_the_check(folder, capsys, monkeypatch):
    report.main(arguments(folder))
    figure = folder / "records" / "figures" / "some-cpu-2-threads-float32-roofline.svg"
    text = figure.read_bytes()
    figure.unlink()
    assert (
        report.main([*arguments(folder), "--check"]) == 1 and f"{figure.name} is linked to" in capsys.readouterr().out
    )
    figure.write_bytes(text)
    monkeypatch.setattr(record, "source_hash", lambda op, backend: "of a changed kernel")
    assert report.main([*arguments(folder), "--check"]) == 1 and "`torch`†" in capsys.readouterr().out


def test_the_same_records_give_the_same_bytes(folder):
    """In another process with another order of hashes, too."""
    report.main(arguments(folder))
    here = files(folder)
    assert {Path(name).suffix for name in here} == {".md", ".jsonl", ".svg"}
    code = (
        "import sys; from bench import record, report; record.source_hash = lambda op, backend: sys.argv[1]; "
        "sys.exit(report.main(sys.argv[2:]))"
    )
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code, NOW, *arguments(folder)], check=True, env=environment, timeout=120)
    assert files(folder) == here


def test_figures_say_what_the_records_say(folder):
    report.main(arguments(folder))
    figures = {path.name: path.read_text() for path in (folder / "records" / "figures").glob("*.svg")}
    stem = "some-cpu-2-threads-float32"
    assert set(figures) == {f"{stem}-{x}.svg" for x in ("roofline", "temporal-vivit_b_16x2-b1", "memory-train")}
    assert "crashed: RuntimeError: invalid | grid" in figures[f"{stem}-temporal-vivit_b_16x2-b1.svg"]
    assert "2.50× ours" in figures[f"{stem}-temporal-vivit_b_16x2-b1.svg"]  # sdpa's 5 ms
    assert "copy 1,000 GB/s" in figures[f"{stem}-roofline.svg"] and "temporal" in figures[f"{stem}-roofline.svg"]
    assert "out of memory there" in figures[f"{stem}-memory-train.svg"]
    assert all("commit abc1234567" in text for text in figures.values())
    assert not any("<dc:date>" in text for text in figures.values())


def test_png_on_request(folder, capsys):
    assert report.main([*arguments(folder), "--png"]) == 0
    pictures = list((folder / "records" / "figures").iterdir())
    assert len(pictures) == 3 and all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    capsys.readouterr()


def test_without_matplotlib_the_tables_are_written(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main(arguments(folder)) == 0
    assert "they need matplotlib" in capsys.readouterr().out
    assert "2.50×" in (folder / "README.md").read_text() and not (folder / "records" / "figures").exists()


def test_what_cannot_be_used_says_what_to_do(folder, capsys):
    def complaint(*extra: str) -> str:
        assert report.main([*arguments(folder), *extra]) == 2
        return capsys.readouterr().err

    assert "no such folder" in complaint("--from", f"{folder}/nowhere")
    readme = folder / "README.md"
    readme.write_text("nothing to fill\n")
    assert "write the lines <!-- bench:NAME -->" in complaint()
    readme.write_text("<!-- bench:opps -->\n<!-- /bench:opps -->\n")
    assert "README.md:1: no table 'opps'; did you mean 'ops'?" in complaint()
    readme.write_text("<!-- bench:ops -->\n<!-- bench:models -->\n<!-- /bench:ops -->\n")
    assert "README.md:2: found <!-- bench:models -->, expected <!-- /bench:ops -->" in complaint()
    readme.write_text("<!-- bench:ops -->\n")
    assert "no <!-- /bench:ops --> after" in complaint()


def test_no_record_is_said_and_not_hidden(monkeypatch):
    monkeypatch.setattr(report.gains, "records", lambda: ())
    sections = report.sections([], "figures", "records/README.md")
    assert all(len(lines) == 1 and lines[0].startswith("No ") for lines in sections.values())
    assert plots.planned([]) == []


# ---- the project's own README and records ----


@pytest.fixture
def as_the_tree_is(monkeypatch):
    monkeypatch.undo()  # sources count as they are


def test_the_readme_says_what_the_records_say(as_the_tree_is, capsys):
    assert "<!-- bench:ops -->" in (ROOT / "README.md").read_text(), "README has no table of the operations"
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_no_older_kernel_stands_unmarked(as_the_tree_is):
    """The file of all tables has a row for each measurement; those of an older kernel, and no others, have a dagger."""
    found = list(record.read(record.RESULTS)) if record.RESULTS.is_dir() else []
    shown = [group.best for group in compare.current(compare.groups(r for r in found if r.kind in ("op", "model")))]
    stale = [one for one in shown if one and record.is_stale(one)]
    file = record.RESULTS / "README.md"
    rows = rows_of(file.read_text().partition("\n## Memory")[0]) if file.is_file() else []
    assert len(rows) == len(shown)
    assert sum("†" in "".join(row) for row in rows) == len(stale)
