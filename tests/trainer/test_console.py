"""Printing never ends a program: readers that had enough, terminals that went away, full disks, missing letters."""

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.launch import FP32, REPOSITORY, SCRIPT, environment, records
from tests.refusals import TINY
from trainer.exit_codes import REQUEUE

SECONDS = 240
STEPS = 8
DEEP = ["--output_dir", "/".join(["d" * 200] * 2)]
PLAN = [str(REPOSITORY / "tools" / "plan.py"), "a4"]


@pytest.fixture(scope="module")
def box(tmp_path_factory) -> Path:
    """A folder with an experiment whose name not every encoding has."""
    box = tmp_path_factory.mktemp("console")
    train = {**TINY["train"], "steps": STEPS, "eval_every": STEPS}
    tiny = {**TINY, "name": "übung", "train": train, "sample": {"tokens": 3, "prompt": "Größe 🙂"}}
    (box / "tiny.yaml").write_text(yaml.safe_dump({**tiny, "checkpoint": {"every": 1000}}))
    return box


def start(box: Path, *words: str, variables: dict[str, str] | None = None, **streams) -> subprocess.Popen:
    """A program of its own in `box`."""
    settings = environment(SOME_CACHE_DIR=str(box / "cache"), **(variables or {}))
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **streams}
    return subprocess.Popen([sys.executable, *words], cwd=box, env=settings, stdin=subprocess.DEVNULL, **streams)


def start_closed(box: Path, streams: str, *words: str) -> subprocess.Popen:
    """The same by a shell that closes streams."""
    shell = ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, *words]
    return subprocess.Popen(shell, cwd=box, env=environment(SOME_CACHE_DIR=str(box / "cache")))


def training(output_dir: str, *more: str) -> list[str]:
    """The command line of a run."""
    settings = [SCRIPT, "--experiment", "tiny.yaml", "--ds_config", FP32, "--output_dir", output_dir]
    return [*settings, *more]


def code_of(process: subprocess.Popen) -> int:
    """How it ended."""
    try:
        return process.wait(SECONDS)
    finally:
        process.kill()


def read_until(descriptor: int, mark: bytes) -> bytes:
    """What comes, up to `mark`."""
    seen = b""
    while mark not in seen:
        more = os.read(descriptor, 1)
        assert more, seen
        seen += more
    return seen


def check_finished(folder: Path) -> None:
    """A run that came to its end, and wrote all that it should."""
    assert records(folder, "end") == [{"event": "end", "step": STEPS, "finished": True}]
    assert (folder / "checkpoints" / f"step_{STEPS:08}" / "state.json").exists()
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line)


