"""A run from its checked settings to its last checkpoint: all that needs torch and DeepSpeed, whose import takes seconds."""

import argparse
import time
from pathlib import Path

import torch
import torch.distributed as dist

from modeling import build_model
from trainer.checkpoint import RunState
from trainer.config import Experiment
from trainer.console import Console, all_printed, say
from trainer.data import check_source, open_data, prepare_data
from trainer.distributed import (
    broadcast_text,
    check_gpus,
    choose_device,
    demand_agreement,
    expert_parallel_group,
    init_process_group,
    key_store_group,
)
from trainer.ds_config import is_bf16
from trainer.engine import Engine, check_ds_config
from trainer.exit_codes import DONE, FAILED, REQUEUE
from trainer.generate import generate
from trainer.job import Job, decide, is_done, report_skipped, train_order
from trainer.lock import FolderLock
from trainer.loop import Trainer
from trainer.metrics import RunLog
from trainer.numerics import set_numerics
from trainer.paths import make_folder
from trainer.plan import check_memory, describe
from trainer.precision import Precision
from trainer.runfolder import check_writable, earlier_start, set_aside, write_config
from trainer.settings import Settings
from trainer.snapshot import load_checkpoint
from trainer.stopping import StopSignals
from trainer.storage import StorageError, describe_free, is_failing
from trainer.watchdog import Watchdog


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """One run from its settings to its last checkpoint; its exit code."""
    job = decide(arguments, settings)
    if arguments.dry_run:
        if settings.launch.rank == 0:
            say(describe(job.experiment, job.deployment, job.precision))
        return DONE if all_printed() else FAILED
    try:
        code = carry_out(job, arguments)
        if job.lock is not None:
            job.lock.release()
        return code
    finally:
        if job.lock is not None:
            job.lock.close()  # where it failed its name stays, which tells so


def carry_out(job: Job, arguments: argparse.Namespace) -> int:
    """The job; its exit code."""
    launch = job.launch
    if launch.rank == 0:
        report_skipped(job)
    launch.export()
    check_gpus(launch)
    check_memory(job.experiment, job.deployment)
    check_ds_config(arguments.ds_config, job.ds_config)
    check_source(job.experiment.data)
    if is_done(job, arguments.max_steps):
        if job.continues and job.lock is not None:
            # As many are kept as the run itself said, since nothing starts that could ask for others.
            job.found.clean(job.saved.experiment["checkpoint"]["keep"])
        return DONE
    check_writable(job.output_dir)
    if launch.rank == 0:
        say(f"precision {job.precision}")
    with StopSignals() as signals:
        # Rank 0 prepares folder and data while the others wait for it at the rendezvous, so what it refuses is refused here.
        data_folder = prepare_folder_and_data(job) if launch.rank == 0 else None

        device, timeout = choose_device(launch), job.experiment.parallel.timeout_minutes
        init_process_group(device, timeout)
        try:
            agree_on_precision(job)
            # Ranks that see different folders or sizes of nodes would run different collectives and wait for each other.
            demand_agreement(f"{job.layout}, starting at step {job.saved.step if job.saved else 0}")
            if launch.rank == 0 and job.continues:
                # The run is going to start, and every rank has looked at what lies there.
                job.found.set_skipped_aside()
                job.found.clean(job.experiment.checkpoint.keep)
            trainer = prepare_trainer(job, Path(broadcast_text(str(data_folder))), device)
            with Watchdog(trainer.progress, timeout):
                return train(trainer, signals, arguments.max_steps)
        finally:
            dist.destroy_process_group()


def agree_on_precision(job: Job) -> None:
    """Rank 0 decides for all ranks, also where their machines differ.

    Raises:
        ValueError: this rank's share of its machine does not hold the model in that precision.
    """
    precision = Precision.parse(broadcast_text(str(job.precision)))
    if precision.name != job.precision.name:
        job.take_precision(precision)
        check_memory(job.experiment, job.deployment)


def train(trainer: Trainer, signals: StopSignals, max_steps: int | None) -> int:
    """Train to the end, or until a signal comes; the exit code."""
    trainer.signals, total = signals, trainer.state.total_steps
    signals.defer()
    try:
        is_complete = trainer.run(stop=min(max_steps or total, total))
    except ValueError as error:
        # All that users can mend was checked before: this is a fault of ours, which a restart may get around.
        raise RuntimeError(f"step {trainer.state.step}: training failed") from error
    trainer.engine.print_communication()
    finish(trainer, is_complete)
    return DONE if is_complete else REQUEUE


