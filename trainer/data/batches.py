"""Batches of similar length: the order of a run, and the micro batches of each rank.

Shape suffixes: B sequences of one batch, S positions (the longest of them, rounded up to a multiple of 16; exactly
model.max_seq_len where padding counts).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from modeling.cross_entropy import NO_TARGET
from trainer.data.sequences import RowLayout, Sequences

WINDOW_BATCHES = 32  # sort within this many batches: similar lengths, but still a different mix every epoch

S_MULTIPLE = 16  # few distinct shapes: kernels compiled for a shape, as oneDNN's in bf16, are then reused


@dataclass
class Batch:
    """Right-padded sequences: input position s predicts targets_BS[:, s]."""

    input_ids_BS: torch.Tensor
    """int64; the tokenizer's [PAD] at padding."""
    targets_BS: torch.Tensor
    """int64; -100 where no target counts: at padding, unless it counts, and where a row ends."""
    attention_mask_BS: torch.Tensor
    """bool; True at positions that are routed: those with a target, or all of a row where padding counts."""
    is_real_BS: torch.Tensor
    """bool; True at positions whose target is a real token, never padding."""
    sequence_ids_B: torch.Tensor
    """int64; index of each row in its split, -1 for the masked row of a rank that has run out."""
    max_seq_len: int
    """Most positions a row of this data can have; see `token_ids_BS`."""

    @property
    def token_ids_BS(self) -> torch.Tensor:
        """int64; of every position an id that no other position of the split has, in whatever batch it comes."""
        positions_S = torch.arange(self.input_ids_BS.shape[1], device=self.sequence_ids_B.device)
        return self.sequence_ids_B[:, None] * (self.max_seq_len + 1) + positions_S

    @property
    def routing_mask(self) -> torch.Tensor | None:
        """`attention_mask_BS`, or None where every position is routed, which saves the model picking them out."""
        return None if bool(self.attention_mask_BS.all()) else self.attention_mask_BS


