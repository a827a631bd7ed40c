"""The chaos runner: real kills, and that it would notice a run that did not come to the same end."""

import json
import random
import shutil
import signal
import subprocess
import sys

import pytest

from tests.launch import REPOSITORY, environment
from tools.chaos import Chaos, compare, main
from tools.chaos_faults import SLOW_SECONDS, Card, arrange, deck
from tools.runs import read_run
from trainer.config import load_experiment

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


def test_runs_with_checkpoints_behind_a_link_come_to_the_same_end(tmp_path, cache_dir):
    settings = ["--set", "train.steps=6", "--set", f"data.cache_dir={cache_dir}", "--linked"]
    result = chaos("--kills", "2", "--only", "in a save, inside", *settings, "--folder", str(tmp_path / "runs"),
                   "--json", str(tmp_path / "figures.json"))  # fmt: skip
    assert result.returncode == 0 and "| all | 2 | 2 | 2 |" in result.stdout, result.stdout + result.stderr
    assert json.loads((tmp_path / "figures.json").read_text())["linked"]
    assert not list((tmp_path / "runs").glob("run_*_checkpoints")), "removed with the run"


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


OTHER_CODES = {
    "SIGKILL at a step": [-signal.SIGTERM, 1, 0],
    "SIGKILL in a save": [-signal.SIGTERM, 1, 0],
    "SIGKILL at any moment": [-signal.SIGTERM, 1, 0],
    "SIGTERM at any moment": [-signal.SIGKILL, 1, 2, 0],
    "SIGSTOP at a step": [-signal.SIGKILL, 0, 75],
    "NaN at a step": [-signal.SIGKILL, 1, 0],
    "full disk in a save": [-signal.SIGKILL, 3, 0],
    "slow at a step": [-signal.SIGKILL, 1, 75],
}
"""By which ranks end that another fault has struck."""


@pytest.mark.parametrize("kind", sorted({card.kind for card in deck(2)}))
def test_another_end_than_the_faults_own_does_not_pass_for_it(kind):
    """Told from the exit code of the rank that it strikes and from what was said."""
    card = next(card for card in deck(2) if card.kind == kind)
    fault = arrange(card, random.Random(0), newest=3, every=3, total=12, seconds=10)
    said = f"error: step {_step(fault)}: the loss is not finite suspect: rank {card.rank} (host) No space left on device"
    seconds = {step: SLOW_SECONDS for step in range(13)}
    assert fault.happened([fault.codes[0]] * 2, said, seconds)
    assert not any(fault.happened([code] * 2, said, seconds) for code in OTHER_CODES[kind])
    if fault.rank is not None:
        codes = [0, 0]
        codes[1 - fault.rank] = fault.codes[0]
        assert not fault.happened(codes, said, seconds), "another rank's end"
    if fault.said:
        assert not fault.happened([fault.codes[0]] * 2, "", seconds)
    if fault.slow_step:
        assert not fault.happened([fault.codes[0]] * 2, said, seconds | {fault.slow_step: 0.1})
    for setting in fault.settings:
        load_experiment("quickstart", [setting])


def _step(fault) -> int | None:
    asked = [setting for setting in fault.settings if setting.startswith("faults.")]
    faults = load_experiment("quickstart", asked).faults.parsed().values()
    return next((each.step for each in faults), None)


def test_a_start_that_fails_by_itself_is_a_problem_and_no_fault(killed, monkeypatch):
    monkeypatch.setattr("tools.chaos.prepare", lambda: None)
    starts = iter([[0, 0], [1, None]])
    monkeypatch.setattr(Chaos, "_start", lambda self, output_dir, fault=None: next(starts))
    chaos = Chaos([], 2, killed[0].parent, random.Random(0))
    (killed[0].parent / "run_7.log").touch()
    cards = [Card("SIGKILL at a step", rank=1), Card("SIGKILL at a step", rank=0)]
    assert chaos.run(7, cards) == cards and not chaos.rows
    (problem,) = chaos.problems
    assert "run 7 was to meet SIGKILL at a step, rank 1 faults.kill=rank=1 step=" in problem
    assert "exit codes [1, None]" in problem


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kills", "0"], "--kills and --kills_a_run: must be at least 1"),
        (["--experiment", "quikstart"], "did you mean quickstart?"),
        (["--experiment", "quik\x1bstart"], "quik\\x1bstart"),
        (["--set", "train.steps=many"], "train.steps = 'many'"),
        (["--only", "SIGKIL at"], "--only SIGKIL at: no fault has this in its name; there are: NaN at a step; SIGKILL at"),
        (["--ranks", "3"], "train.batch_size = 8 does not divide over 3 ranks"),
        (["--ds_config", "{tmp}/none.json"], "none.json: cannot be read"),
        (["--folder", "{tmp}"], "is not empty; give another"),
        (["--folder", "{tmp}/used/run"], "Not a directory; give another"),
        (
            ["--json", "{tmp}/none/figures.json"],
            "figures.json: cannot be written (No such file or directory)",
        ),
    ],
)
def test_refusals(monkeypatch, capsys, tmp_path, arguments, message):
    (tmp_path / "used").touch()
    monkeypatch.setattr(sys, "argv", ["chaos.py", *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and "\x1b" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
