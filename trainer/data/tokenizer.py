"""Tokenizers, trained with the `tokenizers` library: byte-level BPE, which is lossless (decode(encode(x)) == x for every
text), and the published BPE inside words, which discards white space and knows no character it was not trained on.

Training gives the same tokenizer in every process: merges are taken by (count, pair of ids), the byte alphabet is
fixed, and neither the number of threads nor a hash seed enters (tests/trainer/data compares separate processes). Words
longer than `words.MAX_WORD_BYTES` are cut for training.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.data.words import cutting_pre_tokenizer, pre_tokenizer

PAD_ID = 0  # of the byte-level tokenizer, like EOS_ID: see `pad_id` and `eos_id`
EOS_ID = 1
SPECIAL_TOKENS = ["[PAD]", "[EOS]"]
WORDS_SPECIAL_TOKENS = ["[UNK]", "[PAD]", "[EOS]"]  # ids 0, 1, 2
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256  # every byte must have an id, or some text could not be encoded


def check_vocab_size(vocab_size: int) -> None:
    """Raises ValueError where `vocab_size` cannot hold the special tokens and all 256 bytes."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"model.vocab_size={vocab_size} is too small for byte-level BPE: use {MIN_VOCAB_SIZE} or more "
            f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int, kind: str = "bytes") -> Tokenizer:
    """Train a tokenizer of one `kind` (data.tokenizer) with at most `vocab_size` tokens on `texts`.

    A small corpus may yield fewer tokens; ids are always below `vocab_size`. Raises ValueError (model.vocab_size) if it
    is below 258 for bytes, or below the number of characters in `texts` for words.
    """
    if kind == "words":
        return _train_words(texts, vocab_size)
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return _train(tokenizer, texts, trainer, "bytes")


def _train_words(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=WORDS_SPECIAL_TOKENS, show_progress=False)
    tokenizer = _train(Tokenizer(models.BPE(unk_token="[UNK]")), texts, trainer, "words")
    # The library keeps every character it has seen, whatever the limit.
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size} is too small for data.tokenizer=words on this text: "
            f"use {tokenizer.get_vocab_size()} or more (its characters and {len(WORDS_SPECIAL_TOKENS)} special tokens)"
        )
    return tokenizer


def _train(tokenizer: Tokenizer, texts: Iterable[str], trainer: trainers.BpeTrainer, kind: str) -> Tokenizer:
    tokenizer.pre_tokenizer = cutting_pre_tokenizer(kind)
    tokenizer.train_from_iterator(texts, trainer)
    # Encoding takes time in proportion to a word's length, so that words may stay whole there.
    tokenizer.pre_tokenizer = pre_tokenizer(kind)
    return _finish(tokenizer)


def pad_id(tokenizer: Tokenizer) -> int:
    """Id of [PAD]: 0 for bytes, 1 for words."""
    return tokenizer.token_to_id("[PAD]")


def eos_id(tokenizer: Tokenizer) -> int:
    """Id of [EOS]: 1 for bytes, 2 for words."""
    return tokenizer.token_to_id("[EOS]")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer that `tokenizer.save(path)` wrote. Raises ValueError naming the file if it is none of ours."""
    try:
        tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a readable tokenizer ({first_line}): delete it to have it rebuilt") from error
    ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    words = [tokenizer.token_to_id(token) for token in WORDS_SPECIAL_TOKENS] == [0, 1, 2]
    if ids != [PAD_ID, EOS_ID] and not words:
        raise ValueError(f"{path} has ids {ids} for {SPECIAL_TOKENS}, not [0, 1]: use a tokenizer trained by this project")
    return _finish(tokenizer)


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Hex SHA-256 of the tokenizer's JSON: equal if and only if vocabulary, merges and settings are equal."""
    return hashlib.sha256(tokenizer.to_str().encode("utf-8")).hexdigest()


def _finish(tokenizer: Tokenizer) -> Tokenizer:
    # Text that happens to contain "[EOS]" must stay ordinary text. The library does not save this flag in its JSON, so
    # it is set after training and again after every load.
    tokenizer.encode_special_tokens = True
    return tokenizer
