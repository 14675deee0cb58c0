"""The rules of the layout, checked on the tree itself: import direction, sizes, one place for tolerances, no debris.

Each rule is a function from source to a list of complaints; each has a test that plants a violation, so that a rule
which stopped biting is noticed, and one that runs it over every file git knows or would add.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES, MAX_FUNCTION_LINES = 420, 75  # the aim is 400 and 60


@cache
def files() -> tuple[Path, ...]:
    """Files git tracks, and those it would add, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: cannot tell the project's files from others")
    return tuple(Path(name) for name in sorted(set(listed.split("\0"))) if name and (ROOT / name).is_file())


@cache
def python_files() -> dict[Path, str]:
    return {path: (ROOT / path).read_text() for path in files() if path.suffix == ".py"}


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# ---- import direction ----


class Import(NamedTuple):
    source: str  # module that imports
    target: str  # module that is imported
    name: str  # the name taken from it, "" for `import target`
    at_import: bool  # runs when the source is imported, not inside a function
    line: int


def imports(path: Path, text: str, modules: frozenset[str]) -> Iterator[Import]:
    """`modules` decides whether `from a import b` takes the module a.b or the name b of a."""
    source = module_name(path)
    package = source if path.name == "__init__.py" else source.rpartition(".")[0]
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lazy = {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(source, alias.name, "", id(node) not in lazy, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{origin}.{alias.name}"
                target, name = (whole, "") if whole in modules else (origin, alias.name)
                yield Import(source, target, name, id(node) not in lazy, node.lineno)


# Inside the folder of an op: what each file may import of its neighbours. A `*_kernels` file and other device code may
# take `tiles` and device code; `op` may take `*_kernels`, but only when it is called.
NEIGHBOURS = {
    "": {"api"},
    "api": {"support", "op", "reference", "composed"},
    "op": {"support", "tiles", "composed"},
    "support": {"tiles", "order"},
    "order": set(),
    "tiles": set(),
    "reference": set(),
    "composed": set(),
}


def forbidden(entry: Import, ops: frozenset[str], public: frozenset[str]) -> str:
    """Why this import goes against bench, tests -> vivit -> vivit_kernels -> <op>.api -> ...; '' if it does not."""
    source, target = entry.source.split("."), entry.target.split(".")
    if source[0] not in ("vivit", "vivit_kernels"):
        return "bench does not import tests" if (source[0], target[0]) == ("bench", "tests") else ""
    if target[0] in ("tests", "bench"):
        return "installed code does not import tests or bench"
    if source[0] == "vivit":
        if target[0] != "vivit_kernels":
            return ""
        # an op's folder and its function have one name: `from vivit_kernels import joint_attention` gives the function
        taken = ".".join([*target[1:], *([entry.name] if entry.name else [])])
        if taken and taken not in public:
            return "vivit takes only the public names of vivit_kernels"
        return ""
    if target[0] == "vivit":
        return "vivit_kernels does not import vivit"

    inside, leaf = (source[1], ".".join(source[2:])) if len(source) > 1 and source[1] in ops else ("", "")
    if inside and leaf == "reference" and target[0] not in ("torch", "vivit_kernels", *sys.stdlib_module_names):
        return "reference.py is the definition: it imports only torch"
    if target[0] != "vivit_kernels":
        foreign = entry.at_import and target[0] not in ("torch", *sys.stdlib_module_names)
        return "a host library is imported when it is asked for" if source[1:2] == ["integrations"] and foreign else ""
    if complaint := forbidden_integration(source, target, entry.at_import):
        return complaint
    to_op, to_leaf = (target[1], ".".join(target[2:])) if len(target) > 1 and target[1] in ops else ("", "")
    if not to_op:
        if inside and (len(target) == 1 or not target[1].startswith("_")):
            return "an op imports its neighbours and the private modules of vivit_kernels, nothing above it"
        return ""
    if inside:
        return "ops never import each other" if inside != to_op else forbidden_neighbour(leaf, to_leaf, entry.at_import)
    if len(source) > 1 and source[1].startswith("_") and source[1] != "__main__":
        return "private modules are shared by the ops and know none of them"
    if to_leaf in ("api", "") or (source[1:] == ["__main__"] and to_leaf == "support"):
        return ""
    return "from outside an op, only its api is imported"


def forbidden_integration(source: list[str], target: list[str], at_import: bool) -> str:
    """vivit_kernels -> accelerate -> (when called) integrations -> {accelerate's dataclasses, modules, apis of ops}."""
    within = source[:2] == ["vivit_kernels", "integrations"]
    if within:
        private = len(target) > 1 and target[1].startswith("_")
        return "an integration uses what users have, no private module of vivit_kernels" if private else ""
    above = source == ["vivit_kernels"] or source == ["vivit_kernels", "accelerate"]
    if target[1:2] != ["integrations"]:
        top = target[1:2] in (["accelerate"], ["modules"])
        shared = len(source) > 1 and source[1].startswith("_") and source[1] != "__main__"
        return "private modules know nothing of those above them" if top and shared else ""
    if not above:
        return "only vivit_kernels and accelerate know of integrations"
    if len(target) > 2 and target[2] != "pytorch" and at_import:
        return "the integration of another library is imported where its host is, when accelerate() is called"
    return ""


def forbidden_neighbour(leaf: str, to_leaf: str, at_import: bool) -> str:
    is_kernel = to_leaf.endswith("_kernels")
    if leaf == "op" and is_kernel:
        return "launchers are imported inside the op, when it is called" if at_import else ""
    if leaf not in NEIGHBOURS:  # kernels and the device code they share
        return (
            f"device code does not import {to_leaf or 'its package'}"
            if to_leaf in NEIGHBOURS.keys() - {"tiles"}
            else ""
        )
    return "" if to_leaf in NEIGHBOURS[leaf] else f"{leaf or '__init__'} does not import {to_leaf}"


def public_names(text: str) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    return frozenset(name for name in names if not name.startswith("_"))


PLANTED_OPS = frozenset({"joint_attention", "tubelet_embedding"})
JOINT = "vivit_kernels.joint_attention"


@pytest.mark.parametrize(
    "source, target, name, at_import, allowed",
    [
        ("vivit.model", "vivit_kernels", "joint_attention", True, True),
        ("vivit.model", JOINT, "", True, True),
        ("vivit.model", "vivit_kernels", "_dispatch", True, False),
        ("vivit.model", f"{JOINT}.api", "joint_attention", True, False),
        ("vivit_kernels", f"{JOINT}.api", "joint_attention", True, True),
        ("vivit_kernels", f"{JOINT}.reference", "joint_attention", True, False),
        ("vivit_kernels.modules", "vivit", "Config", False, False),
        ("vivit_kernels.numerics", "tests.grid", "", True, False),
        (f"{JOINT}.api", f"{JOINT}.reference", "joint_attention", True, True),
        (f"{JOINT}.api", "vivit_kernels", "joint_attention", False, False),
        (f"{JOINT}.api", "vivit_kernels.tubelet_embedding.composed", "embed", False, False),
        (f"{JOINT}.op", f"{JOINT}.triton_kernels", "launch_fwd", False, True),
        (f"{JOINT}.op", f"{JOINT}.triton_kernels", "launch_fwd", True, False),
        (f"{JOINT}.composed", f"{JOINT}.reference", "joint_attention", True, False),
        (f"{JOINT}.triton_kernels", f"{JOINT}.reference", "joint_attention", True, False),
        (f"{JOINT}.triton_kernels", f"{JOINT}.tiles", "choose", True, True),
        (f"{JOINT}.reference", "vivit_kernels._attention.rotary", "rotate", True, True),
        (f"{JOINT}.reference", "numpy", "", True, False),
        ("vivit_kernels._dispatch", f"{JOINT}.support", "", False, False),
        ("vivit_kernels", "vivit_kernels.integrations.pytorch", "sdpa_override", True, True),
        ("vivit_kernels", "vivit_kernels.integrations.transformers", "replacements", True, False),
        ("vivit_kernels.accelerate", "vivit_kernels.integrations", "HOSTS", True, True),
        ("vivit_kernels.modules", "vivit_kernels.integrations", "HOSTS", False, False),
        ("vivit_kernels.integrations.transformers", "vivit_kernels.accelerate", "Left", True, True),
        ("vivit_kernels.integrations.transformers", "vivit_kernels.integrations.pytorch", "", True, True),
        ("vivit_kernels.integrations.transformers", f"{JOINT}.api", "joint_attention", True, True),
        ("vivit_kernels.integrations.transformers", f"{JOINT}.support", "", True, False),
        ("vivit_kernels.integrations.transformers", "vivit_kernels._native", "", True, False),
        ("vivit_kernels.integrations.transformers", "transformers", "AttentionInterface", False, True),
        ("vivit_kernels.integrations.transformers", "transformers", "AttentionInterface", True, False),
        (f"{JOINT}.api", "vivit_kernels.accelerate", "accelerate", False, False),
        ("vivit_kernels._layouts", "vivit_kernels.modules", "", False, False),
        ("tests.test_joint", f"{JOINT}.reference", "joint_attention", True, True),
        ("bench.ops", "tests.grid", "", True, False),
    ],
)
def test_the_import_rule_bites(source, target, name, at_import, allowed):
    complaint = forbidden(Import(source, target, name, at_import, 1), PLANTED_OPS, frozenset({"joint_attention"}))
    assert bool(complaint) != allowed, complaint


def test_imports_are_read_as_python_reads_them():
    text = "from . import op\nfrom .. import _dispatch\nfrom .support import X\ndef f():\n    import a.b\n"
    modules = frozenset({"vivit_kernels.x.op", "vivit_kernels._dispatch", "vivit_kernels.x.support"})
    found = [(i.target, i.name, i.at_import) for i in imports(Path("kernels/vivit_kernels/x/api.py"), text, modules)]
    assert found == [
        ("vivit_kernels.x.op", "", True),
        ("vivit_kernels._dispatch", "", True),
        ("vivit_kernels.x.support", "X", True),
        ("a.b", "", False),
    ]


def test_imports_go_one_way():
    package = Path("kernels/vivit_kernels")
    modules = frozenset(map(module_name, python_files()))
    ops = frozenset(path.parent.name for path in python_files() if path.name == "api.py" and package in path.parents)
    public = public_names(python_files().get(package / "__init__.py", ""))
    complaints = [
        f"{path}:{entry.line} imports {entry.target} {entry.name}: {complaint}"
        for path, text in python_files().items()
        for entry in imports(path, text, modules)
        if (complaint := forbidden(entry, ops, public))
    ]
    assert not complaints, "\n".join(complaints)


def test_kernels_is_a_source_root_and_no_package():
    """With an __init__.py it would be found as the PyPI package `kernels`, which transformers probes for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


# ---- sizes and debris ----


def without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is None:
        return length
    doc = node.body[0]
    return length - ((doc.end_lineno or doc.lineno) - doc.lineno + 1)


def too_long(text: str) -> list[str]:
    lines = text.count("\n")
    complaints = [f"{lines} lines in the file, {MAX_FILE_LINES} at most"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and without_docstring(node) > MAX_FUNCTION_LINES:
            complaints.append(f"{node.name}: {without_docstring(node)} lines of code, {MAX_FUNCTION_LINES} at most")
    return complaints


def is_placeholder(text: str) -> bool:
    """Nothing but docstrings, `pass`, `...` and `from __future__`."""
    body = ast.parse(text).body
    return all(
        isinstance(node, ast.Pass)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or (isinstance(node, ast.ImportFrom) and node.module == "__future__")
        for node in body
    )


def test_the_size_rule_bites():
    assert too_long("x = 1\n" * (MAX_FILE_LINES + 1))
    assert too_long("def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES)
    assert not too_long('def f():\n    """' + "a\n" * MAX_FUNCTION_LINES + '    """\n    return 1\n')
    assert is_placeholder('"""To come."""\nfrom __future__ import annotations\n')
    assert not is_placeholder("from .api import f\n")


def test_files_and_functions_stay_readable():
    complaints = [
        f"{path}: {complaint}"
        for path, text in python_files().items()
        if path.parts[0] != "tests"
        for complaint in too_long(text)
    ]
    assert not complaints, "\n".join(complaints)


def test_no_empty_placeholders():
    empty = [str(path) for path, text in python_files().items() if path.name != "__init__.py" and is_placeholder(text)]
    assert not empty, empty


# "/" + root, home, ... at the start of a path; /usr, /etc and /dev are the same on every machine
MACHINE_PATH = re.compile(r"(?<![\w.:/*$})~-])/(?:root|home|work|opt|mnt|Users)/\w|\b[A-Z]:\\Users\b")


def test_no_absolute_machine_paths():
    assert MACHINE_PATH.search('open("' + "/home" + '/me/x")')
    assert not MACHINE_PATH.search("see https://example.org/work/1 and a/root/b")
    complaints = []
    for path in files():
        try:
            text = (ROOT / path).read_text()
        except UnicodeDecodeError:
            continue
        complaints += [f"{path}: {match.group()}..." for match in MACHINE_PATH.finditer(text)]
    assert not complaints, "\n".join(complaints)


# ---- tolerances live in numerics.py ----

TOLERANCE = re.compile(r"(^|_)([ar]tol|tol|tolerance)s?$", re.IGNORECASE)
COMPARISONS = {"allclose", "isclose", "assert_close", "assert_allclose"}


def is_number(node: ast.expr | None) -> bool:
    """A literal other than 0: exact equality needs no budget."""
    if isinstance(node, ast.UnaryOp):
        return is_number(node.operand)
    if isinstance(node, ast.BinOp):
        return is_number(node.left) and is_number(node.right)
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float) and node.value != 0


def tolerances(text: str) -> list[str]:
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            names = {"abs", "rel"} if called == "approx" else set()
            for keyword in node.keywords:
                named = keyword.arg is not None and (TOLERANCE.search(keyword.arg) or keyword.arg in names)
                if named and is_number(keyword.value):
                    found.append((node.lineno, f"{keyword.arg}={ast.unparse(keyword.value)}"))
            if called in COMPARISONS and any(map(is_number, node.args[2:])):
                found.append((node.lineno, f"{called}(..., number)"))
        elif isinstance(node, ast.FunctionDef):
            pairs = list(zip(reversed(node.args.args), reversed(node.args.defaults), strict=False))
            pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            found += [(node.lineno, f"{a.arg}=") for a, d in pairs if TOLERANCE.search(a.arg) and is_number(d)]
        elif isinstance(node, ast.Assign | ast.AnnAssign) and is_number(node.value):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if TOLERANCE.search(ast.unparse(target)):
                    found.append((node.lineno, ast.unparse(node)))
    return [f"{line}: {what}" for line, what in found]


@pytest.mark.parametrize(
    "text, allowed",
    [
        ("allclose(a, b, atol=1e-5)", False),
        ("torch.testing.assert_close(a, b, rtol=-2 * 1e-3, atol=0)", False),
        ("torch.allclose(a, b, 1e-3)", False),
        ("def same(a, b, *, atol=1e-6): pass", False),
        ("ATOL = 1e-4", False),
        ("x == pytest.approx(y, rel=1e-3)", False),
        ("assert_close(a, b, atol=0, rtol=0)", True),
        ("assert_close(a, b, atol=budget(dtype))", True),
        ("total = 3", True),
    ],
)
def test_the_tolerance_rule_bites(text, allowed):
    assert bool(tolerances(text)) != allowed


def test_tolerances_are_written_in_one_place():
    this = Path(__file__).relative_to(ROOT)
    complaints = [
        f"{path}:{complaint}"
        for path, text in python_files().items()
        if path.name != "numerics.py" and path != this
        for complaint in tolerances(text)
    ]
    assert not complaints, "a tolerance belongs in numerics.py\n" + "\n".join(complaints)
