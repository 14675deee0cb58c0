"""The compile gate: every Triton kernel that the named cases launch, compiled for GPUs that are not here, and judged
by bench/gate.py. First that it notices what it is there for."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from bench import cubin, gate  # noqa: E402
from bench.cases import CASES, AttentionCase, Case  # noqa: E402
from bench.launches import (  # noqa: E402
    BLOCKS,
    DIRECTIONS,
    OPTIONS,
    PASSES,
    Compiled,
    block_launches,
    case_launches,
    compile_launches,
    has_kernel,
    pass_launches,
)

# (kernel, what the complaint begins with): why it is right all the same
ALLOWED: dict[tuple[str, str], str] = {
    # both touch the weight once, between runs of 14 and runs padded to 16: in one of the two orders nothing is wide
    ("prepare_weight", "loads"): "a run of 14 taps begins at a multiple of 4 bytes",
    ("finish_parameters", "loads"): "a run of 14 sums begins at a multiple of 8 bytes",
}


@pytest.fixture(autouse=True)
def unwritten_memory(monkeypatch):
    """Tensors of gigabytes whose numbers nobody reads."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


# ---- planted kernels ----


@triton.jit
def scaled(x_ptr, y_ptr, stride, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * stride + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x * tl.sum(x.to(tl.float32)).to(x.dtype))


@triton.jit
def product(a_ptr, b_ptr, c_ptr, M: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, M)
    k = tl.arange(0, 64)
    # a, c [M, 64], b [64, 64]
    a = tl.load(a_ptr + i[:, None] * 64 + k[None, :])
    b = tl.load(b_ptr + k[:, None] * 64 + k[None, :])
    c = tl.dot(a, b, input_precision=PRECISION)
    tl.store(c_ptr + i[:, None] * 64 + k[None, :], c.to(c_ptr.dtype.element_ty))


@triton.jit
def batched(a_ptr, c_ptr):
    i = tl.arange(0, 16)
    at = tl.arange(0, 8)[:, None, None] * 256 + i[None, :, None] * 16 + i[None, None, :]
    a = tl.load(a_ptr + at)
    tl.store(c_ptr + at, tl.dot(a, a).to(a.dtype))


def compiled_scaled(stride: int, M: int = 64, N: int = 64, warps: int = 4, dtype=torch.bfloat16) -> Compiled:
    x = torch.empty(M * stride, dtype=dtype)
    return compile_launches(lambda: scaled[(1,)](x, x, stride, M=M, N=N, num_warps=warps), 90)[0]


def compiled_product(arch: int, M: int = 64, dtype=torch.bfloat16, precision: str = "ieee", warps: int = 4) -> Compiled:
    a, b = torch.empty(M, 64, dtype=dtype), torch.empty(64, 64, dtype=dtype)
    return compile_launches(lambda: product[(1,)](a, b, a, M=M, PRECISION=precision, num_warps=warps), arch)[0]


def test_a_good_kernel_has_no_complaints():
    found = compiled_scaled(64)
    assert gate.complaints(found) == [] and found.kernel.mix["LDG.128"] and found.kernel.mix["STG.128"]
    assert gate.tile_name(found) == "M=64 N=64 warps=4 stages=3"


def test_a_planted_spill_is_noticed(monkeypatch):
    spilled = compiled_scaled(256, 128, 256, warps=1, dtype=torch.float32)
    monkeypatch.setattr(gate, "recorded", lambda: {"triton": triton.__version__})
    first, second = gate.complaints(spilled)[:2]
    assert first.startswith("spills: ") and second.startswith("local memory: ")
    # of a compiler that nobody chose tiles by, a little is none, but not this
    monkeypatch.setattr(gate, "recorded", lambda: {"triton": "another"})
    assert gate.complaints(spilled)[0] == f"{second}, 64 at most"
    little = dataclasses.replace(spilled, kernel=dataclasses.replace(spilled.kernel, stack=64, local=0))
    assert not [line for line in gate.complaints(little) if line.startswith(("spills", "local"))]


def test_planted_narrow_loads_and_stores_are_noticed():
    """Rows an odd number of elements apart lie nowhere in particular."""
    found = gate.complaints(compiled_scaled(65))
    assert [line.partition(":")[0] for line in found] == ["loads", "loads", "stores", "stores"]
    assert found[0] == "loads: none of 128 bits" and found[1].endswith(" of 16 bits")


def test_a_tile_too_small_for_wide_loads_is_not_asked_for_them():
    found = compiled_scaled(64, 8, 16)
    assert found.kernel.mix["LDG.16"] and gate.complaints(found) == []


@pytest.mark.parametrize(
    "arch, M, dtype, precision, warps, opcode",
    [
        (80, 64, torch.bfloat16, "ieee", 4, "HMMA"),
        (90, 64, torch.bfloat16, "ieee", 4, "HGMMA"),
        (90, 64, torch.float16, "ieee", 4, "HGMMA"),
        (90, 64, torch.float32, "tf32", 4, "HGMMA"),
        (90, 64, torch.float32, "ieee", 4, None),
        (90, 16, torch.bfloat16, "ieee", 4, "HMMA"),
        (90, 64, torch.bfloat16, "ieee", 2, "HMMA"),
        (100, 64, torch.bfloat16, "ieee", 4, "UTCHMMA"),
        (100, 16, torch.bfloat16, "ieee", 4, "HMMA"),
    ],
)
def test_the_instruction_that_a_product_is_for(arch, M, dtype, precision, warps, opcode):
    found = compiled_product(arch, M, dtype, precision, warps)
    (wanted,) = gate.products(found.ir)
    assert wanted.shape == (M, 64) and wanted.opcode(arch, found.threads) == opcode
    assert [name for name in cubin.TENSOR_OPCODES if found.kernel.mix[name]] == ([opcode] if opcode else [])
    assert not [line for line in gate.complaints(found) if line.startswith("opcode")]  # IEEE products of 64x64 spill


def test_a_batched_product_is_for_a_warp():
    a = torch.empty(8, 16, 16, dtype=torch.bfloat16)
    (found,) = compile_launches(lambda: batched[(1,)](a, a), 90)
    assert gate.products(found.ir) == [gate.Product((8, 16, 16), "bf16", "tf32")]
    assert found.kernel.mix["HMMA"] and gate.complaints(found) == []


def test_planted_instructions_are_noticed():
    """Machine code of one tile with the intermediate code of another: what a compiler that falls back looks like."""
    grouped, by_warp = compiled_product(90), compiled_product(90, M=16)
    exact = compiled_product(90, dtype=torch.float32)

    def complaints(code: Compiled, ir: Compiled) -> list[str]:
        return [line for line in gate.complaints(dataclasses.replace(code, ir=ir.ir)) if "opcode" in line]

    none = "opcode: no HGMMA for products of 64x64"
    assert complaints(by_warp, grouped) == [none, "opcode: 8 HMMA, but no product of the tile is for it"]
    assert complaints(exact, grouped) == [none]  # what a kernel too large for tensor memory comes to
    assert complaints(grouped, exact)[0].endswith(" HGMMA, but no product of the tile is for it")


def test_loads_and_stores_are_read():
    ir = """
    %x = tt.load %p, %m, %o : tensor<64x32x!tt.ptr<bf16>> loc(#loc35)
    %y = tt.load %q {isVolatile = true} : tensor<128x!tt.ptr<f32>> loc(#loc35)
    %z = tt.load %r : !tt.ptr<i64> loc(#loc1)
    tt.store %s, %x, %m evictionPolicy = evict_first : tensor<4x8x16x!tt.ptr<i1>> loc(#loc22)
    """
    bf16, fp32, bits = gate.accesses(ir)
    assert (bf16, fp32) == (gate.Access("load", (64, 32), 2), gate.Access("load", (128,), 4))
    assert bits == gate.Access("store", (4, 8, 16), 1)
    assert bf16.may_be_wide(128) and not bf16.may_be_wide(512) and not fp32.may_be_wide(32)


# ---- the kernels of the operations ----

