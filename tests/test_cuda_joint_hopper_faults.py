"""Mistakes planted in joint attention's kernels for Hopper, each of which the simulator or the error budget must find:
a wrong phase, a wait left out, memory given back too early, a fragment's wrong column. Without one, all pass."""

from __future__ import annotations

import re

import pytest
import torch
from cuda_faults import Fault, planted, said
from test_cuda_joint_hopper import between_nan, check_call, inputs
from test_cuda_joint_hopper import check as check_forward
from test_cuda_joint_hopper_backward import check as check_backward
from test_cuda_joint_hopper_backward import check_options_of, four

HERE = __name__


# ---- what each fault is shown ----


def forward():
    """Several tiles of keys, and of queries for a block, the last ones not whole; scores rise by 17 in each tile."""
    for seed in range(2):
        torch.manual_seed(seed)
        q, k, v = 1 + torch.rand(1, 130, 2, 64), torch.rand(1, 700, 2, 64), torch.randn(1, 700, 2, 64)
        k = k + torch.linspace(4, 0, 700)[:, None, None]
        check_forward(*(between_nan(x.bfloat16()) for x in (q, k, v)), seed=seed)
        check_forward(*inputs("plain", 1, 64, 20, 2, 64, torch.bfloat16), seed=seed)


def forward_options():
    for seed in range(2):
        torch.manual_seed(seed)
        check_call("all", 130, 300, 64, torch.bfloat16, seed)


def backward():
    for seed in range(3):
        torch.manual_seed(seed)
        check_backward(four("plain", 1, 300, 385, 2, 64, torch.bfloat16), seeds=(seed,))
    q, k = 1 + torch.rand(1, 66, 1, 64), -12 - 0.1 * torch.randn(1, 66, 1, 64)  # 2^-lse is infinite
    check_backward(tuple(x.bfloat16() for x in (q, k, torch.randn_like(q), torch.randn_like(q))))


def backward_of_128_channels():
    for seed in range(2):
        torch.manual_seed(seed)
        check_backward(four("plain", 1, 300, 300, 2, 128, torch.bfloat16), seeds=(seed,))


def backward_options():
    for seed, which in enumerate(("all", "turned")):
        torch.manual_seed(seed)
        check_options_of(which, 150, 200, 64, torch.bfloat16, seeds=(seed,))


# ---- the faults ----

STUCK = "nobody can go on"
UNMET = "no barrier lies between"
EARLY = "is still being copied to|whose phase the thread has not waited for"
UNFINISHED = "was not waited for|before it was waited for"

F, B, MULTIPLY = "joint_hopper.cuh", "joint_hopper_backward.cuh", "joint_hopper_backward_multiply.cuh"
COPY_F, COPY_B, PAIRS = "joint_hopper_copy.cuh", "joint_hopper_backward_copy.cuh", "joint_hopper_pairs.cuh"

