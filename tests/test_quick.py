"""What is answered from flags, keys and files alone imports no torch, whose import takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

import modeling
import modeling.some
import trainer.data
from tests.launch import REPOSITORY, environment

SLOW = ("torch", "deepspeed", "datasets", "pyarrow", "numpy")
RUN = "trainer/run.py"
ANSWERS = {
    "list": ([RUN, "--list"], 0),
    "help": ([RUN, "--help"], 0),
    "flag": ([RUN, "--max_step", "3"], 2),
    "flag value": ([RUN, "--max_steps", "many"], 2),
    "no steps": ([RUN, "--max_steps", "0"], 2),
    "experiment": ([RUN, "--experiment", "quikstart"], 2),
    "experiment missing": ([RUN, "--experiment", "none.yaml"], 2),
    "experiment bad": ([RUN, "--experiment", "bad.yaml"], 2),
    "key": ([RUN, "--set", "train.lerning_rate=1"], 2),
    "value": ([RUN, "--set", "train.batch_size=many"], 2),
    "layout": ([RUN, "--set", "parallel.ep_size=3"], 2),
    "ds missing": ([RUN, "--ds_config", "none.json"], 2),
    "ds bad": ([RUN, "--ds_config", "bad.json"], 2),
    "ds key": ([RUN, "--ds_config", "key.json"], 2),
}
TOOLS = ("grid", "padding", "plan", "report", "reproduce", "study", "watch")
ANSWERS |= {f"{tool} help": ([f"tools/{tool}.py", "--help"], 0) for tool in TOOLS}
ANSWERS |= {f"{tool} flag": ([f"tools/{tool}.py", "--nosuch"], 2) for tool in TOOLS}

PROGRAM = """
import atexit, runpy, sys
sys.argv = sys.argv[1:]
atexit.register(lambda: print("imported:", *sys.modules, file=sys.stderr))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Becomes a script, and says at its end which modules it imported."""


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_imports_nothing_slow(name, tmp_path):
    (program, *flags), code = ANSWERS[name]
    for file, text in {"bad.yaml": "train: [1", "bad.json": "{", "key.json": '{"zero_optimisation": {}}'}.items():
        (tmp_path / file).write_text(text)
    done = answer(str(REPOSITORY / program), *flags, folder=tmp_path)
    assert done.returncode == code, done.stderr
    imported = done.stderr.rpartition("imported:")[2].split()
    assert "argparse" in imported, done.stderr
    unwanted = SLOW if program == RUN else SLOW[:-1]  # numpy is fast, but a refusal needs none
    assert not set(unwanted) & set(imported)


def answer(*words: str, folder: Path) -> subprocess.CompletedProcess:
    """A program's answer, and the modules that it imported in the last line of its errors."""
    command = [sys.executable, "-c", PROGRAM, *words]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("package", [modeling, modeling.some, trainer.data], ids=lambda package: package.__name__)
def test_packages_offer_every_name_that_they_list(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="nosuch"):
        _ = package.nosuch
