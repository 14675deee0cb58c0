"""The static model of tubelet_embedding's kernels for Hopper (bench/cuda_model_tubelet.py), on machine code that is
written here."""

import pytest

from bench import cubin, cuda_gate, cuda_model, cuda_model_tubelet

NAME = "gathering_tubelet_forward<bfloat16, {pixel}, 192>"
SASS = """
        /*0000*/                   WARPGROUP.ARRIVE ;
        /*0010*/                   HGMMA.64x192x16.F32.BF16 R24, R124, gdesc[UR8], R24 ;
        /*0020*/                   HGMMA.64x192x16.F32.BF16 R24, R128, gdesc[UR8], R24, gsb0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/                   LDS.128 R140, [R140+0x24160] ;
        /*0050*/               @P3 LDG.E.U16.CONSTANT R171, desc[UR10][R148.64] ;
        /*0060*/              @!P0 BRA 0x280 ;
{scaled}
        /*0280*/                   PRMT R141, R21, 0x4140, RZ ;
        /*0290*/                   HFMA2.BF16_V2 R141, R141, R170.H0_H0, -2, -2 ;
        /*02a0*/               @P1 BRA 0x0 ;
        /*02b0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*02c0*/                   EXIT ;
"""
SCALED = "\n".join(f"        /*{16 * i:04x}*/                   FFMA R88, R88, R5, R6 ;" for i in range(7, 40))
GRADIENT = "gathering_weight_gradient<bfloat16, {pixel}>"
OF_GRADIENT = """
        /*0000*/                   WARPGROUP.ARRIVE ;
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR4].tnspB, R24 ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R88, R156, gdesc[UR8].tnspB, R88, gsb0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/               @!P0 BRA 0x80 ;
        /*0050*/                   SYNCS.ARRIVE.TRANS64 RZ, [R176+URZ+0x20000], R171 ;
        /*0060*/                   UTMALDG.3D [UR8], [UR14] ;
        /*0070*/                   VIADD R2, R2, 0x1 ;
        /*0080*/                   LDS.128 R176, [R233+0x20200] ;
        /*0090*/                   LDG.E.U16.CONSTANT R187, desc[UR8][R182.64] ;
        /*00a0*/               @P1 BRA 0x0 ;
        /*00b0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00c0*/                   EXIT ;
"""


def compiled(sass: str) -> cubin.Kernel:
    return cubin.Kernel("k", 90, 195, 0, 0, 0, 256, cubin.instructions(sass), sass)


@pytest.fixture
def kernel() -> cubin.Kernel:
    return compiled(SASS.format(scaled=SCALED))


def test_a_step_of_the_gradient_is_added_up():
    """What one warp alone asks for counts once, not in each warp of a scheduler."""
    step = cuda_model_tubelet.step_of(GRADIENT.format(pixel="unsigned char"), compiled(OF_GRADIENT))
    assert step.columns == 0 and step.pixel_bytes == 1
    assert step.products == 2 * 64 and step.issue == (2 * 8 + 3) // 2
    assert step.shared == (2 * 2 * 32 + 2 * 64 + 8 * (1 + 1)) // 2
    assert step.period() == (step.shared, "shared")
    assert step.cached_bytes() == 32 * 128 * 2 + 32 * 256


def test_a_gradient_takes_whole_parts_and_what_lies_beside_them():
    step = cuda_model_tubelet.step_of(GRADIENT.format(pixel="float"), compiled(OF_GRADIENT))
    us, beside, parts = cuda_model_tubelet.gradient_us(step, 25088, 1536, 768)
    assert parts == 7, "252 tiles for 132 multiprocessors: two rounds, the second nearly full"
    assert us == pytest.approx(2 * 56 * 2 * step.period()[0] / 1.7e3)
    assert beside == pytest.approx((25088 * 768 * 2 + 7 * 768 * 1536 * 4) / 3e6)
    assert cuda_model_tubelet.gradient_us(step, 25088, 1537, 768)[0] > us


