"""The public function accelerate: known modules of any model are replaced in place, and the report can undo it.

A module of `integrations` knows one host library. It offers

    HOST        name of the host's package, as in sys.modules
    SUPPORTED   versions of it, comparisons as in a requirement: ">=4.57,<6"
    replacements(model)  yields a Replacement or a Left for every module that it knows, outermost first, in the order of
                model.named_modules(), and none inside of one that it replaces as a whole; it changes nothing itself

and is imported only where the host is in sys.modules: a model of that host cannot exist otherwise.
"""

from __future__ import annotations

import importlib
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from operator import eq, ge, gt, le, lt, ne
from types import ModuleType

from torch import nn

from .integrations import HOSTS

NO_RECORD = "no record"
Undo = Callable[[], None]


@dataclass(frozen=True)
class Replacement:
    """What is done to one module. `apply` does it in place, and returns what undoes it exactly."""

    path: str  # as in model.named_modules(), "" for the model itself
    what: str  # the module's class, or what of it is replaced
    why: str  # what is done, and what is different then
    gain: str  # with its record: numbers, device, date; NO_RECORD where there is none
    apply: Callable[[], Undo] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Left:
    """A module that is known or looked at, and stays as it is."""

    path: str
    what: str
    why: str


def swap_class(module: nn.Module, ours: type[nn.Module]) -> Callable[[], Undo]:
    """`apply` of a Replacement by class: parameters, hooks and state dict stay, isinstance and pickling as well.

    ours: a subclass of the module's class that adds no state, at the top level of its file so that pickle finds it.
    """

    def apply() -> Undo:
        before = module.__class__
        if not issubclass(ours, before):
            raise TypeError(
                f"accelerate: {ours.__name__} is no subclass of {before.__name__}, whose place it would take"
            )
        module.__class__ = ours
        return lambda: put_back(module, ours, before)

    return apply


def put_back(module: object, ours: type, before: type) -> None:
    """`before` in the place of ours, also where others have since made a class from ours for this one instance, as a
    parametrization of PyTorch and its FSDP do: theirs is then made from `before`."""

    def made(cls: type) -> type:
        if cls is ours:
            return before
        if not issubclass(cls, ours):
            return cls
        names = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        name = cls.__name__.replace(ours.__name__, before.__name__)
        return type(cls)(name, tuple(made(base) for base in cls.__bases__), names)

    module.__class__ = made(type(module))


