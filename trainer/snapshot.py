"""The tensors of a checkpoint: copied from a run to be saved, and put back into one that goes on."""

import json
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling.some import KeyStore
from trainer.checkpoint import CORE, KEYS, OPTIMIZER, RunState
from trainer.engine import MOMENTS, CoreState


@dataclass(frozen=True)
class Snapshot:
    """What one checkpoint holds: copies on the CPU, which do not change while training goes on."""

    state: RunState
    tensors: dict[str, dict[str, torch.Tensor]]
    """By file and name."""

    @staticmethod
    def of(state: RunState, core: CoreState, stores: list[KeyStore]) -> "Snapshot":
        """Of a run as it is now; `core` is the snapshot's from now on."""
        steps = dict(key_store_steps=[store.steps for store in stores], optimizer_steps=core.steps)
        return Snapshot(
            state=deepcopy(replace(state, **steps)),
            tensors={
                CORE: core.parameters,
                OPTIMIZER: {f"{moment}/{name}": t for moment, values in core.moments.items() for name, t in values.items()},
                KEYS: {
                    f"{layer}/{name}": buffer.detach().to("cpu", copy=True)
                    for layer, store in enumerate(stores)
                    for name, buffer in store.named_buffers()
                },
            },
        )

    @property
    def num_bytes(self) -> int:
        """What it takes on a disk, a little rounded up."""
        tensors = [tensor for file in self.tensors.values() for tensor in file.values()]
        return sum(tensor.nbytes + 256 for tensor in tensors) + len(self.state_json()) + 2**16

    def state_json(self) -> bytes:
        """The contents of `state.json`."""
        return json.dumps(asdict(self.state), indent=1).encode()


def load_checkpoint(folder: Path, saved: RunState, stores: list[KeyStore]) -> CoreState:
    """Put the key stores back in place and return the core."""
    keys = load_file(folder / KEYS)
    for layer, store in enumerate(stores):
        for name, buffer in store.named_buffers():
            buffer.copy_(keys[f"{layer}/{name}"])
        store.steps = saved.key_store_steps[layer]
    moments = load_file(folder / OPTIMIZER)
    parameters = load_file(folder / CORE)
    return CoreState(
        parameters=parameters,
        moments={moment: {name: moments[f"{moment}/{name}"] for name in parameters} for moment in MOMENTS},
        steps=saved.optimizer_steps,
    )
