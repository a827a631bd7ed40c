"""Words that are too long to train a tokenizer on, and the bound at which they are cut.

A word is what the tokenizer's pre-tokenizer makes of a text: a run of letters, of digits, of white space or of other signs.
Training takes time in proportion to the square of a word's length, so that one line of 400,000 spaces takes minutes. For the
training alone, a longer word is cut into several; nothing of it is left out, and texts are encoded with their words whole.
"""

import re

from tokenizers import pre_tokenizers

MAX_WORD_BYTES = 1200
"""Longest word that a tokenizer is trained on, in UTF-8 bytes (data.tokenizer=words: in characters), in every format alike.
A multiple of 2, 3 and 4, so that a run of characters of one size is not cut inside one."""

_LEAST = MAX_WORD_BYTES // 4  # characters of a word that is too long: none has more than 4 bytes
_LONG_RUN = re.compile(rf"\w{{{_LEAST}}}|(?:[^\w\s]|_){{{_LEAST}}}|\s{{{_LEAST}}}")
_PRE_TOKENIZERS = {"bytes": pre_tokenizers.ByteLevel(add_prefix_space=False), "words": pre_tokenizers.Whitespace()}


def pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    """What makes words of a text, for a tokenizer of this `kind` (data.tokenizer)."""
    return _PRE_TOKENIZERS[kind]


def cutting_pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    """The same, but with words of over MAX_WORD_BYTES cut; for training."""
    return pre_tokenizers.Sequence([pre_tokenizer(kind), pre_tokenizers.FixedLength(MAX_WORD_BYTES)])


def count_long_words(text: str, kind: str) -> int:
    """How many words of `text` are longer than MAX_WORD_BYTES."""
    if len(text) < _LEAST or not _may_have_long_run(text) or not _LONG_RUN.search(text):
        return 0
    return sum(len(word) > MAX_WORD_BYTES for word, _ in pre_tokenizer(kind).pre_tokenize_str(text))


def _may_have_long_run(text: str) -> bool:
    """Whether some part of half such a run is all white space or has no space: quick, for what nearly every text is not."""
    half = _LEAST // 2
    parts = (text[start : start + half] for start in range(0, len(text) - half + 1, half))
    return any(" " not in part or part.isspace() for part in parts)
