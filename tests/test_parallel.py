"""Runs of two and four processes on a CPU: losses, gradients, steps and checkpoints of one, whatever is shared how."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from parity import F32_BUDGET, assert_same
from processes import together
from test_train import EVERYTHING, Noise, config, losses

from vivit import ViViT, ViViTConfig, memory, parallel, sequence_parallel, sharded
from vivit.data import Order
from vivit.parallel import World
from vivit.train import Interrupted, Run, TrainingError
from vivit_kernels.numerics import judge

CALM = {"model__dropout": 0.0, "model__drop_path": 0.0, "optimizer__name": "sgd", "optimizer__lr": 0.05}
SEPARATE = {"dropout": 0.0, "attention_dropout": 0.0}

# ---- a model's gradients ----

# 5 x 7 positions and 5 temporal tokens: neither 2 nor 4 processes get equal parts
TOY = dict(frames=10, height=10, width=14, tubelet=(2, 2, 2), embedding=16, depth=2, heads=4, mlp=32, classes=3)
MODELS = {
    "joint": dict(attention="joint"),
    "joint, max": dict(attention="joint", pool="max"),
    "factorized_encoder": dict(attention="factorized_encoder", temporal_depth=1),
    "factorized_encoder, mean": dict(attention="factorized_encoder", temporal_depth=1, pool="mean"),
    "average pool": dict(attention="factorized_encoder"),
    "factorized_self_attention": dict(attention="factorized_self_attention"),
    "time first": dict(attention="factorized_self_attention", attention_order="time_space", pool="sum"),
    "factorized_dot_product": dict(attention="factorized_dot_product"),
    "mixed": dict(attention=("joint", "factorized_dot_product", "factorized_self_attention"), depth=3),
    "uniform": dict(attention="factorized_dot_product", tokenization="uniform", uniform_frames=5, tubelet=(1, 2, 2)),
}


def toy(name: str, dtype: torch.dtype, level: str = "fast") -> tuple[ViViT, torch.Tensor, torch.Tensor]:
    """A model of MODELS, four clips and their labels; with every parameter random, so that none has no gradient."""
    torch.manual_seed(3)
    c = ViViTConfig(**{**TOY, **MODELS[name]})
    model = ViViT(c, memory=level)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    video = torch.randint(0, 256, (4, c.frames, c.height, c.width, 3), dtype=torch.uint8)
    return model.to(dtype), video, torch.tensor([0, 1, 2, 1])


def gradients(name: str, dtype: torch.dtype, kind: str = "", sequence: int = 1, level: str = "fast", clips=range(4)):
    """(loss, gradients by name) of a batch of four, or of some of it; `kind`: of the processes that run this."""
    model, video, label = toy(name, dtype, level)
    world = parallel.joined(kind, sequence, "cpu") if kind else parallel.ALONE
    row_alone = model._only_class_row(model.blocks[-1])
    called = world.wrap(model, torch.device("cpu"))
    # the hooks of FSDP change neither what a block keeps nor that a last block computes one row
    assert model._only_class_row(model.blocks[-1]) == row_alone
    warnings.filterwarnings("error", message=".*has no effect on a block")
    mine = world.share(clips)
    loss = F.cross_entropy(called(video[mine], layout="BFYXC"), label[mine])
    loss.backward()
    value, _ = world.agreed(loss.item(), torch.tensor(0.0))
    found = {n: parallel.whole(p.grad).detach() for n, p in model.named_parameters() if p.grad is not None}
    return value, found


def many(cases) -> list:
    with parallel.started(config()):
        return [gradients(*case) for case in cases]


def hold(cases, found) -> None:
    """Each to the budget of its dtype, against one process in float64."""
    for (name, dtype, *how), (loss, grads) in zip(cases, found, strict=True):
        exact_loss, exact = gradients(name, torch.float64)
        eager_loss, eager = gradients(name, dtype)
        assert grads.keys() == exact.keys()
        values = [(loss, dtype), (exact_loss, torch.float64), (eager_loss, dtype)]
        verdict = judge(*(torch.tensor([x], dtype=d) for x, d in values))
        assert verdict.ok, (name, how, "loss", str(verdict))
        size = max(g.abs().max().item() for g in exact.values())
        clips = [gradients(name, torch.float64, clips=[i])[1] for i in range(4)]
        for key, value in grads.items():
            terms = sum(one[key].abs().max().item() for one in clips) / 4  # of clips, which cancel: tenfold here
            floor = max(terms, 1e-3 * size)  # zero by mathematics: a bias of keys
            verdict = judge(value, exact[key], eager[key], gradient=True, scale=floor, row=value.shape[-1])
            assert verdict.ok, (name, dtype, how, key, str(verdict))


def test_two_processes_have_the_gradients_of_one():
    cases = [
        ("factorized_self_attention", torch.float32, "fsdp", 2, "small"),
        ("joint", torch.float32, "ddp", 2, "fast"),
    ]
    for found in together(2, many, cases):
        hold(cases, found)


@pytest.mark.full
@pytest.mark.parametrize("count, sequence", [(2, 2), (4, 4), (4, 2)])
def test_a_clip_on_several_processes_has_its_gradients(count, sequence):
    """All models, levels of memory and wrappers; in float64, where any mistake stands out, and in float32."""
    cases = [(name, torch.float64, kind, sequence) for name in MODELS for kind in ("ddp", "fsdp")]
    cases += [
        (name, torch.float32, "fsdp", sequence, level)
        for name, level in itertools.product(["joint", "factorized_encoder", "mixed"], memory.LEVELS)
    ]
    found = together(count, many, cases, seconds=400)
    hold(cases, found[-1])
    assert all(one[0] == other[0] for one, other in zip(found[0], found[-1], strict=True))  # the very same loss


@pytest.mark.full
@pytest.mark.parametrize("count", [2, 4])
def test_a_batch_on_several_processes_has_its_gradients(count):
    names = ["joint", "factorized_encoder", "factorized_self_attention", "factorized_dot_product"]
    cases = list(itertools.product(names, (torch.float64, torch.float32), ("ddp", "fsdp")))
    hold(cases, together(count, many, cases, seconds=400)[-1])


def kept(sequence: int, level: str) -> dict[str, int]:
    """Bytes that the forward of four clips keeps for its backward, weights aside."""
    found = {}
    sys.modules[
        "vivit_kernels.linear"
    ]._FEWEST_ROWS = 0  # this process's: what an MLP keeps on an AMD would hang on how many rows its part has
    with parallel.started(config()):
        for name in ("joint, max", "factorized_encoder", "factorized_self_attention", "factorized_dot_product"):
            model, video, _ = toy(name, torch.float32, level)
            called = parallel.joined("ddp", sequence, "cpu").wrap(model, torch.device("cpu"))
            weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
            storages = {}

            def pack(x, storages=storages, weights=weights):
                if x.is_floating_point() and (key := x.untyped_storage().data_ptr()) not in weights:
                    storages[key] = x.untyped_storage()  # held, so that no other takes its place
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                called(video, layout="BFYXC")
            found[name] = sum(storage.nbytes() for storage in storages.values())
    return found


@pytest.mark.full
@pytest.mark.parametrize("level", ["fast", "balanced"])
def test_a_process_keeps_its_part_of_a_clip(level):
    """3 and 2 of 5 temporal tokens: of the clip's bytes three and two fifths; the rest are rows of positions."""
    whole = together(2, kept, 1, level)[0]
    parts = together(2, kept, 2, level)
    for name, size in whole.items():
        shares = [part[name] / size for part in parts]
        assert 0.5 < shares[0] < 0.72 and 0.35 < shares[1] < 0.5, (name, shares)


