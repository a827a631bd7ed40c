"""What a run shows in TensorBoard: curves in groups, usage and key norms as histograms, the key stores in the projector, the
settings as text and as hyperparameters by which runs compare.

Its size is bounded: curves have a limited number of points whatever the run's length, and are smallest, mean and largest
over layers, not one a layer; a histogram has `BINS` bins whatever the number of experts; of the key stores only the newest
evaluation's lie there.

Shapes: E experts, D width.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from google.protobuf import text_format
from tensorboard.plugins.projector import ProjectorConfig
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from modeling.some import KeyStore
from trainer.comparison import differing_keys
from trainer.config import Experiment
from trainer.plain_yaml import dump_yaml
from trainer.text import visible

MOST_STEPS, MOST_EVALUATIONS, MOST_HISTOGRAMS = 5000, 1000, 50
"""How many of a run's steps, evaluations and histograms are shown, or one more; `metrics.jsonl` has all records."""
BINS = 30
NEAREST = 3
"""How many of an expert's nearest keys the projector names."""
TAGS = {
    "train": {
        "loss": "loss/train",
        "lr": "optimizer/learning_rate",
        "grad_norm": "optimizer/grad_norm",
        "skipped": "optimizer/skipped_steps",
        "tokens_per_second": "speed/tokens_per_second",
        "seconds": "speed/seconds_a_step",
        "tokens": "progress/tokens",
        "epoch": "progress/epoch",
    },
    "eval": {
        "val_loss": "loss/validation",
        "val_ppl": "loss/validation_ppl",
        "val_loss_with_padding": "loss/validation_with_padding",
        "val_loss_batch_mean": "loss/validation_batch_mean",
        "bits_per_byte": "loss/bits_per_byte",
        "nats_per_story": "loss/nats_per_story",
        "seconds": "speed/seconds_an_evaluation",
    },
    "checkpoint": {"seconds": "speed/seconds_a_checkpoint"},
}
"""Which numbers of a record are shown, and in which group."""
COMPARED = ("loss/validation", "loss/train", "speed/tokens_per_second", "routing/effective_experts/min")
"""The curves by whose last points runs are compared."""


