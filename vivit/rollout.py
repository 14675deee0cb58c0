"""Attention roll-out (Abnar and Zuidema 2020, arXiv 2005.00928) over space and time, for all four models.

Every attention step counts as (A + I) / 2, A its attention averaged over heads; the steps are multiplied, which traces
what the head reads back to the tokens. Here a row vector is multiplied from the last step to the first, so no N x N
product is formed. Model 2 gives one row per frame from its spatial encoder, weighted by the temporal encoder's row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .model import Attention, Block, ViViT


@torch.no_grad()
def rollout(model: ViViT, video: Tensor, layout: str = "BFYXC") -> Tensor:
    """`[B, T, Y/y, X/x]`, sums to 1 per clip: how much each token goes into what the head reads."""
    taken: dict[Attention, Tensor] = {}
    hooks = []
    for module in model.modules():
        if isinstance(module, Attention):

            def keep(_, __, out: Tensor, module: Attention = module) -> None:
                taken[module] = out.detach().float()

            hooks.append(module.qkv.register_forward_hook(keep))
    was_training = model.training
    try:
        model.eval()(video, layout=layout)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    B, (T, rows, columns) = len(video), model.config.grid
    map_BTS = _factorized_encoder(model, taken, B) if model.per_frame else _one_encoder(model, taken, B)
    return (map_BTS / map_BTS.sum((1, 2), keepdim=True)).view(B, T, rows, columns)


def _factorized_encoder(model: ViViT, taken: dict[Attention, Tensor], B: int) -> Tensor:
    T, S, has_class = model.config.T, model.config.S, model.config.has_class_token
    space = _through(model.blocks, taken, _readout((B, T, S + has_class), has_class))[..., has_class:]  # [B, T, S]
    time = torch.full((B, T), 1 / T)
    if model.temporal is not None:
        time = _through(model.temporal.blocks, taken, _readout((B, T + has_class), has_class))[:, has_class:]  # [B, T]
    return time[..., None] * space / space.sum(-1, keepdim=True)


def _one_encoder(model: ViViT, taken: dict[Attention, Tensor], B: int) -> Tensor:
    T, S, has_class = model.config.T, model.config.S, model.config.has_class_token
    if model.on_grid:
        return _through(model.blocks, taken, _readout((B, T, S), False))
    return _through(model.blocks, taken, _readout((B, T * S + 1), True))[:, has_class:].view(B, T, S)


def _readout(shape: tuple[int, ...], has_class: bool) -> Tensor:
    """What the head reads: the class row, or every token alike."""
    if not has_class:
        return torch.ones(shape) / shape[-1]
    row = torch.zeros(shape)
    row[..., 0] = 1
    return row


def _through(blocks: nn.ModuleList, taken: dict[Attention, Tensor], row: Tensor) -> Tensor:
    """row (A_L + I)/2 ... (A_1 + I)/2; row `[B, N]` or `[B, T, S]`."""
    for block in reversed(list(blocks)):
        assert isinstance(block, Block)
        for attention in reversed(list(block.attentions)):
            assert isinstance(attention, Attention)
            row = (_step(attention, taken[attention], row) + row) / 2
    return row


def _step(attention: Attention, qkv: Tensor, row: Tensor) -> Tensor:
    """row A, A the attention of one step, averaged over heads."""
    row = row.to(qkv.device)
    q, k, _ = qkv.unflatten(-1, (3, attention.heads, -1)).unbind(-3)  # [B, N, H, D] or [B, T, S, H, D]
    if attention.temporal_heads is None:
        if q.dim() == 5:  # a joint layer between factorised ones
            return _mean_over_heads(q.flatten(1, 2), k.flatten(1, 2), row.flatten(1)).view_as(row)
        return _mean_over_heads(q, k, row)
    H, Ht = attention.heads, attention.temporal_heads
    out = torch.zeros_like(row)
    if Ht < H:  # within the frame
        out += (H - Ht) / H * _mean_over_heads(q[..., Ht:, :], k[..., Ht:, :], row)
    if Ht:  # along time, at a position
        q_time, k_time = q[..., :Ht, :].transpose(1, 2), k[..., :Ht, :].transpose(1, 2)  # [B, S, T, Ht, D]
        out += Ht / H * _mean_over_heads(q_time, k_time, row.transpose(1, 2)).transpose(1, 2)
    return out


def _mean_over_heads(q: Tensor, k: Tensor, row: Tensor) -> Tensor:
    """q, k `[..., N, H, D]`, row `[..., N]`; one head at a time: N x N is the largest thing here."""
    out = torch.zeros_like(row)
    for h in range(q.shape[-2]):
        scores = q[..., h, :] @ k[..., h, :].transpose(-1, -2) * q.shape[-1] ** -0.5  # [..., N, N]
        out += (row[..., None, :] @ scores.softmax(-1))[..., 0, :] / q.shape[-2]
    return out
