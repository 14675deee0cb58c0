"""diffusers: Latte, AnimateDiff, SVD, UNet3D and I2VGenXL on the grid of tokens, joint attention of Wan and others.

A model of a pipeline is given by itself: accelerate(pipe.unet) or accelerate(pipe.transformer).

Temporal transformers change their class, with the attentions in them; other `Attention` modules change theirs, and the
processors of models with joint attention theirs; linear layers do where a CPU has a faster product. Processors of the
user stay what they are. Our classes are made where they are first asked for, bear the host's names, and are attributes
of this file, where pickle finds them.
Source: diffusers 0.42.1 and 0.35.2, models/{attention,attention_processor,attention_dispatch}.py, transformers, unets.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import gains
from ..accelerate import NO_RECORD, Left, Replacement, Undo, put_back
from . import _linear
from . import diffusers_grid as grid
from ._mixin import Mixin
from .diffusers_attention import OurAttention, bound, has_matrix_unit, why_not
from .pytorch import _no_kernels

HOST, SUPPORTED = "diffusers", ">=0.35,<0.43"
_MODELS = "diffusers.models"


class Known(NamedTuple):
    """A class of the host, in the file of diffusers.models where it is, and what goes before it."""

    file: str
    mixin: type
    why: str = ""
    temporal: str = ""  # of a whole transformer: the name of its blocks with temporal attention


_IN_PLACE = "temporal attention on the grid of tokens, no permutation; as before while blocks in it have hooks"
ATTENTION = Known(
    "attention_processor", OurAttention, "as joint_attention, while its processor is the default one; not with a mask"
)
BLOCKS = {
    "BasicTransformerBlock": Known("attention", grid.OurPlacedBlock),
    "TemporalBasicTransformerBlock": Known("attention", grid.OurTemporalBlock),
}
TRANSFORMERS = {
    "AnimateDiffTransformer3D": Known(
        "unets.unet_motion_model", grid.OurMotionTransformer, _IN_PLACE, "transformer_blocks"
    ),
    "TransformerTemporalModel": Known(
        "transformers.transformer_temporal", grid.OurTemporalTransformer, _IN_PLACE, "transformer_blocks"
    ),
    "TransformerSpatioTemporalModel": Known(
        "transformers.transformer_temporal",
        grid.OurSpatioTemporalTransformer,
        _IN_PLACE + "; its context once for a clip",
        "temporal_transformer_blocks",
    ),
    "LatteTransformer3DModel": Known(
        "transformers.latte_transformer_3d",
        grid.OurLatte,
        _IN_PLACE + "; the caption projected once for a clip",
        "temporal_transformer_blocks",
    ),
}
# Processors that call an attention function of the host, and the files where they are.
PROCESSORS = {
    "WanAttnProcessor": "transformers.transformer_wan",
    "SkyReelsV2AttnProcessor": "transformers.transformer_skyreels_v2",
    "SkyReelsV2AttnProcessor2_0": "transformers.transformer_skyreels_v2",
    "LTXVideoAttnProcessor": "transformers.transformer_ltx",
    "HunyuanVideoAttnProcessor2_0": "transformers.transformer_hunyuan_video",
    "CosmosAttnProcessor2_0": "transformers.transformer_cosmos",
    "CogVideoXAttnProcessor2_0": "attention_processor",
    "FusedCogVideoXAttnProcessor2_0": "attention_processor",
    "AllegroAttnProcessor2_0": "attention_processor",
    "MochiAttnProcessor2_0": "attention_processor",
}
# Models in which modules are looked at, by their classes. Others are left whole.
MODELS = frozenset(
    {
        "LatteTransformer3DModel", "TransformerTemporalModel", "UNetMotionModel", "MotionAdapter",
        "UNet3DConditionModel", "I2VGenXLUNet", "UNetSpatioTemporalConditionModel", "WanTransformer3DModel",
        "WanVACETransformer3DModel", "SkyReelsV2Transformer3DModel", "LTXVideoTransformer3DModel",
        "HunyuanVideoTransformer3DModel", "CosmosTransformer3DModel",
        "CogVideoXTransformer3DModel", "AllegroTransformer3DModel", "MochiTransformer3DModel",
    }
)  # fmt: skip
_KNOWN: dict[str, Known] = {"Attention": ATTENTION, **BLOCKS, **TRANSFORMERS}


def replacements(model: nn.Module) -> Iterator[Replacement | Left]:
    """As accelerate.py says. Models of diffusers that are not known are left, with all that is in them."""
    if f"{_MODELS}.modeling_utils" not in sys.modules:
        return  # without it no model of diffusers was made
    model_mixin = sys.modules[f"{_MODELS}.modeling_utils"].ModelMixin

    strangers: list[str] = []  # prefixes of paths, as the two that follow
    known_models: dict[str, str] = {}  # with the model's class
    replaced: list[str] = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if path.startswith(tuple(strangers)):
            continue
        if isinstance(module, model_mixin) and not path.startswith(tuple(known_models)):
            if not _is_known_model(type(module)):
                strangers.append(prefix)
                yield Left(path, type(module).__name__, "nothing to replace is known in this model of diffusers")
                continue
            known_models[prefix] = type(module).__name__
        within = path.startswith(tuple(replaced))
        family = next((name for start, name in known_models.items() if path.startswith(start)), "")
        if family and (layer := _layer(path, module, family)):
            yield layer
            continue
        entry = None if within else _transformer(path, module, family)
        is_ours = isinstance(module, Mixin)
        if isinstance(entry, Replacement) or (entry is not None and is_ours):
            replaced.append(prefix)
        entry = entry or _attention(path, module, family)
        if entry is not None and not (within and (isinstance(entry, Replacement) or is_ours)):
            yield entry


def _is_known_model(cls: type) -> bool:
    return any(base.__module__.startswith(f"{_MODELS}.") and base.__name__ in MODELS for base in cls.__mro__)


def _host(cls: type, known: dict[str, Known]) -> type | None:
    """The class of the host that cls is, or is made from, if it is one of these."""
    for base in cls.__mro__:
        found = known.get(base.__name__)
        if found is not None and base.__module__ == f"{_MODELS}.{found.file}":
            return base
    return None


def _why_of_class(module: nn.Module, host: type) -> str:
    if isinstance(module, Mixin):
        return "it is replaced already"
    return "" if type(module) is host else f"a class of its own, made from {host.__name__}: it may do more"


def _transformer(path: str, module: nn.Module, family: str) -> Replacement | Left | None:
    """A temporal transformer with its blocks and attentions, or why not."""
    host = _host(type(module), TRANSFORMERS)
    if host is None:
        return None
    name = host.__name__
    blocks = list(getattr(module, TRANSFORMERS[name].temporal))
    why = _why_of_class(module, host) or next(filter(None, map(_why_not_block, blocks)), "")
    if why:
        return Left(path, name if type(module) is host else type(module).__name__, why)
    attentions = [one for one in module.modules() if _takes_attention(one)]
    placed = [one for one in blocks if _has_place(one) or type(one).__name__ == "TemporalBasicTransformerBlock"]
    gain = gains.expected(HOST, family, module) or NO_RECORD
    return Replacement(path, name, TRANSFORMERS[name].why, gain, _swap([module, *placed, *attentions]))


def _why_not_block(block: nn.Module) -> str:
    """Why a temporal block, and so its transformer, is left; its spatial blocks do not matter."""
    host = _host(type(block), BLOCKS)
    if host is None or type(block) is not host:
        return f"a block of it is a {type(block).__name__}, which may do more"
    if host.__name__ == "BasicTransformerBlock" and block.norm_type not in grid.NORMS:
        return f"norm_type={block.norm_type!r} of its blocks goes by sequences"
    for attention in (block.attn1, block.attn2):
        if attention is not None and (why := _why_not_attention(attention)):
            return f"a temporal attention: {why}"
    return ""


def _has_place(block: Any) -> bool:
    return getattr(block, "pos_embed", None) is not None


def _takes_attention(module: nn.Module) -> bool:
    return _host(type(module), {"Attention": ATTENTION}) is not None and not _why_not_attention(module)


def _why_not_attention(attention: Any) -> str:
    host = _host(type(attention), {"Attention": ATTENTION})
    if host is None:
        return f"a {type(attention).__name__}, which is not known"
    why = _why_of_class(attention, host) or why_not(attention)
    return why or _no_kernels(attention.to_q.weight, attention.inner_dim // attention.heads)


def _layer(path: str, module: nn.Module, family: str) -> Replacement | None:
    return _linear.replacement(path, module, lambda: gains.expected(HOST, family, module) or NO_RECORD)


def _attention(path: str, module: nn.Module, family: str) -> Replacement | Left | None:
    """An `Attention` by its class, or any module with a known processor by the processor's."""
    processor = getattr(module, "processor", None)
    if processor is None:
        return None
    what, host = type(module).__name__, _processor_host(type(processor))
    if host is None:
        if _host(type(module), {"Attention": ATTENTION}) is None:
            return Left(path, what, f"its processor is a {type(processor).__name__}, which is not known")
        if why := _why_not_attention(module):
            return Left(path, what, why)
        return Replacement(path, what, ATTENTION.why, _gain(module, family), _swap([module]))
    if type(processor) is not host:
        ours = type(processor) is _ours(host)
        return Left(path, what, "it is replaced already" if ours else f"its processor is made from {host.__name__}")
    done = f"{host.__name__}: its attention as joint_attention, masks of pairs and backends of your choice as before"
    return Replacement(path, what, done, _gain(module, family), _swap([processor]))


