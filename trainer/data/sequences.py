"""Token sequences on disk: documents become [EOS] text [EOS], cut into chunks that overlap by one id.

Every id of a document but the leading [EOS] is a target exactly once, the first word and the closing [EOS] included.
Nothing is truncated.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from trainer.data.tokenizer import EOS_ID

DOCUMENTS_PER_SLICE = 1024  # documents handed to the tokenizer's threads at once; bounds the memory of Python lists
ARRAYS = ("tokens", "offsets", "num_bytes", "starts_document")


class Sequences:
    """N sequences of token ids, memory-mapped from the four .npy files that `write_sequences` wrote.

    `lengths` int64 [N]: targets (ids - 1) of each; `num_bytes` int64 [N]: UTF-8 bytes of the document at its first
    chunk, 0 at its others, so that a sum is the bytes of the text; `starts_document` bool [N]; `num_documents` int.
    """

    def __init__(self, folder: str | Path):
        """Raises ValueError naming the folder if the files are missing, unreadable or do not belong together."""
        folder = Path(folder)
        try:
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS}
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{folder}: tokenised data is not readable ({error}): delete the folder") from error
        self._tokens, self._offsets = arrays["tokens"], np.asarray(arrays["offsets"])
        self.num_bytes = np.asarray(arrays["num_bytes"])
        self.starts_document = np.asarray(arrays["starts_document"]).astype(bool)
        self.lengths = np.diff(self._offsets) - 1
        self.num_documents = int(self.starts_document.sum())
        if not len(self.lengths) == len(self.num_bytes) == len(self.starts_document) or (
            self._offsets[-1] != len(self._tokens)
        ):
            raise ValueError(f"{folder}: tokenised data does not fit together: delete the folder to have it rebuilt")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Ids of sequence `index`: int64 [lengths[index] + 1]. Raises IndexError out of range."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return self._tokens[self._offsets[index] : self._offsets[index + 1]].astype(np.int64)


def chunk(ids: np.ndarray, max_seq_len: int) -> list[np.ndarray]:
    """Cut ids [n] into chunks of at most max_seq_len + 1 ids, each starting with the last id of the one before."""
    return [ids[start : start + max_seq_len + 1] for start in range(0, len(ids) - 1, max_seq_len)]


def write_sequences(
    folder: Path, documents: list[str], tokenizer: Tokenizer, vocab_size: int, max_seq_len: int
) -> dict[str, int]:
    """Tokenise `documents` into `folder` (created). Returns counts: documents, sequences, tokens (targets), bytes."""
    dtype = np.dtype(np.uint16 if vocab_size < 65536 else np.int32)
    slices: list[np.ndarray] = []
    lengths: list[int] = []
    num_bytes: list[int] = []
    starts_document: list[bool] = []
    for texts in _slices(documents):
        chunks: list[np.ndarray] = []
        for text, encoding in zip(texts, tokenizer.encode_batch_fast(texts), strict=True):
            pieces = chunk(np.array([EOS_ID, *encoding.ids, EOS_ID], dtype=dtype), max_seq_len)
            chunks += pieces
            lengths += [len(piece) for piece in pieces]
            num_bytes += [len(text.encode("utf-8"))] + [0] * (len(pieces) - 1)
            starts_document += [True] + [False] * (len(pieces) - 1)
        slices.append(np.concatenate(chunks))
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    folder.mkdir()
    np.save(folder / "tokens.npy", np.concatenate(slices))
    np.save(folder / "offsets.npy", offsets.astype(np.int64))
    np.save(folder / "num_bytes.npy", np.array(num_bytes, dtype=np.int64))
    np.save(folder / "starts_document.npy", np.array(starts_document, dtype=np.bool_))
    return {
        "documents": len(documents),
        "sequences": len(lengths),
        "tokens": int(offsets[-1]) - len(lengths),
        "bytes": sum(num_bytes),
    }


def _slices(documents: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(documents)
    while texts := list(islice(rest, DOCUMENTS_PER_SLICE)):
        yield texts
