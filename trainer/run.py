"""Train a SoME language model.

    deepspeed trainer/run.py --ds_config ds_configs/zero2.json
    torchrun --nproc-per-node 2 trainer/run.py --experiment a4 --set data.path=DIR
    srun python trainer/run.py ...
    python trainer/run.py --list

Everything that can be refused is refused before the process group forms.
"""

import argparse
import math
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import NoReturn

# The launchers run this file by path: make the packages beside it importable without an installation, and keep this
# folder itself from shadowing other modules.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.distributed as dist

from modeling import build_model
from modeling.some import pool_manifest
from trainer.checkpoint import RunState, check_resumable, find_checkpoint, load_checkpoint, read_state
from trainer.config import Experiment, experiment_names, load_experiment
from trainer.console import Console
from trainer.data import TrainOrder, check_source, open_data, prepare_data
from trainer.distributed import (
    Launch,
    Layout,
    broadcast_text,
    choose_device,
    expert_parallel_group,
    init_process_group,
)
from trainer.ds_config import is_bf16, load_ds_config
from trainer.engine import Engine
from trainer.generate import generate
from trainer.loop import Trainer
from trainer.metrics import RunLog
from trainer.plan import describe
from trainer.runfolder import set_aside, write_config

EXIT_REFUSED = 2
SECONDS_TO_WAIT_FOR_RANK_0 = 60


def main() -> None:
    """The command line."""
    arguments = parse_arguments()
    launch = Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)
    try:
        launch = Launch.from_environment()
        if arguments.list:
            print_experiments()
            return
        run(arguments, launch)
    except ValueError as error:
        refuse(error, launch)