def exchanges(sizes: tuple[int, ...], other: tuple[int, ...]):
    c = config()
    with parallel.started(c) as world:
        x = torch.arange(sum(sizes) * other[world.rank], dtype=torch.float64).view(sum(sizes), other[world.rank])
        x = (x + 100 * world.rank).requires_grad_()
        y = sequence_parallel.exchange(x, None, 0, 1, sizes, other)
        weight = torch.arange(y.numel(), dtype=torch.float64).view(y.shape) + world.rank
        (y * weight).sum().backward()
        back = sequence_parallel.exchange(weight, None, 1, 0, other, sizes)
        return x.detach(), y.detach(), torch.equal(x.grad, back)


@pytest.mark.full
def test_an_exchange_is_what_it_says():
    sizes, other = (3, 2, 2, 1), (1, 4, 2, 2)
    found = together(4, exchanges, sizes, other)
    whole = torch.cat([x for x, _, _ in found], 1)
    for part, (_, y, is_transpose) in zip(whole.split(sizes, 0), found, strict=True):
        assert torch.equal(y, part) and is_transpose


# ---- runs ----


def run(folder, changes: dict, count: int = 20, stop: int = 0):
    """(result, weights) of a run that goes on if it is there; stop: the step in which the last process gets SIGTERM."""
    c = config(**changes)
    with parallel.started(c) as world:
        data = Noise(count)
        one = Run(c, data, Path(folder), resume=True, world=world)
        if stop and world.rank == world.size - 1:
            step = one.train_step
            one.train_step = lambda *a: (one.step + 1 == stop and os.kill(os.getpid(), signal.SIGTERM), step(*a))[1]
        try:
            result = one.fit(Noise(9), quiet=True)
        except Interrupted as error:
            result = {"code": error.code, "step": one.step}
        weights = {name: parallel.whole(p.detach()).clone() for name, p in one.model.named_parameters()}
    result.pop("seconds", None)
    return result, weights


