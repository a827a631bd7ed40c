"""Links on the way to a run's folder, its checkpoints and its files: followed, and never replaced; what is behind them and
missing is said, and no run starts over because of it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from tests.launch import FP32, losses, records, succeed
from tests.refusals import MET, TINY, Bad, Ending, call, check_refused, make_tree, sets
from trainer.checkpoint import read_state
from trainer.command_line import parse_arguments
from trainer.job import Job, decide
from trainer.launch import Launch
from trainer.lock import FolderLock
from trainer.settings import Settings


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_dir) -> Path:
    """A working folder with `tiny.yaml`, and a run `r` of it that was stopped at step 2 of 4."""
    box = tmp_path_factory.mktemp("links") / "box"
    make_tree(box, {"tiny.yaml": yaml.safe_dump(TINY | {"data": TINY["data"] | {"cache_dir": str(cache_dir)}})})
    succeed(*flags(box), "--output_dir", str(box / "r"), "--max_steps", "2", "--set", "checkpoint.every=1")
    return box


@pytest.fixture
def box(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it, which is the current folder."""
    box = tmp_path / "box"
    shutil.copytree(trained, box)
    monkeypatch.chdir(box)
    return box


def flags(box: Path) -> list[str]:
    experiment = yaml.safe_load((box / "tiny.yaml").read_text())
    return [
        "--experiment",
        str(box / "tiny.yaml"),
        "--ds_config",
        FP32,
        *sets(f"data.cache_dir={experiment['data']['cache_dir']}"),
    ]


def look(box: Path, *more: str) -> Job:
    """What the command line comes to, before the ranks meet; other runs may have the folder then."""
    arguments = parse_arguments([*flags(box), *more])
    launch = Launch(0, 1, 0, 1)
    job = decide(arguments, Settings.read(arguments, launch))
    if job.lock is not None:
        job.lock.close()
    return job


def start(box: Path, *more: str) -> Ending:
    """As a program of its own, up to where the ranks would meet."""
    return call(*flags(box), *more, folder=box)


def move(path: Path, to: str, text: str | None = None) -> None:
    """Move it, and leave a link."""
    target = path.parent / to
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    path.symlink_to(to if text is None else text)


LINKS = {
    "checkpoints, far away": lambda box: move(box / "r/checkpoints", str(box / "far/ck")),
    "checkpoints, relative": lambda box: move(box / "r/checkpoints", "../far"),
    "checkpoints, in two steps": lambda box: (
        move(box / "r/checkpoints", "../far"),
        move(box / "far", "further/away", "further/away"),
    ),
    "the newest checkpoint": lambda box: move(box / "r/checkpoints/step_00000002", "../../far/x"),
    "the run's folder": lambda box: move(box / "r", "far/run"),
    "its parent": lambda box: (move(box / "r", "parent/r"), (box / "r").unlink(), (box / "p").symlink_to("parent")),
    "config and metrics": lambda box: (
        move(box / "r/config.yaml", "../far/c.yaml"),
        move(box / "r/metrics.jsonl", "../far/m"),
    ),
    "latest": lambda box: (
        (box / "r/checkpoints/latest").unlink(),
        (box / "r/checkpoints/latest").symlink_to("step_00000002"),
    ),
}


@pytest.mark.parametrize("name", LINKS)
def test_a_run_resumes_behind_links_in_place(name, box):
    LINKS[name](box)
    folder = "p/r" if (box / "p").exists() else "r"
    (box / "x").mkdir()
    for given in (folder, f"{folder}/", f"x/../{folder}", str(box / folder)):
        job = look(box, "--output_dir", given, "--set", "train.max_micro_batch=2")
        assert job.saved.step == 2 and job.continues, given
    for named in ("checkpoints", "checkpoints/step_00000002"):
        job = look(box, "--output_dir", folder, "--resume", f"{folder}/{named}")
        assert job.saved.step == 2 and job.continues, "it is the run's own"
    (box / "best").symlink_to(box / folder / "checkpoints" / "step_00000002")
    assert look(box, "--output_dir", folder, "--resume", "best").continues
    job = look(box, "--output_dir", "branch", "--resume", "best")
    assert not job.continues and (job.origin / "step_00000001").is_dir() or name == "the newest checkpoint"
    assert start(box, "--output_dir", folder).code == MET
    assert not list(box.glob("**/r.1")), "nothing is moved aside"


