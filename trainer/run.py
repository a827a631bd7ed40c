"""Train a SoME language model.

    deepspeed trainer/run.py --ds_config ds_configs/zero2.json
    torchrun --nproc-per-node 2 trainer/run.py --experiment a4 --set data.path=DIR
    srun python trainer/run.py ...
    python trainer/run.py --list

Everything that can be refused is refused before the process group forms.
"""

import argparse
import difflib
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # The launchers run this file by path: make the packages beside it importable without an installation, and keep this
    # folder itself from shadowing other modules.
    sys.path[0] = str(REPOSITORY)

import torch
import torch.distributed as dist

from modeling import build_model
from modeling.mixers import frozen_manifest
from trainer.checkpoint import (
    RunState,
    check_resumable,
    find_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    read_state,
)
from trainer.config import Experiment, experiment_names, load_experiment
from trainer.console import Console, say
from trainer.data import Dataset, TrainOrder, check_source, open_data, prepare_data
from trainer.distributed import (
    Launch,
    Layout,
    broadcast_text,
    check_gpus,
    choose_device,
    demand_agreement,
    expert_parallel_group,
    init_process_group,
)
from trainer.ds_config import is_bf16, load_ds_config
from trainer.engine import Engine, check_ds_config
from trainer.generate import generate
from trainer.loop import Trainer
from trainer.metrics import RunLog
from trainer.plan import Deployment, Sharding, check_expert_size, check_memory, describe, most_replicas
from trainer.published import published_ids, published_results
from trainer.runfolder import check_writable, set_aside, write_config
from trainer.text import error_line

EXIT_REFUSED = 2
SECONDS_TO_WAIT_FOR_RANK_0 = 60


def main() -> None:
    """The command line."""
    # Text that the terminal's encoding lacks must not end a run that only wanted to print it.
    sys.stdout.reconfigure(errors="backslashreplace")
    launch = Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)
    try:
        launch = Launch.from_environment()
        arguments = parse_arguments()
        if arguments.list:
            print_experiments()
            return
        run(arguments, launch)
    except ValueError as error:
        refuse(error, launch)


