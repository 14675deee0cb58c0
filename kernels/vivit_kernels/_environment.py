"""Facts read once, at import, and never from a device: initialising CUDA at import breaks forked data loaders."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path

HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")  # kernels then run on CPU tensors
HAS_XFORMERS = importlib.util.find_spec("xformers") is not None
VARIABLE = "VIVIT_KERNELS_BACKENDS"
BACKENDS = ("cuda", "triton", "cpu", "torch")  # default order: the first without a refusal runs
PEERS = ("sdpa", "flash_attn", "xformers")  # kernels of others, which joint_attention offers beside its own
NAMES = BACKENDS + PEERS


def _flash_attn_installed() -> tuple[int, ...]:
    """Versions of FlashAttention that are here. 2 and 4 share a folder; find_spec of a submodule would import it."""
    spec = importlib.util.find_spec("flash_attn")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    has_2, has_4 = (
        any((folder / file).is_file() for folder in folders)
        for file in ("flash_attn_interface.py", "cute/interface.py")
    )
    has_3 = importlib.util.find_spec("flash_attn_interface") is not None
    return tuple(v for v, found in ((2, has_2 and not _is_old_flash_attn_2()), (3, has_3), (4, has_4)) if found)


def _is_old_flash_attn_2() -> bool:
    """Before 2.7 the low-level functions took and returned other things."""
    try:
        major, minor = importlib.metadata.version("flash_attn").split(".")[:2]
        return (int(major), int(minor)) < (2, 7)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False


FLASH_ATTN = _flash_attn_installed()


def flash_attn_for(arch: int) -> int | None:
    """The version that runs on sm_<arch>, of those installed: 3 is for sm_90, 4 for sm_90 to sm_110, 2 for all."""
    wanted = (3, 4, 2) if 90 <= arch < 100 else (4, 2) if 100 <= arch < 120 else (2,)
    return next((version for version in wanted if version in FLASH_ATTN), None)


def _read_restriction(text: str | None) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(
            f"{VARIABLE}={text!r}: {unknown[0]!r} is not a backend; use some of {', '.join(NAMES)}, "
            "in the order to try them"
        )
    return names


RESTRICTED = _read_restriction(os.environ.get(VARIABLE))


def allowed_backends(order: tuple[str, ...] = BACKENDS) -> tuple[str, ...]:
    """The backends to try, in order: an op's own order, or what VIVIT_KERNELS_BACKENDS names, in its order."""
    return RESTRICTED or order
