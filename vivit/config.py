"""What a ViViT is, in numbers: one frozen dataclass, checked on construction.

Letters (the same everywhere): B clips, C channels, F, Y, X frames, rows and columns of the clip, f, y, x those of a
tubelet, T = F/f temporal tokens, S = (Y/y)(X/x) spatial tokens, H heads, D head size, E = H*D embedding.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeVar

MODELS = (
    "joint",
    "factorized_encoder",
    "factorized_self_attention",
    "factorized_dot_product",
)  # 1, 2, 3, 4 of the paper
LAYERS = ("joint", "factorized_self_attention", "factorized_dot_product")  # what one layer of a mixed model can be
POOLS = ("cls", "mean", "max", "sum")
SCHEDULES = ("scenic", "paper", "timm")

# name: embedding, depth, heads, mlp. B, L and H are the paper's; Ti and S are the usual ViT sizes, for small machines:
# nothing published for ViViT corresponds to them.
SIZES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}

_SIZES = ("frames", "height", "width", "channels", "embedding", "depth", "heads", "mlp")

Config = TypeVar("Config")


def nearest(word: str, words) -> str:
    """`, did you mean 'x'?` when one of `words` is close to `word`, else the list of them."""
    words = [str(w) for w in words]
    close = difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"it is one of {', '.join(words)}"


def from_dict(cls: type[Config], values: dict[str, Any], where: str = "config") -> Config:
    """Builds dataclass `cls` from plain values; an unknown key is an error that names the nearest valid one."""
    names = [f.name for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    for key in values:
        if key not in names:
            raise ValueError(f"{where}: unknown key {key!r}; {nearest(key, names)}")
    lists = {k: _tuples(v) for k, v in values.items()}
    return cls(**lists)


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "left out"}


def check_types(config: Any, prefix: str = "", but: tuple[str, ...] = ()) -> None:
    """Every field (`but` some) holds what its annotation says; whole numbers serve as floats, which must be finite."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name not in but and not _fits(value, hints[f.name]):
            key = f"{prefix}.{f.name}" if prefix else f.name
            raise ValueError(f"{key}={value!r} must be {_in_words(hints[f.name])}")


def _fits(value: Any, hint: Any) -> bool:
    inner = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if typing.get_origin(hint) is tuple:
        wanted = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is ... else inner
        return isinstance(value, tuple) and len(value) == len(wanted) and all(map(_fits, value, wanted))
    if hint in (int, float):
        number = isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return isinstance(value, hint)


def _in_words(hint: Any) -> str:
    inner = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_in_words, inner))
    if typing.get_origin(hint) is tuple:
        each = _in_words(inner[0])
        return f"a list, each of it {each}" if inner[-1] is ... else f"a list of {len(inner)}, each of it {each}"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


