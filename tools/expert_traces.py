"""What a trained model does with a text: where each token was routed, and what an expert is worth to it.

A token's experts are those of the position where it is the *input*: the layers see it there and predict the next one.
(Published traces print the experts of the last input beside the token that was generated from it, and so are off by one.)

Shapes: T tokens with a target, in the order of the text, L SoME layers, K experts a token, B sequences, S positions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tokenizers import Tokenizer

from modeling import Transformer
from modeling.cross_entropy import NO_TARGET
from modeling.some.exchange import Exchange
from modeling.some.experts import FrozenExpertPool
from trainer.data import RowLayout, Sequences, micro_batches
from trainer.data.sequences import write_rows, write_sequences


@dataclass(frozen=True)
class Trace:
    """Every token that the model reads and predicts from; padding is left out."""

    token_ids_T: torch.Tensor
    """int64, the token that is read, and routed."""
    targets_T: torch.Tensor
    """int64, the token that follows it."""
    rows_T: torch.Tensor
    """int64, its sequence: a document, or a piece of one that is longer than `model.max_seq_len`."""
    positions_T: torch.Tensor
    """int64, its place there."""
    losses_T: torch.Tensor
    """fp32, nats of predicting the next token."""
    expert_ids_LTK: torch.Tensor
    """int64, the experts that serve it, best first."""
    gates_LTK: torch.Tensor
    """fp32, their weights."""


FIELDS = [field.name for field in fields(Trace)]


def tokenise(text: str, tokenizer: Tokenizer, vocab_size: int, layout: RowLayout) -> Sequences:
    """A text as one document, in the way that the model was trained to read documents (`trainer/data/sequences.py`).

    Raises:
        ValueError: no token to predict.
    """
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "text"
        if layout.rows == "chunks":
            write_sequences(folder, [text], tokenizer, vocab_size, layout.max_seq_len)
        else:
            write_rows(folder, [text], tokenizer, vocab_size, layout)
        return Sequences(folder, layout)  # mapped, so the files may go


@torch.no_grad()
def trace(model: Transformer, sequences: Sequences, count: int, micro_batch: int) -> Trace:
    """The first `count` sequences as the model evaluates them, `micro_batch` at a time."""
    model.eval()
    parts = []
    for batch in micro_batches(sequences, np.arange(min(count, len(sequences))), 0, 1, micro_batch):
        out = model(batch.input_ids_BS, batch.routing_mask, targets_BS=batch.targets_BS)
        real_BS = batch.is_real_BS
        routed_T, counted_T = real_BS[batch.attention_mask_BS], real_BS[batch.targets_BS != NO_TARGET]
        rows_BS = batch.sequence_ids_B[:, None].expand_as(real_BS)
        positions_BS = torch.arange(real_BS.shape[1]).expand_as(real_BS)
        parts.append(
            Trace(
                token_ids_T=batch.input_ids_BS[real_BS],
                targets_T=batch.targets_BS[real_BS],
                rows_T=rows_BS[real_BS],
                positions_T=positions_BS[real_BS],
                losses_T=out.losses_T[counted_T],
                expert_ids_LTK=torch.stack([record.expert_ids_TK[routed_T] for record in out.routing]),
                gates_LTK=torch.stack([record.gates_TK[routed_T] for record in out.routing]),
            )
        )
    # Batches come longest row first; the text goes by rows, then positions.
    joined = {name: torch.cat([getattr(part, name) for part in parts], _tokens_dim(name)) for name in FIELDS}
    order_T = (joined["rows_T"] * (sequences.layout.max_seq_len + 1) + joined["positions_T"]).argsort()
    return Trace(**{name: values.index_select(_tokens_dim(name), order_T) for name, values in joined.items()})


def _tokens_dim(name: str) -> int:
    """Which dimension of a field of `Trace` counts tokens."""
    return name.rpartition("_")[2].index("T")


@contextmanager
def disabled(model: Transformer, layer: int, expert: int) -> Iterator[None]:
    """In this block the expert adds nothing to the tokens that choose it; their other experts keep their gates."""
    some = model.some_layers[layer]
    whole = some.exchange
    some.exchange = _Without(whole, expert)
    try:
        yield
    finally:
        some.exchange = whole


class _Without:
    """An exchange of a whole pool, but for one expert."""

    def __init__(self, exchange: Exchange, expert: int):
        self._exchange, self._expert = exchange, expert

    def __call__(
        self, x_TD: torch.Tensor, gates_TK: torch.Tensor, expert_ids_TK: torch.Tensor, pool: FrozenExpertPool
    ) -> torch.Tensor:
        here_TK = expert_ids_TK.masked_fill(expert_ids_TK == self._expert, -1)  # -1: not in this pool
        return self._exchange(x_TD, gates_TK, here_TK, pool)