FORWARD = {
    "wrong phase": Fault(
        COPY_F, "memory.k_empty + ring.stage, ring.parity ^ 1", "memory.k_empty + ring.stage, ring.parity", STUCK
    ),
    "no wait for keys": Fault(
        F, "phase_wait(memory.k_full + ring.stage, ring.parity);\n        turns.wait();", "turns.wait();", EARLY
    ),
    "no wait for values": Fault(
        F,
        "phase_wait(memory.v_full + last.stage, last.parity);\n        group_begin();",
        "group_begin();",
        EARLY,
    ),
    "waits too little": Fault(F, "group_wait<1>();", "group_wait<2>();", UNFINISHED),
    "values given back too early": Fault(
        F,
        "release(memory.k_empty + ring.stage);\n        const bool rises",
        "release(memory.k_empty + ring.stage), release(memory.v_empty + last.stage);\n        const bool rises",
        UNFINISHED,
    ),
    "too few bytes": Fault(
        "joint_hopper_slabs.cuh", "phase_expect(full, kRows * ", "phase_expect(full, kRows / 2 * ", r"expects \d+ more"
    ),
    "no turns": Fault(F, "        turns.wait();\n", "", "arrives twice"),
    "sums are not rescaled": Fault(F, "if (rises) rescale(o, shrink);", "", "parity"),
    "wrong row": Fault(F, "lane_number() / 4),", "lane_number() % 8),", "writes a second time"),
    "wrong column is hidden": Fault(PAIRS, "word[i / 16] >> 2 * t &", "word[i / 16] >> t &", "parity"),
}
FORWARD_OPTIONS = {
    "words of another row": Fault("joint_hopper_softmax.cuh", "row + (odd ? 8 : 0)", "row + (odd ? 0 : 8)", "parity"),
}
BACKWARD = {
    "wrong phase": Fault(
        COPY_B,
        "ring.parity ^ 1);\n            phase_expect",
        "ring.parity);\n            phase_expect",
        STUCK,
    ),
    "no wait for rows": Fault(
        B,
        "group.wait(stage);\n        group_begin();\n        start_across<T>(x, q,",
        "group_begin();\n        start_across<T>(x, q,",
        EARLY,
    ),
    "no wait for kept rows": Fault(
        B, "phase_wait(memory.kept_full, parity);\n        KeysOfGroup", "KeysOfGroup", EARLY
    ),
    "waits too little": Fault(
        B,
        "group_wait<1>();\n        group_settle(x), group_settle(ds)",
        "group_wait<2>();\n        group_settle(x), group_settle(ds)",
        UNFINISHED,
    ),
    "a stage given back too early": Fault(
        B, "if (!first) group.done(last);\n        float delta", "group.done(stage);\n        float delta", UNFINISHED
    ),
    "too few bytes": Fault(
        COPY_B,
        "phase_expect(full, Memory::kStageBytes)",
        "phase_expect(full, Memory::kPassingBytes)",
        r"expects \d+ more",
    ),
    "statistics of another stage": Fault(
        B, "statistics + stage.stage * kPassing", "statistics + (stage.stage ^ 1) * kPassing", UNMET
    ),
    "wrong row": Fault(
        B, "8 * r + lane_number() / 4, query", "8 * r + lane_number() % 8, query", "writes a second time"
    ),
    "wrong column": Fault(B, "column_of(i) < keys", "column_of(i) <= keys", "parity"),
    "statistics of another column": Fault(B, "of[i % 2 * 2]", "of[i / 2 * 2]", "parity"),
    "delta of another column": Fault(B, "delta[i / 4][i % 2];", "delta[i / 4][i / 2 % 2];", "parity"),
}
OF_128_CHANNELS = {
    "kept rows given back too early": Fault(MULTIPLY, "if (Variant::kHeld == 2) has_kept();", "has_kept();", UNMET),
    "wrong half of kept rows": Fault(MULTIPLY, "kept, first / kHalfRows * kHalfRows", "kept, 0", "parity"),
}
BACKWARD_OPTIONS = {
    "wrong pairs are dropped": Fault(PAIRS, "i % 8 / 4 * 2 + i % 2", "i % 8 / 4 + i % 2 * 2", "parity"),
    "words of another row": Fault(
        PAIRS, "words(row + (odd ? 8 : 0), first_group", "words(row + (odd ? 0 : 8), first_group", "parity"
    ),
    "a hidden key has gradients": Fault(B, "keys.forget_hidden_keys();", ";", "parity"),
    "a slope left out": Fault("joint_hopper_backward_scores.cuh", "return x * (1.f - y * y);", "return x;", "parity"),
    "not turned back": Fault(MULTIPLY, "!Variant::kPlain && p.cos != nullptr", "false", "parity"),
}
ALL = [
    (check, source, name, fault)
    for check, source, faults in (
        ("forward", "joint_hopper_bf16.cu", FORWARD),
        ("forward_options", "joint_hopper_options_bf16.cu", FORWARD_OPTIONS),
        ("backward", "joint_hopper_backward_bf16.cu", BACKWARD),
        ("backward_of_128_channels", "joint_hopper_backward_bf16.cu", OF_128_CHANNELS),
        ("backward_options", "joint_hopper_backward_options_bf16.cu", BACKWARD_OPTIONS),
    )
    for name, fault in [("none", None), *faults.items()]
]


@pytest.mark.full
@pytest.mark.parametrize("check, source, name, fault", [pytest.param(*x, id=f"{x[0]}-{x[2]}") for x in ALL])
def test_a_mistake_is_found(check, source, name, fault, tmp_path):
    found = said(planted(tmp_path, fault, source), f"{HERE}.{check}")
    if fault is None:
        assert found == "", name
    else:
        assert re.search(fault.found, found, re.DOTALL), found or "nobody found it"
