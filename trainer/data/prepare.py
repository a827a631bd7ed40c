"""Documents to cached tokenizer and cached tokenised data, keyed by content, built once by rank 0, opened by all ranks.

Everything is written under a temporary name next to its place and moved there in one step, so that an entry is either
absent or whole; entries are checked by SHA-256 before they are used again.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from tokenizers import Tokenizer

from trainer.console import say
from trainer.data.config import DataConfig
from trainer.data.progress import progress
from trainer.data.sequences import ARRAYS, RowLayout, Sequences, write_rows, write_sequences
from trainer.data.sources import load_documents, tokenizer_texts
from trainer.data.tokenizer import check_vocab_size, load_tokenizer, pad_id, tokenizer_hash, train_tokenizer
from trainer.data.words import MAX_WORD_BYTES, count_long_words
from trainer.paths import make_folder
from trainer.storage import StorageError, describe_free, is_failing, remove

FORMAT = 3  # part of every key: raise it when what is cached changes its meaning
SPLITS = ("train", "validation")
FILES = ("tokenizer.json", *(f"{split}/{name}.npy" for split in SPLITS for name in ARRAYS))
META = "meta.json"


@dataclass(frozen=True)
class Dataset:
    """What `open_data` returns. `fingerprint` is equal if and only if documents, tokenizer and row layout are;
    `validation_hash` is that of the tokenised validation split alone.

    `summary`: for `train` and `validation` the counts documents, sequences, tokens (targets) and bytes, for padded rows
    also cut and, where padding counts, its share padding of the targets; for `dropped` the counts empty and overlap;
    `notes`, a list of lines about the source; `vocab_size` and `max_seq_len`.
    """

    tokenizer: Tokenizer
    train: Sequences
    validation: Sequences
    fingerprint: str
    validation_hash: str
    tokenizer_hash: str
    summary: dict[str, Any]


def prepare_data(
    config: DataConfig, vocab_size: int, max_seq_len: int, seed: int, accept: Callable[[Dataset], None] = lambda _: None
) -> Path:
    """Make sure that the tokenised data exists in the cache, and return its folder. For rank 0 only.

    `max_seq_len` is the largest number of inputs in a sequence. A second call with the same documents and settings
    reads the documents, finds the entry and builds nothing; a damaged entry is rebuilt with a message. `accept` is called
    with the data before anything new stays in the cache, and may raise ValueError to keep it out. Raises ValueError for
    settings or a source that cannot work, and for a cache folder that cannot be written; StorageError for a full disk.
    """
    _check_sizes(config, vocab_size, max_seq_len)
    documents = load_documents(config, seed)
    notes = list(documents.notes)
    has_own_texts = config.tokenizer_documents is not None or config.tokenizer_from is not None

    def texts_of_tokenizer() -> Iterable[str]:
        return tokenizer_texts(config, seed) if has_own_texts else documents.train

    train_hash, number_of_texts, long_words = _hash_texts(documents.train, None if has_own_texts else config.tokenizer)
    tokenizer_texts_hash = train_hash
    if has_own_texts:
        tokenizer_texts_hash, number_of_texts, long_words = _hash_texts(texts_of_tokenizer(), config.tokenizer)
        source = f"data.tokenizer_from={config.tokenizer_from!r}" if config.tokenizer_from else "the source"
        if not number_of_texts:
            raise ValueError(
                f"{source} has no documents to train the tokenizer on: set data.tokenizer_from to data with some"
            )
        if config.tokenizer_documents is not None and number_of_texts < config.tokenizer_documents:
            shortage = f"data.tokenizer_documents={config.tokenizer_documents}, but {source} has only {number_of_texts}"
            if not config.allow_fewer:
                raise ValueError(f"{shortage}: lower it, or take what there is with --set data.allow_fewer=true")
            notes.append(shortage)
    notes += _long_words_note(long_words, config.tokenizer)
    for line in notes:
        say(f"data: {line}")
    for reason, number in documents.dropped.items():
        if number:
            say(f"data: dropped {number} documents ({reason})")
    root = config.cache_root()
    try:
        tokenizer_key = _key(tokenizer_texts_hash, vocab_size, config.tokenizer, *([MAX_WORD_BYTES] if long_words else []))
        tokenizer_path = root / f"tokenizer-{tokenizer_key[:32]}.json"
        tokenizer = _cached_tokenizer(tokenizer_path, vocab_size)
        if is_new := tokenizer is None:
            with progress(f"training the tokenizer on {number_of_texts:,} documents"):
                tokenizer = train_tokenizer(texts_of_tokenizer(), vocab_size, config.tokenizer)
        notes += _unfilled(tokenizer, vocab_size, config.allow_fewer)
        layout = RowLayout(max_seq_len, config.rows, config.append_eos, config.count_padding, pad_id(tokenizer))
        key = _key(train_hash, _hash_texts(documents.validation)[0], tokenizer_hash(tokenizer), asdict(layout))
        summary = {"dropped": documents.dropped, "notes": notes, "vocab_size": vocab_size, "max_seq_len": max_seq_len}
        summary["tokenizer_documents"] = number_of_texts
        # What the summary says besides is no part of the data's identity, but an entry must not tell of other settings.
        folder = root / f"data-{_key(key, summary)[:32]}"
        problem = _problem(folder, key)
        if problem is None:
            accept(open_data(folder))
        else:
            make_folder(root)
            if folder.exists():
                say(f"data: rebuilding cache entry {folder}: {problem}")
            texts = {"train": documents.train, "validation": documents.validation}
            _remove_abandoned(root)
            _build(folder, key, texts, tokenizer, layout, summary, accept)
        if is_new:
            temporary = _temporary(tokenizer_path)
            temporary.write_text(tokenizer.to_str(), encoding="utf-8")
            os.replace(temporary, tokenizer_path)
    except OSError as error:
        if is_failing(error):
            raise StorageError(
                f"data.cache_dir={str(root)!r} cannot be written ({error.strerror}), {describe_free(root)}; make room and "
                f"give the same command again"
            ) from error
        raise ValueError(
            f"data.cache_dir={str(root)!r} cannot be used ({error}): set it (or SOME_CACHE_DIR) to a writable folder"
        ) from error
    return folder


def _check_sizes(config: DataConfig, vocab_size: int, max_seq_len: int) -> None:
    if config.tokenizer == "bytes":
        check_vocab_size(vocab_size)
    # A row of n ids has n - 1 targets; only a chunk has one id more than inputs.
    least = 1 if config.rows == "chunks" else 2
    if max_seq_len < least:
        raise ValueError(f"model.max_seq_len={max_seq_len} leaves no targets: use {least} or more")


def open_data(folder: str | Path) -> Dataset:
    """Open a folder that `prepare_data` returned; any rank, memory-mapped. Raises ValueError if it is damaged."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        fingerprint, summary, expected_hash = meta["fingerprint"], meta["summary"], meta["tokenizer_hash"]
        layout = RowLayout(**meta["layout"])
        validation_hash = _key(*(meta["sha256"][f"validation/{name}.npy"] for name in ARRAYS))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not a folder of tokenised data ({error}): prepare the data again") from error
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    train, validation = (Sequences(folder / split, layout) for split in SPLITS)
    if tokenizer_hash(tokenizer) != expected_hash:
        raise ValueError(f"{folder / 'tokenizer.json'}: differs from the tokenizer of this data: delete {folder}")
    return Dataset(tokenizer, train, validation, fingerprint, validation_hash, expected_hash, summary)


