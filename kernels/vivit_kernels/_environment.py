"""Facts read once, at import, and never from a device: initialising CUDA at import breaks forked data loaders."""

from __future__ import annotations

import importlib.util
import os

HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")  # kernels then run on CPU tensors
VARIABLE = "VIVIT_KERNELS_BACKENDS"
BACKENDS = ("cuda", "triton", "cpu", "torch")  # default order: the first without a refusal runs


def _read_restriction(text: str | None) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise ValueError(
            f"{VARIABLE}={text!r}: {unknown[0]!r} is not a backend; use some of {', '.join(BACKENDS)}, "
            "in the order to try them"
        )
    return names


RESTRICTED = _read_restriction(os.environ.get(VARIABLE))


def allowed_backends() -> tuple[str, ...]:
    """The backends to try, in order: all of them, or what VIVIT_KERNELS_BACKENDS names, in its order."""
    return RESTRICTED or BACKENDS