def curve(folder) -> torch.Tensor:
    return torch.tensor(losses(Path(folder)), dtype=torch.float64)


def same_run(mine, reference, folder, other) -> None:
    assert_same(curve(folder), curve(other), 10 * F32_BUDGET)  # 15 steps, each on the rounding of those before
    for name, value in mine[1].items():
        assert_same(value, reference[1][name], 10 * F32_BUDGET)
    assert mine[0]["val_clips"] == 9 and mine[0]["val_top1"] == reference[0]["val_top1"]


OPTIONS = [
    {},
    {"accumulate": 2, "ema": 0.8, "augment__mixup": 0.3, "optimizer__clip_norm": 0.05, "memory": "balanced"},
    {"init__freeze": ["tubelets", "blocks.0"], "init__layer_decay": 0.7, "ema": 0.8, "ema_on": "cpu"},
]


@pytest.mark.full
@pytest.mark.parametrize("kind, count, sequence", [("ddp", 2, 1), ("fsdp", 2, 1), ("ddp", 4, 2), ("fsdp", 4, 2)])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_run_is_the_run_of_one_process(tmp_path, kind, count, sequence, options):
    from vivit import weights

    changes = {**CALM, **options}
    reference = run(tmp_path / "one", changes)
    found = together(count, run, tmp_path / "many", {**changes, "parallel": kind, "sequence_parallel": sequence})
    assert all(result == found[0][0] for result, _ in found)
    same_run(found[0], reference, tmp_path / "many", tmp_path / "one")
    exported = [weights.load(tmp_path / which / "model.safetensors").state_dict() for which in ("one", "many")]
    for name, value in exported[0].items():
        assert_same(exported[1][name], value, 10 * F32_BUDGET)


@pytest.mark.full
def test_bf16_autocast_trains_on_several(tmp_path):
    changes = {**CALM, "autocast": True, "epochs": 1, "parallel": "fsdp", "sequence_parallel": 2}
    run(tmp_path / "one", {**changes, "sequence_parallel": 1})
    together(4, run, tmp_path / "many", changes)
    one, other = curve(tmp_path / "one"), curve(tmp_path / "many")
    assert ((one - other).abs() / one.abs().clamp(min=1)).max() < torch.finfo(torch.bfloat16).eps


# ---- checkpoints ----


