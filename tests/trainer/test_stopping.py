"""Stopping by signals: where the ranks agree to stop, what the continued run repeats, and when a process ends at once."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from tests.distributed import SECONDS, free_port, run_ranks, start_process
from tests.launch import FP32, losses, records, wait_for
from tests.training import make_trainer
from trainer import run, stopping
from trainer.checkpoint import RunState, read_state
from trainer.exit_codes import REQUEUE
from trainer.job import Job, is_done
from trainer.launch import Launch
from trainer.loop import Trainer
from trainer.precision import Precision
from trainer.resume import Found, checkpoint_at
from trainer.stopping import StopSignals

STEPS = 8
TINY = [
    "model.d_model=16", "model.num_layers=2", "model.num_heads=2", "model.vocab_size=300", "model.max_seq_len=32",
    "model.some.num_experts=8", "model.some.d_ffn=24", "train.batch_size=8", "train.max_micro_batch=2",
    f"train.steps={STEPS}", "train.warmup_steps=2", "data.train_documents=60", "data.val_documents=3",
    "log.tensorboard=false", "sample.tokens=5", "train.eval_every=3", "checkpoint.every=4",
]  # fmt: skip
BALANCED = ["parallel.placement=balanced", "parallel.replan_every=3"]


def _run(folder: str, name: str, kill: tuple[signal.Signals, int, str, int] | None = None) -> tuple[bool, str | None]:
    """A run, continued if it lies there, with a signal to rank 1 when it comes for the n-th time to a phase of a step."""
    trainer = make_trainer(Path(folder) / name, "quickstart", [*TINY, *BALANCED, f"data.cache_dir={folder}/cache"])
    mark, seen = trainer.progress.mark, []

    def marked(phase: str, step: int) -> None:
        mark(phase, step)
        seen.append((phase, step))
        if kill and dist.get_rank() == 1 and seen[-1] == kill[2:] and seen.count(kill[2:]) == kill[1]:
            os.kill(os.getpid(), kill[0])
            wait_for(lambda: trainer.signals.received is not None)

    trainer.progress.mark = marked
    with StopSignals() as trainer.signals:
        trainer.signals.defer()
        complete = trainer.run(STEPS)
    if trainer.log is not None:
        trainer.log.close()
    dist.barrier()
    return complete, trainer.stopped_by


def _broken_and_whole(rank: int, folder: str) -> list[tuple[bool, str | None, str, bool]]:
    _run(folder, "whole")
    ends = []
    for kill in [
        (signal.SIGTERM, 1, "evaluation", 0),
        (signal.SIGUSR2, 2, "forward and backward", 3),
        (signal.SIGHUP, 1, "writing a checkpoint", 4),
        (signal.SIGINT, 2, "evaluation", 6),
        (signal.SIGTERM, 2, "evaluation", 8),
        None,
    ]:
        complete, why = _run(folder, "broken", kill)
        newest = checkpoint_at(Path(folder) / "broken").folder
        ends.append((complete, why, newest.name, read_state(newest).evaluation_due))
        dist.barrier()
    return ends


def test_a_run_stopped_anywhere_goes_on_as_if_it_had_not_been(tmp_path):
    first, second = run_ranks(_broken_and_whole, 2, str(tmp_path))
    assert first == second == [
        (False, "SIGTERM on rank 1", "step_00000000", True),
        (False, "SIGUSR2 on rank 1", "step_00000003", True),  # where experts are placed anew before the evaluation
        (False, "SIGHUP on rank 1", "step_00000004", False),
        (False, "SIGINT on rank 1", "step_00000006", True),
        (False, "SIGTERM on rank 1", "step_00000008", True),
        (True, None, "step_00000008", False),
    ]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert losses(broken) == losses(whole) and len(losses(whole)) == STEPS
    for event in ("eval", "placement"):
        seen = [[{**r, "seconds": 0} for r in records(folder, event)] for folder in (whole, broken)]
        assert seen[0] == seen[1] and len(seen[0]) == {"eval": 4, "placement": 2}[event]
    ends = [checkpoint_at(folder).folder for folder in (whole, broken)]
    states = [json.loads((end / "state.json").read_text()) for end in ends]
    assert states[0] == states[1] and not states[0]["evaluation_due"]
    for name in ("core", "optimizer", "keys"):
        ours, theirs = (load_file(end / f"{name}.safetensors") for end in ends)
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours), name
    assert records(broken, "end") == [{"event": "end", "step": STEPS, "finished": True}]


def test_a_run_whose_last_evaluation_is_due_is_not_done(tmp_path):
    state = RunState(8, 0, 8, "fp32", {}, {}, "", "", evaluation_due=True)
    found = Found(tmp_path / "a" / "b", state, seconds=0.0, skipped={})
    precision = Precision("fp32", "as the run began")
    job = Job(None, Launch(1, 2, 1, 2), None, {}, precision, tmp_path, state, found, starts_anew=False, lock=None)
    assert not is_done(job, None) and not is_done(job, 5)
    state.evaluation_due = False
    assert is_done(job, None)


# One process


@pytest.mark.parametrize(
    ("sent", "ends_with"),
    [
        ([(0, signal.SIGTERM), (0.9, signal.SIGTERM), (0.95, signal.SIGINT)], None),
        ([(0, signal.SIGTERM), (1.1, signal.SIGTERM)], 143),
        ([(0, signal.SIGINT), (1.1, signal.SIGHUP)], 129),
        ([(0, signal.SIGUSR2), (1.1, signal.SIGUSR2)], 140),
        ([(0, signal.SIGUSR2), (5, signal.SIGTERM), (5.5, signal.SIGTERM)], None),  # the scheduler's notice, then its end
        ([(0, signal.SIGUSR2), (5, signal.SIGTERM), (6.1, signal.SIGTERM)], 143),
    ],
)
def test_what_counts_as_a_second_signal(monkeypatch, sent, ends_with):
    codes, signals = [], StopSignals()
    monkeypatch.setattr(os, "_exit", codes.append)
    signals.defer()
    for seconds, number in sent:
        monkeypatch.setattr(stopping.time, "monotonic", lambda seconds=seconds: 100.0 + seconds)
        signals._receive(number)
    assert codes == ([] if ends_with is None else [ends_with]) and signals.received is not None


def _wait_in_a_collective(port: int, ready, defers: bool) -> None:
    """Where Python's own handlers never get to run."""
    store = dist.TCPStore("127.0.0.1", port, is_master=True)
    with StopSignals() as signals:
        if defers:
            signals.defer()
        ready.set()
        store.get("what nobody sets")


