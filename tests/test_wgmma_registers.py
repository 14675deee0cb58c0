"""Products of sm_90 that read a factor from registers while they run: nothing may write these before a wait.

No interpreter can show it, and a GPU only when its timing is so: found in the machine code, see bench/cubin.py.
"""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from bench import cubin  # noqa: E402
from bench.launches import compile_launches  # noqa: E402
from vivit_kernels.tubelet_embedding.triton_forward import waited_for  # noqa: E402

PRODUCT = "HGMMA.64x256x16.F32.BF16 R24, {}, gdesc[UR8], R24{}"
A, B = PRODUCT.format("R152", ", gsb0"), PRODUCT.format("R160", ", gsb0")
OPEN, SHARED = PRODUCT.format("R152", ""), PRODUCT.format("gdesc[UR4]", ", gsb0")
WAIT = "WARPGROUP.DEPBAR.LE gsb0, {}"


def machine_code(*lines: str) -> str:
    """Instructions at 0x0000, 0x0010, ..., as the disassembler writes them."""
    return "\n".join(f"        /*{16 * i:04x}*/  {line} ;   /* 0x0 */" for i, line in enumerate(lines))


@pytest.mark.parametrize(
    "lines, found",
    [
        ([A, "IMAD.MOV.U32 R153, RZ, RZ, 0x1"], ["IMAD.MOV.U32 at 0x0010 writes R153"]),
        ([A, WAIT.format("0x0"), "IMAD.MOV.U32 R153, RZ, RZ, 0x1"], []),
        ([A, "IMAD.MOV.U32 R156, RZ, RZ, 0x1", "STS [R152], R153", "BAR.SYNC.DEFER_BLOCKING R152"], []),
        ([SHARED, "IMAD.MOV.U32 R152, RZ, RZ, 0x1"], []),
        ([A, "@!P0 SHFL.IDX PT, R155, R3, R4, 0x1f"], ["SHFL.IDX at 0x0010 writes R155"]),
        # of two in flight, the wait for all but one is for the first
        ([A, B, WAIT.format("0x1"), "PRMT R152, R3, 0x4140, RZ"], []),
        ([A, B, WAIT.format("0x1"), "PRMT R163.reuse, R3, 0x4140, RZ"], ["PRMT at 0x0030 writes R163"]),
        # not yet of a group, which the next product closes
        ([OPEN, "LDS.U16 R152, [R3]"], ["LDS.U16 at 0x0010 writes R152"]),
        ([OPEN, B, WAIT.format("0x1"), "LDS.U16 R152, [R3]"], ["LDS.U16 at 0x0030 writes R152"]),
        # results of several registers
        ([A, "LDS.128 R149, [R3]"], ["LDS.128 at 0x0010 writes R152"]),
        ([A, "IMAD.WIDE.U32 R151, R3, 0x10, R4"], ["IMAD.WIDE.U32 at 0x0010 writes R152"]),
        ([A, "CS2R R150, SRZ", "LDG.E.64 R150, desc[UR14][R4.64]", "LDSM.16.M88.2 R150, [R3]"], []),
        # around a loop, which leaves one product in flight; behind it, and past it
        (["LDS.U16 R152, [R3]", A, WAIT.format("0x1"), "@!P0 BRA 0x0"], ["LDS.U16 at 0x0000 writes R152"]),
        (["LDS.U16 R152, [R3]", A, WAIT.format("0x0"), "@!P0 BRA 0x0", "EXIT"], []),
        ([A, "@P0 BRA 0x30", WAIT.format("0x0"), "LDS.U16 R152, [R3]"], ["LDS.U16 at 0x0030 writes R152"]),
        ([A, "BRA 0x30", "LDS.U16 R152, [R3]", "EXIT"], []),
    ],
)
def test_early_writes_are_noticed(lines, found):
    assert cubin.overwritten(machine_code(*lines)) == found


@triton.jit
def converted(a_ptr, b_ptr, c_ptr, K, WAITS: tl.constexpr):
    i, j, k = tl.arange(0, 128), tl.arange(0, 128), tl.arange(0, 64)
    total = tl.zeros([128, 128], tl.float32)
    for start in range(0, K, 64):
        # [128, 64], [64, 128]
        a = tl.load(a_ptr + i[:, None] * K + start + k[None, :])
        b = tl.load(b_ptr + j[None, :] * K + start + k[:, None])
        total = tl.dot(a.to(tl.bfloat16), b, total)
        if WAITS:
            total = waited_for(total)
    tl.store(c_ptr + i[:, None] * 128 + j[None, :], total)


@pytest.mark.parametrize(
    "waits",
    [
        True,
        pytest.param(
            False, marks=pytest.mark.skipif(triton.__version__ != "3.6.0", reason="another compiler may be right")
        ),
    ],
)
def test_only_products_that_are_waited_for_keep_their_registers(waits):
    a, b = (torch.empty(128, 4096, dtype=dtype) for dtype in (torch.uint8, torch.bfloat16))
    c = torch.empty(128, 128)
    (launch,) = compile_launches(lambda: converted[(1,)](a, b, c, 4096, WAITS=waits, num_stages=4), 90)
    factors = [line.split(",")[1].strip() for line in launch.kernel.sass.splitlines() if "HGMMA" in line]
    assert factors and all(factor.startswith("R") for factor in factors), "the factor is to lie in registers"
    assert any(line.startswith("race: ") for line in launch.complaints) is not waits


# (video, parameters, scale): what the benchmark's cases, uint8 all, leave out of the compile gate
@pytest.mark.parametrize(
    "video, dtype, scale",
    [
        (torch.float16, torch.float16, 0.5),
        (torch.float32, torch.bfloat16, 1.0),
        pytest.param(torch.bfloat16, torch.float16, 1.0, marks=pytest.mark.full),
        pytest.param(torch.float32, torch.float16, 0.5, marks=pytest.mark.full),
        pytest.param(torch.bfloat16, torch.bfloat16, 1.0, marks=pytest.mark.full),
    ],
)
def test_pixels_of_every_kind_are_waited_for(video, dtype, scale):
    clip = torch.empty(2, 3, 8, 224, 224, dtype=video)
    weight = torch.empty(768, 3, 2, 16, 16, dtype=dtype)
    op = torch.ops.vivit_kernels.tubelet_embedding_fwd
    launches = compile_launches(lambda: op(clip, weight, None, None, None, False, [scale] * 3, [0.0] * 3, "triton"), 90)
    assert launches[-1].kernel.mix["HGMMA"]
    assert [line for launch in launches for line in launch.complaints if line.startswith("race: ")] == []