@pytest.mark.full
@pytest.mark.parametrize("on", ["model", "cpu"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, on):
    """1 -> 4 (FSDP) -> 2 (DDP) -> 4 (FSDP, sequences of 2) -> 1: the samples, the steps and the end of a run of one."""
    changes = {**CALM, "ema": 0.8, "ema_on": on, "optimizer__name": "adamw", "optimizer__lr": 1e-3}
    reference = run(tmp_path / "one", changes)
    folder = tmp_path / "many"
    assert run(folder, changes, stop=2)[0] == {"code": 128 + signal.SIGTERM, "step": 2}
    assert (folder / "checkpoint.pt").exists()
    for count, how, stop in (
        (4, {"parallel": "fsdp"}, 5),
        (2, {"parallel": "ddp"}, 8),
        (4, {"parallel": "fsdp", "sequence_parallel": 2}, 12),
    ):
        found = together(count, run, folder, {**changes, **how}, 20, stop)
        assert [result for result, _ in found] == [{"code": 128 + signal.SIGTERM, "step": stop}] * count
        assert [p.name for p in folder.glob("*checkpoint*")] == [f"checkpoint-{stop:06d}"]
    mine = run(folder, changes)
    assert_same(curve(folder), curve(tmp_path / "one"), 100 * F32_BUDGET)  # adamw magnifies: steps of the sign at first
    assert len(curve(folder)) == 15 and mine[0]["val_top1"] == reference[0]["val_top1"]
    assert [p.name for p in folder.glob("*checkpoint*")] == ["checkpoint.pt"]


@pytest.mark.full
@pytest.mark.parametrize("kind, stop, on", [("ddp", 3, "model"), ("fsdp", 7, "model"), ("fsdp", 4, "cpu")])
def test_resume_is_exact_with_as_many_processes(tmp_path, kind, stop, on):
    """With everything that is drawn or carried over on: the same losses to the bit, and each process its own draws."""
    changes = {**EVERYTHING, "parallel": kind, "ema_on": on}
    whole = together(2, run, tmp_path / "whole", changes)
    together(2, run, tmp_path / "parts", changes, 20, stop)
    again = together(2, run, tmp_path / "parts", changes)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(curve(tmp_path / "parts")) == 15
    assert all(torch.equal(value, whole[1][1][name]) for name, value in again[1][1].items())


def saved(folder, failing: bool) -> str:
    c = config(**CALM, parallel="fsdp")
    with parallel.started(c) as world:
        one = Run(c, Noise(), Path(folder), world=world, resume=True)
        one.save()
        if failing and world.rank == 1:
            from torch.distributed.checkpoint.filesystem import FileSystemWriter

            def full(*_):
                raise OSError(errno.ENOSPC, "no space")

            FileSystemWriter.write_data = full
        one.step = 1
        try:
            one.save()
        except OSError as error:
            return str(error)
    return ""


@pytest.mark.full
def test_a_disk_that_is_full_for_one_process_leaves_the_checkpoint_before(tmp_path):
    for said in together(2, saved, tmp_path, True):
        assert "checkpoint-000001 cannot be written" in said and os.strerror(errno.ENOSPC) in said
    assert [p.name for p in tmp_path.glob("*checkpoint*")] == ["checkpoint-000000"]
    assert together(2, saved, tmp_path, False) == ["", ""]
    assert sharded.latest(tmp_path).name == "checkpoint-000001"


def test_what_is_half_written_is_never_picked_up(tmp_path):
    for name in ("checkpoint-000007", ".checkpoint-000009.part", "checkpoint-000012", "checkpoint-notes"):
        (tmp_path / name).mkdir()
    assert sharded.latest(tmp_path).name == "checkpoint-000012"
    sharded.forget(tmp_path, but=tmp_path / "checkpoint-000012")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-000012", "checkpoint-notes"]
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="checkpoint-000012: no whole checkpoint"):
        sharded.load(World(), tmp_path / "checkpoint-000012", model, torch.optim.SGD(model.parameters()))


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_no_pickle_of_a_folder_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoint-000001"
    folder.mkdir()
    model = torch.nn.Linear(2, 2)
    words = ["torch.distributed.checkpoint.filesystem", "os.system", "touch executed"]  # a module that is let through
    module, name, argument = (b"\x8c" + bytes([len(word)]) + word.encode() for word in words)
    by_name = b"\x80\x04" + module + name + b"\x93" + argument + b"\x85R."
    for data in (pickle.dumps(Evil()), by_name):
        (folder / ".metadata").write_bytes(data)
        with pytest.raises(ValueError, match=r"no whole checkpoint .*\.metadata names .*system, which describes no"):
            sharded.load(World(), folder, model, torch.optim.SGD(model.parameters()))
    assert not (tmp_path / "executed").exists()


# ---- agreement ----


def spoilt(folder, most: int):
    c = config(**CALM, parallel="ddp", epochs=1, skip_not_finite=most)
    with parallel.started(c) as world:
        one = Run(c, Noise(), Path(folder), world=world)
        backward = one._backward
        bad = {1, 2} if world.rank == 1 else set()
        one._backward = lambda *a: (backward(*a), float("nan"))[1] if one.step in bad else backward(*a)
        updates, step = [], one.optimizer.step
        one.optimizer.step = lambda *a, **k: (updates.append(one.step), step(*a, **k))[1]
        try:
            one.fit(quiet=True)
        except TrainingError as error:
            return updates, str(error)
    return updates, ""


