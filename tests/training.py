"""Trainers as the command line makes them, on the ranks of `run_ranks`, and small data for them."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from tests.launch import FP32
from trainer.command_line import parse_arguments
from trainer.data import story
from trainer.distributed import broadcast_text
from trainer.job import decide
from trainer.launch import Launch
from trainer.loop import Trainer
from trainer.settings import Settings
from trainer.training import prepare_folder_and_data, prepare_trainer


def make_trainer(output_dir: Path, experiment: str, settings: list[str]) -> Trainer:
    """A trainer of this rank; `settings` are --set overrides. A run that lies in `output_dir` is continued."""
    changes = [part for setting in settings for part in ("--set", setting)]
    arguments = ["--ds_config", FP32, "--experiment", experiment, "--output_dir", str(output_dir), *changes]
    rank, world = dist.get_rank(), dist.get_world_size()
    flags = parse_arguments(arguments)
    job = decide(flags, Settings.read(flags, Launch(rank, world, rank, world)))
    data_folder = prepare_folder_and_data(job) if rank == 0 else None
    return prepare_trainer(job, Path(broadcast_text(str(data_folder))), torch.device("cpu"))


def train(trainer: Trainer, stop: int) -> list[dict]:
    """The run up to step `stop`; what this rank logged, all of it."""
    trainer.run(stop)
    if trainer.log is None:
        return []
    trainer.log.close()
    lines = (trainer.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def texts(number: int, first: int = 0) -> list[str]:
    """Beginnings of stories of 4 to 43 words, shorter and longer than a row of 32; a number tells them apart."""
    return [" ".join([str(i), *story(i).split()[: 3 + 7 * i % 40]]) for i in range(first, first + number)]


def write_texts(folder: Path, **splits: list[str]) -> Path:
    """`train.jsonl`, `validation.jsonl` and so on in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, documents in splits.items():
        lines = [json.dumps({"text": text}) for text in documents]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder
