"""The static model of pipelined CUDA C++ kernels (bench/cuda_model.py), on machine code that is written here."""

import pytest

from bench import cubin, cuda_gate, cuda_model, cuda_model_backward, cuda_model_resident

SASS = """
        /*0000*/                   BAR.SYNC.DEFER_BLOCKING R0, 0x100 ;
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R88, R148, gdesc[UR8].tnspB, R88, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0050*/                   FMNMX R0, R24, R25, !PT ;
        /*0060*/                   FFMA R24, R24, R3, -R4 ;
        /*0070*/                   MUFU.EX2 R24, R24 ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/              @!P0 BRA 0x2b0 ;
{rescale}
        /*02b0*/                   F2FP.BF16.F32.PACK_AB R148, R25, R24 ;
        /*02c0*/               @P1 BRA 0x0 ;
        /*02d0*/                   EXIT ;
"""
RESCALE = "\n".join(f"        /*{16 * i:04x}*/                   FMUL R88, R88, R5 ;" for i in range(10, 42))


SHAPE = cuda_model.Shape(64, 128, 2)


def test_the_shape_is_in_the_name():
    name = "pipelined_joint_forward<float16, HopperVariant<5, 96, false, 3, 0, 8> >"
    assert cuda_model.Shape.of(name) == (80, 96, 3)


@pytest.fixture(scope="module")
def kernel() -> cubin.Kernel:
    sass = SASS.format(rescale=RESCALE)
    return cubin.Kernel("k", 90, 168, 0, 0, 0, 384, cubin.instructions(sass), sass)


def test_a_tile_is_added_up(kernel):
    tile = cuda_model.tile_of(kernel)
    assert (tile.products, tile.of_scores) == (2 * 64 + 32, 2 * 64)
    assert tile.exponentials == 8 and tile.rescale == 32 and tile.issue == 12
    assert tile.fma == 1 and tile.alu == 2 + 2
    assert tile.shared == 2 * (64 + 128) * 32 // 128 + 64 * 32 // 128


def test_the_busiest_part_or_the_chain_is_the_bound(kernel):
    tile = cuda_model.tile_of(kernel)
    assert tile.period(2) == (2 * 160, "products")
    alone, why = tile.period(1)
    assert why == "chain" and alone == tile.chain > 160


def test_a_call_takes_whole_tiles(kernel):
    """Of 128 queries, of 128 keys, and of all multiprocessors at a time."""
    tile = cuda_model.tile_of(kernel)
    one, _ = cuda_model.call_us(tile, SHAPE, 1, 1, 1)
    assert one == cuda_model.call_us(tile, SHAPE, 1, 132, 128)[0] < cuda_model.call_us(tile, SHAPE, 1, 133, 128)[0]
    us, tflops = cuda_model.call_us(tile, SHAPE, 8, 12, 3136)
    assert tflops * us * 1e6 == pytest.approx(4 * 8 * 12 * 3136**2 * 64)