@pytest.mark.parametrize("name", ["checkpoints, far away", "the newest checkpoint", "latest"])
def test_a_run_with_links_trains_to_its_end_and_keeps_them(name, box, trained):
    """More ranks, and fewer checkpoints kept, so that a linked one is superseded: the link goes, what it led to stays."""
    LINKS[name](box)
    printed = succeed(*flags(box), "--output_dir", "r", *sets("checkpoint.keep=1", "train.max_micro_batch=2"), ranks=2)
    assert "starting at step 2 from r/checkpoints/step_00000002" in printed
    assert len(losses(box / "r")) == 4 and losses(box / "r")[:2] == losses(trained / "r")
    checkpoints = box / "r/checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir() if not path.name.startswith("."))
    assert read_state(checkpoints / names[-1]).step == 4 and (checkpoints / "latest").read_text() == names[-1]
    assert not (checkpoints / "latest").is_symlink()
    if name == "checkpoints, far away":
        assert checkpoints.is_symlink() and sorted(os.listdir(box / "far/ck")) == [".lock", *names]
    if name == "the newest checkpoint":
        assert "step_00000002" not in names and read_state(box / "far/x").step == 2


@pytest.mark.parametrize("case", ["never", "killed before its first checkpoint", "nothing there yet", "nothing, and never"])
def test_a_linked_folder_is_prepared_behind_its_link(case, box):
    """Moved aside and made anew is what the link leads to, again and again."""
    (box / "r").rename(box / "far")
    (box / "r").symlink_to("far")
    settings = ["--resume", "never"] if case.endswith("never") else []
    if case == "killed before its first checkpoint":
        forget_checkpoints(box / "far")
        settings = sets("train.learning_rate=0.5")
    if case.startswith("nothing"):
        (box / "far").rename(box / "other")
    (box / "far.1").symlink_to("nowhere")  # a name that is taken, though nothing is there
    for more in ([], sets("seed=7")):
        assert start(box, "--output_dir", "r", *settings, *more).code == MET
        assert os.readlink(box / "r") == "far" and (box / "far/config.yaml").is_file()
    # Of those that were there, also the one that the first of these two left.
    assert sum(path.is_dir() for path in box.glob("far.*")) == (1 if case.startswith("nothing") else 2)
    assert os.readlink(box / "far.1") == "nowhere"


def forget_checkpoints(run: Path) -> None:
    """As if the run had been killed before it wrote one."""
    shutil.rmtree(run / "checkpoints")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["event"] != "checkpoint"))