HEADLINE = gate.headline()
# shapes that models will have and no case names: other head sizes, lengths beside a power of two
SHAPES = [
    AttentionCase(op, f"gate_t{T}_s{S}_d{D}", 2, T, S, 4, D)
    for op, T, S, D in [
        *(("dot_product", 16, 196, D) for D in (16, 32, 40, 72, 80, 88, 96, 104, 128, 144, 160)),
        *(("joint", 1, 1568, D) for D in (16, 32, 80, 88, 96, 128, 144, 160)),
        ("joint", 1, 1569, 72),
        *(("temporal", T, 49, 64) for T in (1, 2, 4, 7, 13, 17, 21, 24, 32, 49, 64)),
        *(("spatial", 4, S, 64) for S in (16, 49, 64, 65, 100, 128, 144, 257, 400, 576)),
        *(("spatial", 4, 100, D) for D in (16, 32, 40, 72, 96)),
        ("dot_product", 16, 100, 64),
        *(("joint", 1, N, 64) for N in (1, 17, 64, 197, 1025, 16384)),
    ]
]


def unlike(cases: Iterable[Case]) -> list[Case]:
    """Of cases that differ in the number of clips alone, one: but for a single clip, which compiles otherwise."""
    first: dict[Case, Case] = {}
    for case in cases:
        first.setdefault(dataclasses.replace(case, B=min(case.B, 2), name="", rank=0), case)
    return list(first.values())


def runs() -> list:
    """pytest parameters (case, dtype, arch, options)."""
    bf16, chosen = torch.bfloat16, []
    ops = {case.op: case for case in reversed(HEADLINE)}.values()  # the first of each
    attention = [case for case in ops if isinstance(case, AttentionCase)]
    quick = [(case, bf16, 90, ()) for case in HEADLINE]
    quick += [(case, torch.float32, 90, ()) for case in ops] + [(case, bf16, 90, OPTIONS) for case in attention]
    others = [case for case in unlike((*CASES, *SHAPES)) if has_kernel(case.op) and case not in HEADLINE]
    full = [(case, bf16, 90, ()) for case in others]
    full += [(case, torch.float16, 90, ()) for case in HEADLINE]
    named = [case for case in unlike(CASES) if has_kernel(case.op)]
    full += [(case, bf16, arch, ()) for case in named for arch in (80, 100)]
    full += [(case, bf16, 90, (option,)) for case in attention for option in OPTIONS]
    for run in quick + full:
        case, dtype, arch, options = run
        name = f"{case.op}-{case.name}-{str(dtype).removeprefix('torch.')}-sm_{arch}{''.join('-' + o for o in options)}"
        chosen.append(pytest.param(*run, id=name, marks=[pytest.mark.full] if run in full else []))
    return chosen


@pytest.mark.parametrize("case, dtype, arch, options", runs())
def test_kernels_are_what_they_were_designed_to_be(case, dtype, arch, options):
    found, launches = [], []
    for direction in DIRECTIONS:
        for launch in case_launches(case, dtype, direction, arch, options):
            launches.append((direction, launch))
            found += [
                f"{direction}: {launch.kernel.name} [{gate.tile_name(launch)}]: {why}"
                for why in gate.complaints(launch)
                if (launch.kernel.name, why.partition(":")[0]) not in ALLOWED
            ]
    assert {direction for direction, _ in launches} == set(DIRECTIONS)
    assert not found, "\n".join(found)


def test_described_keys_come_by_tma():
    for case in (AttentionCase("joint", f"gate_tma_d{D}", 2, 1, 3137, 4, D) for D in (64, 128)):
        (launch,) = case_launches(case, torch.bfloat16, "forward", 90)
        assert launch.kernel.mix["UTMALDG"] >= 4, "a stage or two of k and of v ahead, and in the loop"
        for others, arch in ((dataclasses.replace(case, S=1000), 90), (case, 80)):
            (launch,) = case_launches(others, torch.bfloat16, "forward", arch)
            assert not gate.complaints(launch) and not launch.kernel.mix["UTMALDG"]


FULL_PASSES = [(torch.bfloat16, 80, 768), (torch.bfloat16, 100, 768), (torch.float32, 90, 768)]
FULL_PASSES += [(torch.bfloat16, 90, E) for E in (320, 1024, 2048, 8192)]


@pytest.mark.parametrize(
    "dtype, arch, E",
    [
        pytest.param(torch.bfloat16, 90, 768, id="sm_90"),
        *(pytest.param(*run, id=f"{run[0]}-sm_{run[1]}-{run[2]}", marks=pytest.mark.full) for run in FULL_PASSES),
    ],
)
def test_passes_over_rows_are_what_they_were_designed_to_be(dtype, arch, E):
    for name in PASSES:
        found = pass_launches(name, dtype, arch, E=E)
        assert found and not [why for launch in found for why in gate.complaints(launch)], name


