"""transformers: Vivit, VideoMAE, TimeSformer, VideoPrism, V-JEPA 2 and Qwen-VL-like towers, each module by its class.

Our classes are made where they are first asked for: a mixin of the files beside this one and the class of the host.
They bear the host's names, which device maps and wrapping policies go by, and are attributes of this file, where pickle
finds them. For models that are yet to be made, `register_attention` and `patch_mapping` reach what accelerate() does.
Source: transformers 5.23 and 4.57.6, models/{vivit,videomae,timesformer,videoprism,vjepa2,qwen2_vl,...,glm4v}.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

from torch import nn

from .. import gains
from ..accelerate import NO_RECORD, Left, Replacement, Undo, swap_class
from . import _linear as _linears
from . import transformers_embeddings as embeddings
from . import transformers_mlp as mlps
from . import transformers_timesformer as timesformer
from . import transformers_towers as towers
from ._mixin import Mixin
from .transformers_attention import (
    OurAttention,
    OurRopeAttention,
    attention,
    attention_mixins,
    mask,
    register_attention,
)

HOST, SUPPORTED = "transformers", ">=4.57,<6"
__all__ = ["HOST", "SUPPORTED", "attention", "mask", "patch_mapping", "register_attention", "replacements"]


class Known(NamedTuple):
    """A class of the host and what takes its place. mixin None: its projection is replaced, itself it stays."""

    mixin: type | None
    why: str
    whole: bool = False  # nothing within it is replaced on its own, but for MLPs and linear layers
    refusal: Callable[[nn.Module], str] = lambda module: ""  # why a module of this class is left
    within: bool = False  # it is replaced within a whole one, too

    @property
    def is_attention(self) -> bool:
        """It goes through the registry of the host."""
        return self.mixin is not None and issubclass(self.mixin, OurAttention)


_ATTENTION = (
    "attention through the registry of transformers: nothing of the size N x N is kept; with a mask of pairs, or with "
    "probabilities asked for, as before"
)
_TUBELETS = "its convolution as tubelet_embedding, in place: no permutation of the clip"
_FAST_GELU = "five passes over memory in one"
_GELU_OF_PRODUCT = "without gradients on a CPU: the GELU as part of the product before it"


def _not_divided(module: nn.Module) -> str:
    kind = getattr(module, "attention_type", None)
    return "" if kind == "divided_space_time" else f"attention_type={kind!r}: its parts are replaced one by one"


_PATCHES = Known(None, _TUBELETS)
_SELF = Known(OurAttention, _ATTENTION)
_MLP = Known(mlps.OurMLP, _GELU_OF_PRODUCT, within=True, refusal=mlps.why_no_gelu)
_HALF = Known(mlps.OurIntermediate, _GELU_OF_PRODUCT, within=True, refusal=mlps.why_no_gelu)
FAMILIES: dict[str, dict[str, Known]] = {
    "vivit": {
        "VivitEmbeddings": Known(
            embeddings.OurVivitEmbeddings, "tubelets, class row and positions in one op, from the clip as it lies", True
        ),
        "VivitTubeletEmbeddings": _PATCHES,
        "VivitAttention": _SELF,
        "VivitSelfAttention": _SELF,
        "VivitMLP": _MLP,
        "VivitIntermediate": _HALF,
    },
    "videomae": {
        "VideoMAEPatchEmbeddings": _PATCHES,
        "VideoMAESelfAttention": _SELF,
        "VideoMAEIntermediate": _HALF,
    },
    "timesformer": {
        "TimesformerPatchEmbeddings": _PATCHES,
        "TimesformerLayer": Known(
            timesformer.OurTimesformerLayer,
            "both attentions on the grid of tokens: no permutation, no copy of a slice; as before while its attention "
            "modules have hooks",
            True,
            _not_divided,
        ),
        "TimesformerSelfAttention": Known(timesformer.OurTimesformerSelfAttention, "as joint_attention"),
        "TimesformerIntermediate": _HALF,
    },
    "videoprism": {
        "VideoPrismTubeletEmbeddings": _PATCHES,
        "VideoPrismAttention": Known(OurAttention, _ATTENTION + "; soft-cap included"),
        "VideoPrismMultiheadAttentionPoolingHead": _SELF,
        "VideoPrismMLP": _MLP,
    },
    "vjepa2": {
        "VJEPA2PatchEmbeddings3D": _PATCHES,
        "VJEPA2RopeAttention": Known(OurRopeAttention, _ATTENTION + "; rotary embedding in three passes, not twenty"),
        "VJEPA2PoolerSelfAttention": _SELF,
        "VJEPA2PoolerCrossAttention": _SELF,
        "VJEPA2MLP": _MLP,
    },
}
_FLAT = Known(towers.OurFlatPatches, "its convolution as the linear layer that it is", refusal=towers.why_no_patches)
_FRAMES = Known(
    towers.OurVisionAttention,
    "frames of one length in one call, no loop over them; those of several lengths, and under torch.compile, in the "
    "host's loop by this package's attention",
)
FAMILIES |= {
    "qwen2_vl": {"PatchEmbed": _FLAT, "VisionAttention": _FRAMES},
    "qwen2_5_vl": {"Qwen2_5_VisionPatchEmbed": _FLAT, "Qwen2_5_VLVisionAttention": _FRAMES},
    "qwen3_vl": {"Qwen3VLVisionPatchEmbed": _FLAT, "Qwen3VLVisionAttention": _FRAMES},
    "glm4v": {"Glm4vVisionPatchEmbed": _FLAT, "Glm4vVisionAttention": _FRAMES},
}
_WITH_TEXT = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")  # their linear layers are mostly a language model's
_ACTIVATIONS = {
    "FastGELUActivation": Known(embeddings.TanhGELU, _FAST_GELU),
    "GELUActivation": Known(embeddings.ExactGELU, _FAST_GELU),
}


def replacements(model: nn.Module) -> Iterator[Replacement | Left]:
    """As accelerate.py says. Models of transformers that are not known are left, with all that is in them."""
    from transformers import PreTrainedModel

    inside: list[str] = []  # of what is replaced or named as a whole: prefixes of paths
    unknown: list[str] = []
    for path, module in model.named_modules():
        is_within = any(path.startswith(prefix) for prefix in inside)
        if entry := _linear(model, path, module):
            yield entry
            continue
        found = _known(model, path, module)
        if is_within and not (found and found[0].within):
            continue
        if found is None:
            stranger = isinstance(module, PreTrainedModel) and _family(type(module)) is None
            if stranger and not any(path.startswith(prefix) for prefix in unknown):
                unknown.append(f"{path}." if path else "")
                yield Left(path, type(module).__name__, "nothing to replace is known in this model of transformers")
            continue
        known, host = found
        entry = _entry(path, module, known, host, _gain(_family(host) or _family_around(model, path) or "", module))
        if known.whole and (isinstance(entry, Replacement) or isinstance(module, Mixin)):
            inside.append(f"{path}." if path else "")
        yield entry


def _entry(path: str, module: nn.Module, known: Known, host: type, gain: str) -> Replacement | Left:
    if isinstance(module, Mixin):
        return Left(path, host.__name__, "it is replaced already")
    if type(module) is not host:
        return Left(path, type(module).__name__, f"a class of its own, made from {host.__name__}: it may do more")
    if why := known.refusal(module):
        return Left(path, host.__name__, why)
    projection = _projection(module) if known.mixin in (None, embeddings.OurVivitEmbeddings) else None
    if projection is None:
        return Replacement(path, host.__name__, known.why, gain, _swap(module, host))
    name, convolution = projection
    if type(convolution) in embeddings.OURS.values():
        return Left(path, host.__name__, "its projection is replaced already")
    if why := embeddings.why_not(convolution):
        return Left(path, host.__name__, why)
    convolve = swap_class(convolution, embeddings.OURS[type(convolution)])
    if known.mixin is None:
        where = f"{path}.{name}" if path else name
        return Replacement(where, f"{type(convolution).__name__} of {host.__name__}", known.why, gain, convolve)
    return Replacement(path, host.__name__, known.why, gain, _both(_swap(module, host), convolve))


def _gain(family: str, module: nn.Module) -> str:
    return gains.expected(HOST, family, module) or NO_RECORD


def _linear(model: nn.Module, path: str, module: nn.Module) -> Replacement | None:
    """A linear layer right within a module of a known model."""
    family = _family_around(model, path)
    if family is None or family in _WITH_TEXT:
        return None
    return _linears.replacement(path, module, lambda: _gain(family, module))


def _known(model: nn.Module, path: str, module: nn.Module) -> tuple[Known, type] | None:
    """What is known of a module, and the class of the host that it is, or is made from."""
    for cls in type(module).__mro__:
        family = _family(cls)
        known = FAMILIES[family].get(cls.__name__) if family else None
        if cls.__module__ == "transformers.activations":
            known = _activation(model, path, module, cls.__name__)
        if known is not None:
            # 4.57 has wrappers of the names that are attention itself in 5
            return None if known.is_attention and "config" not in module.__dict__ else (known, cls)
    return None


def _activation(model: nn.Module, path: str, module: nn.Module, name: str) -> Known | None:
    """Of a module of a known model, and not torch.nn.functional.gelu already."""
    if _family_around(model, path) is None:
        return None
    is_plain = name == "GELUActivation" and getattr(module, "act", None) is nn.functional.gelu
    return None if is_plain else _ACTIVATIONS.get(name)


def _family(cls: type) -> str | None:
    """Of a class in a model's own file, ours of the same name included."""
    for base in cls.__mro__:
        package, _, file = base.__module__.rpartition(".")
        family = package.rpartition(".")[2]
        if package == f"transformers.models.{family}" and file == f"modeling_{family}":
            return family if family in FAMILIES else None
    return None


