"""`python -m bench tune`: what it searches, what it refuses to time, and which tile it proposes."""

import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch

from bench import tune
from bench.cases import CASES, SMALL, select
from vivit_kernels import _native, factorized_attention, joint_attention
from vivit_kernels._attention import blockwise, sdpa, tiles
from vivit_kernels._attention.options import Options
from vivit_kernels.factorized_attention import cuda_tiles

SETTING = tune.Setting(next(case for case in SMALL if case.op == "spatial"), "float32", "forward")
CPU = torch.device("cpu")


# ---- the tiles of backend torch ----


@pytest.mark.parametrize("threads", [None, 1, 2, 5, 64])
@pytest.mark.parametrize(
    "shape", [(196, 12, 16, 16, 64), (16, 12, 197, 197, 64), (2, 3, 70, 3137, 40), (1, 1, 1, 1, 8)]
)
def test_a_block_is_never_empty_and_stays_within_its_size(shape, threads):
    G, H, Q, K, _ = shape
    for tile in [tiles.choose(on_cpu=threads is not None), *tiles.candidates(on_cpu=threads is not None)]:
        sequences, heads, queries = tile.cut(*shape, threads)
        assert 1 <= sequences <= G and 1 <= heads <= H and 1 <= queries <= Q
        assert (heads, queries) == (H, Q) or sequences == 1
        room = tile.scores * (min(H, threads) if threads else 1)
        assert sequences * heads * queries * K <= room or (sequences, queries) == (1, 1)


def test_every_pair_is_computed_once_whatever_the_tile():
    q, k = torch.empty(5, 3, 70, 8), torch.empty(5, 3, 70, 8)
    for tile in [tiles.Blocks(scores=1, inputs=1, sdpa_from=1), *tiles.candidates(on_cpu=True)]:
        seen = torch.zeros(5, 3, 70, dtype=torch.int)
        with tiles.forced(tile):
            for some, heads, step in blockwise._chunks(q, k):
                assert step >= 1
                seen[some, heads] += 1
        assert (seen == 1).all(), tile


def test_a_forced_tile_is_taken_and_given_back():
    k, options = torch.empty(1, 1, 16, 8), Options(1.0)
    present = tiles.choose(on_cpu=True)
    assert not sdpa.takes(k, options)
    with pytest.raises(KeyError), tiles.forced(tiles.Blocks(1, 1, sdpa_from=16)):
        assert sdpa.takes(k, options)
        raise KeyError
    assert tiles.current(on_cpu=True) == present and not sdpa.takes(k, options)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_candidates_surround_the_choice(on_cpu):
    present, found = tiles.choose(on_cpu), tiles.candidates(on_cpu)
    assert present not in found and len(set(found)) == len(found)
    for name in ("scores", "sdpa_from", *(["inputs"] if on_cpu else [])):
        values = [getattr(tile, name) for tile in found]
        assert min(values) < getattr(present, name) < max(values)


def test_the_plan_is_what_the_engines_do(monkeypatch):
    """Of every case and tile: sdpa.py for the kinds of sequence the plan says, blockwise.py with its cut for others."""
    ran = []
    monkeypatch.setattr(sdpa, "forward", lambda *_: ran.append("sdpa"))
    monkeypatch.setattr(blockwise, "forward", lambda q, k, *_: ran.append(next(iter(blockwise._chunks(q, k)))))
    for case in SMALL:
        if case.op == "tubelet":
            continue
        known = tune.facts(tune.Setting(case, "float32", "forward"), CPU)
        for tile in [tiles.choose(True), tiles.Blocks(40, 1 << 20, 20), tiles.Blocks(4000, 1 << 20, 9)]:
            ran.clear()
            qkv = torch.empty(case.B, case.T, case.S, 3, case.H, case.D)
            with tiles.forced(tile):
                if case.op == "joint":
                    joint_attention(qkv.flatten(1, 2), backend="torch")
                else:
                    factorized_attention(qkv, temporal_heads=case.temporal_heads, backend="torch")
            did = {x if x == "sdpa" else tuple(part.stop - part.start for part in x[:2]) + x[2:] for x in ran}
            assert set(tune.ask(tiles.plan, known, tile)) == did, (case, tile)


# ---- facts ----


def test_a_tiles_file_gets_the_facts_it_names():
    known = tune.facts(SETTING, CPU)
    assert tune.ask(lambda on_cpu, arch, S, sequences: (on_cpu, arch, S, sequences), known) == (
        True, None, SETTING.case.S, [(SETTING.case.B * SETTING.case.T, SETTING.case.H, SETTING.case.S)],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"asks for clips, which is no fact.*on_cpu"):
        tune.ask(lambda clips: clips, known)


def test_every_case_has_facts():
    for case in CASES:
        known = tune.facts(tune.Setting(case, "bfloat16", "backward"), CPU)
        assert known["itemsize"] == 2
        if case.op != "tubelet":
            assert tune.ask(tiles.plan, known, tiles.choose(True))


