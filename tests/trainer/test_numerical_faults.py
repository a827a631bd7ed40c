"""Losses and gradients that are not finite, on two real ranks: what is skipped, what stops a run, and the way back."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.distributed import run_ranks
from tests.launch import losses, records
from tests.trainer.test_stopping import BALANCED, TINY
from tests.training import make_trainer
from trainer.checkpoint import read_state
from trainer.config import load_experiment
from trainer.diagnose import find_suspects
from trainer.exit_codes import NumericalFault
from trainer.loop import Trainer
from trainer.resume import checkpoint_at

STEPS = 10
SETTINGS = [
    *TINY, *BALANCED, f"train.steps={STEPS}", "train.eval_every=5", "train.max_skipped=1", "train.on_nan=rollback",
    "checkpoint.keep=20",
]  # fmt: skip


def make(folder: str, name: str, bad_steps: set[int], *settings: str) -> Trainer:
    """A trainer in which a layer of rank 1 makes NaN of its batch at some steps (from 1)."""
    trainer = make_trainer(Path(folder) / name, "quickstart", [*SETTINGS, f"data.cache_dir={folder}/cache", *settings])

    def poison(module, _, out):
        return out * torch.nan if module.training and trainer.progress.place[2] in bad_steps else out

    if dist.get_rank() == 1:
        trainer.engine.model.blocks[1].attention.register_forward_hook(poison)
    return trainer


def _run(trainer: Trainer) -> str:
    try:
        trainer.run(STEPS)
        message = ""
    except NumericalFault as fault:
        message = str(fault)
    if trainer.log is not None:
        trainer.log.close()
    dist.barrier()
    return message


def _go_back(rank: int, folder: str) -> list[str]:
    bad = {6, 7}
    faults = [_run(make(folder, "whole", bad))]
    # Killed at any time after a checkpoint: that of step 7 is the rollback's own, before it the same steps fail again.
    for last in (7, 4):
        name = f"killed_after_{last}"
        if rank == 0:
            shutil.copytree(Path(folder) / "whole", Path(folder) / name)
            for path in (Path(folder) / name / "checkpoints").iterdir():
                if path.is_file():
                    path.unlink()
                elif int(path.name.split("_")[1]) > last:
                    shutil.rmtree(path)
        dist.barrier()
        faults.append(_run(make(folder, name, bad)))
    # Stopped on the way, after a step at which nothing is due: what is evaluated there is no place to go back to.
    stopped = make(folder, "stopped", bad)
    stopped.run(3)
    if stopped.log is not None:
        stopped.log.close()
    dist.barrier()
    faults.append(_run(make(folder, "stopped", bad)))
    return [*faults, _run(make(folder, "twice", {6, 7, 8, 9}))]


def test_going_back_leaves_data_out_and_is_repeated_by_a_killed_run(tmp_path):
    first, second = run_ranks(_go_back, 2, str(tmp_path))
    assert first == second and first[:4] == ["", "", "", ""]
    assert "step 9: " in first[4] and first[4].endswith("no checkpoint was due since the run went back at step 7")
    assert checkpoint_at(tmp_path / "twice").folder.name == "step_00000008"

    whole = tmp_path / "whole"
    (back,) = records(whole, "rollback")
    assert (back["step"], back["to"], back["suspects"]) == (7, 5, "the output of blocks.1.attention")
    skipped = [record["skipped"] for record in records(whole, "train")]
    assert skipped == [0, 0, 0, 0, 0, 1, 2, 2, 2, 2]
    folders = [tmp_path / name for name in ("whole", "killed_after_7", "killed_after_4", "stopped")]
    ends = [checkpoint_at(folder).folder for folder in folders]
    assert read_state(ends[0]).optimizer_steps == STEPS - 2 and read_state(ends[0]).rolled_back is None
    for folder, end in zip(folders[1:], ends[1:], strict=True):
        assert losses(folder) == losses(whole)
        assert read_state(end) == read_state(ends[0])
        for name in ("core", "optimizer", "keys"):
            ours, theirs = (load_file(path / f"{name}.safetensors") for path in (end, ends[0]))
            assert all(ours[key].equal(theirs[key]) for key in theirs), name


def _faults(rank: int, folder: str) -> dict:
    seen = {}
    trainer = make(folder, "stop", {6, 7}, "train.on_nan=stop")
    seen["stop"] = _run(trainer)
    seen["kept"] = sorted(path.name for path in (Path(folder) / "stop" / "checkpoints").glob("step_*"))
    early = make(folder, "early", {1, 2})
    seen["early"] = _run(early)

    # A loss that is infinite on one rank by something that no gradient sees.
    forward, before = trainer.engine.forward, trainer.engine.core_state()

    def infinite(*inputs, **keywords):
        out = forward(*inputs, **keywords)
        return type(out)(logits=None, losses_T=out.losses_T + (torch.inf if rank == 1 else 0.0), routing=out.routing)

    trainer.engine.forward, trainer.log, trainer.state.step = infinite, None, 8
    trainer._step()
    after = trainer.engine.core_state()
    seen["skipped"] = trainer.state.skipped
    seen["kept weights"] = all(after.parameters[name].equal(value) for name, value in before.parameters.items())

    batches = trainer._micro_batches(trainer.order.sequence_ids(0))
    where = (trainer.engine.model, batches, None, trainer.engine.device)
    seen["backward"] = find_suspects(*where)
    if rank == 1:
        trainer.stores[1].keys[0, 0] = torch.nan
        trainer.engine.model.blocks[0].attention.qkv.bias.data[0] = torch.inf
    seen["state"] = find_suspects(*where)
    before.parameters["head.bias"][0] = torch.nan
    trainer.engine.load_core_state(before)
    trainer._save()
    seen["kept after"] = sorted(path.name for path in (Path(folder) / "stop" / "checkpoints").glob("step_*"))
    return seen


def test_what_stops_a_run_and_what_it_says(tmp_path):
    first, second = run_ranks(_faults, 2, str(tmp_path))
    assert first == second
    assert first["stop"].startswith(
        "step 7: the loss or the gradients of 2 steps in a row are not finite (train.max_skipped = 1); first seen in the "
        "output of blocks.1.attention; the batch has sequences "
    )
    assert first["stop"].endswith("--set train.on_nan=rollback goes back to a checkpoint and leaves this data out")
    assert first["early"].endswith("there is no checkpoint to go back to")
    assert first["kept"] == first["kept after"] == ["step_00000004", "step_00000005"]
    assert first["skipped"] == 3 and first["kept weights"]
    assert first["backward"] == "the backward pass (the forward is finite now)"
    assert first["state"] == "blocks.0.attention.qkv.bias, blocks.1.mixer.some.store.keys"


@pytest.mark.parametrize(
    ("setting", "message"),
    [("train.on_nan=ignore", "is not one of: stop, rollback"), ("train.max_skipped=-1", "must not be negative")],
)
def test_wrong_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        load_experiment("quickstart", [setting])
