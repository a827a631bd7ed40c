"""Checkpoint folders: what is written, kept, found and refused."""

import dataclasses
import json
import os

import pytest
import torch

from modeling.some import KeyRules, KeyStore
from trainer import checkpoint
from trainer.checkpoint import RunState, check_resumable, find_checkpoint, load_checkpoint, read_state, save_checkpoint
from trainer.engine import CoreState


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


def save(folder, step: int, keep: int = 2, **changes):
    return save_checkpoint(folder, make_state(step, **changes), make_core(step), make_stores(), keep)


def test_round_trip(tmp_path):
    folder = save(tmp_path, 5, best={"step": 5, "val_loss": 1.5}, skipped=2)
    assert sorted(os.listdir(folder)) == ["core.safetensors", "keys.safetensors", "optimizer.safetensors", "state.json"]
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
    assert find_checkpoint("auto", tmp_path).name == "step_00000005"


def test_a_crash_while_saving_leaves_the_former_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    for stage in ("save_file", "write_text_atomically", "os.replace"):
        with monkeypatch.context() as patch:
            target = os if stage == "os.replace" else checkpoint
            patch.setattr(target, stage.split(".")[-1], lambda *a, **k: (_ for _ in ()).throw(OSError("power cut")))
            with pytest.raises(OSError, match="power cut"):
                save(tmp_path, 2)
        found = find_checkpoint("auto", tmp_path)
        assert found.name == "step_00000001" and read_state(found).step == 1
    assert find_checkpoint("auto", save(tmp_path, 2).parent.parent).name == "step_00000002"
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_a_lost_pointer_is_no_lost_checkpoint(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "checkpoints" / "latest").unlink()
    assert find_checkpoint("auto", tmp_path).name == "step_00000002"


def test_what_resume_finds(tmp_path):
    folder = save(tmp_path / "run", 1)
    assert find_checkpoint("auto", tmp_path / "other") is None
    assert find_checkpoint("never", tmp_path / "run") is None
    for name in (tmp_path / "run", tmp_path / "run" / "checkpoints", folder):
        assert find_checkpoint(str(name), tmp_path / "other") == folder
    with pytest.raises(ValueError, match="holds no checkpoint"):
        find_checkpoint(str(tmp_path / "nothing"), tmp_path / "other")


@pytest.mark.parametrize("damage", ["missing", "truncated"])
@pytest.mark.parametrize("name", ["core", "optimizer", "keys"])
def test_damaged_files_are_refused(tmp_path, name, damage):
    folder = save(tmp_path, 1)
    file = folder / f"{name}.safetensors"
    file.write_bytes(file.read_bytes()[:20]) if damage == "truncated" else file.unlink()
    with pytest.raises(ValueError, match="not a checkpoint of this trainer"):
        read_state(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "else"}', '{"format": "some-checkpoint-2", "x": 1}'])
def test_foreign_checkpoints_are_refused(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match="not a checkpoint of this trainer") as refused:
        read_state(tmp_path)
    assert "\n" not in str(refused.value)


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
    assert state["format"] == "some-checkpoint-2" and state["key_store_steps"] == [7, 8]
    assert set(state) == {field.name for field in dataclasses.fields(RunState)}
