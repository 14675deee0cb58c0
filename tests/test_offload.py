"""vivit/offload.py: block inputs in the host's memory give the same gradients to the bit, in time and in few bytes."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import test_memory
import torch
from processes import together
from test_memory import MIXED, MODELS, PREDICTED, SIZES, counted, step, video
from test_parallel import toy
from test_train import Noise, config, losses
from torch import Tensor

from vivit import ViViT, footprint, memory, parallel, recipe
from vivit.offload import Kept, Offload
from vivit.train import Run


def model(attention, offload: bool = True, p: float = 0.0, **changes) -> ViViT:
    made = test_memory.model(attention, "smallest", p, **changes)
    made.keep("smallest", offload)
    return made


class Late(Offload):
    """As a bus that takes all the time it may: a copy happens when somebody waits for it, and until then its target
    holds NaN. What is read too early, or written while it is on its way, shows."""

    def __init__(self):
        super().__init__()
        self.log: list[tuple[str, int]] = []
        self.numbers: weakref.WeakKeyDictionary[Kept, int] = weakref.WeakKeyDictionary()
        self.count = 0

    def pack(self, x: Tensor) -> Kept:
        kept = super().pack(x)
        self.numbers[kept] = self.count
        self.log.append(("out", self.count))
        self.count += 1
        return kept

    def fetch(self, kept: Kept) -> None:
        self.log.append(("in", self.numbers[kept]))
        super().fetch(kept)

    def _copy(self, target: Tensor, source: Tensor):
        target.fill_(torch.nan)
        return lambda: target.copy_(source)

    def _wait(self, x: Tensor, done) -> None:
        done()


def late(made: ViViT) -> Late:
    one = Late()
    for block in made.blocks:
        block.offload = one
    return one


@pytest.mark.parametrize(
    "attention", ["joint", *(pytest.param(x, marks=pytest.mark.full) for x in (*MODELS[1:], MIXED))]
)
def test_gradients_are_the_same_to_the_bit(attention, device):
    for p in (0.0, 0.3):
        wanted = step(model(attention, False, p).to(device))
        made = model(attention, True, p).to(device)
        if device.type == "cpu":
            late(made)
        found = step(made)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_the_next_input_is_on_its_way_while_a_block_goes_backward(monkeypatch):
    made = model("factorized_self_attention", depth=4)
    log = late(made).log
    number = {block: i for i, block in enumerate(made.blocks)}
    steps = memory._steps
    monkeypatch.setattr(memory, "_steps", lambda block, *a: (log.append(("run", number[block])), steps(block, *a))[1])
    step(made)
    forward = [event for i in range(4) for event in (("out", i), ("run", i))]
    # the last one's input is still there; nothing is brought back twice
    assert log == [*forward, ("in", 2), ("run", 3), ("in", 1), ("run", 2), ("in", 0), ("run", 1), ("run", 0)]
    assert made.blocks[0].offload.moving is None


@pytest.mark.parametrize("precision", ["autocast", pytest.param("float32", marks=pytest.mark.full)])
@pytest.mark.parametrize("attention", [MODELS[1], *(pytest.param(x, marks=pytest.mark.full) for x in MODELS)])
def test_bytes_on_the_device_are_as_predicted(attention, precision):
    """What hooks count, and the one input that is there or on its way; the rest on the host."""
    made = model(attention, **{**SIZES, "depth": 6})
    place = made.blocks[0].offload
    kept, pack = [], Offload.pack
    place.pack = lambda x: kept.append(pack(place, x)) or kept[-1]
    found = counted(made, video(made), precision == "autocast")
    found += place.moving[1].untyped_storage().nbytes()
    taken = footprint.Step("smallest", 2, precision, offload=True)
    assert abs(footprint.activations(made.config, taken).total() / found - 1) < PREDICTED
    host = sum(one.host.untyped_storage().nbytes() for one in kept)
    assert len(kept) == 6 and footprint.on_host(made.config, taken) == host
    without = counted(model(attention, False, **{**SIZES, "depth": 6}), video(made), precision == "autocast")
    assert abs((without - found) / (host * 5 / 6) - 1) < 0.01


def test_graphs_may_be_kept_dropped_and_run_together():
    made, plain = model("joint").double(), model("joint", False).double()
    gradients = []
    for one in (made, plain):
        if one is made:
            late(one)
        clip = video(one)
        one(clip)  # never goes backward
        first, second = one(clip), one(clip.flip(0))
        first.square().sum().backward(retain_graph=True)
        first.sum().backward()
        second.square().sum().backward()
        gradients.append({name: p.grad for name, p in one.named_parameters()})
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


def test_only_a_part_of_a_model_learns():
    """Blocks below the first one that learns keep nothing, and nothing is brought back for them."""
    made = model("joint", depth=4)
    for name, p in made.named_parameters():
        p.requires_grad_(name.startswith(("blocks.2", "blocks.3")))
    log = late(made).log
    step(made)
    assert [event for event in log if event[0] == "in"] == [("in", 2)]


def test_copies_and_pickles_have_their_own():
    made = model("joint")
    step(made)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        places = {block.offload for block in other.blocks}
        assert len(places) == 1 and made.blocks[0].offload not in places
        step(other)


@pytest.mark.parametrize("level", ["fast", "balanced", "small"])
def test_other_levels_are_refused(level):
    rule = rf"offload=True with memory='{level}'.*\n  -> memory='smallest'"
    with pytest.raises(ValueError, match=f"ViViT: {rule}"):
        ViViT(model("joint").config, memory=level, offload=True)
    with pytest.raises(ValueError, match=f"recipe: {rule}"):
        recipe.TrainConfig(memory=level, offload=True)


def test_a_run_is_the_same_run(tmp_path):
    for name, changes in {"a": {"offload": True}, "b": {}}.items():
        Run(config(epochs=1, memory="smallest", **changes), Noise(8), tmp_path / name).fit(quiet=True)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    Run(config(epochs=1, memory="fast"), Noise(8), tmp_path / "a", resume=True)  # may change between parts of a run


def gradients(kind: str, sequence: int, offload: bool) -> dict[str, Tensor]:
    made, clips, _ = toy("factorized_self_attention", torch.float64, "smallest")
    made.keep("smallest", offload)
    world = parallel.joined(kind, sequence, "cpu")
    called = world.wrap(made, torch.device("cpu"))
    called(clips[world.share(range(4))], layout="BFYXC").square().mean().backward()
    return {name: parallel.whole(p.grad) for name, p in made.named_parameters()}


def both(cases) -> list[bool]:
    with parallel.started(config()):
        pairs = [(gradients(*case, True), gradients(*case, False)) for case in cases]
    return [all(torch.equal(value, other[name]) for name, value in one.items()) for one, other in pairs]


@pytest.mark.full
def test_several_processes():
    cases = [("ddp", 1), ("fsdp", 1), ("ddp", 2), ("fsdp", 2)]
    assert together(2, both, cases) == [[True] * 4] * 2
