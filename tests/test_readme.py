"""The README's commands: every trainer command is accepted, every make target and script exists."""

import importlib.util
import re
import shlex
import sys

import pytest

from tests.launch import REPOSITORY
from trainer import run

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
TRAINER = [command for command in COMMANDS if "trainer/run.py" in command]


def test_there_are_commands():
    assert len(TRAINER) >= 5 and any(command.startswith("make test") for command in COMMANDS)


@pytest.mark.parametrize("command", TRAINER)
def test_trainer_commands_are_accepted(command, monkeypatch, capsys):
    arguments = shlex.split(command.split("trainer/run.py")[1])
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments, "--dry_run"])
    run.main()
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in TRAINER])
def test_other_commands_name_what_exists(command):
    words = shlex.split(command.removeprefix(".venv/bin/"))
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPOSITORY / "Makefile").read_text(), flags=re.M), command
    elif words[0] in ("python", "python3") and words[1] == "-m":
        spec = importlib.util.find_spec(words[2])
        is_package = spec is not None and spec.submodule_search_locations is not None
        assert importlib.util.find_spec(f"{words[2]}.__main__") if is_package else spec, command
    elif words[0] in ("sbatch", "python", "torchrun"):
        script = next(word for word in words[1:] if word.endswith((".sh", ".py")))
        assert (REPOSITORY / script).exists(), command
    else:
        assert words[0] in ("git", "cd", "tensorboard", "source"), f"{command}: no test knows how to check it"


def test_every_program_has_a_command():
    setup = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    programs = [path.stem for path in (REPOSITORY / "tools").glob("*.py") if '__name__ == "__main__"' in path.read_text()]
    assert len(programs) > 10
    for program in programs:
        assert program == "bench_probe" or f"= tools.{program}:main" in setup, "only bench.py starts the probe"


def test_paths_in_the_text_exist():
    for path in re.findall(r"`((?:trainer|modeling|tests|tools|ds_configs|slurm)/[\w/.]+\.\w+)`", README):
        assert (REPOSITORY / path).exists(), path
