"""Where temporal_block's one kernel stands in for norm, QKV and attention: the decision, and the model that asks it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from parity import F64_BUDGET, assert_same
from test_model import clips, small

import vivit.model
from vivit_kernels import _environment, temporal_block, temporal_block_pays
from vivit_kernels._dispatch import Call
from vivit_kernels.temporal_block import tiles
from vivit_kernels.temporal_block.support import decide, obstacle

# 64 clips of 196 positions: 12 rounds of tiles, of which 1 % is idle
CALL = Call("temporal_block", (64, 16, 196, 3, 64), torch.bfloat16, "cuda", False, arch=90)


def of(heads: int, clips: int = 64, **changes) -> Call:
    return replace(CALL, shape=(clips, 16, 196, heads, 64), **changes)


@pytest.fixture(autouse=True)
def with_triton(monkeypatch):
    monkeypatch.setattr(_environment, "HAS_TRITON", True)
    monkeypatch.setattr(_environment, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(_environment, "RESTRICTED", ())


# ---- the decision ----


@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_pays_up_to_512_channels(dtype, backend):
    assert [H for H in (1, 3, 6, 8, 10, 12, 16) if not obstacle(of(H, dtype=dtype), backend)] == [1, 3, 6, 8]


@pytest.mark.parametrize("clips, heads", [(1, []), (4, [1, 3]), (8, [1, 3]), (16, [1, 3, 6, 8]), (32, [1, 3, 6, 8])])
def test_idle_multiprocessors_count(clips, heads):
    assert [H for H in (1, 3, 6, 8, 12) if not obstacle(of(H, clips), None)] == heads


def test_every_architecture_has_its_own_tile():
    """Before sm_90 tiles have half the rows: the weight is read twice as often."""
    for arch in (80, 86, 89):
        assert [H for H in (1, 3, 6, 8) if not obstacle(of(H, arch=arch), None)] == [1, 3]
    for arch in (100, 120):
        assert not obstacle(of(8, arch=arch), None)


def test_time_is_that_of_the_floors_times_the_rows_that_are_computed():
    one, apart = tiles.floors(192, 3)
    assert tiles.times((8, 16, 196, 3, 64), 2, 90) == (2 * 132 * 128 * one, 8 * 16 * 196 * apart)
    assert tiles.times((1, 7, 18, 3, 64), 2, 90)[0] == tiles.times((1, 7, 19, 3, 64), 2, 90)[0] == 132 * 128 * one


@pytest.mark.parametrize(
    "changes, backend, why",
    [
        ({}, "torch", "another backend"),
        ({}, "cuda", "another backend"),
        ({}, "cpu", "another backend"),
        ({"needs_grad": True}, None, "a backward"),
        ({"needs_grad": True}, "triton", "a backward"),
        ({"device": "cpu", "arch": 0}, None, "for GPUs"),
        ({"device": "cpu", "arch": 0}, "triton", "cannot run"),  # not interpreted
        ({"device": "mps", "arch": 0}, None, "for GPUs"),
        ({"dtype": torch.float32}, None, "16 bits"),
        ({"dtype": torch.float64}, None, "cannot run"),
        ({"arch": 75}, None, "cannot run"),
        ({"shape": (64, 33, 196, 3, 64)}, None, "cannot run"),
        ({"shape": (64, 16, 196, 3, 80)}, None, "cannot run"),
        ({"shape": (64, 16, 196, 12, 64)}, "triton", "least time"),
        ({"shape": (0, 16, 196, 3, 64)}, None, "least time"),
    ],
)
def test_each_obstacle_is_named(changes, backend, why):
    assert why in obstacle(replace(CALL, **changes), backend)
    assert obstacle(CALL, None) == obstacle(CALL, "triton") == ""


@pytest.mark.parametrize("names, pays", [(("triton", "torch"), True), (("cuda", "triton"), False), (("torch",), False)])
def test_the_environment_names_who_is_first(monkeypatch, names, pays):
    monkeypatch.setattr(_environment, "RESTRICTED", names)
    assert (obstacle(CALL, None) == "") == pays
    assert obstacle(CALL, "triton") == ""  # by name, as for every call


def test_an_interpreter_is_asked_by_name(monkeypatch):
    call = replace(CALL, device="cpu", dtype=torch.float32, arch=0)
    monkeypatch.setattr(_environment, "TRITON_INTERPRETED", True)
    assert obstacle(call, "triton") == "" and "for GPUs" in obstacle(call, None)
    monkeypatch.setattr(_environment, "RESTRICTED", ("triton",))
    assert "for GPUs" in obstacle(call, None)


def test_explain_says_what_was_computed_for_a_call():
    assert decide(of(3)).source.reason.endswith("us; a model makes this call, too.")
    assert "not this call, since its least time is more" in decide(of(12)).source.reason
    assert decide(of(3)).order == decide(replace(CALL, dtype=torch.float32)).order == ("triton", "torch")
    for without in ({"dtype": torch.float32}, {"shape": (1, 200, 1, 1, 64)}, {"device": "cpu"}):
        assert "for this call" not in decide(replace(CALL, **without)).source.reason


def layers(E: int = 32, **options) -> list[torch.Tensor]:
    """x, norm's weight and bias, weight, bias."""
    return [torch.randn(*shape, **options) for shape in ((2, 4, 3, E), (E,), (E,), (3 * E, E), (3 * E,))]


