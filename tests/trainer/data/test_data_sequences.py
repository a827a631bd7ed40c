"""Token sequences: nothing lost, every target once, whatever the lengths and the maximum."""

import random

import numpy as np
import pytest

from trainer.data import EOS_ID, Sequences, story, train_tokenizer
from trainer.data.sequences import ARRAYS, chunk, write_sequences

TEXTS = [story(i) for i in range(40)] + ["a", "ünïcödé 🙂", " "]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


def slow_chunks(ids, max_seq_len):
    chunks, start = [], 0
    while start < len(ids) - 1:
        chunks.append(list(ids[start : start + max_seq_len + 1]))
        start += len(chunks[-1]) - 1
    return chunks


def test_chunks_against_slow_version():
    rng = random.Random(0)
    for _ in range(500):
        ids = np.arange(rng.randrange(2, 60))
        max_seq_len = rng.randrange(1, 30)
        chunks = chunk(ids, max_seq_len)
        assert [list(c) for c in chunks] == slow_chunks(ids, max_seq_len)
        assert [int(target) for c in chunks for target in c[1:]] == list(range(1, len(ids)))
        assert all(2 <= len(c) <= max_seq_len + 1 for c in chunks)


@pytest.mark.parametrize("max_seq_len", [1, 7, 50, 100_000])
def test_round_trip(tmp_path, tokenizer, max_seq_len):
    summary = write_sequences(tmp_path / "split", TEXTS, tokenizer, 400, max_seq_len)
    sequences = Sequences(tmp_path / "split")
    expected, num_bytes, starts = [], [], []
    for text in TEXTS:
        chunks = slow_chunks([EOS_ID, *tokenizer.encode(text).ids, EOS_ID], max_seq_len)
        expected += chunks
        num_bytes += [len(text.encode())] + [0] * (len(chunks) - 1)
        starts += [True] + [False] * (len(chunks) - 1)
    assert [row.tolist() for row in sequences] == expected
    assert sequences[0].dtype == np.int64
    assert sequences.num_bytes.tolist() == num_bytes
    assert sequences.starts_document.tolist() == starts
    assert sequences.lengths.tolist() == [len(row) - 1 for row in expected]
    assert sequences.num_documents == len(TEXTS)
    assert summary == {
        "documents": len(TEXTS),
        "sequences": len(expected),
        "tokens": sum(len(tokenizer.encode(text).ids) + 1 for text in TEXTS),
        "bytes": sum(len(text.encode()) for text in TEXTS),
    }


def test_index_range(tmp_path, tokenizer):
    write_sequences(tmp_path / "split", ["a", "b"], tokenizer, 400, 9)
    sequences = Sequences(tmp_path / "split")
    for index in (-1, 2):
        with pytest.raises(IndexError):
            sequences[index]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65535, np.uint16), (65536, np.int32)])
def test_storage_type(tmp_path, tokenizer, vocab_size, dtype):
    write_sequences(tmp_path / "split", ["a"], tokenizer, vocab_size, 9)
    assert np.load(tmp_path / "split" / "tokens.npy").dtype == dtype


def test_more_documents_than_one_slice(tmp_path, tokenizer, monkeypatch):
    write_sequences(tmp_path / "one", TEXTS, tokenizer, 400, 50)
    monkeypatch.setattr("trainer.data.sequences.DOCUMENTS_PER_SLICE", 4)
    write_sequences(tmp_path / "many", TEXTS, tokenizer, 400, 50)
    for name in ARRAYS:
        assert (tmp_path / "one" / f"{name}.npy").read_bytes() == (tmp_path / "many" / f"{name}.npy").read_bytes()


def test_damage_is_named(tmp_path, tokenizer):
    write_sequences(tmp_path / "split", TEXTS, tokenizer, 400, 50)
    tokens = np.load(tmp_path / "split" / "tokens.npy")
    np.save(tmp_path / "split" / "tokens.npy", tokens[:-1])
    with pytest.raises(ValueError, match="split: tokenised data does not fit together"):
        Sequences(tmp_path / "split")
    (tmp_path / "split" / "tokens.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="split: tokenised data is not readable"):
        Sequences(tmp_path / "split")
