"""Batches of similar length: the order of a run, and the micro batches of each rank.

Shape suffixes: B sequences of one batch, S positions (the longest of them, rounded up to a multiple of 16).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from modeling.transformer import NO_TARGET
from trainer.data.sequences import Sequences
from trainer.data.tokenizer import PAD_ID

WINDOW_BATCHES = 32  # sort within this many batches: similar lengths, but still a different mix every epoch

S_MULTIPLE = 16  # few distinct shapes: kernels compiled for a shape, as oneDNN's in bf16, are then reused


@dataclass
class Batch:
    """Right-padded sequences: input position s predicts targets_BS[:, s]."""

    input_ids_BS: torch.Tensor
    """int64; PAD_ID at padding."""
    targets_BS: torch.Tensor
    """int64; -100 at padding."""
    attention_mask_BS: torch.Tensor
    """bool; True at real positions."""

    @property
    def num_tokens(self) -> int:
        """Number of targets that count. Waits for the device if the tensors are on one."""
        return int((self.targets_BS != NO_TARGET).sum())


class TrainOrder:
    """The sequences of every step of a run, as a pure function of (lengths, batch_size, seed, step).

    Each epoch draws a new permutation. The sequences beyond the last full batch are its tail, so they differ from
    epoch to epoch and nothing is left out for good. Within windows of 32 batches sequences are sorted by length, cut
    into batches, and the batches of the epoch are then shuffled.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int):
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
        rows = [sequences[i] for i in ordered[start : start + per_round][rank::world_size]]
        yield _collate(rows, longest)


def _collate(rows: list[np.ndarray], longest: int) -> Batch:
    """Rows of ids [n_i] to a batch with B = len(rows); [1, 1] and all masked without rows.

    S is max(n_i) - 1 rounded up to a multiple of S_MULTIPLE, but not beyond `longest`, the longest of all sequences.
    """
    width = max((len(row) - 1 for row in rows), default=1)
    shape_BS = (max(len(rows), 1), max(width, min(-(-width // S_MULTIPLE) * S_MULTIPLE, longest)) if rows else 1)
    input_ids_BS = torch.full(shape_BS, PAD_ID, dtype=torch.int64)
    targets_BS = torch.full(shape_BS, NO_TARGET, dtype=torch.int64)
    attention_mask_BS = torch.zeros(shape_BS, dtype=torch.bool)
    for b, row in enumerate(rows):
        ids = torch.from_numpy(row)
        input_ids_BS[b, : len(row) - 1] = ids[:-1]
        targets_BS[b, : len(row) - 1] = ids[1:]
        attention_mask_BS[b, : len(row) - 1] = True
    return Batch(input_ids_BS, targets_BS, attention_mask_BS)