class Parser(argparse.ArgumentParser):
    """Refuses in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        close = [near for word in message.split() for near in difflib.get_close_matches(word, flags, n=1, cutoff=0.7)]
        hint = f"did you mean {close[0]}? " if close and close[0] not in message else ""
        raise ValueError(f"{message}; {hint}see --help")


def _not_empty(text: str) -> str:
    """What a shell makes of a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; everything else is a key of the experiment, changed with --set.

    Raises:
        ValueError: unknown flag, or a value that a flag cannot have.
    """
    parser = Parser(prog="trainer/run.py", description="Train a SoME language model.", allow_abbrev=False)
    parser.add_argument(
        "--ds_config",
        type=_not_empty,
        default=str(REPOSITORY / "ds_configs" / "zero2.json"),
        metavar="FILE",
        help="DeepSpeed JSON: precision and ZeRO stage (default: ds_configs/zero2.json)",
    )
    parser.add_argument(
        "--experiment", type=_not_empty, default="quickstart", metavar="NAME|FILE.yaml", help="what to train; see --list"
    )
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one key of the experiment")
    parser.add_argument("--output_dir", type=_not_empty, metavar="DIR", help="the run's folder (default: runs/<experiment>)")
    parser.add_argument(
        "--resume",
        type=_not_empty,
        default="auto",
        metavar="auto|never|DIR",
        help="auto: continue the run in output_dir; never: start anew and move an old run aside",
    )
    parser.add_argument("--max_steps", type=int, metavar="N", help="stop early; the schedule stays the experiment's")
    parser.add_argument("--dry_run", action="store_true", help="print parameters, memory and traffic, and stop")
    parser.add_argument("--list", action="store_true", help="print the shipped experiments, and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args(arguments)


@dataclass
class Job:
    """What is decided before the ranks meet."""

    experiment: Experiment
    launch: Launch
    layout: Layout
    ds_config: dict[str, Any]
    output_dir: Path
    state: RunState
    """Step 0 of this experiment; `complete` fills in what only the data can tell."""
    checkpoint: Path | None
    """What to resume from; None = step 0."""
    saved: RunState | None
    """The state in `checkpoint`."""

    def complete(self, dataset: Dataset) -> None:
        """Take from the data the length of the run and the identity of the data.

        Raises:
            ValueError: a training split smaller than one batch, or other data than the checkpoint's.
        """
        train = self.experiment.train
        order = train_order(self.experiment, dataset)
        self.state.total_steps = train.steps or math.ceil(train.epochs * order.steps_per_epoch)
        self.state.data_fingerprint, self.state.tokenizer_hash = dataset.fingerprint, dataset.tokenizer_hash
        if self.saved is not None:
            check_resumable(self.checkpoint, self.saved, self.state)


def run(arguments: argparse.Namespace, launch: Launch) -> None:
    """One run from its flags to its last checkpoint."""
    job = decide(arguments, launch)
    if arguments.dry_run:
        if launch.rank == 0:
            print(describe(job.experiment, deployment(job)))
        return
    launch.export()
    check_gpus(launch)
    check_memory(job.experiment, deployment(job))
    check_ds_config(arguments.ds_config, job.ds_config)
    check_source(job.experiment.data)
    if is_done(job, arguments.max_steps):
        return
    check_writable(job.output_dir)
    # Rank 0 prepares folder and data while the others wait for it at the rendezvous, so what it refuses is refused here.
    data_folder = prepare_folder_and_data(job) if launch.rank == 0 else None

    device = choose_device(launch)
    init_process_group(device, job.experiment.parallel.timeout_minutes)
    try:
        # Ranks that see different folders or sizes of nodes would run different collectives and wait for each other.
        demand_agreement(f"{job.layout}, starting at step {job.saved.step if job.saved else 0}")
        trainer = prepare_trainer(job, Path(broadcast_text(str(data_folder))), device)
        trainer.run(stop=min(arguments.max_steps or job.state.total_steps, job.state.total_steps))
        finish(trainer)
    finally:
        dist.destroy_process_group()


def decide(arguments: argparse.Namespace, launch: Launch) -> Job:
    """Read and check everything but the data."""
    experiment = load_experiment(arguments.experiment, arguments.set)
    layout = Layout.of(experiment, launch)
    ds_config = load_ds_config(arguments.ds_config, experiment, layout, launch.world_size)
    if arguments.max_steps is not None and arguments.max_steps < 1:
        raise ValueError(f"--max_steps {arguments.max_steps}: must be at least 1")
    model = experiment.model
    check_expert_size(model)
    state = RunState(
        step=0,
        tokens=0,
        total_steps=0,
        precision="bf16" if is_bf16(ds_config) else "fp32",
        experiment=experiment.to_dict(),
        pool=frozen_manifest(model, experiment.seed),
        data_fingerprint="",
        tokenizer_hash="",
    )
    output_dir = Path(arguments.output_dir or Path("runs") / experiment.name)
    try:
        checkpoint = find_checkpoint(arguments.resume, output_dir)
    except OSError as error:
        where = output_dir if arguments.resume == "auto" else f"{output_dir} --resume {arguments.resume}"
        raise ValueError(f"--output_dir {where}: cannot be read ({error.strerror}); choose another") from None
    saved = None if checkpoint is None else read_state(checkpoint)
    if saved is not None:
        check_resumable(checkpoint, saved, state)
        own = newest_checkpoint(output_dir / "checkpoints")
        if own is not None and own.resolve() != checkpoint.resolve():
            raise ValueError(
                f"--resume {arguments.resume}: {output_dir} holds a run at {own.name}; continue that with --resume auto, "
                f"or give another --output_dir to go on from {checkpoint}"
            )
    return Job(experiment, launch, layout, ds_config, output_dir, state, checkpoint, saved)


def deployment(job: Job) -> Deployment:
    """How the job is spread over the cluster, as the cost model sees it."""
    return Deployment(
        layout=job.layout,
        ranks=job.launch.world_size,
        ranks_per_node=job.launch.local_world_size,
        sharding=Sharding.of(job.ds_config),
        device="cuda" if torch.cuda.is_available() else "cpu",
        replicas=most_replicas(job.experiment, job.layout.ep_size),
    )


def is_done(job: Job, max_steps: int | None) -> bool:
    """Whether nothing is left to do; rank 0 says so and how to start anew."""
    saved = job.saved
    if saved is None or (saved.step < saved.total_steps and (max_steps is None or saved.step < max_steps)):
        return False
    if job.launch.rank == 0:
        what = "is finished" if saved.step >= saved.total_steps else f"has reached --max_steps {max_steps}"
        loss = "" if saved.val_loss is None else f" with validation loss {saved.val_loss:.4f} nats/token"
        cure = "start anew with --resume never, or give another --output_dir"
        say(f"{job.checkpoint.parent.parent} {what} at step {saved.step}{loss}; {cure}")
    return True


def prepare_folder_and_data(job: Job) -> Path:
    """The run's folder, and the tokenised data's; rank 0 only."""
    model = job.experiment.model
    experiment = job.experiment
    data_folder = prepare_data(experiment.data, model.vocab_size, model.max_seq_len, experiment.seed, job.complete)
    continues = job.checkpoint is not None and job.output_dir.resolve() in job.checkpoint.resolve().parents
    try:
        aside = None if continues else set_aside(job.output_dir)
        summary = open_data(data_folder).summary
        write_config(job.output_dir, experiment, job.launch, job.layout, job.ds_config, summary)
    except OSError as error:
        raise ValueError(f"--output_dir {job.output_dir}: cannot be written ({error.strerror}); choose another") from None
    if aside is not None:
        say(f"the earlier run was moved to {aside}")
    return data_folder


def prepare_trainer(job: Job, data_folder: Path, device: torch.device) -> Trainer:
    """Model, engine, data and log of this rank, with the checkpoint loaded if there is one."""
    began, is_first, experiment = time.perf_counter(), job.launch.rank == 0, job.experiment
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
        stores = [layer.store for layer in model.some_layers]
        engine.load_core_state(load_checkpoint(job.checkpoint, job.saved, stores))
        state = job.saved

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
    console.say(f"starting at step {state.step}" + (f" from {job.checkpoint}" if job.saved is not None else ""))
    return Trainer(
        experiment=experiment,
        layout=job.layout,
        engine=engine,
        dataset=dataset,
        order=train_order(experiment, dataset),
        state=state,
        output_dir=job.output_dir,
        log=RunLog(job.output_dir, state.step, experiment.log.tensorboard) if is_first else None,
        console=console,
    )


def train_order(experiment: Experiment, dataset: Dataset) -> TrainOrder:
    """The sequences of every step."""
    sort_by_length = dataset.train.layout.sort_by_length
    return TrainOrder(dataset.train.lengths, experiment.train.batch_size, experiment.seed, sort_by_length)


def set_numerics(deterministic: bool) -> None:
    """Full fp32 products (no TF32: routing and key stores are fp32 by contract), and repeatable kernels if asked for.

    Operations without a repeatable kernel warn; on GPUs the backward of fused attention is one.
    """
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Nothing here reads memory that it has not written; filling it first took a fifth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def finish(trainer: Trainer) -> None:
    """Print what the model writes now, and where the run lies."""
    experiment, state = trainer.experiment, trainer.state
    if experiment.sample.tokens:
        data, engine = trainer.dataset, trainer.engine
        text = generate(engine.model, data.tokenizer, data.train.layout, experiment.sample, experiment.seed, engine.device)
        trainer.console.say(f"\n{text}\n")
    done = "finished" if state.step >= state.total_steps else "stopped"
    trainer.console.say(f"{done} at step {state.step}: {trainer.output_dir}")
    if trainer.log is not None:
        trainer.log.close()


def print_experiments() -> None:
    """One line an experiment; for a published run, its last published validation loss."""
    for name in experiment_names():
        experiment = load_experiment(name)
        model, counts = experiment.model, experiment.model.num_parameters()
        mixer = f"{model.some.num_experts} experts, top {model.some.top_k}"
        shape = f"{model.num_layers} layers, {mixer if model.channel_mixer == 'some' else model.channel_mixer}"
        size = f"{counts.total:>13,} parameters {counts.trainable:>10,} trained"
        line = f"{name:25} {size}   {shape:29} {experiment.data.name:11}"
        print(f"{line} {describe_published(name)}".rstrip())


def describe_published(name: str) -> str:
    """The last published result of a run; empty for an experiment that is none."""
    if name not in published_ids():
        return ""
    epochs = published_results(name).epochs
    if not epochs:
        return "no published result"
    last = epochs[-1]
    return f"published: val {last.val_loss:.4f} (ppl {last.val_ppl:.2f}) after {last.epoch} epochs"


def refuse(error: ValueError, launch: Launch) -> NoReturn:
    """One line and exit code 2. Rank 0 speaks for all; the others wait to be ended with it, and speak up if they are not."""
    if launch.rank != 0:
        signal.sigtimedwait([signal.SIGTERM], SECONDS_TO_WAIT_FOR_RANK_0)
    print(error_line(error), file=sys.stderr, flush=True)
    sys.exit(EXIT_REFUSED)


if __name__ == "__main__":
    main()