# ---- what CUDA C++ kernels can be asked for at a launch ----


def cuda_facts(op: str, direction: str, arch: int = 90, **changes) -> dict:
    case = replace(next(case for case in CASES if case.op == op), **changes)
    return tune.facts(tune.Setting(case, "bfloat16", direction), CPU) | {"arch": arch, "on_cpu": False}


def test_cuda_launches_are_tuned_where_they_can_be_asked_for():
    """Heads of a block of packed sequences, stages of longer ones; nothing where one kernel is all there is."""

    def sizes(*given, **changes):
        known = cuda_facts(*given, **changes)
        found = tune.ask(cuda_tiles.candidates, known)
        assert all(tile.direction == known["direction"] for tile in found)
        return [(tile.packed_warps, tile.stages) for tile in found]

    for direction in tune._DIRECTIONS:
        assert sizes("temporal", direction, T=16) == [(warps, 0) for warps in (1, 2, 3, 4)]
        assert sizes("temporal", direction, T=32, D=80) == [(0, stages) for stages in (1, 2, 3)]
        assert sizes("spatial", direction, S=196, D=64) == [], "Hopper's products"
        assert sizes("dot_product", direction, T=16, S=196) == [], "blocks of two kinds lie side by side"
    assert sizes("temporal", "forward", T=32, D=64) == [], "two blocks share a multiprocessor"
    assert sizes("temporal", "backward", T=32, D=64) == [(0, stages) for stages in (1, 2, 3)]
    assert sizes("spatial", "backward", arch=80, S=196, D=64) == [(0, stages) for stages in (1, 2, 3)]
    assert sizes("temporal", "backward", T=32, D=128, softcap=5.0) == [], "no registers for it"


def test_the_same_launch_of_cuda_is_timed_once():
    known = cuda_facts("temporal", "forward", T=16)
    present = tune.ask(cuda_tiles.choose, known)
    plans = [tune.ask(cuda_tiles.plan, known, tile) for tile in [present, *tune.ask(cuda_tiles.candidates, known)]]
    assert plans[0] in plans[1:] and len(set(plans)) == cuda_tiles.PACKED_WARPS
    assert cuda_tiles in tune.tile_modules("temporal") and cuda_tiles not in tune.tile_modules("joint")


def test_a_cuda_tiling_is_measured_like_any_other():
    """The composition of PyTorch ops in the place of the kernels: every tiling is in force while it is timed."""
    seen = set()

    class StandIn(tune.Session):
        def candidate(self, backend):
            return super().candidate("torch")

        def call(self, candidate, direction):
            run = super().call(candidate, direction)
            return lambda: (seen.add(cuda_tiles.current(direction).packed_warps), run())[1]

    case = next(case for case in SMALL if case.op == "temporal")
    assert case.T <= 16
    outcome = tune.measure(StandIn(CPU), "cuda", cuda_tiles, tune.Setting(case, "bfloat16", "forward"), 0.01)
    assert seen == {0, 1, 2, 3} and outcome.present == cuda_tiles.Tiling("forward"), "4 is what 0 comes to"
    assert tune.lines_to_paste([outcome], "here")[-1].startswith("return Tiling(direction='forward'")


# ---- a tiles.py of somebody else, with a wrong, a crashing and a faster tile ----


@dataclass(frozen=True)
class Tile:
    rows: int


@pytest.fixture
def planted(monkeypatch):
    """vivit_kernels.factorized_attention.tiles, of which rows=2 gives a wrong result, 3 crashes, 4 is the same as 1."""
    module = ModuleType("vivit_kernels.factorized_attention.tiles")
    module.__spec__ = sys.modules[__name__].__spec__
    right = blockwise.forward

    @contextmanager
    def forced(tile):
        def forward(q, k, v, o, *rest):
            if tile.rows == 3:
                raise RuntimeError("out of resource: shared memory\nmore")
            right(q, k, v, o, *rest)
            if tile.rows == 2:
                o[:, :, -1] += 1

        with monkeypatch.context() as patch:
            patch.setattr(blockwise, "forward", forward)
            yield

    for name, value in {
        "BACKENDS": ("torch",), "choose": lambda S: Tile(1), "candidates": lambda S: [Tile(2), Tile(3), Tile(4)],
        "forced": forced, "plan": lambda tile: tile.rows % 3 if tile.rows != 3 else 3,
    }.items():  # fmt: skip
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_a_wrong_tile_is_not_timed_and_a_crash_is_a_row(planted):
    outcome = tune.measure(tune.Session(CPU), "torch", planted, SETTING, 0.01)
    assert set(outcome.ms) == {Tile(1)} and len(outcome.ms[Tile(1)]) == tune.ROUNDS
    assert outcome.error[Tile(2)] > 1 >= outcome.error[Tile(1)]
    assert "of the budget, not timed" in outcome.reason[Tile(2)]
    assert outcome.reason[Tile(3)] == "crashed: RuntimeError: out of resource: shared memory"
    assert outcome.same[Tile(4)] == Tile(1) and Tile(4) not in outcome.ms
    shown = tune.setting_table(outcome)
    assert "rows=2" in shown and "rows=3" in shown and "1 more candidates" in shown