def test_a_run_outlives_its_reader_and_an_encoding_without_letters(box):
    with start(box, *training("head", "--set", r'sample.prompt="\ud83d\ude42"'), variables={"PYTHONIOENCODING": "ascii"},
               stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:  # fmt: skip
        read_until(run.stdout.fileno(), b"starting at step 0\n")
        run.stdout.close()
        said = run.stderr.read()
        assert code_of(run) == 0, said
    assert b"Error" not in said and b"Exception" not in said
    check_finished(box / "head")


def test_a_run_outlives_a_full_disk_of_its_log_and_closed_streams(box):
    with open("/dev/full", "wb") as full:
        run = start(box, *training("full"), variables={"LC_ALL": "C"}, stdout=full, stderr=full)
        assert code_of(run) == 0
    check_finished(box / "full")
    closed = start_closed(box, "<&- >&- 2>&-", *training("closed"))
    assert code_of(closed) == 0
    check_finished(box / "closed")


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """A pseudo-terminal: our end and the program's."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    yield ours, theirs
    for descriptor in (ours, theirs):
        try:
            os.close(descriptor)
        except OSError:
            pass


def on_terminal(box: Path, theirs: int, before: Callable[[], None], *words: str) -> subprocess.Popen:
    """A program in a session of its own on a terminal, which hears of its end."""

    def prepare() -> None:
        os.setsid()
        fcntl.ioctl(1, termios.TIOCSCTTY, 0)
        before()

    return start(box, *words, stdout=theirs, stderr=theirs, preexec_fn=prepare)


def test_a_run_that_ignores_the_end_of_its_terminal_comes_to_its_own(box, terminal):
    ours, theirs = terminal
    run = on_terminal(box, theirs, lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN), *training("nohup"))
    os.close(theirs)
    read_until(ours, b"step/s")  # a progress bar
    os.close(ours)
    assert code_of(run) == 0
    check_finished(box / "nohup")


def test_a_run_that_heeds_the_end_of_its_terminal_saves_and_says_so_by_its_code(box, terminal):
    ours, theirs = terminal
    run = on_terminal(box, theirs, lambda: None, *training("hup", "--set", "train.steps=1000000"))
    os.close(theirs)
    read_until(ours, b"loss ")
    os.close(ours)
    assert code_of(run) == REQUEUE
    [end] = records(box / "hup", "end")
    assert end["stopped_by"] == "SIGHUP on rank 0"
    assert (box / "hup" / "checkpoints" / f"step_{end['step']:08}" / "state.json").exists()


# Programs that only print


@pytest.mark.parametrize(
    "words", [["plan.py", "a4"], ["grid.py", "a4", "--grid", f"seed={','.join(map(str, range(300)))}", *DEEP]]
)
def test_a_reader_that_left_ends_a_tool_quietly(box, words):
    reading, writing = os.pipe()
    os.close(reading)
    with start(box, str(REPOSITORY / "tools" / words[0]), *words[1:], stdout=writing, stderr=subprocess.PIPE) as tool:
        os.close(writing)
        assert (tool.stderr.read(), code_of(tool)) == (b"", 0)


def test_a_full_disk_is_told_of(box):
    with (
        open("/dev/full", "wb") as full,
        start(box, *PLAN, "--json", "plan.json", stdout=full, stderr=subprocess.PIPE) as tool,
    ):
        assert (tool.stderr.read(), code_of(tool)) == (b"warning: output is lost: No space left on device\n", 1)
    assert json.loads((box / "plan.json").read_text())["options"], "files are written all the same"


@pytest.mark.parametrize("streams", ["2>&-", ">&- 2>&-", "2>/dev/full"])
def test_a_refusal_that_nobody_hears_keeps_its_code(box, streams):
    assert code_of(start_closed(box, streams, PLAN[0], "nope")) == 2
    assert code_of(start_closed(box, streams, SCRIPT, "--experiment", "nope")) == 2


def test_a_closed_stream_is_not_taken_by_the_next_file(box):
    code = "from trainer.console import guard_streams; guard_streams(); import os, sys; print(1); sys.exit(os.open('x', 65))"
    assert (
        code_of(start_closed(box, "<&- >&- 2>&-", "-c", f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); {code}")) > 2
    )
    assert (box / "x").read_bytes() == b""


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_all(box):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    seeds = ",".join(map(str, range(300)))
    with start(box, str(REPOSITORY / "tools" / "grid.py"), "a4", "--grid", f"seed={seeds}", *DEEP, stdout=writing) as tool:
        os.close(writing)
        with open(reading, encoding="utf-8") as pipe:
            said = pipe.read()
        assert code_of(tool) == 0
    assert f" 299  {DEEP[1]}/a4/seed=299\n300 runs: sbatch" in said and len(said) > 65536, "more than a pipe holds"


def test_names_that_an_encoding_lacks(box):
    variables = {"PYTHONIOENCODING": "ascii", "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1"}
    variables["SLURM_ARRAY_TASK_MAX"] = "0"
    words = [str(REPOSITORY / "tools" / "grid.py"), "tiny.yaml", "--grid", "name=übung"]
    with start(box, *words, variables=variables, stdout=subprocess.PIPE) as tool:
        assert b"0  runs/sweep/tiny/name=\\xfcbung\n" in tool.stdout.read()
        assert code_of(tool) == 0
    with start(box, *words, "--task", variables=variables, stdout=subprocess.PIPE) as tool:
        assert tool.stdout.read().endswith("--output_dir\0runs/sweep/tiny/name=übung\0".encode()), "a program reads this"
        assert code_of(tool) == 0
