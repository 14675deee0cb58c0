"""The compile gate of CUDA C++: every kernel in the native library, judged by bench/cuda_gate.py. First that it notices
what it is there for."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from native_tree import build

from bench import cubin, cuda_gate
from vivit_kernels import _library, _native

in_library = pytest.mark.usefixtures("cuda_library")
compiles = pytest.mark.skipif(
    not shutil.which("nvcc"),
    reason="what the gate must notice is planted in kernels, which nvcc compiles: it is not here",
)
KERNELS = """
template <class T, bool kBackward>
__global__ void __launch_bounds__(256) packed_good(const T* x, T* y) { y[threadIdx.x] = x[threadIdx.x]; }
__global__ void __launch_bounds__(32) packed_local(const float* x, float* y, int i) {
    float many[64];
    for (int j = 0; j < 64; ++j) many[j] = x[j * i];
    for (int j = 0; j < 64; ++j) many[(j * i) % 64] += x[j];
    y[threadIdx.x] = many[i % 64];
}
__device__ void multiply(float (&d)[4], unsigned a) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %4, %4, %4}, {%4, %4}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a));
}
template <bool kInside>
__global__ void __launch_bounds__(32) packed_products(const unsigned* x, float* y, int steps, int i) {
    unsigned kept[16];
    float d[4] = {};
    for (int j = 0; j < 16; ++j) kept[j] = x[j];
#pragma unroll 1
    for (int j = 0; j < steps; ++j) multiply(d, kInside ? kept[(i + j) % 16] : x[j]);
#pragma unroll 1
    for (int j = 0; j < steps; ++j) d[0] += kept[(i + j) % 16] *= 3;
    y[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
template __global__ void packed_products<true>(const unsigned*, float*, int, int);
template __global__ void packed_products<false>(const unsigned*, float*, int, int);
__global__ void resident_unbound(const short* x, short* y) { y[threadIdx.x] = x[threadIdx.x]; }
__global__ void __launch_bounds__(64) other(const float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; }
template __global__ void packed_good<float4, true>(const float4*, float4*);
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> dict[str, tuple[cubin.Kernel, list[str]]]:
    folder: Path = tmp_path_factory.mktemp("gate")
    (folder / "planted.cu").write_text(KERNELS)
    command = ["nvcc", "-std=c++17", "-arch=sm_90a", "-cubin", "planted.cu", "-o", "planted.cubin"]
    subprocess.run(command, cwd=folder, check=True)
    return {
        name: (kernel, cuda_gate.complaints(name, kernel)) for name, kernel in cuda_gate.read(folder / "planted.cubin")
    }


@compiles
def test_names_are_as_one_writes_them(planted):
    loops = {"packed_products<true>", "packed_products<false>"}
    assert set(planted) == {"packed_good<float4, true>", "packed_local", "resident_unbound", "other"} | loops
    mangled = "_ZN5vivit4cuda16packed_attentionI13__nv_bfloat16Li4ELb1ELb0EEEvNS0_15AttentionParamsE"
    if shutil.which("c++filt"):
        name = cuda_gate.demangled([mangled, mangled])[mangled]
        assert name == "packed_attention<bfloat16, 4, true, false>"


@compiles
def test_what_is_planted_is_noticed(planted):
    good, found = planted["packed_good<float4, true>"]
    assert good.threads == 256 and found == ["opcode: no HMMA", "opcode: no MOVM"], "128 bits a load and store"
    _, found = planted["packed_local"]
    assert f"local memory: 256 bytes a thread, {cuda_gate.MOST_STACK} at most" in found and not any(
        "spills" in line for line in found
    )
    assert {"opcode: no LDG.128", "opcode: no STG.128"} <= set(found)
    _, found = planted["resident_unbound"]
    assert found[0].startswith("launch bounds: none") and "opcode: no LDSM" in found
    assert any(line.startswith("memory: ") and line.endswith("LDG.16") for line in found)
    _, found = planted["other"]
    assert len(found) == 1 and found[0].startswith("name: begins with neither packed nor resident nor hopper")
    kernel, _ = planted["packed_good<float4, true>"]
    for name, last in (
        ("hopper_attention<bfloat16, 4, true, false>", ["LDSM"]),
        ("hopper_attention<half, 5, true>", []),
    ):
        assert cuda_gate.complaints(name, kernel) == [
            f"opcode: no {opcode}" for opcode in ("HMMA", "MOVM", "HGMMA", "UTMALDG", "STG.64", *last)
        ]
    name = "hopper_attention<bfloat16>"
    assert cuda_gate.complaints(name, dataclasses.replace(kernel, arch=80)) == []


@compiles
def test_tensor_cores_are_not_for_float32(planted):
    (good, _), (products, _) = planted["packed_good<float4, true>"], planted["packed_products<false>"]
    missing = [f"opcode: no {opcode}" for opcode in ("FFMA", "LDGSTS.128", "LDS.128")]
    assert cuda_gate.complaints("float32_attention<true>", good) == missing
    assert cuda_gate.complaints("tf32_attention<true>", good) == ["opcode: no HMMA", *missing[1:]]
    count = products.mix["HMMA"]
    assert f"opcode: {count} HMMA, which is not float32" in cuda_gate.complaints("float32_attention<true>", products)


@compiles
def test_who_may_read_one_or_two_bytes_at_a_time(planted):
    narrow = dataclasses.replace(planted["packed_products<false>"][0], mix=cubin.Counter({"LDG.16": 3}))
    for name, allowed in (
        ("tubelet_forward<bfloat16, unsigned char, true>", False),
        ("tubelet_forward<bfloat16, unsigned char, false>", True),
        ("tubelet_video_gradient<half>", True),
        ("parameter_row<half>", True),
        ("gathering_tubelet_forward<half, unsigned char, 192>", True),
        ("gathering_tubelet_forward<half, float, 192>", False),
        ("gathering_weight_gradient<half, unsigned char>", True),
        ("gathering_weight_gradient<half, half>", False),
        ("scattering_video_gradient<half>", True),
        ("packed_attention<bfloat16, 4, false>", False),
    ):
        assert ("memory: 3 LDG.16" not in cuda_gate.complaints(name, narrow)) == allowed


@compiles
def test_a_kernel_that_does_not_fit_is_noticed(planted):
    kernel, _ = planted["packed_good<float4, true>"]
    greedy = dataclasses.replace(kernel, registers=255, threads=512)
    assert "no block fits: registers" in cuda_gate.complaints("packed_good", greedy)


@compiles
def test_local_memory_is_allowed_outside_of_loops_that_multiply(planted):
    (inside, found), (outside, others) = (planted[f"packed_products<{word}>"] for word in ("true", "false"))
    assert inside.stack == outside.stack == 64 and outside.spills
    (loop,) = cubin.loops_with_products(inside)
    count = loop.mix["LDL"] + loop.mix["STL"]
    assert count and f"spills: {count} loads and stores of local memory in the loop at {loop.first:#06x}" in found
    assert len(cubin.loops_with_products(outside)) == 1 < len(cubin.loops(outside.sass))
    assert (
        not any(line.startswith("spills") for line in others)
        and f"local memory: 64 bytes a thread, {cuda_gate.MOST_STACK} at most" in others
    )
    smaller = dataclasses.replace(outside, stack=cuda_gate.MOST_STACK)
    assert not cubin.local_memory(smaller, cuda_gate.MOST_STACK)


LOOPS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/               @P0 BRA 0x90 ;
        /*0020*/                   LDL R1, [R1] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
                                                                                  /* 0x000000080c04723c */
        /*0040*/               @P0 BRA 0x30 ;
        /*0050*/                   STL [R1], R4 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/                   BRA.U UP0, 0x60 ;
        /*0080*/              @!P1 BRA P2, 0x20 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0 ;
"""


def test_loops_are_found_by_branches_back():
    kernel = cubin.Kernel("k", 90, 64, 8, 0, 0, 128, cubin.instructions(LOOPS), LOOPS)
    first, second, outer = cubin.loops(LOOPS)
    assert [(loop.first, loop.last) for loop in (first, second, outer)] == [(0x30, 0x40), (0x60, 0x70), (0x20, 0x80)]
    assert first.mix == {"HMMA": 1, "BRA": 1} and outer.mix == {"HMMA": 2, "BRA": 3, "LDL": 1, "STL": 1}
    most = cuda_gate.MOST_STACK
    assert cubin.loops_with_products(kernel) == [first, second] and cubin.local_memory(kernel, most) == []
    inside = dataclasses.replace(kernel, sass=LOOPS.replace("@P0 BRA 0x30", "@P0 BRA 0x20"))
    assert cubin.local_memory(inside, most) == ["spills: 1 loads and stores of local memory in the loop at 0x0020"]
    many = dataclasses.replace(kernel, stack=most, local=4)
    assert cubin.local_memory(many, most) == [f"local memory: {most + 4} bytes a thread, {most} at most"]


PIPELINED = """
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R88, R4, gdesc[UR12], R88, gsb0 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0030*/                   MUFU.EX2 R24, R24 ;
        /*0040*/                   MUFU.EX2 R25, R25 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   MUFU.EX2 R26, R26 ;
        /*0070*/               @P0 BRA 0x0 ;
        /*0080*/                   EXIT ;
"""


def test_exponentials_that_overlap_with_nothing_are_noticed():
    kernel = cubin.Kernel("k", 90, 168, 0, 0, 0, 384, cubin.instructions(PIPELINED), PIPELINED)
    name = "pipelined_joint_forward<bfloat16>"
    assert cuda_gate.not_overlapped(kernel) == []
    late = dataclasses.replace(kernel, sass=PIPELINED.replace("gsb0, 0x1", "gsb0, 0x0"))
    assert cuda_gate.not_overlapped(late) == ["overlap: 0 of 3 exponentials in the loop at 0x0000 beside a product"]
    found = cuda_gate.complaints(name, dataclasses.replace(late, stack=8))
    assert "local memory: 8 bytes a thread, none at all here" in found and any("overlap" in line for line in found)
    assert [line for line in found if line.startswith("opcode")] == [
        f"opcode: no {opcode}" for opcode in ("UTMALDG", "SYNCS", "USETMAXREG", "STG.64")
    ]
    assert cuda_gate.complaints(name, dataclasses.replace(late, arch=80)) == []
    early = dataclasses.replace(kernel, sass=PIPELINED.replace("MUFU.EX2 R25, R25", "MUFU.EX2 R4, R25"))
    assert "a product under way: MUFU.EX2 at 0x0040 writes R4" in cuda_gate.complaints(name, early)
    assert not any("under way" in line for line in cuda_gate.complaints(name, kernel))


def packed(*instructions: str) -> cubin.Kernel:
    text = {"load": "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", "product": "HMMA.16816.F32.BF16 R4, R8, R12, R4"}
    sass = "\n".join(f"        /*{16 * i:04x}*/  {text[word]} ;" for i, word in enumerate(instructions))
    return cubin.Kernel("k", 90, 80, 0, 0, 0, 128, cubin.instructions(sass), sass)


def test_loads_that_wait_for_products_are_noticed():
    name, whole = "packed_attention<bfloat16, 4, true, false>", ["load"] * 12 + ["product"] * 32
    assert cuda_gate.asked_at_once(packed(*whole, *whole)) == (2, 16 * 64 * 2 * 3)
    assert cuda_gate.too_little_asked(name, packed(*whole, *whole)) == []
    late = packed(*["load"] * 8, "product", *["load"] * 4, "product", *whole)
    assert cuda_gate.too_little_asked(name, late) == ["loads: in 3 runs with products between, of 2"]
    assert any(line.startswith("loads: in 3") for line in cuda_gate.complaints(name, late))
    assert cuda_gate.too_little_asked("packed_attention<bfloat16, 4, false, false>", late) == []  # turned on load
    few = dataclasses.replace(packed(*whole, *whole), registers=255)
    assert cuda_gate.too_little_asked(name, few) == ["loads: 8 warps ask for 49,152 bytes at most, 65,536 at least"]


@in_library
def test_next_to_nothing_lies_in_local_memory():
    """Of any kernel. The rest of the gate disassembles, for seconds to a minute."""
    used = cubin.resources(_library.library_path())
    names = cuda_gate.demangled(name for _, name in used)
    taken = {f"sm_{arch} {names[name]}": x["STACK"] + x["LOCAL"] for (arch, name), x in used.items()}
    found = {name: count for name, count in taken.items() if count > cuda_gate.MOST_STACK}
    assert taken and not found


PARTS = 16  # of the library, of about the same size: a process that is done takes another


@pytest.fixture
def cubins(cuda_library, tmp_path_factory) -> list[Path]:
    """The library's, the largest first. They are extracted once for all processes of this run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cubins"
    with build.alone(folder):
        if not (folder / "all").exists():
            cubin.extracted(_library.library_path(), folder)
            (folder / "all").touch()
    return sorted(folder.glob("*.cubin"), key=lambda path: (-path.stat().st_size, path.name))


@pytest.mark.full
@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_are_what_they_were_written_to_be(part, cubins):
    kernels = [pair for path in cubins[part::PARTS] for pair in cuda_gate.read(path)]
    found = [f"sm_{x.arch} {name}: {why}" for name, x in kernels for why in cuda_gate.complaints(name, x)]
    assert kernels and not found, "\n".join(found)


@pytest.mark.full
def test_every_kernel_is_in_one_of_the_parts_and_there_for_every_gpu(cubins):
    library = {(arch, name) for arch, name in cubin.resources(_library.library_path()) if arch in cubin.ARCHS}
    of_cubin = {path: int(path.suffixes[-2].removeprefix(".sm_").rstrip("af")) for path in cubins}
    assert library == {
        (arch, name) for path, arch in of_cubin.items() if arch in cubin.ARCHS for _, name in cubin.resources(path)
    }
    names = cuda_gate.demangled(name for _, name in library)
    words = {name.partition("_")[0] for name in names.values()}
    assert {"pipelined", "packed", "resident", "float32", "streaming", "tubelet", "parameter"} <= words
    archs = {arch for arch, _ in library}
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        assert {80, 90} <= archs
    for arch in archs:  # the same kernels for each
        assert {name for other, name in library if other == arch} == {name for _, name in library}


def test_the_command_prints_a_table(capsys, monkeypatch, tmp_path):
    kernel = cubin.Kernel("k", 90, 64, 0, 0, 0, 128, cubin.Counter({"HMMA": 8, "LDG": 4, "LDG.128": 4}), "")
    monkeypatch.setattr(cuda_gate.cubin, "read", lambda path: [kernel])
    monkeypatch.setattr(cuda_gate, "demangled", lambda names: dict.fromkeys(names, "packed_attention<bfloat16, 4>"))
    assert cuda_gate.main(["--file", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "packed_attention<bfloat16, 4>  sm_90         64       0      128     32      0     8" in printed
    assert "! sm_90 packed_attention<bfloat16, 4>: opcode: no STG.128" in printed and "4/4" in printed
    assert "0+0/0" in printed
    monkeypatch.setitem(cuda_gate.WANTED, "packed", ("HMMA", "LDG.128"))
    assert cuda_gate.main(["--file", str(tmp_path), "packed*"]) == 0
    assert cuda_gate.main(["--file", str(tmp_path), "resident*"]) == 1
    assert "! no kernel is called so" in capsys.readouterr().out


def test_without_kernels_it_says_why(capsys, monkeypatch):
    monkeypatch.setattr(_native, "AVAILABLE", True)
    monkeypatch.setattr(_native, "CUDA", False)
    monkeypatch.setattr(_native, "NO_CUDA", "built for the CPU alone (no nvcc)")
    assert cuda_gate.main([]) == 1
    assert capsys.readouterr().err == f"built for the CPU alone (no nvcc)\n  -> {_native.CUDA_REMEDY}\n"
