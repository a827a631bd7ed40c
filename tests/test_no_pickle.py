"""No code of the project reads what could run: no pickle, no eval, YAML by the safe loader alone; told from its syntax."""

import ast
from pathlib import Path

import pytest

from tests.launch import REPOSITORY

PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_METHODS = {
    # yaml
    "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all",
    # numpy and pandas
    "read_pickle", "to_pickle",
    # torch.distributed: these pickle what they send and unpickle what arrives
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip
FILES = sorted(path for folder in ("modeling", "trainer", "tools") for path in (REPOSITORY / folder).rglob("*.py"))


def unsafe(source: str) -> list[str]:
    """What in a source could run what it reads, with its lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            found += [(node.lineno, module) for module in modules if module.split(".")[0] in PICKLERS]
            found += [(node.lineno, name) for name in names if name in UNSAFE_METHODS]
        elif isinstance(node, ast.Attribute):
            if node.attr in UNSAFE_METHODS or (node.attr in ("Loader", "UnsafeLoader", "FullLoader") and _is(node, "yaml")):
                found.append((node.lineno, node.attr))
        elif isinstance(node, ast.Call):
            keywords = {k.arg: k.value for k in node.keywords}
            if isinstance(node.func, ast.Name) and node.func.id in UNSAFE_CALLS:
                found.append((node.lineno, node.func.id))
            is_load = isinstance(node.func, ast.Attribute) and node.func.attr == "load"
            if is_load and _is(node.func, "yaml"):
                found.append((node.lineno, "yaml.load"))
            if is_load and _is(node.func, "torch") and not _is_constant(keywords.get("weights_only"), True):
                found.append((node.lineno, "torch.load"))
            if "allow_pickle" in keywords and not _is_constant(keywords["allow_pickle"], False):
                found.append((node.lineno, "allow_pickle"))
    return [f"line {line}: {what}" for line, what in found]


def _is(node: ast.Attribute, module: str) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == module


def _is_constant(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_nothing_that_is_read_can_run():
    assert len(FILES) > 50
    found = {str(path.relative_to(REPOSITORY)): unsafe(path.read_text(encoding="utf-8")) for path in FILES}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from dill import loads", "import numpy, cloudpickle.x", "import torch\ntorch.load(f)",
        "torch.load(f, weights_only=False)", "torch.load(f, weights_only=safe)", "yaml.load(t, Loader=yaml.SafeLoader)",
        "yaml.unsafe_load(t)", "from yaml import full_load", "class L(yaml.Loader): pass", "np.load(f, allow_pickle=True)",
        "eval(text)", "exec(text)", "dist.all_gather_object(a, b)", "from torch.distributed import broadcast_object_list",
    ],
)  # fmt: skip
def test_what_could_run_is_found(source):
    assert len(unsafe(source)) >= 1


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.load(f, weights_only=True)",
        "np.load(f, allow_pickle=False)",
        "yaml.safe_load(t)",
        "re.compile(p)",
    ],
)
def test_what_cannot_run_is_not(source):
    assert unsafe(source) == []


def test_files_are_those_of_the_packages():
    assert Path(REPOSITORY / "trainer" / "text.py") in FILES
