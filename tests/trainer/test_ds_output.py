"""What the DeepSpeed JSON asks DeepSpeed to print is printed, on one rank and on two, and changes no number of a run."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.launch import FP32, launch, records
from tests.refusals import TINY

LOUD = {
    "wall_clock_breakdown": True,
    "flops_profiler": {"enabled": True, "profile_step": 1, "top_modules": 2},
    "comms_logger": {"enabled": True, "verbose": True},
    "steps_per_print": 2,
    "zero_optimization": {"reduce_bucket_size": "auto", "allgather_bucket_size": "auto", "overlap_comm": "auto"},
}
SHARDED_OTHERWISE = {
    "zero_optimization": {
        "overlap_comm": True, "contiguous_gradients": False, "reduce_scatter": False, "reduce_bucket_size": 1,
        "allgather_bucket_size": 2, "allgather_partitions": False, "use_multi_rank_bucket_allreduce": False,
        "round_robin_gradients": True, "parameter_alignment": True,
    }
}  # fmt: skip
NUMBERS = ("loss", "grad_norm", "key_movement", "val_loss", "tokens")


def train(folder: Path, cache_dir: Path, ranks: int, changes: dict, *settings: str) -> tuple[list[dict], str]:
    """The numbers of four steps with two micro batches each, and what rank 0 printed."""
    folder.mkdir()
    config = json.loads(Path(FP32).read_text(encoding="utf-8"))
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    (folder / "ds.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    flags = ["--ds_config", str(folder / "ds.json"), "--experiment", str(folder / "tiny.yaml"), "--output_dir"]
    settings = ("train.max_micro_batch=1", "train.eval_every=2", f"data.cache_dir={cache_dir}", *settings)
    result = launch(*flags, str(folder / "run"), *(word for one in settings for word in ("--set", one)), ranks=ranks)
    assert result.returncode == 0, result.stderr
    found = [*records(folder / "run", "train"), *records(folder / "run", "eval")]
    return [{name: record[name] for name in NUMBERS if name in record} for record in found], result.stdout


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_deepspeed_prints_changes_no_number(ranks, tmp_path, cache_dir):
    quiet, silence = train(tmp_path / "quiet", cache_dir, ranks, {})
    assert "time (ms)" not in silence and "INFO" not in silence
    loud, said = train(tmp_path / "loud", cache_dir, ranks, LOUD)
    assert loud == quiet
    micro_batches = 4 * (4 // ranks)
    assert said.count("time (ms) | fwd_microstep") == micro_batches, "evaluations are not timed"
    assert said.count("time (ms) | fwd: ") == 4
    assert said.count("DeepSpeed Flops Profiler --") == 1
    profile = said.index("Profile Summary at step 2")
    assert said.index("step 1/4") < profile < said.index("step 2/4")
    assert len(re.findall(r"INFO.* step=[24], skipped=0", said)) == 2 and "step=3, skipped" not in said
    summary = said.index("Comm. Op ")
    assert "comm op: all_reduce | time (ms)" in said and "all_reduce\n" in said[summary:]
    counts = re.findall(r"^ {20}[\d.]+ \w+ +(\d+) +([\d.]+) +([\d.]+) ", said[summary:], re.MULTILINE)
    assert counts and all(float(total) < 1.5 * int(n) * float(mean) + 20 for n, total, mean in counts if int(n) < 9)
    assert said.index("step 4/4") < summary < said.index("finished at step 4")

    others, _ = train(tmp_path / "others", cache_dir, ranks, SHARDED_OTHERWISE)
    # Sums in another order: the norm of gradients differs in its last digits.
    for other, record in zip(others, quiet, strict=True):
        assert all(other[name] == pytest.approx(record[name], rel=1e-5) for name in record)


def test_memory_is_printed_and_the_profile_can_go_to_a_file(tmp_path, cache_dir):
    profile = tmp_path / "new" / "profile.txt"
    profiler = {"enabled": True, "output_file": str(profile), "profile_step": 0}
    changes = {"flops_profiler": profiler, "memory_breakdown": True}
    _, said = train(tmp_path / "run", cache_dir, 1, changes, "train.steps=2", "train.max_micro_batch=2")
    assert said.count("Engine before forward") == said.count("Engine after backward") == 4
    assert "Flops Profiler --" not in said and "Profile Summary at step 1" in profile.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "settings"), [({}, ["log.deepspeed=true"]), ({"dump_state": True}, []), ({"log_level": "info"}, [])], ids=str
)
def test_deepspeeds_log_shows_where_it_is_wanted(changes, settings, tmp_path, cache_dir):
    """Its logger is made in a moment when its output is muted, and must not stay so."""
    _, said = train(tmp_path / "run", cache_dir, 1, changes, *settings)
    assert re.search(r"\[INFO\].*DeepSpeed Final Optimizer", said), said
    assert bool(re.search(r"\[INFO\].*DeepSpeedEngine:\n", said)) == ("dump_state" in changes)