def parse_arguments() -> argparse.Namespace:
    """The flags; everything else is a key of the experiment, changed with --set."""
    parser = argparse.ArgumentParser(prog="trainer/run.py", description="Train a SoME language model.", allow_abbrev=False)
    parser.add_argument(
        "--ds_config",
        default=str(Path(sys.path[0]) / "ds_configs" / "zero2.json"),
        metavar="FILE",
        help="DeepSpeed JSON: precision and ZeRO stage (default: ds_configs/zero2.json)",
    )
    parser.add_argument("--experiment", default="quickstart", metavar="NAME|FILE.yaml", help="what to train; see --list")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one key of the experiment")
    parser.add_argument("--output_dir", metavar="DIR", help="the run's folder (default: runs/<experiment>)")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|DIR",
        help="auto: continue the run in output_dir; never: start anew and move an old run aside",
    )
    parser.add_argument("--max_steps", type=int, metavar="N", help="stop early; the schedule stays the experiment's")
    parser.add_argument("--dry_run", action="store_true", help="print parameters, memory and traffic, and stop")
    parser.add_argument("--list", action="store_true", help="print the shipped experiments, and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args()


def run(arguments: argparse.Namespace, launch: Launch) -> None:
    """One run from its flags to its last checkpoint."""
    experiment = load_experiment(arguments.experiment, arguments.set)
    layout = Layout.of(experiment, launch)
    ds_config = load_ds_config(arguments.ds_config, experiment, layout, launch.world_size)
    if arguments.dry_run:
        if launch.rank == 0:
            print(describe(experiment, layout, launch.world_size, is_bf16(ds_config)))
        return
    if arguments.max_steps is not None and arguments.max_steps < 1:
        raise ValueError(f"--max_steps {arguments.max_steps}: must be at least 1")

    check_source(experiment.data)
    output_dir = Path(arguments.output_dir or Path("runs") / experiment.name)
    state = initial_state(experiment, is_bf16(ds_config))
    checkpoint = find_checkpoint(arguments.resume, output_dir)
    saved = None if checkpoint is None else read_state(checkpoint)
    if saved is not None:
        check_resumable(checkpoint, saved, state)
        if says_it_is_done(saved, output_dir, arguments.max_steps, launch):
            return

    # Rank 0 prepares folder and data while the others wait for it at the rendezvous, so what it refuses is refused here.
    data_folder = ""
    if launch.rank == 0:
        aside = set_aside(output_dir) if checkpoint is None else None
        if aside is not None:
            print(f"the earlier run was moved to {aside}", flush=True)
        output_dir.mkdir(parents=True, exist_ok=True)
        model = experiment.model
        data_folder = str(prepare_data(experiment.data, model.vocab_size, model.max_seq_len, experiment.seed))
        complete_state(state, experiment, data_folder)
        if saved is not None:
            check_resumable(checkpoint, saved, state)

    if not experiment.log.deepspeed:
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    device = choose_device(launch)
    init_process_group(launch, device, experiment.parallel.timeout_minutes)
    try:
        trainer = prepare(
            experiment, layout, ds_config, device, output_dir, broadcast_text(data_folder), state, saved, checkpoint
        )
        if launch.rank == 0:
            write_config(output_dir, experiment, launch, layout, ds_config, {"data": trainer.dataset.summary})
        trainer.run(stop=min(arguments.max_steps or state.total_steps, trainer.state.total_steps))
        finish(trainer)
    finally:
        dist.destroy_process_group()


def initial_state(experiment: Experiment, bf16: bool) -> RunState:
    """Step 0; what only the data can tell is filled in by `complete_state`."""
    model = experiment.model
    return RunState(
        step=0,
        tokens=0,
        total_steps=0,
        precision="bf16" if bf16 else "fp32",
        experiment=experiment.to_dict(),
        pool=pool_manifest(model.some, model.num_layers, experiment.seed),
        data_fingerprint="",
        tokenizer_hash="",
    )


def complete_state(state: RunState, experiment: Experiment, data_folder: str) -> None:
    """Length of the run and identity of the data; the order refuses a training split smaller than one batch."""
    dataset = open_data(Path(data_folder))
    order = TrainOrder(dataset.train.lengths, experiment.train.batch_size, experiment.seed)
    state.total_steps = experiment.train.steps or math.ceil(experiment.train.epochs * order.steps_per_epoch)
    state.data_fingerprint, state.tokenizer_hash = dataset.fingerprint, dataset.tokenizer_hash


def says_it_is_done(saved: RunState, output_dir: Path, max_steps: int | None, launch: Launch) -> bool:
    """Whether nothing is left to do; rank 0 says so and how to start anew."""
    finished = saved.step >= saved.total_steps
    if not finished and (max_steps is None or saved.step < max_steps):
        return False
    if launch.rank == 0:
        what = "is finished" if finished else f"has reached --max_steps {max_steps}"
        loss = "" if saved.val_loss is None else f" with validation loss {saved.val_loss:.4f} nats/token"
        print(
            f"{output_dir} {what} at step {saved.step}{loss}; start anew with --resume never, or give another --output_dir"
        )
    return True


def prepare(
    experiment: Experiment,
    layout: Layout,
    ds_config: dict,
    device: torch.device,
    output_dir: Path,
    data_folder: str,
    state: RunState,
    saved: RunState | None,
    checkpoint: Path | None,
) -> Trainer:
    """Model, engine, data and log of this rank, with the checkpoint loaded if there is one."""
    torch.use_deterministic_algorithms(experiment.train.deterministic, warn_only=True)
    if experiment.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("highest")  # no TF32: routing and key stores are fp32 by contract

    began, is_first = time.perf_counter(), dist.get_rank() == 0
    complete_state(state, experiment, data_folder)
    dataset = open_data(Path(data_folder))
    ep_group = expert_parallel_group(layout.ep_size)
    pool_dtype = torch.bfloat16 if is_bf16(ds_config) else torch.float32
    model = build_model(experiment.model, experiment.seed, ep_group, pool_dtype, device)
    engine = Engine(model, experiment.train, ds_config, show_log=experiment.log.deepspeed)
    if saved is not None:
        engine.load_core_state(load_checkpoint(checkpoint, saved, [layer.store for layer in model.some_layers]))
        state = saved

    console = Console(is_first)
    counts = experiment.model.num_parameters()
    console.say(
        f"{experiment.name}: {counts.total:,} parameters, {counts.trainable:,} trained; {dist.get_world_size()} rank(s), "
        f"EP size {layout.ep_size}, {state.precision}, {device.type}; ready in {time.perf_counter() - began:.1f} s"
    )
    console.say(f"data: {dataset.summary}")
    console.say(f"resumed {checkpoint} at step {state.step}" if saved is not None else "starting at step 0")
    return Trainer(
        experiment=experiment,
        layout=layout,
        engine=engine,
        dataset=dataset,
        order=TrainOrder(dataset.train.lengths, experiment.train.batch_size, experiment.seed),
        state=state,
        output_dir=output_dir,
        log=RunLog(output_dir, state.step, experiment.log.tensorboard) if is_first else None,
        console=console,
    )


def finish(trainer: Trainer) -> None:
    """Print what a finished model writes, and where the run lies."""
    experiment, state = trainer.experiment, trainer.state
    if experiment.sample.tokens:
        text = generate(
            trainer.engine.model, trainer.dataset.tokenizer, experiment.sample, experiment.seed, trainer.engine.device
        )
        trainer.console.say(f"\n{text}\n")
    done = "finished" if state.step >= state.total_steps else "stopped"
    trainer.console.say(f"{done} at step {state.step}: {trainer.output_dir}")
    if trainer.log is not None:
        trainer.log.close()


def print_experiments() -> None:
    """One line an experiment."""
    for name in experiment_names():
        experiment = load_experiment(name)
        counts = experiment.model.num_parameters()
        some = experiment.model.some
        print(
            f"{name:12} {counts.total:>15,} parameters {counts.trainable:>12,} trained   "
            f"{experiment.model.num_layers} layers, {some.num_experts} experts, top {some.top_k}, {experiment.data.name}"
        )


def refuse(error: ValueError, launch: Launch) -> NoReturn:
    """One line and exit code 2. Rank 0 speaks for all; the others wait to be ended with it, and speak up if they are not."""
    if launch.rank != 0:
        signal.sigtimedwait([signal.SIGTERM], SECONDS_TO_WAIT_FOR_RANK_0)
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(EXIT_REFUSED)


if __name__ == "__main__":
    main()
