"""accelerate(): what is replaced computes the same, what is not stays, the report tells which, restore() undoes all."""

from __future__ import annotations

import copy
import io
import pickle
import re
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import vivit_kernels
from vivit_kernels import _native, accelerate
from vivit_kernels import integrations as integrations_package
from vivit_kernels.accelerate import NO_RECORD, Left, Replacement, fits, swap_class
from vivit_kernels.integrations import pytorch
from vivit_kernels.numerics import judge

B, N, H, D = 2, 19, 4, 16
E = H * D


pytestmark = pytest.mark.usefixtures("every_call_counts")


@pytest.fixture
def kernels():
    if not _native.AVAILABLE:
        pytest.skip(f"without kernels nothing is replaced: {_native.WHY}")


@pytest.fixture
def taken(monkeypatch):
    """Calls that went to our ops."""
    calls: list[tuple] = []

    def spy(*args):
        calls.append(tuple(args[1].shape))
        return real(*args)

    real = pytorch.attend
    monkeypatch.setattr(pytorch, "attend", spy)
    return calls


class Block(nn.Module):
    """A block of a video model, such as people write."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(E)
        self.attention = nn.MultiheadAttention(E, H, dropout, batch_first=True)
        self.mlp = nn.Linear(E, E)

    def forward(self, x: Tensor, **options) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False, **options)[0]
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) / 10)  # biases, too

    def forward(self, x: Tensor, **options) -> Tensor:
        for block in self.blocks:
            x = block(x, **options)
        return x


def results(model: nn.Module, x: Tensor, **options) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    out = model(x, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    (out * weights).sum().backward()
    found = {"out": out.detach(), "dx": x.grad}  # and under the parameters' names, but for what a wrapper puts first
    found |= {re.sub(r"^(_orig_mod|module)\.", "", name): p.grad for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    return found


def assert_within_budget(actual: dict, exact: dict, eager: dict) -> None:
    assert actual.keys() == exact.keys() == eager.keys()
    for name in exact:
        verdict = judge(actual[name], exact[name], eager[name], gradient=name != "out")
        assert verdict.ok, f"{name}: {verdict}"


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, N, E, dtype=torch.float64).to(dtype)


# ---- what is replaced ----


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_stay_within_the_budget(dtype, masked, kernels, taken):
    model, x = Model().to(dtype), tokens(dtype)
    mask = torch.zeros(B, N, dtype=torch.bool)
    mask[0, 5:9] = True
    options = {"key_padding_mask": mask} if masked else {}
    eager = results(model, x, **options)
    exact = results(copy.deepcopy(model).double(), x.double(), **options)
    report = accelerate(model)
    assert [entry.path for entry in report.replaced] == [f"blocks.{i}.attention" for i in range(3)]
    actual = results(model, x, **options)
    assert len(taken) == 3
    assert_within_budget(actual, exact, eager)


def test_state_and_identity_stay(kernels):
    model = Model()
    before = dict(model.state_dict(keep_vars=True))
    parameters = list(model.parameters())
    accelerate(model)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[k] is before[k] for k in before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model.blocks[0].attention, nn.MultiheadAttention)


def test_restore_gives_the_model_back(kernels, taken):
    model, x = Model(), tokens()
    attributes = [dict(vars(m)) for m in model.modules()]
    classes, plain = [type(m) for m in model.modules()], model(x)
    report = accelerate(model)
    model(x)
    assert len(taken) == 3 and "restored" not in str(report)
    report.restore()
    assert [type(m) for m in model.modules()] == classes and [dict(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(model(x), plain) and len(taken) == 3
    report.restore()
    assert "restored" in str(report)


def test_twice_is_once(kernels):
    model = Model()
    accelerate(model)
    again = accelerate(model)
    assert not again.replaced and {entry.why for entry in again.left} == {"it is replaced already"}


def test_weights_go_both_ways(kernels):
    model, x = Model(), tokens()
    plain = Model()
    accelerate(model)
    plain.load_state_dict(model.state_dict())
    other = Model()
    accelerate(other)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_are_accelerated(how, kernels, taken):
    model, x = Model(), tokens()
    accelerate(model)
    if how == "save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(other(x), model(x)) and len(taken) == 6


def test_compiled_whole(kernels):
    model, x = Model(), tokens()
    exact = results(copy.deepcopy(model).double(), x.double())
    eager = results(model, x)
    accelerate(model)
    called: list[str] = []

    def backend(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    actual = results(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    assert_within_budget(actual, exact, eager)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=backend)(x)
    assert sum("joint_attention_fwd" in name for name in called) == 3


def test_autocast(kernels, taken):
    model, x = Model(), tokens()
    exact = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(x)
        accelerate(model)
        out = model(x)
    assert len(taken) == 3 and out.dtype == eager.dtype
    assert judge(out, exact, eager).ok


def test_activation_checkpointing(kernels):
    model, x = Model(dropout=0.5), tokens()
    accelerate(model)
    torch.manual_seed(1)
    plain = results(model, x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = model.blocks

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    torch.manual_seed(1)
    again = results(Checkpointed(), x)
    assert all(torch.equal(plain[k], again[k]) for k in plain), "the recomputation drops the same pairs"


def test_wrapped_for_training_on_many(kernels, taken, tmp_path):
    model, x = Model(), tokens()
    accelerate(model)
    plain = results(model, x)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = results(nn.parallel.DistributedDataParallel(model), x)
    finally:
        torch.distributed.destroy_process_group()
    assert len(taken) == 6
    assert plain.keys() == found.keys() and all(torch.equal(plain[k], found[k]) for k in plain)


def test_dropout_in_training_alone(kernels, taken):
    model, x = Model(dropout=0.5), tokens()
    accelerate(model)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    first, second = model(x), model(x)
    assert not torch.equal(first, second) and len(taken) == 12


def test_hooks_stay(kernels):
    model, seen = Model(), []
    model.blocks[0].attention.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    report = accelerate(model)
    model(tokens())
    report.restore()
    model(tokens())
    assert seen == ["FastMultiheadAttention", "MultiheadAttention"]


# ---- calls that stay PyTorch's ----

CALLS = {
    "weights wanted": lambda m, x: m(x, x, x),
    "weights per head": lambda m, x: m(x, x, x, need_weights=True, average_attn_weights=False),
    "pair mask": lambda m, x: m(x, x, x, need_weights=False, attn_mask=torch.ones(N, N, dtype=torch.bool).triu(1)),
    "causal": lambda m, x: m(
        x, x, x, need_weights=False, is_causal=True, attn_mask=nn.Transformer.generate_square_subsequent_mask(N)
    ),
    "key bias": lambda m, x: m(x, x, x, need_weights=False, key_padding_mask=torch.linspace(0, 1, N).expand(B, N)),
    "one clip": lambda m, x: m(x[0], x[0], x[0], need_weights=False),
    "no clips": lambda m, x: m(x[:0], x[:0], x[:0], need_weights=False),
    "vmap": lambda m, x: torch.vmap(lambda y: m(y[None], y[None], y[None], need_weights=False)[0])(x),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_other_calls_are_as_before(call, training, kernels, taken):
    module, x = nn.MultiheadAttention(E, H, batch_first=True).train(training), tokens()
    plain = call(module, x)
    accelerate(module)
    found = call(module, x)
    plain, found = (y if isinstance(y, tuple) else (y, None) for y in (plain, found))
    assert not taken
    assert torch.equal(found[0], plain[0])
    assert found[1] is plain[1] is None or torch.equal(found[1], plain[1])


def test_clips_of_several_lengths_are_as_before(kernels, taken):
    """As a nested tensor, which PyTorch takes in evaluation without gradients."""
    module = nn.MultiheadAttention(E, H, batch_first=True).eval()
    x = torch.nested.nested_tensor([torch.randn(length, E) for length in (N, 7)])
    with torch.no_grad():
        plain = module(x, x, x, need_weights=False)[0]
        accelerate(module)
        found = module(x, x, x, need_weights=False)[0]
    assert torch.equal(found.to_padded_tensor(0.0), plain.to_padded_tensor(0.0)) and not taken


def test_made_on_meta(kernels):
    """Shapes are asked there before memory is there."""
    with torch.device("meta"):
        model = Model()
    report = accelerate(model)
    out = model(tokens().to("meta"))
    assert report.replaced and out.is_meta and out.shape == (B, N, E)


class Larger(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


def test_a_parametrization_survives_restore(kernels):
    """PyTorch makes a class of ours for it, which becomes one of the host's."""
    module, x = nn.MultiheadAttention(E, H, batch_first=True), tokens()
    report = accelerate(module)
    parametrize.register_parametrization(module, "in_proj_weight", Larger())
    report.restore()
    assert (
        type(module).__mro__[1] is nn.MultiheadAttention and type(module).__name__ == "ParametrizedMultiheadAttention"
    )
    larger = module.in_proj_weight.detach().clone()
    found = module(x, x, x, need_weights=False)[0]
    parametrize.remove_parametrizations(module, "in_proj_weight")
    assert type(module) is nn.MultiheadAttention and torch.equal(module.in_proj_weight, larger)
    assert torch.equal(module(x, x, x, need_weights=False)[0], found)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")