BLOCK_SIZES = [(16, 320, 8), (32, 768, 12), (7, 192, 3), (16, 128, 8)]


@pytest.mark.parametrize(
    "dtype, arch, sizes",
    [
        pytest.param(torch.bfloat16, 90, (16, 768, 12), id="sm_90"),
        *(
            pytest.param(dtype, arch, sizes, id=f"{dtype}-sm_{arch}-{sizes}", marks=pytest.mark.full)
            for sizes in BLOCK_SIZES
            for dtype, arch in [*((torch.bfloat16, arch) for arch in (80, 90, 100)), (torch.float32, 90)]
        ),
    ],
)
def test_the_temporal_block_is_what_it_was_designed_to_be(dtype, arch, sizes):
    for name in BLOCKS:
        found = block_launches(name, dtype, arch, *sizes)
        assert found and not [why for launch in found for why in gate.complaints(launch)], name


RECORDED = gate.recorded()


@pytest.mark.skipif(
    RECORDED.get("triton") != triton.__version__,
    reason=f"what another compiler than the recorded one, Triton {RECORDED.get('triton')}, takes is no regression",
)
@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.op}-{case.name}") for case in HEADLINE])
def test_headline_kernels_take_no_more_than_recorded(case):
    worse = {
        what: why
        for what, found in gate.recorded_launches(case).items()
        if (why := gate.regressions(RECORDED.get(what), found))
    }
    assert not worse, f"{json.dumps(worse, indent=1)}\nif that is meant: python -m bench gate --record"


def test_regressions_are_noticed():
    old = [{"kernel": "f", "tile": "M=64", "registers": 128, "shared": 1024, "warps": 16}]

    def changed(**changes):
        return [{**old[0], **changes}]

    assert gate.regressions(old, old) == []
    assert gate.regressions(old, changed(registers=120, shared=0, warps=32)) == []
    assert gate.regressions(old, changed(registers=129)) == ["f: registers 128 -> 129"]
    assert gate.regressions(old, changed(warps=12, shared=2048)) == ["f: shared 1024 -> 2048", "f: warps 16 -> 12"]
    assert gate.regressions(old, changed(tile="M=32"))[0].startswith("other kernels or tiles")
    assert gate.regressions(old, old * 2)[0].startswith("other kernels or tiles")
    assert gate.regressions(None, old) == ["not recorded"]


def test_the_record_is_what_it_is_compared_with(tmp_path, monkeypatch):
    found = gate.facts(compiled_scaled(64))
    monkeypatch.setattr(gate, "headline", lambda: HEADLINE[:1] or [CASES[0]])
    monkeypatch.setattr(gate, "recorded_launches", lambda case: {"this forward": [found], "this backward": []})
    gate.write_record(tmp_path / "gate.json")
    written = json.loads((tmp_path / "gate.json").read_text())
    assert written == {"triton": triton.__version__, "this forward": [found], "this backward": []}


def test_the_command_prints_a_table(capsys, monkeypatch):
    case = CASES[0]
    monkeypatch.setattr(gate, "has_kernel", lambda op: True)
    good, bad = compiled_scaled(64), compiled_scaled(65)
    monkeypatch.setattr(gate, "case_launches", lambda case, dtype, direction, arch: [good])
    assert gate.main([case.op, "--case", case.name]) == 0
    printed = capsys.readouterr().out
    assert f"{case.op} {case.name} bfloat16 forward" in printed and "M=64 N=64 warps=4" in printed
    assert printed.count("scaled") == 1, "a kernel that several launch is one line"
    monkeypatch.setattr(gate, "case_launches", lambda case, dtype, direction, arch: [good, bad])
    assert gate.main([case.op, "--case", case.name]) == 1
    assert "scaled: loads: none of 128 bits" in capsys.readouterr().out
    assert gate.main([case.op, "--case", "nobody"]) == 2


def test_kernels_are_compiled_here():
    """In a process that interprets them this file must not run: see conftest.py."""
    assert os.environ.get("TRITON_INTERPRET", "0") in ("", "0")
