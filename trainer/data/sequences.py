"""Token sequences on disk, in one of two conventions (data.rows).

`chunks`: documents become [EOS] text [EOS], cut into chunks that overlap by one id. Every id of a document but the
leading [EOS] is a target exactly once, the first word and the closing [EOS] included. Nothing is truncated.

`padded`: a document is one row, text [EOS], cut at max_seq_len ids, so that a long one loses its [EOS]. Every id but
the first is a target. Rows are stored without their padding, which batches add.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from trainer.data.tokenizer import PAD_ID, eos_id

DOCUMENTS_PER_SLICE = 1024  # documents handed to the tokenizer's threads at once; bounds the memory of Python lists
ARRAYS = ("tokens", "offsets", "num_bytes", "starts_document")


@dataclass(frozen=True)
class RowLayout:
    """How documents become rows, and rows batches: what `open_data` needs besides the ids."""

    max_seq_len: int
    """Most inputs of a row. A row of `padded` has as many ids at most, one of `chunks` one more."""

    rows: str = "chunks"
    append_eos: bool = True
    count_padding: bool = False
    pad_id: int = PAD_ID

    @property
    def sort_by_length(self) -> bool:
        """What `TrainOrder` is to be told: the published order is a plain shuffle."""
        return self.rows == "chunks"


class Sequences:
    """N sequences of token ids, memory-mapped from the four .npy files that `write_sequences` wrote.

    `lengths` int64 [N]: real targets (ids - 1) of each, 0 in a padded row of one id; `targets_per_row` int64 [N]: targets
    that the loss counts, which is more where padding counts; `num_bytes` int64 [N]: UTF-8 bytes that the real targets
    cover (of chunks: of the whole document at its first, 0 at its others, so that a sum is the bytes of the text);
    `starts_document` bool [N]; `num_documents` int; `layout`.
    """

    def __init__(self, folder: str | Path, layout: RowLayout | None = None):
        """`layout` None: chunks, the longest of which decides max_seq_len.

        Raises ValueError naming the folder if the files are missing, unreadable or do not belong together.
        """
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
        self.layout = layout or RowLayout(int(self.lengths.max(initial=1)))
        self.targets_per_row = (
            np.full_like(self.lengths, self.layout.max_seq_len - 1) if self.layout.count_padding else self.lengths
        )
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
    eos = eos_id(tokenizer)
    slices: list[np.ndarray] = []
    lengths: list[int] = []
    num_bytes: list[int] = []
    starts_document: list[bool] = []
    for texts in _slices(documents):
        chunks: list[np.ndarray] = []
        for text, encoding in zip(texts, tokenizer.encode_batch_fast(texts), strict=True):
            pieces = chunk(np.array([eos, *encoding.ids, eos], dtype=dtype), max_seq_len)
            chunks += pieces
            lengths += [len(piece) for piece in pieces]
            num_bytes += [len(text.encode("utf-8"))] + [0] * (len(pieces) - 1)
            starts_document += [True] + [False] * (len(pieces) - 1)
        slices.append(np.concatenate(chunks))
    return {"documents": len(documents)} | _save(folder, slices, lengths, num_bytes, starts_document)


def write_rows(
    folder: Path, documents: list[str], tokenizer: Tokenizer, vocab_size: int, layout: RowLayout
) -> dict[str, int | float]:
    """Tokenise `documents` into `folder` (created), one padded row each.

    Returns the counts of `write_sequences` and `cut`, the rows that were cut short; where padding counts also `padding`,
    its share of the targets. Raises ValueError if no row has a target.
    """
    dtype = np.dtype(np.uint16 if vocab_size < 65536 else np.int32)
    end, most = [eos_id(tokenizer)] * layout.append_eos, layout.max_seq_len
    slices: list[np.ndarray] = []
    lengths: list[int] = []
    num_bytes: list[int] = []
    cut = 0
    for texts in _slices(documents):
        rows: list[list[int]] = []
        for text, encoding in zip(texts, tokenizer.encode_batch(texts), strict=True):
            ids, spans = encoding.ids + end, encoding.offsets[:most]
            rows.append(ids[:most])
            cut += len(ids) > most
            # From the end of the first token, which is no target, to the end of the last one kept.
            num_bytes.append(len(text[spans[0][1] : spans[-1][1]].encode("utf-8")))
        lengths += [len(row) for row in rows]
        slices.append(np.concatenate([np.array(row, dtype=dtype) for row in rows]))
    targets = sum(lengths) - len(lengths)
    if not targets:
        raise ValueError("data.rows=padded: no document has a second token to predict: use longer documents")
    counts = _save(folder, slices, lengths, num_bytes, [True] * len(lengths))
    summary = {"documents": len(documents)} | counts | {"cut": cut}
    if layout.count_padding:
        summary["padding"] = round(1 - targets / (len(lengths) * (most - 1)), 4)
    return summary


def _save(
    folder: Path, slices: list[np.ndarray], lengths: list[int], num_bytes: list[int], starts_document: list[bool]
) -> dict[str, int]:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    folder.mkdir()
    np.save(folder / "tokens.npy", np.concatenate(slices))
    np.save(folder / "offsets.npy", offsets.astype(np.int64))
    np.save(folder / "num_bytes.npy", np.array(num_bytes, dtype=np.int64))
    np.save(folder / "starts_document.npy", np.array(starts_document, dtype=np.bool_))
    return {"sequences": len(lengths), "tokens": int(offsets[-1]) - len(lengths), "bytes": sum(num_bytes)}


def _slices(documents: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(documents)
    while texts := list(islice(rest, DOCUMENTS_PER_SLICE)):
        yield texts
