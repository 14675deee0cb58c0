"""Peers that misbehave, for `python -m bench --with`: what the harness must notice, survive and never record."""

import ctypes
import time

import torch

from bench.attention_peers import _honest, heads_first, matmul_softmax
from bench.peers import Missing, Refused, peer


def textbook(x):
    return _honest(x, heads_first(matmul_softmax(x)))


def changed(x, change):
    candidate = textbook(x)
    right = candidate.forward
    candidate.forward = lambda: change(right())
    return candidate


@peer("temporal", "spatial")
def scaled_by_two_percent(x):
    return changed(x, lambda o: o * 1.02)


@peer("temporal", "spatial")
def one_wrong_row(x):
    def change(o):
        o = o.clone()
        o[-1, -1, -1, -1] = 0  # the last token's last head, of the last clip
        return o

    return changed(x, change)


@peer("temporal")
def stops_the_process(x):
    ctypes.string_at(0)


@peer("temporal")
def takes_all_memory(x):
    return changed(x, lambda o: torch.empty(1 << 45))


@peer("temporal")
def refuses(x):
    raise Refused("no clips on a Thursday")


@peer("temporal")
def is_not_installed(x):
    raise Missing("thursday is not installed; pip install thursday")


@peer("temporal")
def raises(x):
    raise RuntimeError("invalid configuration argument: 65,536 sequences")


@peer("spatial")
def hangs(x):
    time.sleep(600)
