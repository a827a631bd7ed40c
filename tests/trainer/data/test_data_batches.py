"""Batches: each sequence where it should be exactly once, ranks in step, an order that only (seed, step) decide."""

import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from modeling.cross_entropy import NO_TARGET
from trainer.data import PAD_ID, RowLayout, TrainOrder, eval_batches, micro_batches
from trainer.data.batches import WINDOW_BATCHES


class Rows:
    """Stands in for Sequences: row i holds ids that occur in no other row."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths, dtype=np.int64)
        self.layout = RowLayout(max_seq_len=max(lengths))
        starts = np.cumsum([2, *(n + 1 for n in lengths)])
        self.rows = [np.arange(start, start + n + 1) for start, n in zip(starts, lengths, strict=False)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def random_rows(rng, most=80):
    return Rows([rng.randrange(1, 40) for _ in range(rng.randrange(1, most))])


def contents(batch):
    """The rows of a batch as (inputs, targets) of plain ids, padding checked and removed."""
    rows = []
    for inputs, targets, mask in zip(batch.input_ids_BS, batch.targets_BS, batch.attention_mask_BS, strict=True):
        n = int(mask.sum())
        assert mask[:n].all() and not mask[n:].any(), "padding must be on the right"
        assert (inputs[n:] == PAD_ID).all() and (targets[n:] == -100).all()
        assert (targets[:n] != -100).all()
        if n:
            rows.append((tuple(inputs[:n].tolist()), tuple(targets[:n].tolist())))
    return rows


def expected(sequences, ids):
    return Counter((tuple(sequences[i][:-1].tolist()), tuple(sequences[i][1:].tolist())) for i in ids)


def check_deal(sequences, ids, world, micro, per_rank):
    assert len({len(batches) for batches in per_rank}) == 1, "ranks differ in their number of batches"
    assert len(per_rank[0]) == -(-len(ids) // (world * micro))
    seen = Counter()
    for batches in per_rank:
        for batch in batches:
            assert (batch.input_ids_BS.dtype, batch.targets_BS.dtype) == (torch.int64, torch.int64)
            assert batch.attention_mask_BS.dtype == torch.bool
            rows = contents(batch)
            seen.update(rows)
            assert len(rows) <= micro
            assert int((batch.targets_BS != NO_TARGET).sum()) == sum(len(targets) for _, targets in rows)
            if rows:
                longest = max(len(inputs) for inputs, _ in rows)
                width = min(-(-longest // 16) * 16, int(sequences.lengths.max()))
                assert batch.input_ids_BS.shape == (len(rows), width)
            else:
                assert batch.input_ids_BS.shape == (1, 1)
    assert seen == expected(sequences, ids)
    # Round by round, over all ranks together, lengths only go down.
    rounds = [[len(t) for batch in step for _, t in contents(batch)] for step in zip(*per_rank, strict=True)]
    assert all(min(a) >= max(b) for a, b in zip(rounds, rounds[1:], strict=False))


def test_micro_batches_cover_the_batch_for_any_world():
    rng = random.Random(0)
    for _ in range(150):
        sequences = random_rows(rng)
        ids = np.array(rng.sample(range(len(sequences)), rng.randrange(1, len(sequences) + 1)))
        world, micro = rng.randrange(1, 6), rng.randrange(1, 7)
        per_rank = [micro_batches(sequences, ids, rank, world, micro) for rank in range(world)]
        check_deal(sequences, ids, world, micro, per_rank)


def test_micro_batches_deal_in_turn():
    sequences = Rows([5, 9, 1, 7, 3, 8, 2, 6])
    first = [micro_batches(sequences, range(8), rank, 2, 2) for rank in range(2)]
    lengths = [[batch.attention_mask_BS.sum(1).tolist() for batch in batches] for batches in first]
    assert lengths == [[[9, 7], [5, 2]], [[8, 6], [3, 1]]]


def test_eval_batches_cover_everything_once():
    rng = random.Random(1)
    for _ in range(100):
        sequences = random_rows(rng)
        world, micro = rng.randrange(1, 6), rng.randrange(1, 7)
        per_rank = [list(eval_batches(sequences, rank, world, micro)) for rank in range(world)]
        check_deal(sequences, range(len(sequences)), world, micro, per_rank)


def test_a_rank_without_rows_gets_a_masked_batch():
    (batch,) = micro_batches(Rows([4]), [0], 1, 2, 3)
    assert batch.input_ids_BS.tolist() == [[PAD_ID]] and batch.targets_BS.tolist() == [[-100]]
    assert batch.attention_mask_BS.tolist() == [[False]] and int((batch.targets_BS != NO_TARGET).sum()) == 0


def test_micro_batch_size_is_checked():
    with pytest.raises(ValueError, match="micro_batch_size=0"):
        micro_batches(Rows([4]), [0], 0, 1, 0)


def test_order_is_an_epoch_of_distinct_sequences():
    rng = random.Random(2)
    for _ in range(50):
        size, batch_size = rng.randrange(1, 300), rng.randrange(1, 20)
        if size < batch_size:
            continue
        order = TrainOrder(np.array([rng.randrange(1, 50) for _ in range(size)]), batch_size, seed=rng.randrange(100))
        assert order.steps_per_epoch == size // batch_size
        for epoch in range(3):
            steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
            ids = np.concatenate([order.sequence_ids(step) for step in steps])
            assert len(set(ids.tolist())) == len(ids) == order.steps_per_epoch * batch_size
            assert 0 <= ids.min() and ids.max() < size


def test_order_is_a_pure_function_of_seed_and_step():
    lengths = np.random.RandomState(0).randint(1, 100, size=500)
    forward = TrainOrder(lengths, 8, seed=7)
    steps = [forward.sequence_ids(step).tolist() for step in range(200)]
    jumping = TrainOrder(lengths, 8, seed=7)
    for step in random.Random(0).sample(range(200), 60):
        ids = jumping.sequence_ids(step)
        assert ids.tolist() == steps[step]
        ids[:] = -1  # a caller may not change the order of the run
        assert jumping.sequence_ids(step).tolist() == steps[step]
    assert TrainOrder(lengths, 8, seed=8).sequence_ids(0).tolist() != steps[0]
    assert steps[:62] != steps[62:124], "epochs must differ"
    state = np.random.get_state()[1].tolist()
    TrainOrder(lengths, 8, seed=7).sequence_ids(3)
    assert np.random.get_state()[1].tolist() == state


def test_order_is_frozen():
    """A change here breaks the resumption of every running experiment: the value is what the first release draws."""
    code = (
        "import numpy as np; from trainer.data import TrainOrder; o = TrainOrder(np.arange(20) % 7 + 1, 4, 3); "
        "print([o.sequence_ids(s).tolist() for s in (0, 7)])"
    )
    env = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "99"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[[8, 1, 9, 2], [8, 1, 16, 9]]"


def test_left_over_sequences_change():
    order = TrainOrder(np.ones(103, dtype=np.int64), 10, seed=0)
    left = []
    for epoch in range(8):
        used = np.concatenate([order.sequence_ids(epoch * 10 + step) for step in range(10)])
        left.append(frozenset(range(103)) - set(used.tolist()))
    assert all(len(ids) == 3 for ids in left) and len(set(left)) == 8


def test_batches_have_similar_lengths_but_no_order_of_length():
    lengths = np.random.RandomState(0).randint(1, 1000, size=WINDOW_BATCHES * 16 * 3)
    order = TrainOrder(lengths, 16, seed=0)
    batches = [lengths[order.sequence_ids(step)] for step in range(order.steps_per_epoch)]
    spread = np.mean([batch.max() - batch.min() for batch in batches])
    assert spread < 1000 / WINDOW_BATCHES * 2, "sorted windows make a batch as narrow as its share of all lengths"
    means = np.array([batch.mean() for batch in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.4, "batches must not run from short to long"
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.4


def test_batch_size_is_checked():
    for size in (0, 11):
        with pytest.raises(ValueError, match=rf"train\.batch_size={size}"):
            TrainOrder(np.ones(10), size, seed=0)
    assert TrainOrder(np.ones(10), 10, seed=0).steps_per_epoch == 1
    with pytest.raises(IndexError):
        TrainOrder(np.ones(10), 5, seed=0).sequence_ids(-1)