def _cached_tokenizer(path: Path, vocab_size: int) -> Tokenizer | None:
    if not path.exists():
        return None
    try:
        tokenizer = load_tokenizer(path)
        if tokenizer.get_vocab_size() <= vocab_size:
            return tokenizer
        say(f"data: rebuilding {path}: it has more than {vocab_size} tokens")
    except ValueError as error:
        say(f"data: rebuilding: {error}")
    return None


def _long_words_note(number: int, kind: str) -> list[str]:
    if not number:
        return []
    unit = "bytes" if kind == "bytes" else "characters"
    return [f"{number:,} words of over {MAX_WORD_BYTES:,} {unit} are cut to train the tokenizer, and only there"]


def _unfilled(tokenizer: Tokenizer, vocab_size: int, allow_fewer: bool) -> list[str]:
    """A note on a vocabulary that the text does not fill, which gives the model rows that no token ever uses."""
    found = tokenizer.get_vocab_size()
    if found == vocab_size:
        return []
    shortage = f"model.vocab_size={vocab_size}, but the tokenizer finds only {found} tokens in the text"
    if not allow_fewer:
        raise ValueError(f"{shortage}: lower it, use more text, or go on with --set data.allow_fewer=true")
    say(f"data: {shortage}")
    return [shortage]


def _build(
    folder: Path,
    key: str,
    texts: dict[str, list[str]],
    tokenizer: Tokenizer,
    layout: RowLayout,
    summary: dict[str, Any],
    accept: Callable[[Dataset], None],
) -> None:
    temporary = _temporary(folder)
    temporary.mkdir()
    splits: dict[str, Any] = {}
    try:
        (temporary / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        for split in SPLITS:
            # Chunks and padded rows differ in what a row may be, not in how it is stored.
            write, shape = (write_sequences, layout.max_seq_len) if layout.rows == "chunks" else (write_rows, layout)
            with progress(f"tokenising {len(texts[split]):,} {split} documents"):
                splits[split] = write(temporary / split, texts[split], tokenizer, summary["vocab_size"], shape)
        meta = {
            "fingerprint": key,
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "layout": asdict(layout),
            "summary": summary | splits,
            "sha256": {name: _hash_file(temporary / name) for name in FILES},
        }
        (temporary / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        accept(open_data(temporary))
        if folder.exists() and _problem(folder, key) is not None:
            # A folder cannot be replaced while it has files: move the damaged one aside first.
            aside = _temporary(folder)
            os.replace(folder, aside)
            shutil.rmtree(aside)
        try:
            os.replace(temporary, folder)
        except OSError:
            # Another run may have put the same entry there meanwhile; its content is the same as ours.
            if _problem(folder, key) is not None:
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _problem(folder: Path, key: str) -> str | None:
    """Why the cache entry cannot be used, or None if it is whole: every file has the SHA-256 that meta.json states."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["fingerprint"] != key:
            return f"{META} is of other data"
        for name in FILES:
            if _hash_file(folder / name) != meta["sha256"][name]:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid4().hex[:8]}.tmp")


def _remove_abandoned(root: Path) -> None:
    """What processes of this host left behind that were ended, by a signal or else, before they had built it."""
    for path in root.glob(f".*.{socket.gethostname()}.*.*.tmp"):
        try:
            os.kill(int(path.name.split(".")[-3]), 0)
        except ProcessLookupError:
            remove(path)
        except PermissionError:
            pass  # another user's, and alive


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode("utf-8")).hexdigest()


def _hash_texts(texts: Iterable[str], kind: str | None = None) -> tuple[str, int, int]:
    """Their hash, their number, which a stream only tells once it has been read, and how many of their words are too long
    to train a tokenizer of this `kind` on; None counts none."""
    digest, number, long_words = hashlib.sha256(), 0, 0
    for text in texts:
        number += 1
        long_words += 0 if kind is None else count_long_words(text, kind)
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))  # the length keeps ["ab", "c"] apart from ["a", "bc"]
        digest.update(data)
    return digest.hexdigest(), number, long_words


def _hash_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
