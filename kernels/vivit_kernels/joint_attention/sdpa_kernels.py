"""Backend `sdpa` of joint_attention: PyTorch's own fused kernels, forward and backward, called by name.

`scaled_dot_product_attention` would choose again, silently, and its backward is behind autograd. Here the kernels
behind it are called as it would call them: cuDNN's or FlashAttention's on a GPU, ATen's on a CPU, never the textbook.
All leave the natural logsumexp of each row, `[B, H, N]`, so any of them can read what any other wrote.

Backward takes probabilities from a rounded logsumexp and delta from a rounded o. On a CPU its float32 gradients miss
the error budget in 57 of 135 cases of the parity grid (normal inputs: 6 of 32), so they are refused. In 16 bits they
keep to it over 2,048 tokens with at most 0.6 of it on the hardest inputs, and exceed it only over a few keys with large
scores (2 of 105 cases with hard inputs). `torch` errs less in all of them and comes first there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._attention.options import Options
from .._triton import arch_of
from .peer_views import whole_vectors, write

_aten = torch.ops.aten


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in whole_vectors(*tensors)]  # [B, N, H, D] -> [B, H, N, D]


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Which of PyTorch's kernels runs q, k, v `[B, H, N, D]`, by PyTorch's own rules and the user's switches.

    cuDNN first from sm_90 on: 167 + 384 us forward + backward, its FlashAttention 268 + 662 (one H200, 2026-11-26,
    bf16, B=2 N=3136 H=12 D=64). Before sm_90 it is not measured, and PyTorch's own choice is FlashAttention.
    """
    if q.device.type == "cpu":
        return "cpu"
    cuda = torch.backends.cuda
    params = cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    usable = {"cudnn": cuda.can_use_cudnn_attention, "flash": cuda.can_use_flash_attention}
    for name in ("cudnn", "flash") if arch_of(q.device) >= 90 else ("flash", "cudnn"):
        if usable[name](params):
            return name
    raise NotImplementedError(
        f"joint_attention: backend 'sdpa': neither cuDNN nor FlashAttention of PyTorch {torch.__version__} runs "
        f"q {tuple(q.shape)}, k {tuple(k.shape)} {q.dtype} on {q.device}, and the textbook is not run in their place; "
        "use backend='triton' or 'torch', or set torch.backends.cuda.enable_cudnn_sdp and enable_flash_sdp"
    )


def launch_fwd(q: Tensor, k: Tensor, v: Tensor, _: int, options: Options, keep: bool = False):
    """q `[B, N_q, H, D]`, k, v `[B, N_k, H, D]` -> (o like q, logsumexp fp32 `[B, H, N_q]` or None)."""
    B, N, H, _ = q.shape
    if B == 0:
        return q.new_empty(q.shape), q.new_empty(B, H, N, dtype=torch.float32) if keep else None
    q, k, v = _heads_first(q, k, v)
    kernel = _kernel(q, k, v)
    if kernel == "cpu":
        o, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=options.scale)
    elif kernel == "cudnn":
        o, lse = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, keep, scale=options.scale)[:2]
    else:
        o, lse = _aten._scaled_dot_product_flash_attention(q, k, v, scale=options.scale)[:2]
    return o.transpose(1, 2).contiguous(), lse.reshape(B, H, N).contiguous() if keep else None


def launch_bwd(do, q, k, v, o, lse, dq, dk, dv, _: int, options: Options) -> None:
    """Writes dq, dk, dv."""
    if q.shape[0] == 0:
        return
    do, q, k, v, o = _heads_first(do, q, k, v, o)
    lengths, no_dropout = (q.shape[2], k.shape[2]), (0.0, False)
    kernel = _kernel(q, k, v)
    if kernel == "cpu":
        gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, *no_dropout, scale=options.scale
        )
    elif kernel == "cudnn":
        seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))  # not read
        gradients = _aten._scaled_dot_product_cudnn_attention_backward(
            do,
            q,
            k,
            v,
            o,
            lse.unsqueeze(-1),
            seed,
            offset,
            None,
            None,
            None,
            *lengths,
            *no_dropout,
            scale=options.scale,
        )
    else:
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the random numbers: not read
        gradients = _aten._scaled_dot_product_flash_attention_backward(
            do, q, k, v, o, lse, None, None, *lengths, *no_dropout, state, state[0], scale=options.scale
        )
    write((dq, dk, dv), (x.transpose(1, 2) for x in gradients))
