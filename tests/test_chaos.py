"""The chaos runner: real kills, and that it would notice a run that did not come to the same end."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.launch import REPOSITORY, environment
from tools.chaos import compare, main
from tools.runs import read_run

SCRIPT = str(REPOSITORY / "tools" / "chaos.py")


def chaos(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], env=environment(), capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def killed(tmp_path_factory, cache_dir):
    """What three faults in one run left: the unbroken run's folder and the figures."""
    folder = tmp_path_factory.mktemp("chaos")
    settings = ["--set", "train.steps=8", "--set", f"data.cache_dir={cache_dir}"]
    result = chaos("--kills", "3", "--seed", "1", "--only", "SIGKILL", *settings, "--folder", str(folder / "runs"),
                   "--json", str(folder / "figures.json"))  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "runs" / "unbroken", json.loads((folder / "figures.json").read_text()), result.stdout


def test_killed_runs_come_to_the_same_end(killed):
    _, figures, printed = killed
    rows = figures["rows"].values()
    assert sum(row["tried"] for row in rows) == 3 and not figures["problems"]
    assert all(row["tried"] == row["went_on"] == row["same_end"] for row in rows)
    assert "| all | 3 | 3 | 3 |" in printed


def test_another_end_is_noticed(killed, tmp_path):
    unbroken = read_run(killed[0])
    copy = tmp_path / "run"

    def differences() -> str:
        return "; ".join(compare(unbroken, read_run(copy)))

    shutil.copytree(killed[0], copy)
    assert differences() == ""
    (tmp_path / "run.1").mkdir()
    (copy / "checkpoints" / ".tmp-step_00000009").mkdir()
    assert differences() == "left behind or missing: checkpoints/.tmp-step_00000009; left behind: run.1"
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines + [line for line in lines if '"train"' in line][-1:]))
    assert "train records differ" in differences()
    shutil.rmtree(copy / "checkpoints" / "step_00000008")
    assert "core.safetensors in the last checkpoint differs" in differences() and "step in the last" in differences()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kills", "0"], "--kills and --kills_a_run: must be at least 1"),
        (["--experiment", "quikstart"], "did you mean quickstart?"),
        (["--set", "train.steps=many"], "train.steps = 'many'"),
    ],
)
def test_refusals(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["chaos.py", *arguments])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
