"""Checkpoint folders: what is written, kept, found and refused."""

import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess

import pytest
import torch

from modeling.some import KeyRules, KeyStore
from trainer import checkpoint
from trainer.checkpoint import FILES, RunState, check_resumable, read_state, save_checkpoint, verify
from trainer.engine import CoreState
from trainer.faults import FILE_STAGES, STAGES, Faults, FaultsConfig
from trainer.resume import find_checkpoint
from trainer.snapshot import Snapshot, load_checkpoint
from trainer.storage import StorageError


def make_state(step: int, **changes) -> RunState:
    values = dict(step=step, tokens=10 * step, total_steps=100, precision="fp32", experiment={"seed": 0, "train": {"lr": 1}},
                  pool={"sample_sha256": "p"}, data_fingerprint="d", tokenizer_hash="t")  # fmt: skip
    return RunState(**{**values, **changes})


def make_core(step: int) -> CoreState:
    weight = torch.full((3, 2), float(step))
    return CoreState({"w": weight}, {"exp_avg": {"w": weight + 1}, "exp_avg_sq": {"w": weight + 2}}, steps=step)


def make_stores() -> list[KeyStore]:
    stores = [KeyStore(4, 3, 2, KeyRules(), layer=layer) for layer in range(2)]
    for number, store in enumerate(stores):
        store.steps = 7 + number
        store.usage += 3
    return stores


def save(folder, step: int, keep: int = 2, faults: Faults | None = None, **changes):
    snapshot = Snapshot.of(make_state(step, **changes), make_core(step), make_stores())
    return save_checkpoint(folder, snapshot, keep, faults or Faults(FaultsConfig(), rank=0))


def names(folder) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))


def in_child(work) -> int:
    """Do `work` in a process of its own; its exit code, or minus the signal that ended it."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    return child.exitcode


def test_round_trip(tmp_path):
    folder = save(tmp_path, 5, best={"step": 5, "val_loss": 1.5}, skipped=2)
    assert sorted(os.listdir(folder)) == sorted(FILES + ("manifest.json",))
    state = read_state(folder)
    assert (state.step, state.tokens, state.skipped, state.best) == (5, 50, 2, {"step": 5, "val_loss": 1.5})
    stores = [KeyStore(4, 3, 2, KeyRules(), seed=9, layer=layer) for layer in range(2)]
    core = load_checkpoint(folder, state, stores)
    assert core.steps == 5
    assert core.parameters["w"].equal(make_core(5).parameters["w"])
    assert core.moments["exp_avg_sq"]["w"].equal(make_core(5).moments["exp_avg_sq"]["w"])
    for ours, theirs in zip(stores, make_stores(), strict=True):
        assert ours.keys.equal(theirs.keys) and ours.usage.equal(theirs.usage) and ours.steps == theirs.steps


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, keep=2, best={"step": 2, "val_loss": 1.0})
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step_00000002", "step_00000004", "step_00000005"]
    assert find_checkpoint("auto", tmp_path).folder.name == "step_00000005"


class Recorder(Faults):
    """Notes where a save has come."""

    def __init__(self):
        super().__init__(FaultsConfig(), rank=0)
        self.points = []

    def at(self, point: str, step: int) -> None:
        self.points.append(point)


def test_a_save_goes_through_the_stages_that_faults_know(tmp_path):
    recorder = Recorder()
    save(tmp_path, 1, faults=recorder)
    expected = []
    for stage in STAGES:
        expected += [f"before {stage}", *[f"inside {stage}"] * (stage in FILE_STAGES), f"after {stage}"]
    assert recorder.points == expected


POINTS = [("before", s) for s in STAGES] + [("inside", s) for s in FILE_STAGES] + [("after", s) for s in STAGES]


@pytest.mark.parametrize("step", [2, 1], ids=["of a new step", "of the same step"])
def test_a_save_that_is_killed_leaves_a_whole_checkpoint(tmp_path, step):
    """At every point, by SIGKILL; the only checkpoint that is kept may be the one that is replaced."""
    for when, stage in POINTS:
        run = tmp_path / f"{when} {stage}"
        save(run, 1, keep=1, val_loss=1.0)
        faults = Faults(FaultsConfig(kill=f"step={step} stage={stage} when={when}"), rank=0)
        code = in_child(lambda run=run, faults=faults: save(run, step, keep=1, faults=faults, val_loss=2.0))
        assert code == -signal.SIGKILL
        in_place = (when, stage) in POINTS[POINTS.index(("after", "rename")) :] or stage in ("pointer", "clean")
        found = find_checkpoint("auto", run)
        assert (found.state.step, found.state.val_loss) == ((step, 2.0) if in_place else (1, 1.0)), (when, stage)
        assert found.folder.name.startswith(f"step_{found.state.step:08d}") and not found.skipped
        save(run, 3, keep=1)
        assert names(run) == ["latest", "step_00000003"], "the next save cleans up"


def test_a_kill_between_replacing_and_renaming_loses_nothing(tmp_path, monkeypatch):
    """The moments within the stage `rename`, where one of the same step is replaced."""
    for part in ("remove", "os.replace"):
        run = tmp_path / part
        save(run, 1, keep=1, val_loss=1.0)

        def killed_save(run=run, part=part):
            calls = []

            def count_and_kill(*arguments):
                calls.append(arguments)
                # The folder that is replaced is gone, or its successor was to be given its name.
                if part == "remove" and str(arguments[0]).endswith("step_00000001"):
                    (arguments[0] / "core.safetensors").unlink()
                    os.kill(os.getpid(), signal.SIGKILL)
                if part == "os.replace" and str(arguments[0]).endswith(".new"):
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments)

            original = checkpoint.remove if part == "remove" else os.replace
            monkeypatch.setattr(checkpoint if part == "remove" else os, part.split(".")[-1], count_and_kill)
            save(run, 1, keep=1, val_loss=2.0)

        assert in_child(killed_save) == -signal.SIGKILL
        found = find_checkpoint("auto", run)
        assert found.state.val_loss == 2.0 and found.folder.name == "step_00000001.new"
        found.clean(keep=1)
        assert verify(found.folder)
        save(run, 2, keep=2)
        assert names(run) == ["latest", "step_00000001", "step_00000002"]
        assert verify(run / "checkpoints" / "step_00000001").val_loss == 2.0


@pytest.mark.parametrize("stage", FILE_STAGES)
def test_a_write_that_fails_leaves_the_former_checkpoint_and_says_what_it_needs(tmp_path, stage):
    save(tmp_path, 1)
    with pytest.raises(StorageError, match=r"step_00000002 cannot be written \(No space left on device\): 0.1 MB needed, "
                       r"[\d.,]+ MB free; step_00000001 is the newest"):  # fmt: skip
        save(tmp_path, 2, faults=Faults(FaultsConfig(write=f"step=2 stage={stage}"), rank=0))
    assert names(tmp_path) == ["latest", "step_00000001"] and verify(tmp_path / "checkpoints" / "step_00000001")


def test_a_file_system_that_takes_no_more(tmp_path):
    """The system itself ends the write, in the middle of a file."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        with pytest.raises(StorageError, match="File too large"):
            save(tmp_path, 2)

    save(tmp_path, 1)
    assert in_child(limited) == 0
    assert names(tmp_path) == ["latest", "step_00000001"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk):
    """It is full before the save, and it fills up meanwhile."""
    save(small_disk, 1)
    ballast = small_disk / "ballast"

    class Fills(Faults):
        def at(self, point: str, step: int) -> None:
            if point == "after core.safetensors":
                with pytest.raises(OSError, match="No space left"):
                    ballast.write_bytes(bytes(2**21))

    for faults, needed in ((Fills(FaultsConfig(), rank=0), "0.0 MB free"), (None, "free")):
        with pytest.raises(StorageError, match=f"No space left on device.*: 0.1 MB needed, .*{needed}; step_00000001"):
            save(small_disk, 2, faults=faults)
        assert names(small_disk) == ["latest", "step_00000001"] and verify(small_disk / "checkpoints" / "step_00000001")
    ballast.unlink()
    save(small_disk, 2)
    assert find_checkpoint("auto", small_disk).state.step == 2


