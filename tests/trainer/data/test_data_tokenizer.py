"""The tokenizer: lossless on every text, special tokens never made by text, equal in every process."""

import random
import subprocess
import sys

import pytest

from trainer.data import EOS_ID, PAD_ID, load_tokenizer, story, tokenizer_hash, train_tokenizer

STORIES = [story(i) for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(STORIES, 600)


def random_text(rng: random.Random) -> str:
    alphabet = [
        "a",
        "b",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\x00",
        "é",
        "\u0301",
        "你",
        "🙂",
        "'s",
        "[EOS]",
        "[PAD]",
        "\ufeff",
        "7",
    ]
    return "".join(
        rng.choice(alphabet)
        if rng.random() < 0.7
        else chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))))
        for _ in range(rng.randrange(40))
    )


def test_lossless_and_free_of_special_ids(tokenizer):
    rng = random.Random(0)
    for text in [*STORIES[:50], *(random_text(rng) for _ in range(500))]:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert PAD_ID not in ids and EOS_ID not in ids
        assert all(2 <= i < 600 for i in ids)


def test_special_tokens_in_text_survive_saving(tokenizer, tmp_path):
    text = "the [EOS] and the [PAD]"
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.encode(text).ids == tokenizer.encode(text).ids
    assert EOS_ID not in loaded.encode(text).ids
    assert loaded.decode(loaded.encode(text).ids) == text
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)


def test_training_text_full_of_special_tokens():
    tokenizer = train_tokenizer(["[EOS][EOS] [PAD] [EOS]" * 50], 400)
    ids = tokenizer.encode("[EOS] [EOS][PAD]").ids
    assert EOS_ID not in ids and PAD_ID not in ids
    assert tokenizer.decode(ids) == "[EOS] [EOS][PAD]"


def test_ids_and_sizes(tokenizer):
    assert (tokenizer.token_to_id("[PAD]"), tokenizer.token_to_id("[EOS]")) == (PAD_ID, EOS_ID) == (0, 1)
    assert tokenizer.get_vocab_size() == 600
    small = train_tokenizer(["ab"], 5000)
    assert small.get_vocab_size() < 300
    assert small.decode(small.encode("anything ☃").ids) == "anything ☃"
    assert train_tokenizer(["abc abc"], 258).get_vocab_size() == 258
    with pytest.raises(ValueError, match=r"model\.vocab_size=257"):
        train_tokenizer(["abc"], 257)


def test_training_learns_merges(tokenizer):
    text = STORIES[0]
    assert len(tokenizer.encode(text).ids) < len(text.encode()) / 2


def test_same_hash_in_another_process_with_other_threads(tokenizer):
    code = "from trainer.data import *; print(tokenizer_hash(train_tokenizer([story(i) for i in range(300)], 600)))"
    env = {"PYTHONPATH": ":".join(sys.path), "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == tokenizer_hash(tokenizer)
    assert tokenizer_hash(train_tokenizer(STORIES[::-1], 600)) == tokenizer_hash(tokenizer)


def test_bad_files_are_named(tmp_path):
    bad = tmp_path / "tokenizer.json"
    for content in (b"", b"{}", b"\xff\xfe", b"no json"):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer.json") as error:
            load_tokenizer(bad)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="missing.json"):
        load_tokenizer(tmp_path / "missing.json")
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(bad))
    with pytest.raises(ValueError, match=r"ids \[None, None\]"):
        load_tokenizer(bad)