def test_traced_by_torch_jit(kernels, taken):
    """With PyTorch's own check, which traces again, without gradients."""
    model, x = Model(), tokens()
    accelerate(model)
    expected = model(x)
    traced: Any = torch.jit.trace(model, x)
    assert torch.equal(traced(x), expected) and taken


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m(x.double(), x.double(), x.double(), need_weights=False),
        lambda m, x: m(x[..., 1:], x[..., 1:], x[..., 1:], need_weights=False),
        lambda m, x: m(x, x[:1], x[:1], need_weights=False),
        lambda m, x: m(x, x, x, need_weights=False, key_padding_mask=torch.zeros(B, N + 1, dtype=torch.bool)),
    ],
)
def test_errors_are_pytorchs(call, kernels, taken):
    module, x = nn.MultiheadAttention(E, H, batch_first=True), tokens()
    messages = []
    for _ in range(2):
        with pytest.raises((RuntimeError, AssertionError)) as error:
            call(module, x)
        messages.append((error.type, str(error.value)))
        accelerate(module)
    assert messages[0] == messages[1] and not taken


@pytest.mark.parametrize("name, least", [("_LEAST_ELEMENTS", B * N * E + 1), ("_LEAST_KEYS", N + 1)])
def test_small_calls_are_as_before(name, least, kernels, monkeypatch, taken):
    model, x = Model(), tokens()
    plain = model(x)
    accelerate(model)
    monkeypatch.setattr(pytorch, name, least)
    assert torch.equal(model(x), plain) and not taken
    monkeypatch.setattr(pytorch, name, least - 1)
    model(x)
    assert len(taken) == 3