def prepare_folder_and_data(job: Job) -> Path:
    """The run's folder, and the tokenised data's; rank 0 only."""
    model = job.experiment.model
    experiment = job.experiment
    data_folder = prepare_data(experiment.data, model.vocab_size, model.max_seq_len, experiment.seed, job.complete)
    try:
        make_folder(job.output_dir)
        job.lock = job.lock or FolderLock(job.output_dir, create=True)
        again = not job.starts_anew and earlier_start(job.output_dir, experiment) == job.ds_config
        aside = None if job.continues or again else set_aside(job.output_dir)
        if aside is not None:
            job.lock.release()
            job.lock = FolderLock(job.output_dir, create=True)
        job.lock.sign()
        data = open_data(data_folder)
        write_config(job.output_dir, experiment, job.launch, job.layout, job.ds_config, job.precision, data)
    except OSError as error:
        if is_failing(error):
            raise StorageError(
                f"--output_dir {job.output_dir}: cannot be written ({error.strerror}), {describe_free(job.output_dir)}; "
                "make room and give the same command again"
            ) from None
        raise ValueError(f"--output_dir {job.output_dir}: cannot be written ({error.strerror}); choose another") from None
    if aside is not None:
        say(f"the earlier run was moved to {aside}")
    return data_folder


def prepare_trainer(job: Job, data_folder: Path, device: torch.device) -> Trainer:
    """Model, engine, data and log of this rank, with the checkpoint loaded if there is one."""
    began, is_first, experiment, load_seconds = time.perf_counter(), job.launch.rank == 0, job.experiment, 0.0
    set_numerics(experiment.train.deterministic)
    dataset = open_data(data_folder)
    job.complete(dataset)
    pool_dtype = torch.bfloat16 if is_bf16(job.ds_config) else torch.float32
    ep_group = expert_parallel_group(job.layout.ep_size, experiment.parallel.timeout_minutes)
    chunks = experiment.parallel.chunks
    model = build_model(experiment.model, experiment.seed, ep_group, pool_dtype, device, chunks)
    engine = Engine(model, experiment.train, job.ds_config, show_log=experiment.log.deepspeed)
    state = job.state
    if job.saved is not None:
        loading, stores = time.perf_counter(), [layer.store for layer in model.some_layers]
        engine.load_core_state(load_checkpoint(job.checkpoint, job.saved, stores))
        state, load_seconds = job.saved, time.perf_counter() - loading

    console, counts = Console(is_first), experiment.model.num_parameters()
    console.say(
        f"{experiment.name}: {counts.total:,} parameters, {counts.trainable:,} trained; {dist.get_world_size()} rank(s), "
        f"EP size {job.layout.ep_size}, {state.precision}, {device.type}; ready in {time.perf_counter() - began:.1f} s"
    )
    if model.some_layers:
        console.say(f"kernel of the experts: {model.some_layers[0].pool.describe_kernel()}")
    for split in ("train", "validation"):
        sizes = ", ".join(f"{value:,} {name}" for name, value in dataset.summary[split].items())
        console.say(f"{split} data: {sizes}")
    log = open_log(job.output_dir, experiment, state) if is_first else None
    report_start(job, state.step, load_seconds, console, log)
    return Trainer(
        experiment=experiment,
        layout=job.layout,
        engine=engine,
        dataset=dataset,
        order=train_order(experiment, dataset),
        state=state,
        output_dir=job.output_dir,
        log=log,
        console=console,
        key_group=key_store_group(experiment.parallel.timeout_minutes),
        origin=job.origin,
    )


def open_log(output_dir: Path, experiment: Experiment, state: RunState) -> RunLog:
    """The run's records from its state on, with a board if the settings say so."""
    board = None
    if experiment.log.tensorboard:
        from trainer.board import Board  # half a second, which a run without it need not wait

        make_folder(output_dir / "tensorboard")
        board = Board(output_dir / "tensorboard", experiment, state.total_steps, state.step)
    return RunLog(output_dir, state.step, board, state.evaluation_due)


def report_start(job: Job, step: int, load_seconds: float, console: Console, log: RunLog | None) -> None:
    """Where the run starts, and how long it took to come there."""
    if job.found is None:
        console.say(f"starting at step {step}")
        return
    seconds = {"verify_seconds": job.found.seconds, "load_seconds": load_seconds}
    took = f"verified in {job.found.seconds:.1f} s, loaded in {load_seconds:.1f} s"
    console.say(f"starting at step {step} from {job.checkpoint}, {took}")
    if log is not None:
        skipped = {folder.name: reason for folder, reason in job.found.skipped.items()}
        log.write("resume", step=step, path=str(job.checkpoint), **seconds, skipped=skipped)


def finish(trainer: Trainer, is_complete: bool) -> None:
    """Print what the model writes now, unless the time is up, and where the run lies."""
    experiment, state = trainer.experiment, trainer.state
    if experiment.sample.tokens and trainer.stopped_by is None:
        data, engine = trainer.dataset, trainer.engine
        text = generate(
            engine.model,
            data.tokenizer,
            data.train.layout,
            experiment.sample,
            experiment.seed,
            engine.device,
            on_token=lambda: trainer.progress.mark("sample", state.step),
        )
        trainer.console.say(f"\n{text}\n")
    done = "finished" if is_complete and state.step >= state.total_steps else "stopped"
    why = "" if is_complete else f" by {trainer.stopped_by}; the same command goes on from its newest checkpoint"
    trainer.console.say(f"{done} at step {state.step}{why}: {trainer.output_dir}")
    if trainer.log is not None:
        trainer.log.close()
