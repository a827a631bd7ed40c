"""Evaluation on all ranks: every validation sequence once, weighted by its real tokens.

Shapes: N sequences of the split, T positions with a target.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from modeling import Transformer
from modeling.cross_entropy import NO_TARGET
from trainer.config import Experiment
from trainer.data import Batch, Sequences, eval_batches
from trainer.metrics import RoutingMeter
from trainer.served import ServedTokens


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation measured, over all ranks."""

    record: dict[str, Any]
    """The numbers that `metrics.jsonl` keeps."""
    served: list[torch.Tensor]
    """Of each SoME layer, the tokens that each expert serves most, as `ServedTokens.most` gives them."""
    pairs: list[torch.Tensor]
    """Of each SoME layer (E, E) int32, how many real tokens chose both experts."""


@torch.no_grad()
def evaluate(
    model: Transformer,
    sequences: Sequences,
    experiment: Experiment,
    micro_batch: int,
    device: torch.device,
    gives_up: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Losses on the validation split and how its tokens were routed; a collective, the same result on every rank.

    `gives_up` is asked on every rank before each of its batches, of which all have as many, and must say the same on all.

    Returns:
        None where it was given up, else as `record`
        `val_loss` nats per real token, `val_ppl` its exponential, `nats_per_story`, `bits_per_byte` (of the text's UTF-8),
        `val_tokens`, and `layers`, one record a SoME layer. With padded rows besides, by the published convention (specs
        1.3: the unweighted mean over batches of their mean loss): `val_loss_with_padding` where padding is counted,
        `val_loss_batch_mean` where it is not.
    """
    stores = [layer.store for layer in model.some_layers]
    meter, config = RoutingMeter(stores), model.config
    served = ServedTokens(len(stores), config.some.num_experts, config.vocab_size, device)
    real = torch.zeros(2, dtype=torch.float64, device=device)
    rows_N2 = torch.zeros(len(sequences), 2, dtype=torch.float64, device=device)
    model.eval()
    for batch in eval_batches(sequences, dist.get_rank(), dist.get_world_size(), micro_batch):
        if gives_up():
            model.train()
            return None
        mask_BS = batch.routing_mask
        out = model(
            batch.input_ids_BS.to(device),
            None if mask_BS is None else mask_BS.to(device),
            targets_BS=batch.targets_BS.to(device),
        )
        routed_BS = batch.attention_mask_BS
        token_ids_T, is_real_T = (values_BS[routed_BS].to(device) for values_BS in (batch.input_ids_BS, batch.is_real_BS))
        meter.add(out.routing, is_real_T)
        served.add(out.routing, token_ids_T, is_real_T)
        real_T, rows_T = _real_and_row(batch)
        losses_T = out.losses_T.double()
        real += torch.stack([losses_T[real_T.to(device)].sum(), real_T.sum().to(device)])
        rows_N2.index_add_(0, rows_T.to(device), torch.stack([losses_T, torch.ones_like(losses_T)], 1))
    model.train()
    dist.all_reduce(real)
    nats, tokens = real.tolist()
    loss = nats / tokens
    published = {}
    if experiment.data.rows == "padded":
        dist.all_reduce(rows_N2)
        name = "val_loss_with_padding" if experiment.data.count_padding else "val_loss_batch_mean"
        published[name] = mean_of_batch_means(rows_N2, experiment.train.batch_size, experiment.data.drop_last_validation)
    record = {
        "val_loss": loss,
        "val_ppl": math.exp(min(loss, 700.0)),
        **published,
        "nats_per_story": nats / sequences.num_documents,
        # Rows whose only targets are ends of documents have no bytes.
        "bits_per_byte": nats / math.log(2) / num_bytes if (num_bytes := int(sequences.num_bytes.sum())) else math.inf,
        "val_tokens": int(tokens),
        "layers": meter.result([layer.placement for layer in model.some_layers]),
    }
    return Evaluation(record, served.most(), meter.pairs)


def mean_of_batch_means(rows_N2: torch.Tensor, batch_size: int, drop_last: bool) -> float:
    """The published epoch loss: rows (sum of losses, number of targets) in order, in batches, each with equal weight.

    A split smaller than one batch is one batch, or nothing could be said of it.
    """
    batches = list(rows_N2.split(batch_size))
    if drop_last and len(batches) > 1 and len(batches[-1]) < batch_size:
        batches.pop()
    sums = [batch.sum(0) for batch in batches]
    means = [float(nats / targets) for nats, targets in sums if targets > 0]
    return sum(means) / len(means)


def _real_and_row(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """For every position with a target: (T,) bool, whether it is a real token, and (T,) int64, its sequence."""
    counted_BS = batch.targets_BS != NO_TARGET
    rows_BS = batch.sequence_ids_B[:, None].expand_as(batch.targets_BS)
    return batch.is_real_BS[counted_BS], rows_BS[counted_BS]
