"""No code of the project reads what could run: no pickle, no eval, YAML by the safe loader alone; told from its syntax."""

import ast
from pathlib import Path

import pytest

from tests.launch import REPOSITORY

PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
UNSAFE = {
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "torch.jit.load", "torch.hub.load",
    "torch.package.PackageImporter", "yaml.load", "yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader",
}  # fmt: skip
"""By their full names, whatever a file calls them."""
UNSAFE_METHODS = {
    # yaml
    "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all",
    # numpy and pandas
    "read_pickle", "to_pickle",
    # torch.distributed: these pickle what they send and unpickle what arrives
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip
"""Of whatever they are asked."""
SAFE_WITH = {"torch.load": ("weights_only", True, None), "numpy.load": ("allow_pickle", False, 2)}
"""Safe where they are called with this keyword and constant; numpy's own default is safe too, so it may be left out, but
then not be given by its place."""
UNSAFE_FLAGS = {"allow_pickle", "shell", "trust_remote_code"}
FILES = sorted(path for folder in ("modeling", "trainer", "tools") for path in (REPOSITORY / folder).rglob("*.py"))


def unsafe(source: str) -> list[str]:
    """What in a source could run what it reads, with its lines."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    modules = _imported(nodes)
    safe_calls = {id(node.func) for node in nodes if isinstance(node, ast.Call) and _is_safe(node, modules)}
    found = []
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names = [prefix + alias.name for alias in node.names]
            banned = UNSAFE | ({*SAFE_WITH} if prefix else set())
            found += [(node, name) for name in names if name.split(".")[0] in PICKLERS or name in banned]
            found += [(node, name) for name in names if name.split(".")[-1] in UNSAFE_METHODS]
        elif isinstance(node, ast.Attribute):
            name = _full_name(node, modules)
            if node.attr in UNSAFE_METHODS or name in UNSAFE or (name in SAFE_WITH and id(node) not in safe_calls):
                found.append((node, name))
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
                found.append((node, node.func.id))
            flags = [word for word in node.keywords if word.arg in UNSAFE_FLAGS and not _is_constant(word.value, False)]
            found += [(node, word.arg) for word in flags]
    return [f"line {node.lineno}: {what}" for node, what in found]


def _imported(nodes: list[ast.AST]) -> dict[str, str]:
    """What a file calls its modules, and their names."""
    modules = {"np": "numpy"}
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def _full_name(node: ast.expr, modules: dict[str, str]) -> str:
    """`torch.jit.load`, of a name with dots; what stands before them is left out where it is no name."""
    if isinstance(node, ast.Attribute):
        return f"{_full_name(node.value, modules)}.{node.attr}"
    return modules.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _is_safe(call: ast.Call, modules: dict[str, str]) -> bool:
    """Whether a call of what may be unsafe is not."""
    flag, value, place = SAFE_WITH.get(_full_name(call.func, modules), (None, None, None))
    given = [word.value for word in call.keywords if word.arg in (flag, None)]  # None: two asterisks
    if given or place is None:
        return len(given) == 1 and _is_constant(given[0], value)
    return len(call.args) <= place and not any(isinstance(argument, ast.Starred) for argument in call.args)


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
        "from torch import load", "import torch as t\nt.load(f)", "f = torch.load", "import torch as t\nt.jit.load(f)",
        "from torch.jit import load", "from torch import jit\njit.load(f)", "torch.load(f, **how)", "from yaml import load",
        "import yaml as y\ny.load(t)", "np.load(f, None, True)", "np.load(*f)", "import numpy as n\nn.load(f, None, True)",
        "f = numpy.load", "np.savez(f, allow_pickle=how)", "os.system(text)", "from os import system", "os.popen(text)",
        "subprocess.run(text, shell=True)", "Popen(text, shell=how)", "load_dataset(name, trust_remote_code=True)",
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
        "import numpy as n\nn.load(f, 'r')",
        "import torch as t\nt.load(f, weights_only=True)",
        "subprocess.run([word], shell=False)",
        "yaml.safe_load(t)",
        "re.compile(p)",
    ],
)
def test_what_cannot_run_is_not(source):
    assert unsafe(source) == []


def test_files_are_those_of_the_packages():
    assert Path(REPOSITORY / "trainer" / "text.py") in FILES