def test_cross_attention(kernels, taken):
    module, x, keys = nn.MultiheadAttention(E, H, batch_first=True), tokens(), torch.randn(B, 7, E)
    exact = copy.deepcopy(module).double()(x.double(), keys.double(), keys.double(), need_weights=False)[0]
    eager = module(x, keys, keys, need_weights=False)[0]
    accelerate(module)
    assert judge(module(x, keys, keys, need_weights=False)[0], exact, eager).ok and len(taken) == 1


def test_a_clip_without_keys(kernels):
    """PyTorch's attention gives such a query zero as well, before the output projection."""
    module, x = nn.MultiheadAttention(E, H, batch_first=True), tokens()
    mask = torch.zeros(B, N, dtype=torch.bool)
    mask[0] = True
    plain = module(x, x, x, key_padding_mask=mask, need_weights=False)[0]
    accelerate(module)
    found = module(x, x, x, key_padding_mask=mask, need_weights=False)[0]
    assert torch.equal(found[0], plain[0])


def test_an_encoder_of_pytorchs(kernels, taken):
    layer = nn.TransformerEncoderLayer(E, H, 2 * E, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = tokens()
    exact, eager = copy.deepcopy(model).double()(x.double()), model(x)
    report = accelerate(model)
    assert "fused path" in report.replaced[0].why
    assert judge(model(x), exact, eager).ok and len(taken) == 2
    model.eval()
    with torch.no_grad():
        assert judge(model(x), exact, eager).ok


# ---- what is left ----


class OfOthers(nn.MultiheadAttention):
    def forward(self, query, *_, **__):
        return query, None


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: nn.MultiheadAttention(E, H), "batch_first=True"),
        (lambda: nn.MultiheadAttention(E, H, batch_first=True, kdim=8), "another width"),
        (lambda: nn.MultiheadAttention(E, H, batch_first=True, add_bias_kv=True), "keys of its own"),
        (lambda: nn.MultiheadAttention(E, H, batch_first=True, add_zero_attn=True), "keys of its own"),
        (lambda: nn.MultiheadAttention(60, 3, batch_first=True), "head size 20"),
        (lambda: nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64), "no kernel runs float64 on cpu"),
        (lambda: OfOthers(E, H, batch_first=True), "subclass"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "no module in it is one that accelerate"),
        (lambda: vivit_kernels.VideoMultiheadAttention(E, H), "no module in it is one that accelerate"),
    ],
)
def test_the_reason_is_told(make, why):
    model = make()
    classes = [type(m) for m in model.modules()]
    report = accelerate(model)
    assert not report.replaced and [type(m) for m in model.modules()] == classes
    assert why in report.left[0].why and why.split()[0] in str(report)


def test_without_kernels_nothing_is_replaced(monkeypatch):
    monkeypatch.setattr(pytorch, "_chosen", lambda *_, **__: "torch")
    report = accelerate(Model())
    assert not report.replaced and "no kernel runs float32 on cpu" in report.left[0].why


