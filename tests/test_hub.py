"""`make hub`: a folder that Hugging Face's `kernels` loads, with the package installed or not; its layers within the
error budget in models of transformers; and `import transformers` from the repository root, which has a folder kernels/.

`kernels` is not among the test tools: what needs it is left out without it. The others do what its loader does."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import MethodType, ModuleType

import pytest
import torch
from torch import Tensor, nn

import vivit_kernels
from vivit_kernels.numerics import judge

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("hub_builder", ROOT / ".ci" / "hub.py")
assert spec and spec.loader
builder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builder)

HAS_KERNELS = importlib.util.find_spec("kernels.layer") is not None  # not kernels/ of this repository, a namespace
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="needs the package `kernels`: pip install kernels")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    builder.write(folder, None)
    return folder


def load(variant: Path) -> ModuleType:
    """As the loader does: under its own name, from its own path."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert found and found.loader
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def variant(folder) -> ModuleType:
    return load(folder / "build" / "torch-cpu")


def namespaces() -> set[str]:
    found = (schema.name.partition("::")[0] for schema in torch._C._jit_get_all_schemas())
    return {name for name in found if name.startswith("vivit_kernels")}


# ---- the folder ----


def test_the_folder_has_both_layouts(folder):
    assert {path.name for path in (folder / "build").iterdir()} == {"torch-cpu", "torch-cuda"}
    for backend in ("cpu", "cuda"):
        metadata = json.loads((folder / "build" / f"torch-{backend}" / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend} and metadata["id"].startswith(f"vivit_kernels_{backend}_")
        assert metadata["python-depends"] == [] and "integrations/huggingface_kernels.py" in metadata["digest"]["files"]
    assert (folder / "torch-ext" / "vivit_kernels" / "__init__.py").is_file()
    card = (folder / "CARD.md").read_text()
    layers = load(folder / "build" / "torch-cpu").layers.__all__
    assert all(f"- `{name}`: For " in card or f"- `{name}`: The same for " in card for name in layers)


def test_two_versions_are_told_apart(folder, tmp_path, monkeypatch):
    ids = {json.loads(path.read_text())["id"] for path in folder.glob("build/*/metadata.json")}
    files = builder.python_files() | {"_philox.py": "changed"}
    monkeypatch.setattr(builder, "python_files", lambda: dict(files))
    builder.write(tmp_path / "other", None)
    assert not ids & {json.loads(path.read_text())["id"] for path in tmp_path.glob("other/build/*/metadata.json")}


def test_a_folder_of_something_else_is_not_emptied(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "hub.py", "--no-library", "--out", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 1 and "holds something else than a kernel" in done.stderr and "--out" in done.stderr
    assert (tmp_path / "thesis.tex").exists()


@needs_kernels
def test_the_loader_reads_the_metadata(folder):
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    for path in (folder / "build").iterdir():
        read = Metadata.read_from_file(path / "metadata.json")
        assert read.name.python_name == "vivit_kernels" and read.version == builder.VERSION
        found = Digest.hash_variant(DigestAlgorithm.SHA256, path)
        found.validate(read.digest)
        assert found.files == read.digest.files


# ---- a variant beside the installed package ----


def test_a_variant_has_operators_of_its_own(folder, tmp_path):
    """A process of its own: what is registered stays."""
    code = f"""if True:
        import sys; sys.path[:0] = {sys.path!r}
        from pathlib import Path
        import test_hub, torch
        with_installed = {{"vivit_kernels", "vivit_kernels_native"}}
        assert test_hub.namespaces() <= with_installed
        before = test_hub.namespaces()
        kernel = test_hub.load(Path({str(folder / "build" / "torch-cpu")!r}))
        assert test_hub.namespaces() - before == {{kernel.__name__}}
        assert not [name for name in sys.modules if name.startswith("transformers")]
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_a_variant_computes_what_the_package_does(variant):
    qkv = torch.randn(2, 5, 3, 2, 16)
    ours = vivit_kernels.joint_attention(qkv, backend="torch")
    assert torch.equal(variant.joint_attention(qkv, backend="torch"), ours)
    clip, weight = torch.randn(1, 3, 4, 8, 8), torch.randn(16, 3, 2, 4, 4)
    ours = vivit_kernels.tubelet_embedding(clip, weight, backend="torch")
    assert torch.equal(variant.tubelet_embedding(clip, weight, backend="torch"), ours)


def test_layers_are_what_the_loader_takes(variant):
    """No constructor, no member but forward and the flags, and arguments of the kinds that the host's have."""
    members = {name for name, _ in inspect.getmembers(nn.Module)}
    for name in variant.layers.__all__:
        layer = getattr(variant.layers, name)
        assert layer.__init__ is nn.Module.__init__
        found = {name for name, _ in inspect.getmembers(layer)}
        assert found - members <= {"has_backward", "can_torch_compile"}
        assert layer.has_backward and layer.can_torch_compile
    for host, name in [(nn.MultiheadAttention, "MultiheadAttention"), (nn.Conv3d, "TubeletConv3d")]:
        assert kinds(getattr(variant.layers, name)) == kinds(host)


def kinds(cls: type[nn.Module]) -> list:
    return [parameter.kind for parameter in inspect.signature(cls.forward).parameters.values()]


# ---- layers in models ----

# class of a module -> the layer whose forward it gets
FAMILIES = {
    "vivit": {
        "VivitTubeletEmbeddings": "TubeletEmbedding",
        "VivitAttention": "VivitAttention",
        "FastGELUActivation": "FastGELU",
    },
    "videomae": {"VideoMAEPatchEmbeddings": "TubeletEmbedding", "VideoMAESelfAttention": "VideoMAESelfAttention"},
    "timesformer": {"Conv2d": "PatchConv2d", "TimesformerSelfAttention": "TimesformerSelfAttention"},
    "videoprism": {"Conv3d": "TubeletConv3d", "VideoPrismAttention": "VideoPrismAttention"},
}


@pytest.fixture
def called(variant, monkeypatch) -> list[str]:
    """Names of the ops that layers called."""
    calls: list[str] = []

    def spy(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kw: (calls.append(name), real(*args, **kw))[1])

    registered = sys.modules[f"{variant.__name__}.integrations.transformers_attention"]
    spy(variant.layers, "tubelet_embedding")
    spy(variant.layers, "joint_attention")
    spy(registered, "spatial_attention")
    return calls


def by_hand(model: nn.Module, variant: ModuleType, layers: dict[str, str]) -> nn.Module:
    """What `kernelize` does."""
    for module in model.modules():
        if name := layers.get(type(module).__name__):
            layer = getattr(variant.layers, name)
            assert kinds(layer) == kinds(type(module))
            module.forward = MethodType(layer.forward, module)
    return model


def models() -> ModuleType:
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip(f"the layers are for transformers 5, this is {transformers.__version__}")
    import transformers_models

    return transformers_models


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_within_the_budget(family, variant, called):
    """Logits, hidden states, and the gradient of every parameter and of the clip."""
    M = models()
    pixels = M.clip()
    found = M.results(by_hand(M.make(family), variant, FAMILIES[family]), pixels)
    assert len(set(called)) == 2, called
    eager = M.make(family, None if family == "timesformer" else "eager")
    M.hold(found, M.exact_of(family, pixels, torch.float32), M.results(eager, pixels))


def test_probabilities_that_are_asked_for_are_the_hosts(variant, called):
    M = models()
    model, pixels = M.make("vivit", "eager"), M.clip()
    plain = model(pixels, output_attentions=True).attentions
    by_hand(model, variant, {"VivitAttention": "VivitAttention"})
    again = model(pixels, output_attentions=True).attentions
    assert len(again) == len(plain) == 2 and all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    assert not called
    model(pixels)
    assert called == ["spatial_attention"] * 2


def test_clips_of_another_size_go_to_the_host(variant, called):
    M = models()
    model = by_hand(M.make("videomae"), variant, FAMILIES["videomae"])
    with pytest.raises(ValueError, match=r"Input image size \(40\*32\) doesn't match model"):
        model(M.clip(height=40))
    embeddings, pixels = M.make("vivit").vivit.embeddings.patch_embeddings, M.clip(height=40, width=48)
    plain = embeddings(pixels)
    by_hand(embeddings, variant, FAMILIES["vivit"])
    assert torch.equal(embeddings(pixels), plain) and not called


CONVOLUTIONS = {
    "overlapping": lambda: nn.Conv3d(3, 16, 4, 2),
    "padded": lambda: nn.Conv3d(3, 16, 4, 4, padding=1),
    "in groups": lambda: nn.Conv3d(4, 16, 4, 4, groups=2),
    "a subclass": lambda: type("Other", (nn.Conv3d,), {})(3, 16, 4, 4),
}


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_other_convolutions_stay_what_they_are(make, variant, called):
    convolution = make()
    x = torch.randn(1, convolution.in_channels, 8, 8, 8)
    plain = convolution(x)
    convolution.forward = MethodType(variant.layers.TubeletConv3d.forward, convolution)
    assert torch.equal(convolution(x), plain) and not called


def test_multihead_attention(variant, monkeypatch):
    """A large call without weights is ours; with weights, or in a subclass that has a forward, it is the host's."""
    pytorch = sys.modules[f"{variant.__name__}.integrations.pytorch"]
    taken: list[tuple] = []
    real = pytorch.attend
    monkeypatch.setattr(pytorch, "attend", lambda *args: (taken.append(args[1].shape), real(*args))[1])
    theirs, x = nn.MultiheadAttention(64, 4, batch_first=True), torch.randn(4, 300, 64)
    plain, weights = theirs(x, x, x, need_weights=False)[0], theirs(x, x, x)[1]
    by_hand(theirs, variant, {"MultiheadAttention": "MultiheadAttention"})
    out = theirs(x, x, x, need_weights=False)[0]
    assert len(taken) == 1
    exact = nn.MultiheadAttention(64, 4, batch_first=True, dtype=torch.float64)
    exact.load_state_dict(theirs.state_dict())
    assert judge(out, exact(*[x.double()] * 3, need_weights=False)[0], plain).ok
    assert torch.equal(theirs(x, x, x)[1], weights) and len(taken) == 1

    class Doubled(nn.MultiheadAttention):
        def forward(self, *args: Tensor, **kw):
            return (2 * args[0], None)

    other = Doubled(64, 4)
    other.forward = MethodType(variant.layers.MultiheadAttention.forward, other)
    assert torch.equal(other(x, x, x)[0], 2 * x)


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_kernelize_puts_them_there(family, folder, monkeypatch):
    """The loader's own way: forward and backward within the budget, the whole compiled, and undone."""
    from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping

    M = models()
    model, pixels, mode = M.make(family), M.clip(), Mode.TRAINING | Mode.TORCH_COMPILE
    for cls in {type(module) for module in model.modules()}:
        monkeypatch.setattr(cls, "kernel_condition", lambda module: True, raising=False)
        if name := FAMILIES[family].get(cls.__name__):
            monkeypatch.setattr(cls, "kernel_layer_name", name, raising=False)
        elif hasattr(cls, "kernel_layer_name"):  # transformers', of layers that are not ours
            monkeypatch.delattr(cls, "kernel_layer_name")
    names = set(FAMILIES[family].values())
    mapping = {name: {"cpu": {mode: LocalLayerRepository(folder, layer_name=name)}} for name in names}
    with use_kernel_mapping(mapping):
        kernelize(model, mode=mode, device="cpu", use_fallback=False)
    changed = [module for module in model.modules() if type(module).__name__ in FAMILIES[family]]
    assert changed and all(module.forward.__func__.__module__.startswith("vivit_kernels_cpu_") for module in changed)
    eager = M.make(family, None if family == "timesformer" else "eager")
    exact, stock = M.exact_of(family, pixels, torch.float32), M.results(eager, pixels)
    M.hold(M.results(model, pixels), exact, stock)
    torch._dynamo.reset()
    logits = torch.compile(model, fullgraph=True, backend="aot_eager")(pixels).logits
    assert judge(logits.detach(), exact["logits"], stock["logits"], row=logits.shape[-1]).ok


# ---- with the native library ----


@pytest.mark.full
def test_the_library_of_a_variant_is_its_own(tmp_path):
    """Loaded beside the installed one, under other names, with the same bits out of it."""
    plan = builder.native.plan()
    if plan.kind == "none" or not vivit_kernels._native.AVAILABLE:
        pytest.skip(f"no native library: {plan.why or vivit_kernels._native.WHY}")
    variants = builder.write(tmp_path / "hub", plan)
    assert len(variants) == (4 if plan.kind == "cuda" else 3)
    path = next(path for path in variants if "-cpu-" in path.name)
    code = f"""if True:
        import sys; sys.path[:0] = {sys.path!r}
        from pathlib import Path
        import test_hub, torch, vivit_kernels
        kernel = test_hub.load(Path({str(path)!r}))
        assert sys.modules[kernel.__name__ + "._native"].AVAILABLE, sys.modules[kernel.__name__ + "._native"].WHY
        assert len(test_hub.namespaces()) == 4, test_hub.namespaces()
        qkv = torch.randn(1, 4, 6, 3, 2, 32)
        one, other = (x.factorized_attention(qkv, temporal_heads=1, backend="cpu") for x in (kernel, vivit_kernels))
        assert torch.equal(one, other)
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# ---- import transformers from the repository root ----


@pytest.mark.parametrize("installed", [False, pytest.param(True, marks=needs_kernels)], ids=["without", "with"])
def test_transformers_is_imported_from_the_root(installed):
    """Its probe for the package `kernels` finds the folder kernels/ of this repository, too, or that alone."""
    pytest.importorskip("transformers")
    entries = [entry for entry in sys.path if entry and Path(entry) != ROOT]
    holders = [entry for entry in entries if (Path(entry) / "kernels" / "__init__.py").is_file()]
    if not installed and any(Path(entry) / "torch" in Path(torch.__file__).parents for entry in holders):
        pytest.skip("the package `kernels` lies where PyTorch does, and cannot be left out")
    code = f"""if True:
        import transformers.integrations.hub_kernels
        import transformers.models.vivit.modeling_vivit, kernels
        assert hasattr(kernels, "kernelize") == {installed}, kernels
        import vivit_kernels
    """
    chosen = ["", *(entry for entry in entries if installed or entry not in holders)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(chosen)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environ)
