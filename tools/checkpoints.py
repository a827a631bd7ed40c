"""A trained model as a checkpoint has it, and the data that it was trained on."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from modeling import Transformer, build_model
from trainer.checkpoint import RunState
from trainer.config import Experiment
from trainer.data import check_source, open_data, prepare_data
from trainer.paths import local_path
from trainer.snapshot import load_checkpoint


def dtype_of(precision: str) -> torch.dtype:
    """In which a run of this precision computes."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def load_model(
    folder: Path, state: RunState, experiment: Experiment, ep_group: dist.ProcessGroup | None = None
) -> Transformer:
    """The model of a verified checkpoint, its experts drawn again from the seed.

    Args:
        folder: the checkpoint.
        state: what is in it.
        experiment: the checkpoint's; `parallel` may differ.
        ep_group: ranks that share the pool; None = all experts here.
    """
    dtype = dtype_of(state.precision)
    model = build_model(experiment.model, experiment.seed, ep_group, dtype)
    core = load_checkpoint(folder, state, [layer.store for layer in model.some_layers])
    for name, parameter in model.named_parameters():
        parameter.data = core.parameters.get(name, parameter.data).to(dtype)
    return model


def find_data(experiment: Experiment, path: str | None, fingerprint: str) -> Path:
    """The folder of the tokenised data that a checkpoint was trained on, made again where the cache has it no more.

    Args:
        experiment: the checkpoint's.
        path: where the data lies now; None = where it lay.
        fingerprint: the checkpoint's.

    Raises:
        ValueError: other data, or none.
    """
    data, model = experiment.data, experiment.model
    data = data if path is None else replace(data, path=local_path(path, "--data_path"))
    check_source(data)
    folder = prepare_data(data, model.vocab_size, model.max_seq_len, experiment.seed)
    if open_data(folder).fingerprint != fingerprint:
        raise ValueError(f"data.path = {data.path}: the run was trained on other data; name its place with --data_path")
    return folder
