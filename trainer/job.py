"""A run as it is decided before the ranks meet: what to train, where, spread how, and from which checkpoint."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import RunState, check_resumable
from trainer.config import Experiment
from trainer.data import Dataset, TrainOrder
from trainer.distributed import Launch, Layout
from trainer.ds_config import set_precision
from trainer.lock import FolderLock
from trainer.plan import Deployment, Sharding, most_replicas
from trainer.precision import Precision
from trainer.resume import Found


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
        """Whether it goes on in the folder of its checkpoint."""
        return self.checkpoint is not None and self.output_dir.resolve() in self.checkpoint.resolve().parents

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


def train_order(experiment: Experiment, dataset: Dataset) -> TrainOrder:
    """The sequences of every step."""
    sort_by_length = dataset.train.layout.sort_by_length
    return TrainOrder(dataset.train.lengths, experiment.train.batch_size, experiment.seed, sort_by_length)