def test_the_function_asks_for_the_call_as_it_is(monkeypatch):
    """An interpreted call by name is the one that a CPU may make."""
    monkeypatch.setattr(_environment, "TRITON_INTERPRETED", True)

    def pays(*tensors, backend: str | None = "triton"):
        return temporal_block_pays(*tensors, heads=2, backend=backend)

    x, *parameters = layers()
    assert pays(x, *parameters) and not pays(x, *parameters, backend=None) and not pays(x, *parameters, backend="torch")
    assert not pays(x, *(p.requires_grad_() for p in layers()[1:]))
    with torch.no_grad():
        assert pays(x, *(p.requires_grad_() for p in layers()[1:]))
    assert not pays(x.bfloat16(), *parameters)  # what autograd or a layer would cast
    assert not pays(x, None, *parameters[1:]) and not pays(x, parameters[0], None, *parameters[2:])
    assert not pays(x, *parameters[:3], None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not pays(x, *parameters)
        assert pays(*(t.bfloat16() for t in (x, *parameters)))
    assert not torch.func.vmap(lambda one: torch.tensor(pays(one, *parameters)))(x[None]).any()
    with pytest.raises(ValueError, match=r"x \(2, 12, 32\) torch.float32 must be \[B, T, S, E\]"):
        pays(x.flatten(1, 2), *parameters)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_decision_is_traced(monkeypatch, dynamic):
    """Without a GPU: of a call that says cuda, and of one on a CPU."""

    def asked(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        B, T, S, E = x.shape
        call = Call("temporal_block", (B, T, S, E // 64, 64), torch.bfloat16, "cuda", False, arch=90)
        here = temporal_block_pays(x, *parameters, heads=2, backend="triton")
        return torch.ones(2) * (obstacle(call, None) == "") + 2 * torch.ones(2) * here

    monkeypatch.setattr(_environment, "TRITON_INTERPRETED", True)
    torch._dynamo.reset()
    compiled = torch.compile(asked, fullgraph=True, dynamic=dynamic, backend="eager")
    small, large = layers(64), layers(64)
    large[0] = torch.randn(1, 8, 2112, 64)  # one round, all of it at work
    assert [compiled(*x)[0].item() for x in (small, large)] == [asked(*small)[0].item(), asked(*large)[0].item()]
    assert compiled(*large)[0] == 3 and compiled(*small)[0] == 2


def test_a_model_that_is_exported_has_the_three_steps(monkeypatch):
    monkeypatch.setattr(_environment, "TRITON_INTERPRETED", True)

    class Asked(torch.nn.Module):
        def forward(self, x, *parameters):
            return x + 1 if temporal_block_pays(x, *parameters, heads=2, backend="triton") else x - 1

    program = torch.export.export(Asked(), tuple(layers()))
    assert "add" not in program.graph_module.code and "sub" in program.graph_module.code


# ---- the model ----


@pytest.fixture
def made(monkeypatch) -> list[str | None]:
    """Says of every call that it pays, and runs it by PyTorch's ops: one entry for each, the backend asked for."""
    found: list[str | None] = []

    def block(*tensors, backend, **options):
        found.append(backend)
        return temporal_block(*tensors, backend="torch", **options)

    monkeypatch.setattr(vivit.model, "temporal_block_pays", lambda *_, **__: True)
    monkeypatch.setattr(vivit.model, "temporal_block", block)
    return found


def plain(model, video):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vivit.model, "temporal_block_pays", lambda *_, **__: False)
        return model(video)


MODEL_3 = dict(attention="factorized_self_attention")


@pytest.mark.parametrize(
    "changes, calls",
    [
        (MODEL_3, 2),
        ({**MODEL_3, "attention_order": "time_space"}, 2),
        ({"attention": ("factorized_self_attention", "joint"), "pool": "mean"}, 1),
        ({"attention": "factorized_dot_product"}, 0),
        ({"attention": "joint"}, 0),
        ({"attention": "factorized_encoder", "temporal_depth": 1}, 0),
    ],
)
@torch.no_grad()
def test_attention_along_time_is_one_call(made, changes, calls):
    model, video = small(**changes, eps=1e-3).eval(), clips()
    found = model(video)
    assert made == ["triton"] * calls
    assert_same(found, plain(model, video), F64_BUDGET)


@torch.no_grad()
def test_a_model_on_a_cpu_never_takes_it(monkeypatch):
    monkeypatch.setattr(vivit.model, "temporal_block", None)
    for backend in (None, "torch"):
        model = small(**MODEL_3).float().eval()
        for block in model.blocks:
            for attention in block.attentions:
                attention.backend = backend
        assert model(clips().float()).isfinite().all()


@torch.no_grad()
def test_the_backend_of_the_model_is_told(monkeypatch):
    told = []
    monkeypatch.setattr(vivit.model, "temporal_block_pays", lambda *_, backend, heads: told.append((backend, heads)))
    vivit.ViViT(small(**MODEL_3).config, backend="torch").eval()(clips().float())
    assert told == [("torch", 2)] * 2


def hooked(model):
    model.blocks[0].norms[1].register_forward_hook(lambda *_: None)
    model.blocks[1].attentions[1].qkv.register_forward_hook(lambda *_: None)


def watched(model):
    for block in model.blocks:
        block.attentions[1].register_forward_pre_hook(lambda *_: None)


def replaced(model):
    for norm in (block.norms for block in model.blocks):
        norm[1] = torch.nn.Sequential(norm[1])


def subclassed(model):
    for block in model.blocks:
        block.attentions[1].qkv.__class__ = type("Other", (type(block.attentions[1].qkv),), {})


def split_over_processes(model):
    class Alone:
        def to_positions(self, x):
            return x

        to_frames = to_positions

    for block in model.blocks:
        block.attentions[1].split = Alone()


@pytest.mark.parametrize("change", [hooked, watched, replaced, subclassed, split_over_processes])
@torch.no_grad()
def test_who_looks_on_or_takes_a_place_is_called(made, change):
    model, video = small(**MODEL_3).eval(), clips()
    wanted = plain(model, video)
    change(model)
    assert_same(model(video), wanted, F64_BUDGET)
    assert made == []


@torch.no_grad()
def test_a_compiled_model_has_it_in_its_graph(monkeypatch):
    """Of a model that asks for an interpreter by name: traced, not run."""
    monkeypatch.setattr(_environment, "TRITON_INTERPRETED", True)
    model = vivit.ViViT(small(**MODEL_3).config, backend="triton").eval()
    traced: list[str] = []

    def backend(graph, inputs):
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return lambda *_: (torch.zeros(2, 5),)

    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend=backend)(clips().float())
    found = {
        name: sum(name in target for target in traced) for name in ("temporal_block_fwd", "factorized_attention_fwd")
    }
    assert found == {"temporal_block_fwd": 2, "factorized_attention_fwd": 2}  # along time, within frames


@torch.no_grad()
def test_dropout_of_attention_is_drawn(made):
    model = small(**MODEL_3, attention_dropout=0.5)
    model.train()(clips())
    assert made == []
    model.eval()(clips())
    assert len(made) == 2


@torch.no_grad()
def test_dropout_behind_it_is_the_same(made):
    model, video = small(**MODEL_3, dropout=0.5).train(), clips()
    torch.manual_seed(1)
    found = model(video)
    assert len(made) == 2
    torch.manual_seed(1)
    assert_same(found, plain(model, video), F64_BUDGET)