def test_the_command_prints_both_tables(kernel, capsys, monkeypatch, tmp_path):
    name = "pipelined_joint_forward<bfloat16, HopperVariant<4, 128, true, 2, 2, 8> >"
    monkeypatch.setattr(cuda_gate, "read", lambda path: [(name, kernel), ("resident_attention<float16>", kernel)])
    assert cuda_model.main(["--file", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(name) == 1 + len(cuda_model.TOKENS) and "320 products" in printed and "resident" not in printed
    monkeypatch.setattr(cuda_gate, "read", lambda path: [])
    assert cuda_model.main(["--file", str(tmp_path)]) == 1


def test_a_kernel_without_such_a_loop_is_named(kernel):
    plain = cubin.Kernel("k", 90, 32, 0, 0, 0, 32, cubin.Counter(), "        /*0000*/                   EXIT ;")
    with pytest.raises(ValueError, match="k has no loop with products and exponentials"):
        cuda_model.tile_of(plain)


# ---- backward ----

GRADIENTS = """
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R24, R120, gdesc[UR8], RZ, !UPT ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, R124, gdesc[UR8], R24, gsb0 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R56, R128, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/                   MUFU.EX2 R24, R24 ;
        /*0050*/                   MUFU.EX2 R25, R25 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   LDS.128 R4, [R3] ;
        /*0080*/                   F2FP.BF16.F32.PACK_AB R148, R25, R24 ;
        /*0090*/               @P1 BRA 0x0 ;
        /*00a0*/                   EXIT ;
"""


@pytest.fixture
def gradients() -> cubin.Kernel:
    return cubin.Kernel("k", 90, 168, 0, 0, 0, 384, cubin.instructions(GRADIENTS), GRADIENTS)


def test_a_tile_of_the_backward(gradients):
    tile = cuda_model_backward.tile_of(cuda_model_backward.loop_of(gradients))
    assert tile.products == 3 * 32 and tile.exponentials == 2 * 8 and tile.issue == 10 and tile.alu == 2
    assert tile.shared == 3 * 64 * 32 // 128 + 4 * 4
    assert tile.chain == 96 + 1 + 3, "all products, the wait, and what comes after it: the exponentials lie beside one"


def test_one_warpgroup_is_walked_through():
    product = "HGMMA.64x64x16.F32.BF16 R24, R120, gdesc[UR8], RZ, !UPT, gsb0"
    wait, exponentials = ("WARPGROUP", " gsb0, 0x0"), [("MUFU", "")] * 8
    assert cuda_model_backward.walk([("HGMMA", product), wait, *exponentials]) == 33 + 7 * 8 + 1
    assert cuda_model_backward.walk([("HGMMA", product), *exponentials, wait]) == 8 * 8, "hidden behind them"
    assert cuda_model_backward.walk([("HGMMA", product), ("MUFU", ""), wait]) == 33


OPTIONS = """
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R24, R120, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0010*/              @!P0 BRA 0x40 ;
        /*0020*/                   IMAD R4, R4, R5, RZ ;
        /*0030*/                   IMAD R4, R4, R5, RZ ;
        /*0040*/              @!P1 BRA 0x80 ;
        /*0050*/                   MUFU.EX2 R24, R24 ;
        /*0060*/                   MUFU.RCP R25, R25 ;
        /*0070*/                   BRA 0x90 ;
        /*0080*/                   MUFU.EX2 R24, R24 ;
        /*0090*/               @P2 BRA 0x0 ;
        /*00a0*/                   EXIT ;
"""


def test_options_are_counted_by_what_a_call_has():
    kernel = cubin.Kernel("k", 90, 168, 0, 0, 0, 384, cubin.instructions(OPTIONS), OPTIONS)
    shape = cuda_model_backward.Shape(64, 2)  # of two exponentials' room
    mask, dropout = cuda_model_backward.ways_of(kernel, shape, False).values()
    assert [line[0] for line in mask] == [0x00, 0x10, 0x40, 0x80, 0x90]
    assert [line[0] for line in dropout] == [0x00, 0x10, 0x20, 0x30, 0x40, 0x80, 0x90]
    assert [*cuda_model_backward.ways_of(kernel, shape, True)] == [""]


def test_both_launches_make_a_call(gradients, capsys, monkeypatch, tmp_path):
    tile, shape = cuda_model_backward.tile_of(cuda_model_backward.loop_of(gradients)), cuda_model_backward.Shape()
    us, tflops = cuda_model_backward.call_us([(tile, shape)] * 2, 8, 12, 3136)
    assert us == 2 * cuda_model_backward.launch_us(tile, shape, 8, 12, 3136)
    assert tflops * us * 1e6 == pytest.approx(10 * 8 * 12 * 3136**2 * 64)
    one, more = (cuda_model_backward.launch_us(tile, shape, 1, heads, 128) for heads in (132, 133))
    assert one < more
    fewer = cuda_model_backward.launch_us(tile, shape._replace(passing=32), 1, 1, 128)
    assert fewer > cuda_model_backward.launch_us(tile, shape, 1, 1, 128)
    words = ("gradient_of_queries", "gradients_of_keys")
    names = [f"pipelined_joint_{x}<bfloat16, BackwardVariant<4, 64, 2, true> >" for x in words]
    monkeypatch.setattr(cuda_gate, "read", lambda path: [(name, gradients) for name in names])
    assert cuda_model.main(["--file", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(printed.count(f"bfloat16 by {x}") == 1 for x in ("queries", "keys")) and "queries x" not in printed
    assert len([line for line in printed.splitlines() if line.startswith("bfloat16 ")]) == 2 + 4


RESIDENT = """
        /*0000*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0010*/                   HGMMA.64x32x16.F32.BF16 R40, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/                   MUFU.EX2 R24, R24 ;
{more}
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R88, R148, gdesc[UR8].tnspB, R88 ;
        /*0090*/                   HGMMA.64x16x16.F32.BF16 R120, R148, gdesc[UR8].tnspB, R120 ;
        /*00a0*/                   HGMMA.64x64x16.F32.BF16 R88, R152, gdesc[UR8].tnspB, R88 ;
        /*00b0*/                   HGMMA.64x16x16.F32.BF16 R120, R152, gdesc[UR8].tnspB, R120, gsb0 ;
        /*00c0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00d0*/               @P1 BRA 0x0 ;
        /*00e0*/                   EXIT ;
"""
SECOND_SUM = "\n".join(
    f"        /*{16 * i:04x}*/                   HGMMA.64x{16 if i % 2 else 64}x16.F32.BF16 R9, R1, gdesc[UR8], R9 ;"
    for i in range(4, 8)
)


@pytest.mark.parametrize("more, by_keys", [("", False), (SECOND_SUM, True)])
def test_a_step_of_sequences_in_shared_memory(more, by_keys):
    """Of 80 channels, which are sums of 64 and 16: two products that they are summed by, or one."""
    sass = RESIDENT.format(more=more)
    kernel = cubin.Kernel("k", 90, 186, 0, 0, 0, 256, cubin.instructions(sass), sass)
    (step,) = cuda_model_resident.steps_of(kernel, steps=5)
    assert (step.passing, step.by_keys, step.exponentials) == (32, by_keys, 8)
    assert step.products == 2 * 16 + (2 if by_keys else 1) * (2 * 32 + 2 * 8) and step.chain >= step.products


BOTH = (False, True)


def test_a_tile_of_a_sequence_is_cut_into_steps():
    def step(passing: int, by_keys: bool) -> cuda_model_resident.Step:
        return cuda_model_resident.Step(passing, by_keys, *[passing] * 7)

    found = [step(16, True), step(64, False), step(32, True), step(16, False)]
    taken = {by_keys: [(n, x.passing) for n, x in cuda_model_resident.cut(found, by_keys, 196)] for by_keys in BOTH}
    assert taken == {False: [(3, 64), (1, 16)], True: [(6, 32), (1, 16)]}
    kernel = cubin.Kernel("k", 90, 128, 0, 0, 0, 256, cubin.Counter(), "")
    assert cuda_model_resident.blocks_at_a_time(kernel, 4, True, 196) == 2
    assert cuda_model_resident.blocks_at_a_time(kernel, 10, True, 196) == 0, "more than a block may have"
    us, bound, memory = cuda_model_resident.call_us(kernel, found, 4, False, 196)
    assert bound == "products" and us > 0 and memory == 4 * 2 * 128 * 12 * 196 * 64 / 3e6