class Board:
    """Writes the files of one run; rank 0 only. What is there of steps that are run again is no longer shown.

    Args:
        folder: the run's `tensorboard`.
        experiment: its settings.
        total_steps: its length.
        resumed_step: where it goes on.
    """

    def __init__(self, folder: Path, experiment: Experiment, total_steps: int, resumed_step: int):
        self._folder = folder
        self._pace = {"train": _Pace(total_steps, MOST_STEPS), "eval": _Pace(total_steps, MOST_EVALUATIONS)}
        self._pace_of_histograms = _Pace(total_steps, MOST_HISTOGRAMS)
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1 if resumed_step else 0)
        settings = experiment.to_dict()
        # Indented, every line is code to Markdown, so nothing in a setting is read as a tag or a link.
        lines = visible(dump_yaml(settings, allow_unicode=True), keep="\n").splitlines()
        self._writer.add_text("config", "\n".join(f"    {line}" for line in lines), 0)
        # What may change a curve; None is how TensorBoard shows a key that it does not have.
        compared = {key: value for key, (_, value) in differing_keys({}, settings).items()}
        compared = {key: str(value) if isinstance(value, bool) else value for key, value in compared.items()}
        session, start, self._session_end = hparams(compared, dict.fromkeys(COMPARED, 0))
        for summary in (session, start):
            self._writer.file_writer.add_summary(summary)

    def write(self, event: str, values: dict[str, Any]) -> None:
        """The numbers of one record of `metrics.jsonl`."""
        if event == "end" and values["finished"]:
            self._writer.file_writer.add_summary(self._session_end)
        step = values.get("step")
        if event not in TAGS or (event in self._pace and not self._pace[event].is_due(step)):
            return
        for key, tag in TAGS[event].items():
            if key in values:
                self._writer.add_scalar(tag, values[key], step)
        # Smallest, mean and largest over layers: the number of curves does not grow with layers or experts.
        layers = values.get("layers") or [{}]
        for key in [key for key, value in layers[0].items() if key != "layer" and isinstance(value, int | float)]:
            over_layers = [layer[key] for layer in layers]
            for name, value in {
                "min": min(over_layers), "mean": sum(over_layers) / len(over_layers), "max": max(over_layers)
            }.items():  # fmt: skip
                self._writer.add_scalar(f"routing/{key}/{name}", value, step)
        if event == "eval":
            self._writer.flush()

    def show_stores(self, step: int, stores: list[KeyStore]) -> None:
        """The key stores at an evaluation: their histograms, if it is time for them, and their keys in the projector."""
        keys = [store.keys.detach().float().cpu() for store in stores]
        usage = [_share(store.usage.detach().float().cpu()) for store in stores]
        if self._pace_of_histograms.is_due(step):
            for layer, (keys_ED, usage_E) in enumerate(zip(keys, usage, strict=True)):
                for tag, values_E in (("usage", usage_E), ("key_norm", keys_ED.norm(dim=-1))):
                    finite = values_E[values_E.isfinite()].numpy()  # a histogram takes no other
                    if len(finite):
                        self._writer.add_histogram(f"{tag}/layer_{layer:02}", finite, step, bins=BINS)
            self._writer.flush()
        if stores:
            self._write_projector(keys, usage)

    def _write_projector(self, keys: list[torch.Tensor], usage: list[torch.Tensor]) -> None:
        """In place of those before; the projector's format is raw fp32 numbers, a table of labels, and where they are."""
        config = ProjectorConfig()
        for layer, (keys_ED, usage_E) in enumerate(zip(keys, usage, strict=True)):
            name = f"keys_layer_{layer:02}"
            keys_ED.numpy().astype("<f4").tofile(self._folder / f"{name}.bytes")
            (self._folder / f"{name}.tsv").write_text(_labels(keys_ED, usage_E), encoding="utf-8")
            config.embeddings.add(
                tensor_name=name,
                tensor_shape=list(keys_ED.shape),
                tensor_path=f"{name}.bytes",
                metadata_path=f"{name}.tsv",
            )
        (self._folder / "projector_config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")

    def close(self) -> None:
        """Bring everything down to the files."""
        self._writer.close()


class _Pace:
    """Spreads at most `most` showings, and the last one, over a run."""

    def __init__(self, total_steps: int, most: int):
        self._total_steps, self._every = total_steps, total_steps / most
        self._last: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether to show this step, which is then the last one shown."""
        if self._last is not None and step - self._last < self._every and step != self._total_steps:
            return False
        self._last = step
        return True


def _share(usage_E: torch.Tensor) -> torch.Tensor:
    """(E,) usage relative to even usage, which is 1; zeros before training."""
    return usage_E * len(usage_E) / usage_E.sum().clamp(min=1e-30)


def _labels(keys_ED: torch.Tensor, usage_E: torch.Tensor) -> str:
    """A line for each expert: its id, its usage, how long its key is, and the keys nearest to it by cosine."""
    unit_ED = F.normalize(keys_ED, dim=-1)
    cosine_EE = (unit_ED @ unit_ED.T).fill_diagonal_(-2)
    nearest = cosine_EE.topk(min(NEAREST, len(keys_ED) - 1), dim=-1)
    norms_E = keys_ED.norm(dim=-1)
    lines = ["expert\tusage (1 = even)\tkey norm\tnearest keys (cosine)"]
    for expert, (ids, cosines) in enumerate(zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True)):
        near = ", ".join(f"{other} ({cosine:.2f})" for other, cosine in zip(ids, cosines, strict=True))
        lines.append(f"{expert}\t{usage_E[expert]:.3f}\t{norms_E[expert]:.3f}\t{near or 'none'}")
    return "\n".join(lines) + "\n"
