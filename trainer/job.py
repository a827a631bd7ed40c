"""A run as it is decided before the ranks meet: what to train, where, spread how, and from which checkpoint."""

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modeling.mixers import frozen_manifest
from trainer.checkpoint import RunState, check_resumable
from trainer.config import Experiment
from trainer.console import say
from trainer.data import Dataset, TrainOrder
from trainer.ds_config import precision_of, set_precision
from trainer.launch import Launch
from trainer.layout import Layout
from trainer.lock import FolderLock
from trainer.plan import Deployment, Sharding, most_replicas
from trainer.precision import Precision, choose_precision
from trainer.resume import Found, find_checkpoint
from trainer.runfolder import check_nothing_lost, earlier_start
from trainer.settings import Settings
from trainer.storage import StorageError, is_failing


@dataclass
class Job:
    """What is decided before the ranks meet."""

    experiment: Experiment
    launch: Launch
    layout: Layout
    ds_config: dict[str, Any]
    """As DeepSpeed gets it."""
    precision: Precision
    """This rank's choice where the JSON leaves it open; `take_precision` puts rank 0's in its place."""
    output_dir: Path
    state: RunState
    """Step 0 of this experiment; `complete` fills in what only the data can tell."""
    found: Found | None
    """What to resume from; None = step 0."""
    starts_anew: bool
    """With --resume never: a run that lies in the folder is moved aside."""
    lock: FolderLock | None
    """On rank 0, from the start where the folder has one, else since the folder was prepared: no other run goes on in it."""

    def __post_init__(self) -> None:
        self._open_config = self.ds_config
        self.take_precision(self.precision)

    def take_precision(self, precision: Precision) -> None:
        """Compute in it from now on."""
        self.precision, self.state.precision = precision, precision.name
        self.ds_config = set_precision(self._open_config, precision.name)

    @property
    def checkpoint(self) -> Path | None:
        """The folder to resume from."""
        return None if self.found is None else self.found.folder

    @property
    def saved(self) -> RunState | None:
        """The state in `checkpoint`."""
        return None if self.found is None else self.found.state

    @property
    def continues(self) -> bool:
        """Whether it resumes in the folder of its checkpoint, which may lie anywhere, behind a link."""
        return self.checkpoint is not None and self.checkpoint.parent == self.output_dir / "checkpoints"

    @property
    def origin(self) -> Path | None:
        """The folder of checkpoints that a run comes from which has none of its own yet."""
        if self.checkpoint is None or self.continues:
            return None
        is_name = re.fullmatch(r"step_\d+", self.checkpoint.name)  # else a link, such as `best`, to one among others
        return (self.checkpoint if is_name else self.checkpoint.resolve()).parent

    @property
    def deployment(self) -> Deployment:
        """How it is spread over the cluster, as the cost model sees it."""
        return Deployment(
            layout=self.layout,
            ranks=self.launch.world_size,
            ranks_per_node=self.launch.local_world_size,
            sharding=Sharding.of(self.ds_config),
            device="cuda" if torch.cuda.is_available() else "cpu",
            replicas=most_replicas(self.experiment, self.layout.ep_size),
        )

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


def decide(arguments: argparse.Namespace, settings: Settings) -> Job:
    """Look into the run's folder: where the run starts, and whether it may."""
    experiment, launch, layout, ds_config = settings.experiment, settings.launch, settings.layout, settings.ds_config
    model = experiment.model
    state = RunState(
        step=0,
        tokens=0,
        total_steps=0,
        precision=precision_of(ds_config),
        experiment=experiment.to_dict(),
        pool=frozen_manifest(model, experiment.seed),
        data_fingerprint="",
        tokenizer_hash="",
    )
    output_dir = Path(arguments.output_dir or Path("runs") / experiment.name)
    if arguments.dry_run:  # starts nothing, so it does not matter what lies in the folder
        precision = choose_precision(state.precision, arguments.ds_config, None, model, launch.local_rank)
        return Job(experiment, launch, layout, ds_config, precision, output_dir, state, None, starts_anew=False, lock=None)
    lock = FolderLock.existing(output_dir) if launch.rank == 0 else None
    try:
        found = find_checkpoint(arguments.resume, output_dir, lambda folder, saved: check_resumable(folder, saved, state))
        if found is None and arguments.resume == "auto":
            check_nothing_lost(output_dir)
        if found is not None and arguments.resume != "auto":
            found = in_place(found, output_dir, arguments.resume)
    except OSError as error:
        where = output_dir if arguments.resume == "auto" else f"{output_dir} --resume {arguments.resume}"
        problem = f"--output_dir {where}: cannot be read ({error.strerror})"
        if is_failing(error):
            raise StorageError(f"{problem}; give the same command again when it can") from None
        raise ValueError(f"{problem}; choose another") from None
    starts_anew = arguments.resume == "never"
    began = None if starts_anew else began_in(found, output_dir, experiment)
    precision = choose_precision(state.precision, arguments.ds_config, began, model, launch.local_rank)
    return Job(experiment, launch, layout, ds_config, precision, output_dir, state, found, starts_anew, lock)


def in_place(named: Found, output_dir: Path, resume: str) -> Found:
    """The checkpoint that `--resume` names: the run's own one by its own name where it is that.

    Raises:
        ValueError: the run has another.
    """
    own = find_checkpoint("auto", output_dir)
    if own is None:
        return named
    if own.folder.resolve() != named.folder.resolve():
        raise ValueError(
            f"--resume {resume}: {output_dir} holds a run at {own.folder.name}; continue that with --resume auto, or give "
            f"another --output_dir to go on from {named.folder}"
        )
    return own


def began_in(found: Found | None, output_dir: Path, experiment: Experiment) -> str | None:
    """The precision in which this run began: its checkpoint's or, before its first one, that of its folder; None for a new
    run."""
    if found is not None:
        return found.state.precision
    config = earlier_start(output_dir, experiment)
    return None if config is None else precision_of(config)


def report_skipped(job: Job) -> None:
    """Say which checkpoints are of no use; rank 0 only."""
    for folder, reason in ({} if job.found is None else job.found.skipped).items():
        say(f"checkpoint {folder} is skipped: {reason}")


def is_done(job: Job, max_steps: int | None) -> bool:
    """Whether nothing is left to do; rank 0 says so and how to start anew."""
    saved = job.saved
    if saved is None or saved.evaluation_due:
        return False
    if saved.step < saved.total_steps and (max_steps is None or saved.step < max_steps):
        return False
    if job.launch.rank == 0:
        what = "is finished" if saved.step >= saved.total_steps else f"has reached --max_steps {max_steps}"
        loss = "" if saved.val_loss is None else f" with validation loss {saved.val_loss:.4f} nats/token"
        cure = "start anew with --resume never, or give another --output_dir"
        say(f"{job.checkpoint.parent.parent} {what} at step {saved.step}{loss}; {cure}")
    return True


def train_order(experiment: Experiment, dataset: Dataset) -> TrainOrder:
    """The sequences of every step."""
    sort_by_length = dataset.train.layout.sort_by_length
    return TrainOrder(dataset.train.lengths, experiment.train.batch_size, experiment.seed, sort_by_length)