@pytest.mark.full
@pytest.mark.parametrize("most, updates, said", [(2, [0, 3, 4], ""), (1, [0], "step 2: the loss is nan")])
def test_a_loss_that_is_no_number_in_one_process_is_left_out_by_all(tmp_path, most, updates, said):
    for found in together(2, spoilt, tmp_path, most):
        assert found[0] == updates and said in found[1]
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == sorted({r["step"] for r in records})  # one process writes
    assert all(len(r["clips"]) == 4 for r in records if "skipped" in r)  # the clips of all
    assert sharded.latest(tmp_path).name == ("checkpoint-000005" if not said else "checkpoint-000002")


# ---- the batch ----


@pytest.mark.parametrize("processes, sequence", [(1, 1), (2, 1), (4, 1), (4, 2), (8, 2), (16, 1)])
def test_a_batch_is_shared_without_overlap(processes, sequence):
    worlds = [World(rank, processes, sequence=sequence) for rank in range(processes)]
    for keys in Order(40, 16, 2, seed=3):
        parts = [world.share(keys) for world in worlds[::sequence]]
        assert sorted(itertools.chain(*parts)) == sorted(keys)
        assert len({len(part) for part in parts}) == 1
        for first in range(0, processes, sequence):  # those that share clips
            assert all(world.share(keys) == worlds[first].share(keys) for world in worlds[first : first + sequence])
        partners = dict(zip(keys, reversed(keys), strict=True))
        for part in parts:
            if len(part) % 2 == 0:
                assert [partners[key] for key in part] == part[::-1]  # mixup's pairs stay together


@pytest.mark.parametrize(
    "world, batch, mixup, message",
    [
        (World(0, 4), 6, 0.0, r"(?s)batch of 6 clips has no equal parts for 4 processes.*multiple of 4"),
        (World(0, 4), 3, 0.0, "no equal parts for 4"),
        (World(0, 2), 6, 0.3, r"(?s)each of 2 has 3 of a batch of 6.*multiple of 4"),
    ],
)
def test_a_batch_without_equal_parts_is_refused(world, batch, mixup, message):
    with pytest.raises(TrainingError, match=message):
        world.check(batch, mixup)
    World(0, 4, sequence=4).check(3, 0.3)  # one share


@pytest.mark.parametrize(
    "changes, processes, message",
    [
        (dict(attention="joint"), 5, "has 4 heads"),
        (dict(attention="factorized_dot_product", height=4, width=4), 5, r"(?s)4 positions.*= 4 at most, or more rows"),
        (
            dict(attention="factorized_encoder"),
            6,
            r"(?s)5 temporal tokens, .*-> sequence_parallel = 5 at most",
        ),
        (dict(dropout=0.1), 2, r"(?s)model.dropout=0.1 would draw the same.*drop_path"),
        (dict(attention_dropout=0.1), 2, "model.attention_dropout=0.1"),
    ],
)
def test_what_cannot_be_cut_is_refused(changes, processes, message):
    with pytest.raises(ValueError, match=message):
        sequence_parallel.check(ViViTConfig(**{**TOY, **changes}), processes)


@pytest.mark.parametrize(
    "changes, size, message",
    [
        (
            {"sequence_parallel": 2},
            1,
            r"(?s)parallel = 2: 1 process is no multiple.*torchrun --nproc-per-node 2",
        ),
        ({"sequence_parallel": 2}, 3, "torchrun --nproc-per-node 4"),
        ({"optimizer__states": "torchao"}, 2, r"(?s)'torchao' with 2 processes: .* are for one.*-> states = 'float32'"),
    ],
)
def test_processes_that_do_not_fit_the_config_are_refused(monkeypatch, changes, size, message):
    monkeypatch.setenv("WORLD_SIZE", str(size))
    changes = {"model__dropout": 0.0, **changes}
    with pytest.raises(TrainingError, match=message), parallel.started(config(**changes)):
        pass


def test_words_that_are_none_are_refused():
    with pytest.raises(ValueError, match="parallel='fsdb' is not known; did you mean 'fsdp'"):
        config(parallel="fsdb")
    with pytest.raises(ValueError, match="sequence_parallel=0 must be at least 1"):
        config(sequence_parallel=0)