def _gain(attention: Any, family: str) -> str:
    weight = attention.to_q.weight if isinstance(getattr(attention, "to_q", None), nn.Module) else None
    if isinstance(weight, Tensor) and has_matrix_unit(weight.device, weight.dtype):
        return "none on this processor in bfloat16: PyTorch's attention is called, on its matrix unit (AMX)"
    return gains.expected(HOST, family, attention) or NO_RECORD


def _processor_host(cls: type) -> type | None:
    """The class of the host that a processor is, or is made from, if it calls an attention function by its name."""
    for base in cls.__mro__:
        if PROCESSORS.get(base.__name__) == base.__module__.removeprefix(f"{_MODELS}."):
            call = base.__call__
            names = call.__code__.co_names if isinstance(call, FunctionType) else ()
            return base if {"dispatch_attention_fn", "scaled_dot_product_attention"} & set(names) else None
    return None


def _swap(objects: list[Any]) -> Callable[[], Undo]:
    """`apply` of a Replacement: the class of each becomes ours; the last one is undone first."""

    def apply() -> Undo:
        before = [(one, _ours(type(one)), type(one)) for one in objects]
        for one, ours, _ in before:
            one.__class__ = ours

        def undo() -> None:
            for one, ours, cls in reversed(before):
                put_back(one, ours, cls)

        return undo

    return apply


# ---- classes of ours, made where the host is imported ----


@cache
def _ours(host: type) -> type:
    """Our class in the place of a class of the host; ours in its own."""
    if host.__module__ == __name__:
        return host
    names = {"__module__": __name__, "__qualname__": host.__name__, "__doc__": host.__doc__}
    if host.__name__ in PROCESSORS:
        return type(host.__name__, (host,), names | {"__call__": bound(host.__call__)})
    mixin = _KNOWN[host.__name__].mixin
    return type(host.__name__, (mixin, host), names | {"__doc__": mixin.__doc__})


def __getattr__(name: str) -> type:
    """Our classes by the names of the host's, for pickle: imports the host's file."""
    file = PROCESSORS.get(name) or (_KNOWN[name].file if name in _KNOWN else "")
    if file:
        return _ours(getattr(importlib.import_module(f"{_MODELS}.{file}"), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