def test_leftovers_of_any_kind_are_removed(tmp_path):
    (tmp_path / "checkpoints" / ".tmp-step_00000009").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".tmp-latest").write_text("step_0")
    save(tmp_path, 1)
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_cleaning_up_keeps_what_is_whole(tmp_path):
    """Damaged checkpoints of later steps do not count among the newest."""
    save(tmp_path, 1, keep=1)
    for step in (7, 8):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir()
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["latest", "step_00000002", "step_00000007", "step_00000008"]
    assert find_checkpoint("auto", tmp_path).state.step == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(experiment={"seed": 1, "train": {"lr": 1}}), "seed = 1 but the checkpoint .* has 0"),
        (dict(experiment={"seed": 0, "train": {"lr": 2}}), "train.lr = 2 but the checkpoint .* has 1"),
        (dict(precision="bf16"), "precision = bf16 but .* has fp32; use the --ds_config"),
        (dict(pool={"sample_sha256": "q"}), "pool = .* the frozen experts would differ"),
        (dict(tokenizer_hash="u"), "tokenizer = u but .* has t; use the data"),
        (dict(data_fingerprint="e"), "data = e but .* has d; use the data"),
    ],
)
def test_another_curve_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        check_resumable(tmp_path, make_state(5), make_state(0, **changes))


def test_what_changes_no_number_may_change(tmp_path):
    free = {
        "name": "x",
        "parallel": {"ep_size": 4},
        "train": {"lr": 1, "max_micro_batch": 2},
        "data": {"path": "y"},
        "seed": 0,
    }
    ours = make_state(0, experiment=free, data_fingerprint="", tokenizer_hash="")
    check_resumable(tmp_path, make_state(5), ours)


def test_state_is_plain_json(tmp_path):
    state = json.loads((save(tmp_path, 3) / "state.json").read_text())
    assert state["format"] == "some-checkpoint-3" and state["key_store_steps"] == [7, 8]
    assert set(state) == {field.name for field in dataclasses.fields(RunState)}