LOSSES = {
    "gone": (lambda run: shutil.rmtree(run / "checkpoints"), "r/checkpoints is missing"),
    "an empty folder": (
        lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").mkdir()),
        "r/checkpoints holds none",
    ),
    "a link to nothing": (
        lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").symlink_to("/nowhere/far")),
        "r/checkpoints is a link to /nowhere/far, which is not there",
    ),
    "and no config": (
        lambda run: (shutil.rmtree(run / "checkpoints"), (run / "config.yaml").unlink()),
        "r/checkpoints is missing",
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_run_whose_checkpoints_are_missing_is_refused(name, box):
    lose, place = LOSSES[name]
    lose(box / "r")
    says = ["--output_dir r: its metrics.jsonl records a checkpoint at step 2, but", place, "mount or restore it, start"]
    for settings in ([], sets("seed=5")):
        bad = Bad([*flags(box), "--output_dir", "r", *settings], [*says, "--resume never", "another --output_dir"])
        check_refused(bad, box)
    assert start(box, "--output_dir", "r", "--resume", "never").code == MET
    assert (box / "r.1/metrics.jsonl").exists() and not (box / "r/metrics.jsonl").exists()


def test_checkpoints_that_cannot_be_read_are_refused(box):
    (box / "r/checkpoints").chmod(0)
    says = ["--output_dir r: cannot be read (Permission denied)", "choose another"]
    ending = start(box, "--output_dir", "r")
    (box / "r/checkpoints").chmod(0o755)
    assert ending.code == 2 and all(part in ending.err for part in says) and ending.err.count("\n") == 1, ending
    shutil.rmtree(box / "r/checkpoints")
    (box / "r/checkpoints").symlink_to("checkpoints")
    check_refused(
        Bad([*flags(box), "--output_dir", "r"], ["--output_dir r: cannot be read (Too many levels of symbolic links)"]), box
    )


def test_what_never_had_checkpoints_starts_over(box):
    """A run that was killed before its first; another run's folder; a dry run; a damaged line that only looks like one."""
    before = (box / "r/metrics.jsonl").read_text()
    shutil.rmtree(box / "r/checkpoints")
    assert start(box, "--output_dir", "r", "--dry_run").code == 0
    (box / "r/checkpoints").mkdir()
    forget_checkpoints(box / "r")
    assert start(box, "--output_dir", "r", *sets("seed=5")).code == MET and (box / "r.1").is_dir(), "another run's"
    shutil.rmtree(box / "r")
    (box / "r.1").rename(box / "r")
    (box / "r/checkpoints").symlink_to(box / "far/not/yet")
    with open(box / "r/metrics.jsonl", "a") as file:
        file.write('{"event": "checkpoint", "st\n["checkpoint"]\n')
    assert start(box, "--output_dir", "r").code == MET and (box / "far/not/yet").is_dir() and not (box / "r.1").exists()
    assert '"checkpoint"' in before


def test_records_behind_a_link_to_nothing_are_no_new_run(box):
    shutil.rmtree(box / "r/checkpoints")
    (box / "r/metrics.jsonl").unlink()
    (box / "r/metrics.jsonl").symlink_to("../gone/m")
    says = [
        "--output_dir r: its records are behind a link to ../gone/m, which is not there",
        "mount or restore",
        "--resume never",
    ]
    check_refused(Bad([*flags(box), "--output_dir", "r"], says), box)


def test_links_that_can_lead_nowhere_are_refused_before_anything_is_made(box):
    (box / "new").mkdir()
    for name in ("metrics.jsonl", "checkpoints"):
        (box / "new" / name).symlink_to("/proc/nowhere/x")
        says = [f"new/{name} is a link to /proc/nowhere/x, which is not there and cannot be made", "mount or restore it"]
        check_refused(Bad([*flags(box), "--output_dir", "new"], says), box)
        (box / "new" / name).unlink()


def test_a_branch_that_lost_its_way_is_told_where_it_began(box):
    """Killed before its first checkpoint, the same command resumes; without --resume it would start at step 0."""
    shutil.copytree(box / "r", box / "branch")
    forget_checkpoints(box / "branch")
    with open(box / "branch/metrics.jsonl", "a") as file:
        file.write(json.dumps({"event": "resume", "step": 2, "path": "r/checkpoints/step_00000002"}) + "\n")
    says = ["branch: its metrics.jsonl records that the run began at step 2", "--resume r/checkpoints/step_00000002 again"]
    check_refused(Bad([*flags(box), "--output_dir", "branch"], says), box)
    assert start(box, "--output_dir", "branch", "--resume", "r/checkpoints/step_00000002").code == MET
    assert records(box / "branch", "resume")


def test_two_names_of_one_folder_are_one_lock(box):
    """Also where two runs' folders lead to the same checkpoints, or one to another run's own."""
    (box / "name").symlink_to("r")
    move(box / "r/checkpoints", "../far")
    (box / "second").mkdir()
    (box / "second/checkpoints").symlink_to("../far")
    owner = FolderLock(box / "r", create=True)
    owner.sign()
    for name in ("name", "second"):
        ending = start(box, "--output_dir", name)
        assert ending.code == 2 and "belongs to a live run (host" in ending.err and ending.err.count("\n") == 1
    owner.release()
    assert start(box, "--output_dir", "name").code == MET
    (box / "r/checkpoints").unlink()
    (box / "far").rename(box / "r/checkpoints")
    (box / "second/checkpoints").unlink()
    (box / "second/checkpoints").symlink_to("../r/checkpoints")
    (box / "r/alike").symlink_to(".")
    owner = FolderLock(box / "r", create=True)
    assert "belongs to a live run" in start(box, "--output_dir", "second").err
    owner.close()
    assert start(box, "--output_dir", "second").code == MET


def test_metrics_and_config_behind_links_are_written_there(box):
    for name in ("config.yaml", "metrics.jsonl", "experts.json"):
        move(box / "r" / name, f"../far/{name}")
    (box / "r/tensorboard").symlink_to("../far/board")
    (box / "cache").symlink_to("far/cache")  # neither is there yet
    succeed(*flags(box), "--output_dir", "r", *sets("log.tensorboard=true", "data.cache_dir=cache"))
    assert list((box / "far/board").glob("events*")) and list((box / "far/cache").glob("data-*"))
    assert all((box / "r" / name).is_symlink() for name in ("config.yaml", "metrics.jsonl", "experts.json"))
    assert len(losses(box / "far")) == 4 and json.loads((box / "far/experts.json").read_text())["step"] == 4