@pytest.mark.parametrize("defers", [False, True])
def test_signals_end_a_process_whose_main_thread_waits(defers):
    ready = multiprocessing.get_context("forkserver").Event()
    process = start_process(_wait_in_a_collective, free_port(), ready, defers)
    assert ready.wait(SECONDS)
    began = time.monotonic()
    while process.is_alive():
        assert time.monotonic() < began + SECONDS
        os.kill(process.pid, signal.SIGUSR2)
        process.join(0.1)
    assert process.exitcode == 128 + signal.SIGUSR2
    assert not defers or time.monotonic() - began >= stopping.SECONDS_BETWEEN_TWO


def test_handlers_are_put_back_and_what_is_ignored_stays_so(monkeypatch):
    former = {number: signal.getsignal(number) for number in stopping.STOPPING}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signals.defer()
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR2)
            wait_for(lambda: signals.received is not None)
            assert signals.received == signal.SIGUSR2
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former[signal.SIGHUP])
    assert {number: signal.getsignal(number) for number in stopping.STOPPING} == former
    wait_for(lambda: "signals" not in [thread.name for thread in threading.enumerate()])


def _command(arguments: list[str]) -> None:
    sys.argv = ["run.py", *arguments]
    run.main()


def _command_that_never_ends_its_second_save(arguments: list[str], blocked: Path) -> None:
    sync = os.fsync

    def blocking(descriptor: int) -> None:
        if (blocked.parent / "step_00000004").exists():
            blocked.touch()
            threading.Event().wait()
        sync(descriptor)

    os.fsync = blocking
    _command(arguments)


def _command_with_a_signal(arguments: list[str]) -> None:
    take_step = Trainer._step

    def step_with_signal(trainer: Trainer) -> None:
        if trainer.state.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            wait_for(lambda: trainer.signals.received is not None)
        take_step(trainer)

    Trainer._step = step_with_signal
    _command(arguments)


def test_the_command_line_stops_and_goes_on_and_a_second_signal_harms_no_checkpoint(tmp_path, cache_dir):
    folder = tmp_path / "run"
    arguments = ["--ds_config", FP32, "--output_dir", str(folder)]
    for setting in [*TINY, f"data.cache_dir={cache_dir}", "train.eval_every=100"]:
        arguments += ["--set", setting]

    blocked = folder / "checkpoints" / "blocked"
    process = start_process(_command_that_never_ends_its_second_save, arguments, blocked)
    wait_for(lambda: blocked.exists() or not process.is_alive())
    while process.is_alive():
        os.kill(process.pid, signal.SIGTERM)
        process.join(0.1)
    assert process.exitcode == 128 + signal.SIGTERM
    found = checkpoint_at(folder).folder
    assert found.name == "step_00000004" and read_state(found).step == 4

    process = start_process(_command_with_a_signal, arguments)
    process.join(SECONDS)
    assert process.exitcode == REQUEUE
    assert checkpoint_at(folder).folder.name == "step_00000006"
    assert [record["step"] for record in records(folder, "start")] == [0, 4]
    assert records(folder, "end") == [{"event": "end", "step": 6, "finished": False, "stopped_by": "SIGINT on rank 0"}]
