"""What the command line comes to, read and checked without torch: whoever mistypes a key gets the answer at once."""

import argparse
from dataclasses import dataclass
from typing import Any

from trainer.config import Experiment, load_experiment
from trainer.ds_config import load_ds_config
from trainer.launch import Launch
from trainer.layout import Layout
from trainer.plan import check_expert_size


@dataclass(frozen=True)
class Settings:
    """An experiment on this job's ranks."""

    experiment: Experiment
    launch: Launch
    layout: Layout
    ds_config: dict[str, Any]

    @staticmethod
    def read(arguments: argparse.Namespace, launch: Launch) -> "Settings":
        """Read and check everything but data and folders.

        Raises:
            ValueError: naming the flag, key or file, its value and the cure.
        """
        experiment = load_experiment(arguments.experiment, arguments.set)
        layout = Layout.of(experiment, launch)
        ds_config = load_ds_config(arguments.ds_config, experiment, layout, launch.world_size)
        experiment.faults.check(launch.world_size)
        if arguments.max_steps is not None and arguments.max_steps < 1:
            raise ValueError(f"--max_steps {arguments.max_steps}: must be at least 1")
        check_expert_size(experiment.model)
        return Settings(experiment, launch, layout, ds_config)