@dataclass(frozen=True)
class ViViTConfig:
    """Everything that decides the shapes and the mathematics of a ViViT; defaults are the paper's B/16x2, model 1.

    attention: one of `MODELS`, or a list with one of `LAYERS` per layer (beyond the paper: a mixed model).
    pool: "cls", "mean", "max" or "sum"; left out, "cls" for models 1 and 2 and "mean" for the others (which have no
        class token).
    temporal_depth: layers of model 2's temporal encoder; 0 is the paper's average-pool baseline.
    tokenization: "tubelet", or "uniform" (`uniform_frames` frames at equal distances, `tubelet = (1, y, x)`).
    classes: classes, or a pair for two heads (EPIC-Kitchens: verb and noun); the model then returns a pair.
    drop_path: stochastic depth of the last layer; schedule "scenic" p*l/(L-1) and "paper" p*l/L leave survivors
        unscaled, "timm" p*l/(L-1) divides them by the keep probability.
    pixel_mean, pixel_std: normalisation of uint8 video, in units of [0, 1]; 0.5 and 0.5 is ViViT's x/127.5 - 1.
    """

    frames: int = 32
    height: int = 224
    width: int = 224
    channels: int = 3
    tubelet: tuple[int, int, int] = (2, 16, 16)
    tokenization: str = "tubelet"
    uniform_frames: int | None = None
    attention: str | tuple[str, ...] = "joint"
    attention_order: str = "space_time"
    pool: str | None = None
    embedding: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    temporal_depth: int = 0
    temporal_heads: int | None = None
    temporal_mlp: int | None = None
    classes: int | tuple[int, int] = 400
    representation: int | None = None
    drop_path: float = 0.0
    drop_path_schedule: str = "scenic"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    eps: float = 1e-6
    pixel_mean: float | tuple[float, ...] = 0.5
    pixel_std: float | tuple[float, ...] = 0.5

    def __post_init__(self):
        for name in ("tubelet", "attention", "classes", "pixel_mean", "pixel_std"):
            object.__setattr__(self, name, _tuples(getattr(self, name)))
        if self.pool is None:
            object.__setattr__(self, "pool", "cls" if self.attention in ("joint", "factorized_encoder") else "mean")
        self._check_choices()
        self._check_types()
        self._check_sizes()
        self._check_attention()

    @classmethod
    def preset(cls, name: str, **changes) -> ViViTConfig:
        """The paper's models by their names: `ViViTConfig.preset("B/16x2", attention="factorized_encoder")`.

        `name` is size/patch x frames: sizes Ti, S (not the paper's), B, L, H. Model 2 gets the paper's 4 temporal
        layers unless `temporal_depth` is given (the published L/16x2 for Kinetics has 24).
        """
        size, _, tubelet = name.partition("/")
        patch, _, frames = tubelet.partition("x")
        if size not in SIZES or not (patch.isdigit() and frames.isdigit()):
            raise ValueError(
                f"ViViTConfig.preset: {name!r} is not SIZE/PATCHxFRAMES, SIZE one of {', '.join(SIZES)}: "
                "for example 'B/16x2'"
            )
        embedding, depth, heads, mlp = SIZES[size]
        values: dict[str, Any] = dict(
            embedding=embedding, depth=depth, heads=heads, mlp=mlp, tubelet=(int(frames), int(patch), int(patch))
        )
        if changes.get("attention") == "factorized_encoder":
            values["temporal_depth"] = 4
        return cls(**{**values, **changes})

    # -- derived numbers ----------------------------------------------------------------------------------------------
    @property
    def grid(self) -> tuple[int, int, int]:
        """(T, Y/y, X/x); frames, rows and columns that fill no tubelet are dropped."""
        f, y, x = self.tubelet
        frames = min(self.uniform_frames or 0, self.frames) if self.tokenization == "uniform" else self.frames // f
        return frames, self.height // y, self.width // x

    @property
    def T(self) -> int:
        return self.grid[0]

    @property
    def S(self) -> int:
        return self.grid[1] * self.grid[2]

    @property
    def has_class_token(self) -> bool:
        return self.pool == "cls"

    @property
    def layers(self) -> tuple[str, ...]:
        """What each (spatial) layer attends over: 'joint', 'space', 'dot_product', 'space_time', 'time_space'."""
        names = {
            "joint": "joint",
            "factorized_encoder": "space",
            "factorized_self_attention": self.attention_order,
            "factorized_dot_product": "dot_product",
        }
        per_layer = self.attention if isinstance(self.attention, tuple) else (self.attention,) * self.depth
        return tuple(names[a] for a in per_layer)

    @property
    def head_sizes(self) -> tuple[int, ...]:
        return self.classes if isinstance(self.classes, tuple) else (self.classes,)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    # -- checks -------------------------------------------------------------------------------------------------------
    def _fail(self, rule: str):
        raise ValueError(f"ViViTConfig: {rule}")

    def _check_choices(self):
        attention = self.attention if isinstance(self.attention, tuple) else ()
        choices = [
            ("tokenization", self.tokenization, ("tubelet", "uniform")),
            ("attention_order", self.attention_order, ("space_time", "time_space")),
            ("pool", self.pool, POOLS),
            ("drop_path_schedule", self.drop_path_schedule, SCHEDULES),
            *([("attention", self.attention, MODELS)] if not attention else []),
            *((f"attention[{i}]", a, LAYERS) for i, a in enumerate(attention)),
        ]
        for field, value, allowed in choices:
            if value not in allowed:
                self._fail(f"{field}={value!r} is not known; {nearest(str(value), allowed)}")

    def _check_types(self):
        try:
            check_types(self, but=_SIZES)
        except ValueError as error:
            self._fail(str(error))

    def _check_sizes(self):
        for field in _SIZES:
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                self._fail(f"{field}={value!r} must be a positive integer")
        for field in ("uniform_frames", "temporal_heads", "temporal_mlp", "representation"):
            value = getattr(self, field)
            if value is not None and value < 1:
                self._fail(f"{field}={value!r} must be a positive integer, or left out")
        if self.temporal_depth < 0:
            self._fail(f"temporal_depth={self.temporal_depth} must be 0 or more layers")
        for field in ("eps", "pixel_std"):
            value = getattr(self, field)
            if min(value if isinstance(value, tuple) else (value,), default=1) <= 0:
                self._fail(f"{field}={value} must be positive")
        if len(self.tubelet) != 3 or min(self.tubelet) < 1:
            self._fail(f"tubelet={self.tubelet} must be three positive sizes (frames, rows, columns)")
        if self.embedding % self.heads:
            self._fail(f"embedding={self.embedding} must be a multiple of heads={self.heads}")
        if self.tokenization == "uniform" and (self.tubelet[0] != 1 or not self.uniform_frames):
            self._fail(
                "tokenization='uniform' needs uniform_frames and tubelet=(1, y, x), "
                f"got {self.uniform_frames} and {self.tubelet}"
            )
        if min(self.grid) < 1:
            self._fail(
                f"a clip of {self.frames} frames of {self.height}x{self.width} holds no tubelet of {self.tubelet}"
            )
        for field in ("drop_path", "dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                self._fail(f"{field}={getattr(self, field)} must be a probability, 0 to 1")
        if min(self.head_sizes) < 1 or len(self.head_sizes) > 2:
            self._fail(f"classes={self.classes} must be a number of classes or a pair of them")
        for field in ("pixel_mean", "pixel_std"):
            value = getattr(self, field)
            if isinstance(value, tuple) and len(value) not in (1, self.channels):
                self._fail(f"{field}={value} must be one number or one per channel ({self.channels})")

    def _check_attention(self):
        if isinstance(self.attention, tuple) and len(self.attention) != self.depth:
            self._fail(f"attention lists {len(self.attention)} layers, depth is {self.depth}: give one entry per layer")
        if self.has_class_token and set(self.layers) - {"joint", "space"}:
            self._fail(
                "pool='cls' has no class token to read in a factorised layer (models 3 and 4, mixed): use pool='mean'"
            )
        if set(self.layers) & {"dot_product"} and self.heads % 2:
            self._fail(f"factorized_dot_product gives half of the heads to time: heads={self.heads} must be even")
        if self.attention != "factorized_encoder" and self.temporal_depth:
            self._fail(
                f"temporal_depth={self.temporal_depth} belongs to attention='factorized_encoder' only; "
                f"got {self.attention!r}"
            )
        if self.embedding % (self.temporal_heads or self.heads):
            self._fail(f"embedding={self.embedding} must be a multiple of temporal_heads={self.temporal_heads}")
