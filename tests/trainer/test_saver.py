"""Saving on real ranks: in a thread as at once, full disks, and losses that are not numbers."""

import threading
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from tests.distributed import SECONDS, run_ranks
from tests.training import make_trainer, train
from trainer import saver
from trainer.checkpoint import FILES, verify
from trainer.storage import StorageError

TINY = {
    "name": "tiny",
    "model": {
        "vocab_size": 300, "d_model": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 32,
        "some": {"num_experts": 8, "d_ffn": 16, "top_k": 2},
    },
    "data": {"name": "stories", "train_documents": 40, "val_documents": 4},
    "train": {"batch_size": 4, "steps": 6, "warmup_steps": 1, "eval_every": 6},
    "checkpoint": {"every": 2, "keep": 9},
    "log": {"tensorboard": False},
    "sample": {"tokens": 0},
}  # fmt: skip


def _train(rank: int, folder: str) -> dict:
    """Four runs on the same ranks, one after the other: what each said and left."""
    path = Path(folder)
    settings = [f"data.cache_dir={path / 'cache'}"]

    def make(name: str, *changes: str):
        return make_trainer(path / name, str(path / "tiny.yaml"), [*settings, *changes])

    seen = {"at once": train(make("at once"), 6)}

    # The first write ends only when two more steps are done, and at most one goes on at a time.
    trainer = make("in a thread", "checkpoint.asynchronous=true")
    step_done, writing, most, write = threading.Event(), [0], [0], saver.save_checkpoint

    def watched(output_dir, snapshot, *arguments):
        writing[0] += 1
        most[0] = max(most[0], writing[0])
        assert snapshot.state.step != 2 or step_done.wait(SECONDS)
        result = write(output_dir, snapshot, *arguments)
        writing[0] -= 1
        return result

    report = trainer._report_step

    def report_and_tell(*arguments):
        report(*arguments)
        if trainer.state.step == 4:
            step_done.set()

    saver.save_checkpoint, trainer._report_step = watched, report_and_tell
    seen["in a thread"] = train(trainer, 6)
    saver.save_checkpoint = write
    seen["most at a time"] = most[0]

    seen["failed"] = {}
    for name, asynchronous in (("fails at once", "false"), ("fails in a thread", "true")):
        fault = "faults.write=step=2 stage=keys.safetensors"
        trainer = make(name, fault, f"checkpoint.asynchronous={asynchronous}")
        try:
            trainer.run(6)
        except StorageError as error:
            seen["failed"][name] = (trainer.state.step, str(error))
        dist.barrier()

    trainer = make("records")
    report_step = trainer._report_step

    def on_a_full_disk(*arguments):
        if trainer.log is not None and trainer.state.step == 3:
            trainer.log._file.close()
            trainer.log._file = open("/dev/full", "w", buffering=1)
        report_step(*arguments)

    trainer._report_step = on_a_full_disk
    try:
        trainer.run(6)
    except StorageError as error:
        seen["failed"]["records"] = (trainer.state.step, str(error))
    dist.barrier()

    trainer = make("not a number", "faults.nan=rank=1 step=2 count=2", "train.max_micro_batch=1")
    train(trainer, 4)
    seen["skipped"] = (trainer.state.skipped, [store.steps for store in trainer.stores])
    return seen


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("saver")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return folder, run_ranks(_train, 2, str(folder))


def test_what_a_thread_writes_is_bitwise_the_same(trained):
    """Though training went on: the first checkpoint was written when two more steps were done."""
    folder, (seen, _) = trained
    assert seen["most at a time"] == 1
    steps = [f"step_{step:08d}" for step in (2, 4, 6)]
    for step in steps:
        ours, theirs = (folder / name / "checkpoints" / step for name in ("in a thread", "at once"))
        assert verify(ours).step == verify(theirs).step
        for name in FILES:
            # The experiment is part of the state, and says how it saves.
            written = (ours / name).read_bytes().replace(b'"asynchronous": true', b'"asynchronous": false')
            assert written == (theirs / name).read_bytes(), name
    for way in ("at once", "in a thread"):
        saved = [record for record in seen[way] if record["event"] == "checkpoint"]
        assert [record["path"] for record in saved] == steps
        for record in saved:
            size = sum(path.stat().st_size for path in (folder / way / "checkpoints" / record["path"]).iterdir())
            assert record["bytes"] == size and record["seconds"] > 0
            assert ("blocked_seconds" in record) == (way == "in a thread")
    losses = [[record["loss"] for record in seen[way] if record["event"] == "train"] for way in ("at once", "in a thread")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


# In a thread it may be noticed at the end of the save already, after the next step, or by the next save.
@pytest.mark.parametrize(("name", "steps"), [("fails at once", [2]), ("fails in a thread", [2, 3, 4])])
def test_a_failed_save_ends_all_ranks_at_one_step(trained, name, steps):
    folder, ranks = trained
    step, message = ranks[0]["failed"][name]
    assert ranks[1]["failed"][name] == (step, message)
    assert step in steps
    assert "step_00000002 cannot be written (No space left on device)" in message and "there is none before it" in message
    assert not list((folder / name / "checkpoints").iterdir())


def test_records_that_cannot_be_written_end_all_ranks_at_one_step(trained):
    """At the next collective: the fourth step's."""
    first, second = (seen["failed"]["records"] for seen in trained[1])
    assert first == second and first[0] in (3, 4)
    assert "metrics.jsonl: cannot be written (No space left on device)" in first[1]


def test_a_loss_that_is_no_number_on_one_rank_is_skipped_on_all(trained):
    for seen in trained[1]:
        assert seen["skipped"] == (2, [2, 2])