class Report:
    """What accelerate() did: print it, read `replaced` and `left`, or `restore()` the model."""

    def __init__(self, model: str, entries: Iterable[Replacement | Left], undo: list[Undo]) -> None:
        self.model, self._undo = model, undo
        self.entries = tuple(entries)

    @property
    def replaced(self) -> tuple[Replacement, ...]:
        return tuple(entry for entry in self.entries if isinstance(entry, Replacement))

    @property
    def left(self) -> tuple[Left, ...]:
        return tuple(entry for entry in self.entries if isinstance(entry, Left))

    def restore(self) -> None:
        """Undoes every replacement, the last one first. A second time does nothing."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        state = "" if self._undo or not self.replaced else ", restored"
        head = f"{self.model}: {len(self.replaced)} replaced, {len(self.left)} left{state}"
        return "\n".join([head, *_table(_grouped(self.entries))])


def accelerate(model: nn.Module, *, only: str | None = None) -> Report:
    """Replaces, in place, the modules of `model` that this package has faster ones for. Nothing else is touched.

    Equivalent to nothing: outputs and gradients stay, within the error budget of numerics.py. Parameters, buffers,
    names, hooks, the state dict, training or evaluation mode stay as they are; the model is saved, loaded, compiled,
    copied and wrapped as before. Dropout of attention draws other random numbers than before. Second derivatives
    (create_graph=True) raise NotImplementedError. torch.jit.script takes no replaced module (torch.jit.trace and
    torch.export do), and tools that go by a module's exact class, as quantize_dynamic of torch.ao, pass them by: use
    those before.

    model: any module. Known: torch.nn.MultiheadAttention, and the classes that `integrations` name for the libraries
        that the process has imported.
    only: name of a host library ("transformers", "torch"): no other is asked.

    Returns a `Report`: print it for what was replaced, what was left and why; `restore()` undoes it. A module of a
    library whose version is not supported is left, with that reason. Raises TypeError if model is no nn.Module;
    ValueError for an `only` that is not known; RuntimeError if its library is not imported or its version not
    supported. Where a replacement fails, all are undone, and its error is raised.

        report = vivit_kernels.accelerate(model)
        print(report)
    """
    if not isinstance(model, nn.Module):
        remedy = "; of a pipeline give a model, pipe.transformer or pipe.unet" if hasattr(model, "components") else ""
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}{remedy}")
    entries = list(_collected(model, only))
    undo: list[Undo] = []
    name = type(model).__name__
    report = Report(name, entries or [Left("", name, "no module in it is one that accelerate() knows")], undo)
    try:
        for entry in report.replaced:
            undo.append(entry.apply())
    except BaseException:
        report.restore()
        raise
    return report


def _collected(model: nn.Module, only: str | None) -> Iterator[Replacement | Left]:
    """Of all integrations; what one of them replaces, the later ones do not see, nor what lies within."""
    if only is not None and only not in HOSTS:
        raise ValueError(f"accelerate: only={only!r} is not known; it is one of {', '.join(HOSTS)}, or None")
    taken: set[str] = set()
    for host, modules in HOSTS.items():
        if only not in (None, host):
            continue
        if host not in sys.modules:
            if only == host:
                raise RuntimeError(f"accelerate: {host} is not imported, so no model of it exists; leave only= out")
            continue
        for module in modules:
            integration = importlib.import_module(f"{__package__}.integrations.{module}")
            if why := unsupported(integration):
                if only == host:
                    raise RuntimeError(f"accelerate: {why}")
                yield Left("", host, why)
                continue
            found = [entry for entry in integration.replacements(model) if not _inside(entry.path, taken)]
            taken |= {entry.path for entry in found if isinstance(entry, Replacement)}
            yield from found


def _inside(path: str, taken: set[str]) -> bool:
    """The root is no prefix: an option set on a whole model leaves its modules to others."""
    parts = path.split(".")
    return any(".".join(parts[:i]) in taken for i in range(1, len(parts) + 1))


def unsupported(integration: ModuleType) -> str:
    """Why an integration does not take the installed version of its host; "" if it does."""
    host, wanted = integration.HOST, integration.SUPPORTED
    version = getattr(sys.modules[host], "__version__", "")
    if fits(version, wanted):
        return ""
    return f"{host} {version or 'of unknown version'} is not supported; install {host}{wanted}"


_COMPARE: dict[str, Callable[[tuple, tuple], bool]] = {">=": ge, "<=": le, ">": gt, "<": lt, "==": eq, "!=": ne}


def fits(version: str, wanted: str) -> bool:
    """Whether a version satisfies comparisons like ">=4.57,<6", by its numbers alone: 2.13.0+cpu is 2.13."""
    have = _numbers(version)
    comparisons = re.findall(r"(>=|<=|==|!=|>|<)([\d.]+)", wanted)
    return bool(have) and all(_COMPARE[sign](have, _numbers(number)) for sign, number in comparisons)


def _numbers(version: str) -> tuple[int, ...]:
    """Without zeros at the end, so that 6 is 6.0."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, re.sub(r"(\.0+)+$", "", found.group()).split("."))) if found else ()


# ---- the report's table ----

_WIDTHS = (36, 26, 50, 30)  # of its columns, at most


def _grouped(entries: Iterable[Replacement | Left]) -> list[tuple[str, str, str, str]]:
    """Rows (where, what, done, gain); modules that differ in the numbers of their path alone share one."""
    rows: dict[tuple, list[str]] = {}
    for entry in entries:
        done, gain = (entry.why, entry.gain) if isinstance(entry, Replacement) else (f"left: {entry.why}", "")
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", entry.path)
        rows.setdefault((pattern, entry.what, done, gain), []).append(entry.path or "(model)")
    return [
        (paths[0] if len(paths) == 1 else f"{pattern} ({len(paths)} times)", *said)
        for (pattern, *said), paths in rows.items()
    ]


def _table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    """Columns as wide as they must be, longer texts wrapped."""
    head = ("where", "what", "done", "expected gain")
    wrapped = [
        [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, _WIDTHS, strict=True)] for row in (head, *rows)
    ]
    widths = [max(len(line) for row in wrapped for line in row[i]) for i in range(len(head))]
    return [
        ("  " + "  ".join(line.ljust(width) for line, width in zip(lines, widths, strict=True))).rstrip()
        for row in wrapped
        for lines in zip_longest(*row, fillvalue="")
    ]
