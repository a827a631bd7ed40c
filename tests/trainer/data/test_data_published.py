"""The published data conventions (specs 1.3), against batches written row by row as the publications describe them."""

import random
import re

import numpy as np
import pytest
import torch

from modeling.cross_entropy import NO_TARGET
from trainer.data import (
    DataConfig,
    RowLayout,
    Sequences,
    TrainOrder,
    check_source,
    eos_id,
    eval_batches,
    load_documents,
    load_tokenizer,
    micro_batches,
    open_data,
    pad_id,
    prepare_data,
    story,
    tokenizer_hash,
    train_tokenizer,
)
from trainer.data.sequences import write_rows

STORIES = [story(i) for i in range(60)]
# Short ones, a single token, and text that looks like the special tokens.
TEXTS = [
    *STORIES[:25],
    "the",
    "a dog",
    "the [EOS] the [PAD] [UNK]",
    "dogs\n\n  ran ",
    *(" ".join(["a"] * n) for n in range(2, 20)),
]
VOCAB = 500
PAD, EOS = 1, 2


@pytest.fixture(scope="module")
def words():
    return train_tokenizer(STORIES, VOCAB, "words")


@pytest.fixture
def rows_of(words, tmp_path):
    """Function from settings of the layout to the Sequences of TEXTS."""

    def make(max_seq_len, texts=TEXTS, tokenizer=words, **settings):
        layout = RowLayout(max_seq_len, "padded", pad_id=pad_id(tokenizer), **settings)
        folder = tmp_path / f"rows-{len(list(tmp_path.iterdir()))}"
        return Sequences(folder, layout) if write_rows(folder, texts, tokenizer, VOCAB, layout) else None

    return make


def published_row(tokenizer, text, S, append_eos, count_padding):
    """One row of S inputs, targets, and whether they are real tokens, as section 1.3 describes it."""
    ids = tokenizer.encode(text).ids
    if append_eos:
        ids = ids + [tokenizer.token_to_id("[EOS]")]
    ids = ids[:S]
    pad = tokenizer.token_to_id("[PAD]")
    inputs = ids + [pad] * (S - len(ids))
    targets = [*inputs[1:], -100]
    real = [position + 1 < len(ids) for position in range(S)]
    if not count_padding:
        # No target, no position: without counted padding the last id of a row is no input either.
        inputs = [i if r else pad for i, r in zip(inputs, real, strict=True)]
        targets = [t if r else -100 for t, r in zip(targets, real, strict=True)]
    return inputs, targets, real


