"""timm for tests: it imports torchvision, whose wheel for CUDA does not load beside a CPU build of PyTorch.

Run as a script it runs another one with timm at hand: `python tests/timm_host.py examples/timm_vit.py`.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType

import torch

_LIBRARIES: list[torch.library.Library] = []


def load() -> ModuleType:
    """The module timm. Raises ImportError without it.

    torchvision describes two operators at import, and fails where they are not defined: they are, here, without a
    kernel. Nothing in timm's models calls them."""
    try:
        import timm
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "timm")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, operator):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)  # they go with it
        import timm
    return timm


if __name__ == "__main__":
    load()
    script, *rest = sys.argv[1:]
    sys.argv = [script, *rest]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