def test_a_wrong_present_choice_is_said(planted, monkeypatch, capsys):
    monkeypatch.setattr(planted, "choose", lambda S: Tile(2))
    assert not tune.tune(tune.Session(CPU), "torch", planted, [SETTING], 0.01)
    assert "of the budget, not timed" in capsys.readouterr().out


def test_a_new_tiles_file_takes_part(planted, capsys):
    assert tune.main(["spatial", "--case", "small.b2", "--direction", "forward", "--seconds", "0.01"]) == 0
    out = capsys.readouterr().out
    assert "choose(S=33): the present choice stays" in out and "return Tile(rows=1)" in out
    assert "choose(on_cpu=True)" in out  # the torch backend's, beside it


def test_cuda_on_a_cpu_says_why_it_does_not_run(capsys):
    assert tune.main(["temporal", "--case", "small.b2", "--backend", "cuda", "--direction", "forward"]) == 1
    assert "backend cuda" in (out := capsys.readouterr().out)
    # with its kernels in the library it is the device that is wrong; else what is missing comes first
    assert "cannot run this call: the tensors are on cpu" in out or not _native.CUDA
    assert "cannot run this call: " in out or "  missing: " in out


# ---- the decision ----


def outcome(ratios: dict[int, list[float]], case: str = "x.b1") -> tune.Outcome:
    """With made-up times: `ratios` to Tile(0), whose five rounds drift."""
    base = [10.0, 12.0, 9.0, 30.0, 11.0]
    setting = tune.Setting(select(["spatial"], ["small.b2"], True)[0], "float32", "forward")
    ms = {Tile(0): base} | {Tile(k): [r * b for r, b in zip(v, base, strict=True)] for k, v in ratios.items()}
    return tune.Outcome(setting, Tile(0), first={x: min(y) for x, y in ms.items()}, ms=ms, same={x: x for x in ms})


@pytest.mark.parametrize(
    "ratios, best",
    [
        ({}, 0),
        ({1: [0.5] * 5, 2: [0.4] * 5}, 2),
        ({1: [0.99] * 5}, 0),  # no gain worth a change
        ({1: [0.9, 0.9, 0.9, 1.2, 1.2]}, 0),  # loses two rounds
        ({1: [0.8, 0.8, 0.8, 1.2, 1.2], 2: [0.9] * 5}, 2),
        ({1: [0.9, 0.9, 0.9, 0.9, 3.0]}, 1),  # one disturbed round
    ],
)
def test_the_winner_gains_in_nearly_every_round(ratios, best):
    assert tune.winner([outcome(ratios)]) == Tile(best)


def test_one_rung_needs_one_answer():
    gains, loses, less = outcome({1: [0.5] * 5, 2: [0.9] * 5}), outcome({1: [1.1] * 5, 2: [0.95] * 5}), Tile(2)
    assert tune.winner([gains]) == Tile(1) and tune.winner([gains, loses]) == less
    del loses.ms[less]  # so slow in one setting that it had no turns there
    assert tune.winner([gains, loses]) == Tile(0)


def test_the_lines_carry_their_reasons():
    lines = tune.lines_to_paste([outcome({1: [0.5] * 5, 2: [0.4] * 5})], "a machine, today")
    text = " ".join(line.removeprefix("#").strip() for line in lines)
    assert "spatial small.b2 float32 forward: 4.4 ms; runner-up (rows=1) 5.5 ms; before (rows=0) 11 ms" in text
    assert lines[-2:] == ["# a machine, today", "return Tile(rows=2)"]
    assert all(len(line) <= 116 for line in lines)


# ---- the command ----


@pytest.mark.parametrize("op", ["temporal", "dot_product", "joint"])
def test_it_runs_here(op, capsys):
    few = ["--backend", "torch", "--dtype", "bfloat16", "--seconds", "0.01"]
    assert tune.main([op, "--case", "small.b2", *few]) == 0
    out = capsys.readouterr().out
    assert f"{op} small.b2 bfloat16 backward" in out and "kernels/vivit_kernels/_attention/tiles.py" in out
    assert "return Blocks(scores=" in out


def test_what_cannot_be_tuned_is_said(capsys, monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(tune, "tile_modules", lambda op: [])
        assert tune.main(["tubelet"]) == 0
    assert "tubelet has no tiles.py, so nothing to tune" in capsys.readouterr().out
    assert tune.main(["joint", "--case", "vivit_c"]) == 2
    assert "no case 'vivit_c' of joint" in capsys.readouterr().err
    assert tune.main(["joint", "--case", "small.b2", "--backend", "cuda"]) == 2
    assert "no tiles of joint are for cuda; there are for" in capsys.readouterr().err
