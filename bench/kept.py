"""`python -m bench kept`: bytes of a training step by kind, at each level of memory, of stock PyTorch, of transformers.

    python -m bench kept [--who ...] [--keep]

Activations are what autograd keeps of a forward for its backward, counted by saved-tensor hooks: storages, each once,
without the parameters. Their kind is told by the node of the graph that made them and by their width, the same way for
everybody's model. Gradients and the optimiser's state are counted on the tensors themselves after a step of SGD
with momentum. `--keep` writes to bench/results/kept.json, from which `python -m bench report` draws.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vivit import ViViTConfig
from vivit.memory import LEVELS

from . import device, record, zoo
from .peers import Missing
from .record import RESULTS

FILE = RESULTS / "kept.json"
WHO = (*LEVELS, "stock", "transformers_sdpa")
STATE = ("parameters", "gradients", "optimiser")
KINDS = ("bf16 weights", "block inputs", "norms", "q, k, v", "attention", "MLP hidden", "GELU", "other")
# Steps of the graph that give what they got, in another shape, layout or dtype
_SAME = (
    "View Transpose Permute ToCopy Clone Unbind Reshape Slice Select Expand Split AsStrided Squeeze Unsqueeze T Alias"
)
_MADE_BY = {  # the beginning of a node's name: what it makes, of the width of the tokens
    "NativeLayerNorm": "norms",
    "Addmm": "q, k, v",
    "Add": "block inputs",
    "Cat": "block inputs",
    "_": "block inputs",  # a branch of low_memory.py with its residual sum
    "Mm": "q, k, v",
    "Linear": "q, k, v",
    "Mkldnn": "q, k, v",
}


def _maker(x: Tensor) -> str:
    """The name of the graph's node that made `x`, views and copies aside; "" for an input or inside of a function."""
    node = x.grad_fn
    while node is not None and node.name().partition("Backward")[0] in _SAME.split():
        node = node.next_functions[0][0]
    return node.name() if node is not None else ""


def kind_of(x: Tensor, tokens: int, width: int, hidden: int) -> str:
    """By what made `x` where the graph tells, else by its width; whoever's model it is of."""
    wide, maker = x.untyped_storage().nbytes() // x.element_size() / tokens, _maker(x)
    if "AccumulateGrad" in maker:
        return "bf16 weights"
    if abs(wide / hidden - 1) < 0.01:
        return "MLP hidden" if maker.startswith(("Addmm", "Mm", "Linear", "_Linear", "Mkldnn")) or not maker else "GELU"
    if abs(wide / (3 * width) - 1) < 0.01:
        return "q, k, v"
    if abs(wide / width - 1) < 0.01:
        found = next((kind for name, kind in _MADE_BY.items() if maker.startswith(name)), "")
        found = "block inputs" if "tubelet" in maker else found
        return found or ("attention" if maker else "")
    return "attention" if "Dot" in maker or "ttention" in maker else ""


def activations(run: Any, module: nn.Module, config: ViViTConfig, spec: zoo.Spec) -> Counter[str]:
    """Bytes by kind (KINDS) that `run()`, a forward of `module`, keeps for its backward."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    tokens = spec.clips * (config.T * config.S + config.has_class_token)
    found: dict[int, tuple[str, int]] = {}  # storages stay, and their addresses with them, while the graph does

    def pack(x: Tensor) -> Tensor:
        pointer = x.untyped_storage().data_ptr()
        kind = kind_of(x, tokens, config.embedding, config.mlp)
        if pointer not in own and (kind or pointer not in found):
            found[pointer] = kind or "other", x.untyped_storage().nbytes()
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=spec.dtype == "autocast"),
    ):
        result = run()
    assert result.requires_grad
    kept: Counter[str] = Counter()
    for kind, size in found.values():
        kept[kind] += size
    return kept


def state(module: nn.Module) -> dict[str, int]:
    """Bytes of parameters, of a gradient for each, and of what SGD with momentum keeps after a step."""
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kept = [x for of in optimizer.state.values() for x in of.values() if isinstance(x, Tensor)]
    sizes = {"parameters": _size(parameters), "gradients": _size(p.grad for p in parameters if p.grad is not None)}
    optimizer.zero_grad(set_to_none=True)
    return sizes | {"optimiser": _size(kept)}


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors)


def measure(who: str, spec: zoo.Spec) -> dict[str, Any]:
    model = zoo.build(spec)
    module, config = model.module.train(), spec.config()
    run = lambda: model.call(model.video)  # noqa: E731
    kept = activations(run, module, config, spec)
    gc.collect()
    return {
        "who": who, "model": f"{spec.size} {spec.model}", "clips": spec.clips, "frames": config.frames,
        "layers": config.depth, "dtype": spec.dtype, "bytes": state(module) | dict(kept),
        "device": device.machine(torch.device("cpu"))["device"], "torch": torch.__version__,
        "date": record.now(), "commit": device.commit()[0],
    }  # fmt: skip


def read(file: Path = FILE) -> list[dict[str, Any]]:
    return json.loads(file.read_text()) if file.exists() else []


def keep(made: dict[str, Any], file: Path = FILE) -> None:
    """In the place of an older one of the same contestant, in the order of WHO."""
    others = [other for other in read(file) if other["who"] != made["who"]]
    ordered = sorted([*others, made], key=lambda found: WHO.index(found["who"]))
    file.write_text("[\n" + ",\n".join(json.dumps(found) for found in ordered) + "\n]\n")


def row(made: dict[str, Any]) -> str:
    parts = {name: made["bytes"].get(name, 0) for name in (*STATE, *KINDS)}
    total = sum(parts.values())
    shown = "  ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items() if size)
    return f"{made['who']:<18}{total / 2**30:6.2f} GiB; MiB: {shown}"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench kept", description=(__doc__ or "").partition("\n")[0])
    top.add_argument("--who", nargs="+", default=list(WHO), choices=WHO, help="all")
    top.add_argument("--size", default="B/16x2")
    top.add_argument("--clips", type=int, default=1)
    top.add_argument("--frames", type=int, help="of the clip (as published)")
    top.add_argument("--dtype", default="autocast", choices=("autocast", "float32"))
    top.add_argument("--keep", action="store_true", help="into bench/results/kept.json")
    return top


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    for who in args.who:
        contestant = "auto" if who == LEVELS[0] else who
        spec = zoo.Spec("joint", contestant, args.size, args.frames, args.clips, args.dtype, "train", "cpu")
        try:
            made = measure(who, spec)
        except Missing as missing:
            print(f"{who:<18}left out: {missing}")
            continue
        print(row(made), flush=True)
        if args.keep:
            keep(made)
    return 0
