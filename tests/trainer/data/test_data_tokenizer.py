"""The tokenizer: lossless on every text, special tokens never made by text, equal in every process."""

import random
import subprocess
import sys

import pytest

from trainer.data import EOS_ID, PAD_ID, load_tokenizer, story, tokenizer_hash, train_tokenizer
from trainer.data.words import MAX_WORD_BYTES, count_long_words

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


LONG = MAX_WORD_BYTES + 1
WITHOUT_BREAKS = {
    "spaces": " ",
    "newlines": "\n",
    "tabs and newlines": "\t\n",
    "letters": "a",
    "base64": "QUJjZGVmR2hpSktsTU5vUA",
    "dna": "GATTACA",
    "digits": "0123456789",
    "rule": "=",
    "zero width": "\u200b",
    "emoji": "🙂🎉",
    "cjk": "你好吗",
    "wide space": "\u3000",
    "combining": "\u0301",
}


@pytest.mark.parametrize("kind", ["bytes", "words"])
@pytest.mark.parametrize("name", WITHOUT_BREAKS)
def test_no_token_is_longer_than_the_bound_and_nothing_is_lost(name, kind):
    """Without the bound, each of these takes minutes to train on."""
    unit = WITHOUT_BREAKS[name]
    text = unit * (200_000 // len(unit))
    tokenizer = train_tokenizer([*STORIES[:20], f"a {text} b"], 600, kind)
    assert max(len(token) for token in tokenizer.get_vocab()) <= MAX_WORD_BYTES
    if kind == "bytes":
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_what_has_no_long_word_trains_the_tokenizer_as_before(kind):
    """The same JSON, so the same hash and the same data fingerprints, as without the bound."""
    tokenizer = train_tokenizer(["x" * MAX_WORD_BYTES + "\ny z", *STORIES[:50]], 400, kind)
    assert "FixedLength" not in tokenizer.to_str()
    untouched = {
        "bytes": "8baba08ac1b058c1a8e71265fe53d362595e4525c67efb99b125b337af275119",
        "words": "3b1468e560f8f07ecd48b1aebbe393a44927c7bc819f69ece835e684d69e9c9c",
    }
    assert tokenizer_hash(tokenizer) == untouched[kind]


@pytest.mark.parametrize("kind", ["bytes", "words"])
@pytest.mark.parametrize(
    ("text", "in_bytes", "in_words"),
    [
        ("a" * MAX_WORD_BYTES, 0, 0),
        ("a" * LONG, 1, 1),
        (" " + "a" * MAX_WORD_BYTES, 1, 0),  # the space belongs to the word
        ("é" * (MAX_WORD_BYTES // 2 + 1), 1, 0),  # bytes here, characters there
        ("🙂" * (MAX_WORD_BYTES // 4 + 1), 1, 0),
        ("story " * 500 + " " * LONG + "end" + "=" * LONG, 2, 1),  # words drop white space
        ("\n" * 2 * LONG, 1, 0),
        ("ab1" * LONG, 0, 1),
        ("a b " * LONG, 0, 0),
        ("你好，" * LONG, 0, 0),
    ],
)
def test_long_words_are_counted(text, in_bytes, in_words, kind):
    assert count_long_words(text, kind) == {"bytes": in_bytes, "words": in_words}[kind]
    assert count_long_words(f"{STORIES[0]}\n{text}\n{STORIES[1]}", kind) >= {"bytes": in_bytes, "words": in_words}[kind]