class TrainOrder:
    """The sequences of every step of a run, as a pure function of (lengths, batch_size, seed, step).

    Each epoch draws a new permutation. The sequences beyond the last full batch are its tail, so they differ from
    epoch to epoch and nothing is left out for good. Within windows of 32 batches sequences are sorted by length, cut
    into batches, and the batches of the epoch are then shuffled. Without `sort_by_length` the permutation is cut into
    batches as it is.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, sort_by_length: bool = True):
        """`lengths` int [N]. Raises ValueError (train.batch_size) if it is below 1 or above N."""
        if batch_size < 1:
            raise ValueError(f"train.batch_size={batch_size} must be 1 or more")
        self.steps_per_epoch = len(lengths) // batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"train.batch_size={batch_size} is more than the {len(lengths)} training sequences: "
                "lower it or use more documents"
            )
        self._lengths = np.asarray(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._sort_by_length = sort_by_length
        self._epoch = -1
        self._batches = np.empty((0, batch_size), dtype=np.int64)

    def sequence_ids(self, step: int) -> np.ndarray:
        """Ids of the sequences of `step` (0 is the first of the run): int64 [batch_size], in no particular order."""
        if step < 0:
            raise IndexError(f"step {step} is before the first step 0")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._batches, self._epoch = self._order(epoch), epoch
        return self._batches[step_in_epoch].copy()

    def _order(self, epoch: int) -> np.ndarray:
        # RandomState, not default_rng: NumPy keeps its stream over versions, so that a resumed run finds its order.
        words = np.frombuffer(hashlib.sha256(f"{self._seed}/{epoch}".encode()).digest(), dtype="<u4")
        random = np.random.RandomState(words)
        permutation = random.permutation(len(self._lengths))[: self.steps_per_epoch * self._batch_size]
        if not self._sort_by_length:
            return permutation.reshape(self.steps_per_epoch, self._batch_size).astype(np.int64)
        window = WINDOW_BATCHES * self._batch_size
        parts = [permutation[start : start + window] for start in range(0, len(permutation), window)]
        ordered = np.concatenate([part[np.argsort(self._lengths[part], kind="stable")] for part in parts])
        batches = ordered.reshape(self.steps_per_epoch, self._batch_size).astype(np.int64)
        return batches[random.permutation(self.steps_per_epoch)]


def micro_batches(
    sequences: Sequences, ids: Sequence[int] | np.ndarray, rank: int, world_size: int, micro_batch_size: int
) -> list[Batch]:
    """The micro batches of one rank for the global batch `ids`, longest first.

    `ids`, sorted by length, are dealt out in rounds of world_size * micro_batch_size, within a round to the ranks in
    turn, so that all ranks work on similar lengths at the same time. Over all ranks every id occurs exactly once, and
    every rank gets the same number of batches of at most `micro_batch_size` sequences; a rank that has run out in the
    last round gets a fully masked batch of shape [1, 1].
    """
    return list(_deal(sequences, np.asarray(ids), rank, world_size, micro_batch_size))


def eval_batches(sequences: Sequences, rank: int, world_size: int, micro_batch_size: int) -> Iterator[Batch]:
    """Every sequence exactly once over all ranks, one batch at a time, longest first; see `micro_batches`.

    Every rank gets the same number of batches; one that has run out gets a fully masked batch of shape [1, 1].
    """
    return _deal(sequences, np.arange(len(sequences)), rank, world_size, micro_batch_size)


def _deal(sequences: Sequences, ids: np.ndarray, rank: int, world_size: int, micro_batch_size: int) -> Iterator[Batch]:
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size={micro_batch_size} must be 1 or more")
    assert 0 <= rank < world_size
    longest = int(sequences.lengths.max())
    ordered = ids[np.argsort(-sequences.lengths[ids], kind="stable")]
    per_round = world_size * micro_batch_size
    for start in range(0, len(ordered), per_round):
        chosen = ordered[start : start + per_round][rank::world_size]
        yield _collate([sequences[i] for i in chosen], chosen, longest, sequences.layout)


def _collate(rows: list[np.ndarray], ids: np.ndarray, longest: int, layout: RowLayout) -> Batch:
    """Rows of ids [n_i], of the sequences `ids`, to a batch with B = len(rows); [1, 1] and all masked without rows.

    S is max(n_i) - 1 rounded up to a multiple of S_MULTIPLE, but not beyond `longest`, the longest of all sequences;
    where padding counts it is max_seq_len.
    """
    if not rows:
        B, S = 1, 1
    elif layout.count_padding:
        B, S = len(rows), layout.max_seq_len
    else:
        width = max(1, *(len(row) - 1 for row in rows))  # a padded row may be a single id, without a target
        B, S = len(rows), max(width, min(-(-width // S_MULTIPLE) * S_MULTIPLE, longest))
    input_ids_BS = torch.full((B, S), layout.pad_id, dtype=torch.int64)
    targets_BS = torch.full((B, S), NO_TARGET, dtype=torch.int64)
    is_real_BS = torch.zeros((B, S), dtype=torch.bool)
    for b, row in enumerate(rows):
        row_ids = torch.from_numpy(row)
        is_real_BS[b, : len(row) - 1] = True
        if layout.count_padding:
            input_ids_BS[b, : len(row)] = row_ids
            targets_BS[b, :-1] = input_ids_BS[b, 1:]
        else:
            input_ids_BS[b, : len(row) - 1] = row_ids[:-1]
            targets_BS[b, : len(row) - 1] = row_ids[1:]
    attention_mask_BS = torch.ones_like(is_real_BS) if layout.count_padding and rows else is_real_BS.clone()
    sequence_ids_B = torch.tensor(ids if rows else [-1], dtype=torch.int64)
    return Batch(input_ids_BS, targets_BS, attention_mask_BS, is_real_BS, sequence_ids_B, layout.max_seq_len)