def test_a_step_is_added_up(kernel):
    """Half of the loop's body, of both warpgroups: two warps on each scheduler."""
    step = cuda_model_tubelet.step_of(NAME.format(pixel="unsigned char"), kernel)
    assert (step.columns, step.pixel_bytes) == (192, 1)
    assert step.products == 2 * 96 and step.issue == 10 and step.normalise == 33
    assert step.alu == 2 and step.fma == 2
    assert step.shared == (2 * 2 * 48 + 2 * 192 + 8 * (1 + 1)) // 2
    assert step.period() == (step.shared, "shared")
    assert step.cached_bytes() == 192 * 64 * 2 + 128 * 64
    wide = cuda_model_tubelet.step_of(NAME.format(pixel="float"), kernel)
    assert wide.pixel_bytes == 4 and wide.shared == step.shared + 4, "a warp's pairs take two cycles"


def test_a_call_takes_whole_tiles_and_pairs_of_steps(kernel):
    step = cuda_model_tubelet.step_of(NAME.format(pixel="bfloat16"), kernel)
    one, _ = cuda_model_tubelet.call_us(step, 1, 1, 1)
    assert one == cuda_model_tubelet.call_us(step, 132 * 128, 128, 192)[0]
    assert cuda_model_tubelet.call_us(step, 132 * 128, 129, 192)[0] == 2 * one
    assert cuda_model_tubelet.call_us(step, 132 * 128, 128, 193)[0] == 2 * one


def test_a_step_of_the_videos_gradient_is_added_up():
    """Both operands in shared memory, one step in the loop's body."""
    code = OF_GRADIENT.replace("64x128x16.F32.BF16 R24, R152,", "64x256x16.F32.BF16 R24, gdesc[UR4],")
    step = cuda_model_tubelet.step_of("scattering_video_gradient<half>", compiled(code.replace("64x128", "64x256")))
    assert step.products == 2 * 2 * 128 and step.cached_bytes() == (128 + 256) * 64 * 2
    assert step.shared == (2 * 2 * (256 + 64) * 16 * 2 + (128 + 256) * 64 * 2) // 128 + 8 * (1 + 1)
    one, _ = cuda_model_tubelet.call_us(step, 1, 1, 1)
    assert one == cuda_model_tubelet.call_us(step, 132 * 128, 256, 64)[0]
    assert cuda_model_tubelet.call_us(step, 132 * 128, 257, 64)[0] == 2 * one


def test_the_command_prints_its_tables_beside_attentions(kernel, capsys, monkeypatch, tmp_path):
    name = NAME.format(pixel="half")
    monkeypatch.setattr(cuda_gate, "read", lambda path: [(name, kernel), ("tubelet_forward<half>", kernel)])
    assert cuda_model.main(["--file", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(name) == 4 and "queries" not in printed and "parts" not in printed
    name, gradient = GRADIENT.format(pixel="half"), compiled(OF_GRADIENT)
    monkeypatch.setattr(cuda_gate, "read", lambda path: [(name, gradient)])
    assert cuda_model.main(["--file", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(name) == 4 and "parts" in printed and "TFLOP/s at most" not in printed


def test_what_cannot_be_read_is_named(kernel):
    with pytest.raises(ValueError, match="gathering_other does not say pixels and columns"):
        cuda_model_tubelet.step_of("gathering_other", kernel)
    plain = cubin.Kernel("k", 90, 32, 0, 0, 0, 32, cubin.Counter(), "        /*0000*/                   EXIT ;")
    with pytest.raises(ValueError, match="k has no loop with products"):
        cuda_model_tubelet.step_of(NAME.format(pixel="float"), plain)


def test_the_gate_notices_products_that_are_waited_for(kernel):
    assert cuda_gate.waited_for(kernel) == []
    serial = kernel.sass.replace("gsb0, 0x1", "gsb0, 0x0")
    found = cuda_gate.waited_for(cubin.Kernel("k", 90, 195, 0, 0, 0, 256, cubin.instructions(serial), serial))
    assert found == ["overlap: 1 of 1 waits in the loop at 0x0000 are for all products"]