def test_the_report_is_a_table(kernels):
    model = Model()
    model.other = nn.MultiheadAttention(E, H)
    model.half = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float16)
    text = str(accelerate(model))
    assert text.startswith("Model: 4 replaced, 1 left")
    assert "blocks.*.attention (3 times)" in text and NO_RECORD in text and "left: its tokens" in text
    assert all(len(line) <= 160 and line == line.rstrip() for line in text.splitlines())


# ---- integrations: the contract, with one that is made up ----


class Host(nn.Module):
    def forward(self, x):
        return x


class Ours(Host):
    def forward(self, x):
        return x + 1


@pytest.fixture
def host(monkeypatch):
    """An integration of a host library `made_up`, version 2.5."""
    library, integration = types.ModuleType("made_up"), types.ModuleType("vivit_kernels.integrations.made_up")
    library.__version__ = "2.5.1"

    def replacements(model):
        for path, module in model.named_modules():
            if type(module) is Host:
                yield Replacement(path, "Host", "one more", "none", swap_class(module, Ours))

    integration.__dict__.update(HOST="made_up", SUPPORTED=">=2,<3", replacements=replacements)
    monkeypatch.setitem(sys.modules, "made_up", library)
    monkeypatch.setitem(sys.modules, integration.__name__, integration)
    monkeypatch.setitem(integrations_package.HOSTS, "made_up", ("made_up",))
    return types.SimpleNamespace(library=library, integration=integration)


def test_an_integration_is_asked(host):
    model = nn.Sequential(Host(), Host())
    report = accelerate(model, only="made_up")
    assert len(report.replaced) == 2 and model(torch.zeros(())) == 2
    report.restore()
    assert model(torch.zeros(())) == 0


def test_an_integration_without_its_host_is_not_imported(host, monkeypatch):
    monkeypatch.delitem(sys.modules, "made_up")
    monkeypatch.delitem(sys.modules, "vivit_kernels.integrations.made_up")  # its import would fail: there is no file
    assert not accelerate(Host()).replaced
    with pytest.raises(RuntimeError, match="made_up is not imported"):
        accelerate(Host(), only="made_up")


@pytest.mark.parametrize("version", ["1.9", "3.0.dev1", ""])
def test_an_unsupported_version_is_told(version, host):
    host.library.__version__ = version
    report = accelerate(Host())
    assert not report.replaced and "is not supported; install made_up>=2,<3" in report.left[0].why
    with pytest.raises(RuntimeError, match=f"made_up {version or 'of unknown version'} is not supported"):
        accelerate(Host(), only="made_up")


def test_an_integration_of_pytorch_does_not_enter_what_is_replaced(host, monkeypatch, kernels):
    class Whole(Host):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(E, H, batch_first=True)

    def replacements(model):
        yield Replacement("0", "Whole", "as a whole", "none", lambda: lambda: None)

    host.integration.replacements = replacements
    model = nn.Sequential(Whole(), nn.MultiheadAttention(E, H, batch_first=True))
    monkeypatch.setattr(
        sys.modules["vivit_kernels.accelerate"], "HOSTS", {"made_up": ("made_up",), "torch": ("pytorch",)}
    )
    assert [entry.path for entry in accelerate(model).replaced] == ["0", "1"]


def test_all_or_nothing(host):
    def fail():
        raise RuntimeError("no")

    def replacements(model):
        yield Replacement("0", "Host", "", "", swap_class(model[0], Ours))
        yield Left("2", "other", "reason")
        yield Replacement("1", "Host", "", "", fail)

    host.integration.replacements = replacements
    model = nn.Sequential(Host(), Host())
    with pytest.raises(RuntimeError, match="no"):
        accelerate(model, only="made_up")
    assert type(model[0]) is Host


def test_a_class_that_is_no_subclass_is_refused():
    with pytest.raises(TypeError, match="Linear is no subclass of Host"):
        swap_class(Host(), nn.Linear)()


@pytest.mark.parametrize("options, error", [({"only": "keras"}, ValueError), ({}, TypeError)])
def test_wrong_arguments_are_told(options, error):
    with pytest.raises(error, match="accelerate: "):
        accelerate(Host() if options else torch.zeros(1), **options)


@pytest.mark.parametrize(
    "version, wanted, answer",
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.9.1", ">=2.11", False),
        ("6", ">=4.57,<6", False),
        ("6.0.0", ">=4.57,<=6", True),
        ("5.23.0", ">=4.57,<6", True),
        ("4.57", ">=4.57.0,!=4.58", True),
        ("4.58.0", ">=4.57,!=4.58", False),
        ("10.0", ">9", True),
        ("dev", ">=1", False),
    ],
)
def test_versions_are_numbers(version, wanted, answer):
    assert fits(version, wanted) == answer
