"""Which checkpoint a run goes on from, with damaged, missing and foreign ones among them."""

import json
import os
import re

import pytest

from tests.trainer.test_checkpoint import make_state, names, save
from trainer.checkpoint import FILES, check_resumable, read_state
from trainer.resume import checkpoint_at, find_checkpoint


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = [
    *[(name, flip, f"{name} is not what was written: its SHA-256 differs") for name in FILES],
    *[(name, truncate, rf"{name} has [\d,]+ bytes instead of [\d,]+") for name in FILES],
    *[(name, lambda path: path.unlink(), f"{name} is missing") for name in (*FILES, "manifest.json")],
    ("manifest.json", truncate, "manifest.json is not JSON"),
    ("manifest.json", lambda path: path.write_text("[]"), "manifest.json or state.json is not of this trainer"),
    ("manifest.json", lambda path: path.write_text('{"format": "some-checkpoint-9"}'), "it has format 'some-checkpoint-9'"),
    (
        "manifest.json",
        lambda path: path.write_text('{"format": "some-checkpoint-3", "files": {}}'),
        "manifest.json lists other files",
    ),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES)
def test_a_damaged_checkpoint_is_skipped_or_refused_by_name(tmp_path, name, damage, reason):
    save(tmp_path / "run", 1)
    newest = save(tmp_path / "run", 2)
    damage(newest / name)
    for resume in ("auto", str(tmp_path / "run"), str(tmp_path / "run" / "checkpoints")):
        found = find_checkpoint(resume, tmp_path / "run")
        assert found.state.step == 1 and found.folder.name == "step_00000001"
        assert list(found.skipped) == [newest]
        assert re.match(reason, found.skipped[newest])
    with pytest.raises(ValueError, match=f"--resume {newest}: not a checkpoint .*{reason}.*--resume never") as refused:
        find_checkpoint(str(newest), tmp_path / "other")
    assert "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read_is_damage(tmp_path):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    (newest / "core.safetensors").unlink()
    (newest / "core.safetensors").symlink_to("core.safetensors")
    assert find_checkpoint("auto", tmp_path).skipped[newest] == (
        "core.safetensors cannot be read: Too many levels of symbolic links"
    )


def test_where_none_is_whole_a_run_does_not_start_anew_by_itself(tmp_path):
    for step in (1, 2):
        truncate(save(tmp_path, step) / "core.safetensors")
    with pytest.raises(ValueError, match="none of the checkpoints is whole .step_00000002: core.*; step_00000001: .*never"):
        find_checkpoint("auto", tmp_path)
    with pytest.raises(ValueError, match=f"--resume {tmp_path}/checkpoints: none"):
        find_checkpoint(str(tmp_path), tmp_path / "other")
    assert find_checkpoint("never", tmp_path) is None


def test_the_pointer_is_not_relied_on(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    pointer = tmp_path / "checkpoints" / "latest"
    for text in ("step_00000001", "step_00000009", "", "../../elsewhere"):
        pointer.write_text(text)
        assert find_checkpoint("auto", tmp_path).state.step == 2
    pointer.unlink()
    assert find_checkpoint("auto", tmp_path).state.step == 2


def test_a_checkpoint_of_another_run_is_skipped_unless_all_are(tmp_path):
    def fits(folder, state):
        check_resumable(folder, state, make_state(0))

    save(tmp_path, 1)
    foreign = save(tmp_path, 2, experiment={"seed": 1, "train": {"lr": 1}})
    found = find_checkpoint("auto", tmp_path, fits)
    assert found.state.step == 1 and "seed = 0 but the checkpoint" in found.skipped[foreign]
    save(tmp_path, 3, keep=1, experiment={"seed": 2, "train": {"lr": 1}})
    with pytest.raises(ValueError, match="seed = 0 but the checkpoint .*step_00000003 has 2; set it back"):
        find_checkpoint("auto", tmp_path, fits)
    with pytest.raises(ValueError, match="step_00000003 has 2"):
        find_checkpoint(str(tmp_path / "checkpoints" / "step_00000003"), tmp_path, fits)


def test_what_was_skipped_is_set_aside_and_never_taken_again(tmp_path):
    save(tmp_path, 1)
    for _ in range(2):
        truncate(save(tmp_path, 2) / "keys.safetensors")
        find_checkpoint("auto", tmp_path).set_skipped_aside()
    assert names(tmp_path) == ["latest", "skipped_step_00000002", "skipped_step_00000002.1", "step_00000001"]
    save(tmp_path, 2)
    assert find_checkpoint("auto", tmp_path).state.step == 2
    assert len(names(tmp_path)) == 5, "nothing that was set aside is deleted"


def test_what_resume_finds(tmp_path):
    folder = save(tmp_path / "run", 1)
    assert find_checkpoint("auto", tmp_path / "other") is None
    assert find_checkpoint("never", tmp_path / "run") is None
    for name in (tmp_path / "run", tmp_path / "run" / "checkpoints", folder):
        assert find_checkpoint(str(name), tmp_path / "other").folder == folder
        assert checkpoint_at(name).seconds > 0
    with pytest.raises(ValueError, match="--resume .*nothing: holds no checkpoint"):
        find_checkpoint(str(tmp_path / "nothing"), tmp_path / "other")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "else"}', '{"format": "some-checkpoint-2", "x": 1}'])
def test_foreign_folders_are_refused(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match="not a checkpoint of this trainer.*manifest.json is missing") as refused:
        read_state(tmp_path)
    assert "\n" not in str(refused.value)
    manifest = {"format": "some-checkpoint-3", "files": text}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="not a checkpoint of this trainer"):
        read_state(tmp_path)