@pytest.mark.parametrize("count_padding", [False, True])
@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize("S", [2, 7, 16, 50, 64, 400])
@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_batches_are_the_published_rows(rows_of, words, S, append_eos, count_padding, kind):
    tokenizer = words if kind == "words" else train_tokenizer(STORIES, VOCAB)
    sequences = rows_of(S, tokenizer=tokenizer, append_eos=append_eos, count_padding=count_padding)
    rng = random.Random(S)
    for ids in (range(len(TEXTS)), rng.sample(range(len(TEXTS)), 9), [TEXTS.index("the")]):
        for batch in micro_batches(sequences, ids, 0, 1, 6):
            longest = 0
            width = batch.input_ids_BS.shape[1]
            for b, sequence in enumerate(batch.sequence_ids_B.tolist()):
                inputs, targets, real = published_row(tokenizer, TEXTS[sequence], S, append_eos, count_padding)
                longest = max(longest, sum(real))
                assert batch.input_ids_BS[b].tolist() == inputs[:width]
                assert batch.targets_BS[b].tolist() == targets[:width]
                assert batch.is_real_BS[b].tolist() == real[:width]
                assert batch.attention_mask_BS[b].tolist() == ([True] * S if count_padding else real[:width])
                assert not any(real[width:])
                assert int((batch.targets_BS[b] != -100).sum()) == sequences.targets_per_row[sequence]
                assert sum(real) == sequences.lengths[sequence]
            multiple = max(1, min(-(-max(longest, 1) // 16) * 16, int(sequences.lengths.max())))
            assert width == (S if count_padding else multiple)


def test_a_long_story_loses_its_eos(rows_of, words):
    n = len(words.encode(STORIES[0]).ids)
    for S, ends in ((n, False), (n + 1, True), (n + 2, True)):
        (row,) = rows_of(S, texts=[STORIES[0]])
        assert (row[-1] == EOS, len(row)) == (ends, min(S, n + 1))
        assert EOS not in row[:-1]
    assert EOS not in rows_of(400, append_eos=False)[0]


def test_special_ids_follow_the_kind(words):
    byte_level = train_tokenizer(STORIES, VOCAB)
    assert (pad_id(words), eos_id(words), words.token_to_id("[UNK]")) == (1, 2, 0)
    assert (pad_id(byte_level), eos_id(byte_level)) == (0, 1)


def test_words_are_cut_at_white_space_and_punctuation(words):
    for text in ["the  dog\n\tran", 'She said, "It\'s mine!"', " the ", "the.the", "mom's"]:
        pieces = re.findall(r"\w+|[^\w\s]+", text)
        assert words.encode(text).ids == [i for piece in pieces for i in words.encode(piece).ids]
        assert "".join(words.encode(text).tokens) == "".join(text.split()), "white space is discarded, nothing else"
    assert words.decode(words.encode("the  dog\nran").ids).split() == words.encode("the dog ran").tokens
    assert words.encode("the ☃").ids == [*words.encode("the").ids, 0], "no byte fallback"
    assert words.get_vocab_size() == VOCAB


def test_words_stay_text_after_loading(words, tmp_path):
    words.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    for tokenizer in (words, loaded, train_tokenizer(["[EOS] [PAD] [UNK] the"] * 9, 200, "words")):
        ids = tokenizer.encode("the [EOS] the [PAD]").ids
        assert EOS not in ids and PAD not in ids
    assert tokenizer_hash(loaded) == tokenizer_hash(words)
    assert tokenizer_hash(train_tokenizer(STORIES[::-1], VOCAB, "words")) == tokenizer_hash(words)


def test_words_need_room_for_every_character():
    with pytest.raises(ValueError, match=r"model\.vocab_size=6 .*: use 7 or more"):
        train_tokenizer(["a b c d"], 6, "words")
    assert train_tokenizer(["a b c d"], 7, "words").get_vocab_size() == 7


def test_bytes_of_the_targets(rows_of, words):
    """Bytes from the end of the first token to the end of the last kept one; tokens of words hold no white space."""
    text = "the dog  ran\u00e9 the"
    for S in range(2, 12):
        (num_bytes,) = rows_of(S, texts=[text]).num_bytes.tolist()
        assert num_bytes == len(text[3 : words.encode(text).offsets[:S][-1][1]].encode())
    texts = ["the", "the cat", "éé the"]
    assert rows_of(100, texts=texts).num_bytes.tolist()[:2] == [0, 4]
    byte_level = train_tokenizer(STORIES, VOCAB)
    sequences = rows_of(10_000, texts=STORIES, tokenizer=byte_level)
    first = [len(byte_level.encode(text).tokens[0]) for text in STORIES]
    assert sequences.num_bytes.tolist() == [len(text) - n for text, n in zip(STORIES, first, strict=True)]


@pytest.mark.parametrize("count_padding", [False, True])
def test_every_row_once_with_its_own_token_ids(rows_of, count_padding):
    sequences = rows_of(40, count_padding=count_padding)
    everywhere = None
    for world in (1, 2, 3):
        for micro in (1, 4):
            per_rank = [list(eval_batches(sequences, rank, world, micro)) for rank in range(world)]
            assert len({len(batches) for batches in per_rank}) == 1
            seen, tokens = [], {}
            for batch in [batch for batches in per_rank for batch in batches]:
                assert batch.token_ids_BS.dtype == batch.sequence_ids_B.dtype == torch.int64
                assert batch.token_ids_BS.shape == batch.input_ids_BS.shape
                seen += batch.sequence_ids_B.tolist()
                for token, real in zip(batch.token_ids_BS.flatten(), batch.is_real_BS.flatten(), strict=True):
                    assert int(token) not in tokens or int(token) < 0
                    tokens[int(token)] = bool(real)
            assert sorted(i for i in seen if i >= 0) == list(range(len(TEXTS)))
            real = {token for token, is_real in tokens.items() if is_real}
            assert len(real) == sequences.lengths.sum() and min(real) >= 0
            everywhere = everywhere or real
            assert real == everywhere, "the ids must not depend on ranks and micro batches"


def test_filler_and_rows_without_targets_are_masked(rows_of):
    for count_padding in (False, True):
        sequences = rows_of(8, texts=["the", "the dog ran"], append_eos=False, count_padding=count_padding)
        (filler,) = micro_batches(sequences, [1], 1, 2, 3)
        assert filler.input_ids_BS.tolist() == [[PAD]] and filler.targets_BS.tolist() == [[-100]]
        assert not filler.attention_mask_BS.any() and not filler.is_real_BS.any()
        assert filler.sequence_ids_B.tolist() == [-1] and (filler.token_ids_BS < 0).all()
        (batch,) = micro_batches(sequences, [0], 0, 1, 3)
        assert batch.sequence_ids_B.tolist() == [0] and not batch.is_real_BS.any()
        assert int((batch.targets_BS != NO_TARGET).sum()) == sequences.targets_per_row[0] == (7 if count_padding else 0)
        assert sequences.lengths[0] == 0


def test_order_without_sorting_is_a_plain_shuffle():
    lengths = np.random.RandomState(0).randint(0, 100, size=103)
    order = TrainOrder(lengths, 10, seed=3, sort_by_length=False)
    flat = TrainOrder(np.zeros(103, dtype=np.int64), 10, seed=3, sort_by_length=False)
    assert order.steps_per_epoch == 10, "the last, incomplete batch is dropped"
    epochs = []
    for epoch in range(4):
        steps = [order.sequence_ids(epoch * 10 + step) for step in range(10)]
        assert [ids.tolist() for ids in steps] == [flat.sequence_ids(epoch * 10 + step).tolist() for step in range(10)]
        ids = np.concatenate(steps)
        assert len(set(ids.tolist())) == 100 and 0 <= ids.min() and ids.max() < 103
        epochs.append(ids.tolist())
    assert len({tuple(ids) for ids in epochs}) == 4
    sorted_spread = np.mean([np.ptp(lengths[TrainOrder(lengths, 10, 3).sequence_ids(step)]) for step in range(10)])
    assert np.mean([np.ptp(lengths[order.sequence_ids(step)]) for step in range(10)]) > 3 * sorted_spread
    assert RowLayout(8).sort_by_length and not RowLayout(8, "padded").sort_by_length


def prepared(config, S=32):
    return open_data(prepare_data(config, VOCAB, S, 0))


@pytest.mark.parametrize("count_padding", [False, True])
def test_summary_of_padded_rows(tmp_path, count_padding):
    # As long as the first story's row: a row that just fits is not cut.
    S = len(train_tokenizer(STORIES[:50], VOCAB, "words").encode(STORIES[0]).ids) + 1
    config = DataConfig(
        train_documents=50,
        val_documents=5,
        tokenizer="words",
        rows="padded",
        count_padding=count_padding,
        cache_dir=str(tmp_path),
    )
    data = prepared(config, S)
    sizes = [len(data.tokenizer.encode(text).ids) + 1 for text in STORIES[:50]]
    summary = data.summary["train"]
    assert summary["documents"] == summary["sequences"] == data.train.num_documents == 50
    assert summary["tokens"] == data.train.lengths.sum() == sum(min(size, S) - 1 for size in sizes)
    assert summary["cut"] == sum(size > S for size in sizes) > 0
    assert sizes[0] == S
    assert summary["bytes"] == data.train.num_bytes.sum()
    if count_padding:
        assert summary["padding"] == pytest.approx(1 - summary["tokens"] / (50 * (S - 1)), abs=1e-4)
        assert data.train.targets_per_row.tolist() == [S - 1] * 50
    else:
        assert "padding" not in summary
        assert data.train.targets_per_row.tolist() == data.train.lengths.tolist()


def test_words_in_chunks(tmp_path):
    config = DataConfig(train_documents=5, val_documents=2, tokenizer="words", allow_fewer=True, cache_dir=str(tmp_path))
    data = prepared(config, 10_000)
    assert data.train[0].tolist() == [EOS, *data.tokenizer.encode(STORIES[0]).ids, EOS]
    (batch,) = micro_batches(data.train, range(5), 0, 1, 5)
    assert (batch.input_ids_BS[~batch.attention_mask_BS] == PAD).all()


def test_real_tinystories(real_data, tmp_path):
    """The published set-up on the real text: S=512, padded and counted; about 60 % of the targets are padding."""
    config = DataConfig(
        name="tinystories",
        path=str(real_data / "tinystories"),
        train_documents=600,
        val_documents=64,
        tokenizer="words",
        tokenizer_documents=2000,
        rows="padded",
        count_padding=True,
        allow_fewer=True,  # 2,000 documents do not fill a vocabulary of 8,192
        cache_dir=str(tmp_path),
    )
    check_source(config)
    data = open_data(prepare_data(config, 8192, 512, 0))
    assert 0.5 < data.summary["train"]["padding"] < 0.7
    text = load_documents(config, 0).train[0]
    assert data.train[0].tolist() == [*data.tokenizer.encode(text).ids, EOS]
    (batch,) = micro_batches(data.train, range(32), 0, 1, 32)
    assert batch.input_ids_BS.shape == (32, 512) and int((batch.targets_BS != NO_TARGET).sum()) == 32 * 511