def _family_around(model: nn.Module, path: str) -> str | None:
    """Of the module that holds the one at `path`."""
    holder: nn.Module | None = model
    for name in path.split(".")[:-1]:  # not by get_submodule: a child named as a method of nn.Module is not found by it
        holder = holder._modules[name] if holder is not None else None
    return _family(type(holder)) if path else None


def _projection(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The convolution of a patch embedding, or of the one in an embedding, and its name in it."""
    owner = getattr(module, "patch_embeddings", module)
    return next(((name, x) for name in ("projection", "proj") if (x := getattr(owner, name, None)) is not None), None)


def _swap(module: nn.Module, host: type) -> Callable[[], Undo]:
    return lambda: swap_class(module, _ours(host))()


def _both(first: Callable[[], Undo], second: Callable[[], Undo]) -> Callable[[], Undo]:
    def apply() -> Undo:
        undo = first(), second()

        def both() -> None:
            for one in reversed(undo):
                one()

        return both

    return apply


# ---- classes of ours, made where the host is imported ----


@cache
def _ours(host: type) -> type:
    """Our class in the place of a class of the host. With the first for attention, its function is registered."""
    known = _ACTIVATIONS.get(host.__name__) or FAMILIES[_family(host) or ""][host.__name__]
    mixin = known.mixin or embeddings.Projected
    names, mixins = {"__module__": __name__, "__qualname__": host.__name__, "__doc__": mixin.__doc__}, (mixin,)
    if known.is_attention:
        register_attention()
        mixins, more = attention_mixins(host, mixin)
        names |= more
    return type(host.__name__, (*mixins, host), names)


def __getattr__(name: str) -> type:
    """Our classes by the names of the host's, for pickle and patch_mapping: imports the host's file."""
    if name in _ACTIVATIONS:
        return _ours(getattr(importlib.import_module(f"{HOST}.activations"), name))
    for family, classes in FAMILIES.items():
        if name in classes:
            return _ours(getattr(importlib.import_module(f"{HOST}.models.{family}.modeling_{family}"), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def patch_mapping(*families: str) -> dict[str, type[nn.Module]]:
    """For `register_patch_mapping` of transformers 5: patterns of its names -> ours, so that models are made with them.

    Embeddings and TimeSformer's layers. Attention goes by `attn_implementation=register_attention()`: transformers
    changes for good which class gives `attentions` once that class is patched.

    families: of "vivit", "videomae", "timesformer", "videoprism", "vjepa2", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
        "glm4v"; none named: all that the host has. Raises ValueError for another name.

        from transformers.monkey_patching import register_patch_mapping
        register_patch_mapping(patch_mapping("vivit"))
        model = VivitModel.from_pretrained(path, attn_implementation=register_attention())
    """
    found: dict[str, type[nn.Module]] = {}
    for family in families or FAMILIES:
        if family not in FAMILIES:
            raise ValueError(f"patch_mapping: {family!r} is not known; it is one of {', '.join(FAMILIES)}")
        try:
            file = importlib.import_module(f"{HOST}.models.{family}.modeling_{family}")
        except ModuleNotFoundError:
            if families:
                raise
            continue
        names = [name for name, known in FAMILIES[family].items() if not known.is_attention]
        # a name alone is searched for in every name: VJEPA2PoolerSelfAttention would be found in ...AttentionLayer
        found |= {f"^{name}$": _ours(getattr(file, name)) for name in names if hasattr(file, name)}
    return found
