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
UNFENCED = "did not reach group_fence since"
EARLY = "is still being copied to|whose phase the thread has not waited for"
UNFINISHED = "was not waited for|before it was waited for"

F, B, MULTIPLY = "joint_hopper.cuh", "joint_hopper_backward.cuh", "joint_hopper_backward_multiply.cuh"
COPY_F, COPY_B, PAIRS = "joint_hopper_copy.cuh", "joint_hopper_backward_copy.cuh", "joint_hopper_pairs.cuh"
SCORES = "joint_hopper_backward_scores.cuh"

FORWARD = {
    "wrong phase": Fault(
        COPY_F, "ring.parity ^ 1", "ring.parity", STUCK, "memory.k_empty + ring.stage, ring.parity ^ 1"
    ),
    "no wait for keys": Fault(
        F,
        "phase_wait(memory.k_full + ring.stage, ring.parity);",
        "",
        EARLY,
        "phase_wait(memory.k_full + ring.stage, ring.parity);\n        turns.wait();",
    ),
    "no wait for values": Fault(
        F,
        "phase_wait(memory.v_full + last.stage, last.parity);",
        "",
        EARLY,
        "phase_wait(memory.v_full + last.stage, last.parity);\n        group_begin();",
    ),
    "waits too little": Fault(F, "group_wait<1>();", "group_wait<2>();", UNFINISHED),
    "values given back too early": Fault(
        F,
        "release(memory.k_empty + ring.stage);",
        "release(memory.k_empty + ring.stage), release(memory.v_empty + last.stage);",
        UNFINISHED,
        "release(memory.k_empty + ring.stage);\n        const bool rises",
    ),
    "too few bytes": Fault(
        "joint_hopper_slabs.cuh", "kRows", "kRows / 2", r"expects \d+ more", "phase_expect(full, kRows * "
    ),
    "no turns": Fault(F, "turns.wait();", "", "arrives twice"),
    "sums are not rescaled": Fault(F, "if (rises) rescale(o, shrink);", "", "parity"),
    "wrong row": Fault(F, "lane_number() / 4", "lane_number() % 8", "writes a second time", "lane_number() / 4),"),
    "wrong column is hidden": Fault(PAIRS, "2 * t", "t", "parity", "word[i / 16] >> 2 * t &"),
}
FORWARD_OPTIONS = {
    "words of another row": Fault(
        "joint_hopper_softmax.cuh", "odd ? 8 : 0", "odd ? 0 : 8", "parity", "row + (odd ? 8 : 0)"
    ),
}
BACKWARD = {
    "wrong phase": Fault(
        COPY_B, "ring.parity ^ 1", "ring.parity", STUCK, "ring.parity ^ 1);\n            phase_expect"
    ),
    "no wait for rows": Fault(
        B, "group.wait(stage);", "", EARLY, "group.wait(stage);\n        group_begin();\n        start_across<T>(x, q,"
    ),
    "no wait for kept rows": Fault(
        B,
        "phase_wait(memory.kept_full, parity);",
        "",
        EARLY,
        "phase_wait(memory.kept_full, parity);\n        KeysOfGroup",
    ),
    "waits too little": Fault(
        B,
        "group_wait<1>();",
        "group_wait<2>();",
        UNFINISHED,
        "group_wait<1>();\n        group_settle(x), group_settle(ds)",
    ),
    "a stage given back too early": Fault(
        B,
        "if (!first) group.done(last);",
        "group.done(stage);",
        UNFINISHED,
        "if (!first) group.done(last);\n        float delta",
    ),
    "too few bytes": Fault(
        COPY_B,
        "Memory::kStageBytes",
        "Memory::kPassingBytes",
        r"expects \d+ more",
        "phase_expect(full, Memory::kStageBytes)",
    ),
    "kept rows are read without a fence": Fault(MULTIPLY, "group_fence();", "", UNFENCED),
    "statistics of another stage": Fault(
        B, "stage.stage", "stage.stage ^ 1", UNMET, "statistics + stage.stage * kPassing"
    ),
    "wrong row": Fault(
        B, "lane_number() / 4", "lane_number() % 8", "writes a second time", "8 * r + lane_number() / 4, query"
    ),
    "wrong column": Fault(B, "column_of(i) < keys", "column_of(i) <= keys", "parity"),
    "statistics of another column": Fault(B, "i % 2 * 2", "i / 2 * 2", "parity", "of[i % 2 * 2]"),
    "delta of another column": Fault(B, "i % 2", "i / 2 % 2", "parity", "delta[i / 4][i % 2];"),
}
OF_128_CHANNELS = {
    "a kept tensor is read without a fence": Fault(MULTIPLY, "group_fence();", "", UNFENCED),
    "kept rows given back too early": Fault(MULTIPLY, "if (Variant::kHeld == 2) has_kept();", "has_kept();", UNMET),
    "wrong half of kept rows": Fault(
        MULTIPLY, "first / kHalfRows * kHalfRows", "0", "parity", "kept, first / kHalfRows * kHalfRows"
    ),
}
BACKWARD_OPTIONS = {
    "wrong pairs are dropped": Fault(
        SCORES, "kept_place(4 * n + i)", "kept_place(8 * j + 4 * (i % 2) + i / 2 * 2 + b)", "parity"
    ),
    "words of another row": Fault(
        PAIRS, "odd ? 8 : 0", "odd ? 0 : 8", "parity", "words(row + (odd ? 8 : 0), first_group"
    ),
    "a hidden key has gradients": Fault(B, "keys.forget_hidden_keys();", "", "parity"),
    "a slope left out": Fault(SCORES, "return x * (1.f - y * y);", "return x;", "parity"),
    "not turned back": Fault(MULTIPLY, "!Variant::kPlain && p.cos != nullptr", "false", "parity"),
}
ALL = {  # by what a fault is shown, and the source that is compiled with all of its faults
    forward: ("joint_hopper_bf16.cu", FORWARD),
    forward_options: ("joint_hopper_options_bf16.cu", FORWARD_OPTIONS),
    backward: ("joint_hopper_backward_bf16.cu", BACKWARD),
    backward_of_128_channels: ("joint_hopper_backward_bf16.cu", OF_128_CHANNELS),
    backward_options: ("joint_hopper_backward_options_bf16.cu", BACKWARD_OPTIONS),
}


def of_source(source: str) -> tuple[Fault, ...]:
    return tuple(fault for other, faults in ALL.values() if other == source for fault in faults.values())


@pytest.mark.parametrize(
    "check, name, fault",
    [
        pytest.param(check, name, fault, id=f"{check.__name__}-{name}")
        for check, (_, faults) in ALL.items()
        for name, fault in [("none", None), *faults.items()]
    ],
)
def test_a_mistake_is_found(check, name, fault):
    source, _ = ALL[check]
    with planted(source, of_source(source), fault):
        found = said(check)
    if fault is None:
        assert found == "", name
    else:
        assert re.search(fault.found, found, re.DOTALL), found or "nobody found it"
