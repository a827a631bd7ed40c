"""How faults are written, and that they happen where they should and nowhere else."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from trainer.config import load_experiment
from trainer.faults import Fault, Faults, FaultsConfig


@pytest.mark.parametrize(
    ("kind", "text", "fault"),
    [
        ("kill", "rank=1 step=7", Fault(step=7, rank=1)),
        ("kill", "rank=0 step=8 stage=manifest when=after", Fault(step=8, rank=0, stage="manifest", when="after")),
        ("stop", "step=3 stage=rename", Fault(step=3, stage="rename", when="before")),
        ("slow", "rank=1 step=3 seconds=2.5", Fault(step=3, rank=1, seconds=2.5)),
        ("nan", "step=5 count=3", Fault(step=5, count=3)),
        ("write", "step=8 stage=core.safetensors", Fault(step=8, stage="core.safetensors", when="inside")),
    ],
)
def test_specifications(kind, text, fault):
    assert load_experiment("quickstart", [f"faults.{kind}={text}"]).faults.parsed() == {kind: fault}


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("kill", "rank=1", "step is missing; write it as rank=... step=..."),
        ("kill", "", "step is missing"),
        ("kill", "step=0", "step=0 is out of range; give a number from 1"),
        ("kill", "step=7 rank=-1", "rank=-1 is out of range; give a number from 0"),
        ("kill", "step=seven", "step=seven is not a number"),
        ("kill", "step=7 step=8", "step is given twice"),
        ("kill", "step=7 count=2", "count is not known"),
        ("kill", "step=7 stage=middle", "stage=middle is not one of begin, core.safetensors"),
        ("kill", "step=7 stage=rename when=inside", "stage=rename is not one of core.safetensors"),
        ("kill", "step=7 stage=rename when=never", "when=never is not one of before, inside, after"),
        ("kill", "step=7 when=after", "add stage=..., one of begin"),
        ("kill", "step=7 rank=1 stage=begin", "would never happen; leave out rank"),
        ("slow", "step=7", "seconds is missing"),
        ("slow", "step=7 seconds=nan", "seconds=nan is not a number"),
        ("slow", "step=7 seconds=.nan", "seconds=.nan is out of range"),
        ("slow", "step=7 seconds=1_0", "seconds=1_0 is not a number"),
        ("write", "step=7", "stage is missing"),
        ("write", "step=7 stage=rename", "stage=rename is not one of core.safetensors"),
    ],
)
def test_refusals_name_key_value_and_cure(kind, text, message):
    with pytest.raises(ValueError) as refused:
        load_experiment("quickstart", [f"faults.{kind}='{text}'"])
    said = str(refused.value)
    assert said.startswith(f"faults.{kind} = {text!r}: ") and message in said and "\n" not in said
    with pytest.raises(ValueError, match="there is no rank 2; give one from 0 to 1"):
        FaultsConfig(kill="rank=2 step=1").check(world_size=2)


def test_faults_happen_at_their_point_alone():
    faults = Faults(
        FaultsConfig(write="step=8 stage=manifest", nan="rank=1 step=5 count=2", slow="step=9 seconds=0.2"), rank=1
    )
    for point, step in (("step", 8), ("before manifest", 8), ("inside core.safetensors", 8), ("inside manifest", 7)):
        faults.at(point, step)
    with pytest.raises(OSError, match="No space left"):
        faults.at("inside manifest", 8)
    assert [faults.spoils_loss(step) for step in (4, 5, 6, 7)] == [False, True, True, False]
    assert not Faults(FaultsConfig(nan="rank=1 step=5"), rank=0).spoils_loss(5)
    began = time.perf_counter()
    faults.at("step", 9)
    assert time.perf_counter() - began >= 0.2


def _reach(rank: int, spec: dict[str, str]) -> None:
    Faults(FaultsConfig(**spec), rank).at("step", 3)


@pytest.mark.parametrize(("rank", "killed"), [(0, False), (1, True)])
def test_a_rank_kills_itself(rank, killed):
    process = multiprocessing.get_context("fork").Process(target=_reach, args=(rank, {"kill": "rank=1 step=3"}))
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if killed else 0)


def test_a_rank_stops_itself():
    process = multiprocessing.get_context("fork").Process(target=_reach, args=(0, {"stop": "step=3"}))
    process.start()
    deadline = time.monotonic() + 240
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0, "it goes on as if nothing had been"
