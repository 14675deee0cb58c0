"""Whole models by name, each with the same random weights whoever runs it: this project, stock PyTorch, transformers.

A `Spec` says which; `build(spec)` gives a `Model` that maps its video to logits. Stock PyTorch and the reference are
vivit's own module with other attention and another tubelet embedding (zoo_stock.py), so that everything else is the
same code:

    reference       the definitions of the operations (reference.py of each): the truth in float64, and the yardstick
    stock           what people write: permute, scaled_dot_product_attention; normalise, Conv3d, flatten, transpose, cat
    stock_compiled  torch.compile of it
    stock_liger     stock with Liger's LayerNorm, a Triton kernel
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vivit import ViViT, ViViTConfig, flops, weights
from vivit.config import SIZES
from vivit.memory import LEVELS
from vivit_kernels import _environment, _native
from vivit_kernels._dispatch import Call, refusals
from vivit_kernels.factorized_attention.support import SUPPORT as FACTORIZED
from vivit_kernels.factorized_attention.support import order as factorized_order
from vivit_kernels.joint_attention.support import SUPPORT as JOINT
from vivit_kernels.joint_attention.support import order as joint_order
from vivit_kernels.tubelet_embedding.support import SUPPORT as TUBELET
from vivit_kernels.tubelet_embedding.support import order as tubelet_order

from .peers import Missing, Refused, require
from .zoo_stock import ReferenceViViT, StockViViT, use_liger

VIVITS = ("factorized_encoder", "factorized_dot_product", "joint", "factorized_self_attention")  # what matters first
OTHERS = ("timesformer", "videoprism")
LEANER = LEVELS[1:]  # the default choice of backends, keeping less for backward: contestants of a training step
OURS = ("auto", *_environment.BACKENDS, *LEANER)  # auto: the default choice, call by call
STOCK = ("stock", "stock_compiled", "stock_liger")
PEERS = (*STOCK, "transformers_sdpa", "transformers_eager")
GPU_PEERS = ("stock_compiled", "stock_liger")  # on a CPU only when asked for by name
DTYPES = ("float32", "bfloat16", "float16", "autocast")  # autocast: float32 weights, bfloat16 products
STEPS = ("forward", "train")
CLASSES, SEED = 400, 0


@dataclass(frozen=True)
class Spec:
    """One model as one contestant runs it.

    model: of VIVITS or OTHERS. contestant: of OURS or PEERS, or "reference". size: a preset's name.
    frames: of the clip; None is what the model was published with.
    """

    model: str
    contestant: str
    size: str = "B/16x2"
    frames: int | None = None
    clips: int = 1
    dtype: str = "float32"
    step: str = "forward"
    device: str = "cpu"

    @property
    def ours(self) -> bool:
        return self.contestant in OURS

    @property
    def case(self) -> str:
        """`vivit_b_16x2_joint.b1`, with other frames than 32 `vivit_b_16x2_joint.f64.b1`; `timesformer_b.b1`."""
        frames = f".f{self.frames}" if self.frames not in (None, 32) else ""
        return f"{self.name}{frames}.b{self.clips}"

    @property
    def name(self) -> str:
        size = self.size.lower()
        if self.model in VIVITS:
            return f"vivit_{size.replace('/', '_')}_{self.model}"
        return f"{self.model}_{size.partition('/')[0]}"

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "autocast" else getattr(torch, self.dtype)

    @property
    def product_dtype(self) -> str:
        """What the matrix products run in: which ceiling holds."""
        return "bfloat16" if self.dtype == "autocast" else self.dtype

    def config(self) -> ViViTConfig:
        return ViViTConfig.preset(self.size, attention=self.model, frames=self.frames or 32, classes=CLASSES)

    @property
    def shape(self) -> str:
        if self.model in VIVITS:
            c = self.config()
            grid = f"{c.frames}x{c.height}x{c.width} T={c.T} S={c.S} H={c.heads} D={c.embedding // c.heads}"
            return f"B={self.clips} {grid} depth={c.depth}"
        return f"B={self.clips} {'x'.join(map(str, _other_video(self)))}"

    def forward_flops(self) -> int | None:
        """Of one clip forward, two per multiply-accumulate; None where vivit.flops does not know the model."""
        return 2 * flops.count(self.config()).macs if self.model in VIVITS else None

    @property
    def longest_sum(self) -> int:
        """Products that are added up on the way through all layers, at the widest of each."""
        _, depth, _, mlp = SIZES[self.size.partition("/")[0]]
        return depth * mlp

    def step_flops(self, one_clip: int) -> int:
        """Of a step: a training step counts as three forwards, whatever it computes again."""
        return one_clip * self.clips * (3 if self.step == "train" else 1)


@dataclass
class Model:
    """module: has the parameters. call: `video`, on the module's device, to logits `[B, classes]`.

    video: what the model is given, on the CPU: uint8 `[B, C, F, Y, X]`, for transformers float `[B, F, C, Y, X]`,
        normalised beforehand, which is not timed: to its advantage.
    named: gradients by the names of `module` -> by the names of the reference.
    """

    module: nn.Module
    call: Callable[[Tensor], Tensor]
    video: Tensor
    named: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict


def build(spec: Spec) -> Model:
    """The model in float32 on the CPU. Raises peers.Missing where a package or class is not here."""
    torch.manual_seed(SEED)
    if spec.model not in VIVITS:
        return _other(spec)
    if spec.contestant.startswith("transformers"):
        return _transformers_vivit(spec)
    config = spec.config()
    if spec.contestant == "reference":
        module: ViViT = ReferenceViViT(config)
    elif spec.contestant in STOCK:
        module = StockViViT(config)
    else:
        backend = spec.contestant if spec.contestant in _environment.BACKENDS else None
        module = ViViT(config, backend, spec.contestant if spec.contestant in LEANER else LEVELS[0])
    if spec.contestant == "stock_liger":
        use_liger(module, spec.device)
    fill(module)
    compiled = spec.contestant == "stock_compiled"
    return Model(module, torch.compile(module, dynamic=False) if compiled else module, _video(spec))


def peers_of(model: str) -> tuple[str, ...]:
    """Those of PEERS that have this model."""
    if model in OTHERS:
        return ("transformers_eager",)
    return PEERS if model == "joint" else STOCK


def own_backends(spec: Spec) -> list[str]:
    """Those that can run every operation of this model here; "auto" before them where the default is a mixture."""
    picks, everywhere = [], list(_environment.allowed_backends())
    for call in _calls(spec):
        support, order = _CHOICES[call.op]
        found = refusals(call, support, tuple(dict.fromkeys((*everywhere, *support)))).items()
        runs = [name for name, reasons in found if not reasons]
        picks += [name for name in _environment.allowed_backends(order(call)) if name in runs][:1]
        everywhere = [name for name in everywhere if name in runs]
    return ["auto"] * (len(set(picks)) > 1) + everywhere


_CHOICES: dict[str, Any] = {
    "tubelet_embedding": (TUBELET, tubelet_order),
    "factorized_attention": (FACTORIZED, factorized_order),
    "joint_attention": (JOINT, joint_order),
}


def _calls(spec: Spec) -> list[Call]:
    """The operations of a model, as a backend is chosen for them."""
    c, B = spec.config(), spec.clips
    H, D, per_frame = c.heads, c.embedding // c.heads, spec.model == "factorized_encoder"
    arch = 10 * torch.cuda.get_device_capability()[0] if spec.device == "cuda" else 0
    dtype, device, grad = getattr(torch, spec.product_dtype), spec.device, spec.step == "train"

    def call(op: str, *shape: int, heads: int | None = None, keys: int | None = None) -> Call:
        isa = _native.call_isa(device)
        return Call(op, shape, dtype, device, grad, (), arch, heads, keys, isa)

    calls = [call("tubelet_embedding", B, c.channels, c.frames, c.height, c.width)]
    along_time = {"factorized_encoder": (0,), "factorized_dot_product": (H // 2,), "factorized_self_attention": (0, H)}
    for heads in along_time.get(spec.model, ()):
        calls.append(call("factorized_attention", B, c.T, c.S + per_frame, H, D, heads=heads))
    if spec.model in ("joint", "factorized_encoder"):
        N = (c.T if per_frame else c.T * c.S) + 1
        calls.append(call("joint_attention", B, N, H, D, keys=N))
        sequences, keys = (B * c.T, c.S + 1) if per_frame else (B, N)  # the last block asks with the class token alone
        calls.append(call("joint_attention", sequences, 1, H, D, keys=keys))
    return calls


def fill(module: nn.Module) -> None:
    """Random numbers where a model starts from zeros or ones, so that every parameter changes the logits."""
    with torch.no_grad():
        for p in module.parameters():
            if p.min() == p.max():
                p.add_(torch.randn_like(p) * 0.02)


def _video(spec: Spec) -> Tensor:
    """A clip as decoded: uint8 `[B, C, F, Y, X]`, of slow waves over noise, every clip another."""
    C, F_, Y, X = _other_video(spec) if spec.model in OTHERS else (3, spec.frames or 32, 224, 224)
    generator = torch.Generator().manual_seed(SEED + 1)
    noise = torch.randint(0, 128, (spec.clips, C, F_, Y, X), generator=generator, dtype=torch.uint8)
    phase = torch.rand(spec.clips, C, 1, 1, 1, generator=generator) * 6.3
    axes = [torch.arange(n, dtype=torch.float32) for n in (F_, Y, X)]
    wave = torch.sin(phase + axes[0].view(-1, 1, 1) / 5 + axes[1].view(-1, 1) / 23 + axes[2] / 17)
    return noise + (wave * 63 + 64).to(torch.uint8)


# ---- transformers ----


def _transformers(name: str) -> Any:
    """A class of transformers."""
    package = require("transformers", "pip install transformers")
    try:
        return getattr(package, name)
    except (AttributeError, ImportError, RuntimeError) as error:
        raise Missing(f"transformers {package.__version__} has no {name}: {error}".splitlines()[0]) from error


def _transformers_vivit(spec: Spec) -> Model:
    """transformers' ViViT with this project's weights."""
    if spec.model != "joint":
        raise Missing("transformers has the joint model only")
    config, kind = spec.config(), _transformers("VivitForVideoClassification")
    ours = ViViT(config)
    fill(ours)
    theirs = _transformers("VivitConfig")(
        image_size=config.height, num_frames=config.frames, tubelet_size=list(config.tubelet),
        hidden_size=config.embedding, num_hidden_layers=config.depth, num_attention_heads=config.heads,
        intermediate_size=config.mlp, layer_norm_eps=config.eps, num_labels=CLASSES,
    )  # fmt: skip
    module = kind._from_config(theirs, attn_implementation=spec.contestant.removeprefix("transformers_"))
    for names in ("v5", "hub"):  # transformers 5 renamed its modules
        state = weights.hf_state_dict(ours.state_dict(), config, names)
        if state.keys() == module.state_dict().keys():
            break
    module.load_state_dict(state)
    return Model(
        module, lambda video: module(video).logits, _normalised(_video(spec)), lambda x: weights.load_hf(x, config)
    )


def _normalised(video: Tensor) -> Tensor:
    """uint8 `[B, C, F, Y, X]` -> float `[B, F, C, Y, X]` in [-1, 1]."""
    return (video.float() / 127.5 - 1).transpose(1, 2).contiguous()


def _other_video(spec: Spec) -> tuple[int, int, int, int]:
    """(C, F, Y, X) of the published base models, or with other frames."""
    if spec.model == "timesformer":
        return 3, spec.frames or 8, 224, 224
    return 3, spec.frames or 16, 288, 288


def _other(spec: Spec) -> Model:
    """TimeSformer and VideoPrism have random weights of their own; the size gives width, depth and heads."""
    if spec.contestant not in ("transformers_eager", "reference"):
        raise Refused(f"transformers' {spec.model} has eager attention only")
    _, frames, rows, _ = _other_video(spec)
    width, depth, heads, mlp = SIZES[spec.size.partition("/")[0]]
    common: dict[str, Any] = dict(
        image_size=rows, num_frames=frames, hidden_size=width, num_attention_heads=heads, intermediate_size=mlp,
        num_labels=CLASSES,
    )  # fmt: skip
    if spec.model == "timesformer":
        config = _transformers("TimesformerConfig")(**common, patch_size=16, num_hidden_layers=depth)
        module = _transformers("TimesformerForVideoClassification")(config)
    else:
        kind = _transformers("VideoPrismForVideoClassification")
        config = _transformers("VideoPrismVisionConfig")(**common, num_spatial_layers=depth)
        module = kind._from_config(config, attn_implementation="eager")
    fill(module)
    if spec.contestant == "reference" and spec.step == "train":
        module.gradient_checkpointing_enable()
    # VideoPrism's pooling leaves a dimension of one query
    return Model(module, lambda video: module(video).logits.flatten(1), _normalised(_video(spec)))


def reference_of(spec: Spec) -> Spec:
    """Whose results `spec` is held against."""
    return replace(spec, contestant="reference")
