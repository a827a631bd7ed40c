"""Evaluation on all ranks: every validation sequence once, weighted by its real tokens."""

import math
from typing import Any

import torch
import torch.distributed as dist

from modeling import Transformer
from trainer.data import Sequences, eval_batches
from trainer.metrics import RoutingMeter


@torch.no_grad()
def evaluate(model: Transformer, sequences: Sequences, micro_batch: int, device: torch.device) -> dict[str, Any]:
    """Losses on the validation split and how its tokens were routed; a collective, the same result on every rank.

    Returns:
        `val_loss` nats per real token, `val_ppl` its exponential, `nats_per_story`, `bits_per_byte` (of the text's UTF-8),
        and `layers`, one record a SoME layer.
    """
    stores = [layer.store for layer in model.some_layers]
    meter = RoutingMeter(stores)
    loss_and_tokens = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    for batch in eval_batches(sequences, dist.get_rank(), dist.get_world_size(), micro_batch):
        out = model(
            batch.input_ids_BS.to(device), batch.attention_mask_BS.to(device), targets_BS=batch.targets_BS.to(device)
        )
        meter.add(out.routing)
        loss_and_tokens += torch.tensor([out.losses_T.double().sum(), out.losses_T.numel()], device=device)
    model.train()
    dist.all_reduce(loss_and_tokens)
    nats, tokens = loss_and_tokens.tolist()
    loss = nats / tokens
    return {
        "val_loss": loss,
        "val_ppl": math.exp(min(loss, 700.0)),
        "nats_per_story": nats / sequences.num_documents,
        "bits_per_byte": nats / math.log(2) / int(sequences.num_bytes.sum()),
        "val_tokens": int(tokens),
        "layers": meter.result([layer.placement.rank_of_E for layer in model.some_layers]),
    }
