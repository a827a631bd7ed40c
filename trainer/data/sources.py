"""From a DataConfig to documents: choose the source, split train from validation, drop what is empty, check overlap."""

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path

from trainer.data.config import DataConfig
from trainer.data.files import SUFFIXES, check_file, checked_text, read_documents
from trainer.data.splits import split_files
from trainer.data.stories import story

TINYSTORIES_HUB_ID = "roneneldan/TinyStories"
STORIES_TRAIN = 20_000
STORIES_VALIDATION = 1_000
FIRST_VALIDATION_STORY = 1_000_000_000  # train counts from 0, so the two never share an index
VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "test")


@dataclass(frozen=True)
class Documents:
    """The texts of a run. None is empty, and no validation text occurs in train (but see data.validation_from_train)."""

    train: list[str]
    validation: list[str]
    dropped: dict[str, int]
    """Documents left out: `empty` (nothing but white space), `overlap` (train texts that occur in validation)."""
    notes: tuple[str, ...] = ()
    """One line for each thing about the source that the reader of a run's log should know."""


@dataclass
class _Splits:
    """Lazy streams of documents; validation None means train is a pool still to be split by content hash."""

    train: Iterable[str]
    validation: Iterable[str] | None
    notes: list[str]


def check_source(config: DataConfig) -> None:
    """Cheap check of the source before processes start: files, suffixes, the first documents of each file.

    A hub id is only checked for `datasets` being installed. Raises ValueError: one line with key or file, value, cure.
    """
    if config.tokenizer_from is not None:
        with _naming_tokenizer_from(config):
            source = _tokenizer_source(config)
            check_source(source if _hub_id(source) else _with_known_field(source))
    if config.name == "stories":
        return
    if _hub_id(config) is not None:
        if importlib.util.find_spec("datasets") is None:
            raise ValueError(
                f"data.name={config.name!r} from the hub needs the package `datasets`: install it, "
                "or set data.path to a local copy"
            )
        return
    train, validation, _ = split_files(Path(config.path or ""))
    for file in [*train, *(validation or [])]:
        check_file(file, config.text_field)


def load_documents(config: DataConfig, seed: int) -> Documents:
    """Read (or generate) the documents of both splits. `seed` only matters to `stories`.

    Raises ValueError for a source that cannot be read, a split without documents, or validation texts that occur in
    train while data.drop_overlap is false.
    """
    splits = _open_splits(config, seed)
    empty = 0

    def non_empty(texts: Iterable[str]) -> Iterator[str]:
        nonlocal empty
        for text in texts:
            if text.strip():
                yield text
            else:
                empty += 1

    if config.validation_from_train:
        most = config.train_documents and max(config.train_documents, config.val_documents)
        first = list(islice(non_empty(splits.train), most))
        train, validation = first[: config.train_documents], first[: config.val_documents]
        splits.notes.append("data.validation_from_train=true: the validation documents are training documents too")
    elif splits.validation is None:
        train, validation = _split_pool(non_empty(splits.train), config)
        splits.notes.append(f"no validation split: data.val_fraction={config.val_fraction:g} held out by content hash")
    else:
        train = list(islice(non_empty(splits.train), config.train_documents))
        validation = list(islice(non_empty(splits.validation), config.val_documents))

    found = len(train)
    overlap = 0
    if not config.validation_from_train:
        train, overlap = _without_overlap(train, validation, config.drop_overlap)
    source = config.path or _hub_id(config) or config.name
    for key, name, texts in (("train", "train", train), ("val", "validation", validation)):
        if not texts:
            pool = splits.validation is None
            cure = f"change data.val_fraction={config.val_fraction:g}" if pool else "set data.path to data with some"
            raise ValueError(f"data.path={source!r} gives no {name} documents: {cure}")
        wanted = getattr(config, f"{key}_documents")
        has = found if key == "train" else len(texts)
        if wanted is not None and has < wanted:
            shortage = f"data.{key}_documents={wanted}, but the source has only {has} {name} documents"
            if not config.allow_fewer:
                raise ValueError(f"{shortage}: lower it, or take what there is with --set data.allow_fewer=true")
            splits.notes.append(shortage)
    return Documents(train, validation, {"empty": empty, "overlap": overlap}, tuple(splits.notes))


def tokenizer_texts(config: DataConfig, seed: int) -> Iterator[str]:
    """Stream the documents that data.tokenizer_from and data.tokenizer_documents name; none is empty.

    What is held out by content hash is left out here too. Raises ValueError for a source that cannot be read.
    """
    with _naming_tokenizer_from(config):
        splits = _open_splits(_with_known_field(_tokenizer_source(config)), seed)
    texts = (text for text in splits.train if text.strip())
    if splits.validation is None and not config.validation_from_train:
        texts = (text for text in texts if not _is_held_out(text, config.val_fraction))
    return islice(texts, config.tokenizer_documents)


@contextmanager
def _naming_tokenizer_from(config: DataConfig) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if config.tokenizer_from is None:
            raise
        raise ValueError(str(error).replace("data.path", "data.tokenizer_from")) from error


def _tokenizer_source(config: DataConfig) -> DataConfig:
    """`config` with the source that the tokenizer is trained on as its own."""
    config = replace(config, train_documents=config.tokenizer_documents)
    if config.tokenizer_from is None:
        return config
    return replace(config, name="text", path=config.tokenizer_from, tokenizer_from=None)


def _with_known_field(source: DataConfig) -> DataConfig:
    """`source`, reading `text` where its first training document cannot be read with data.text_field."""
    if source.text_field == "text" or source.name == "stories":
        return source
    try:
        next(iter(_open_splits(source, 0).train), None)
    except ValueError:
        return replace(source, text_field="text")
    return source


def _open_splits(config: DataConfig, seed: int) -> _Splits:
    hub_id = _hub_id(config)
    if config.name == "stories":
        train_size = config.train_documents or STORIES_TRAIN
        if config.validation_from_train:
            train_size = max(train_size, config.val_documents)
        return _Splits(
            (story(i, seed) for i in range(train_size)),
            (story(FIRST_VALIDATION_STORY + i, seed) for i in range(config.val_documents or STORIES_VALIDATION)),
            [],
        )
    if hub_id is not None:
        return _hub_splits(hub_id, config.text_field)
    return _local_splits(Path(config.path or ""), config.text_field)


def _hub_id(config: DataConfig) -> str | None:
    """The hub id that `config` means, or None where it means stories or a local path."""
    if config.name == "tinystories" and config.path is None:
        return TINYSTORIES_HUB_ID
    if config.name != "text" or config.path is None or os.path.lexists(config.path):
        return None
    # A path with a data suffix is a mistyped file name, not a hub id.
    looks_like_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", config.path) and not config.path.lower().endswith(SUFFIXES)
    return config.path if looks_like_id else None


def _local_splits(path: Path, text_field: str) -> _Splits:
    train, validation, notes = split_files(path)

    def documents(files: list[Path]) -> Iterator[str]:
        for file in files:
            yield from read_documents(file, text_field)

    return _Splits(documents(train), None if validation is None else documents(validation), notes)


def _hub_splits(hub_id: str, text_field: str) -> _Splits:
    try:
        import datasets  # slow to import, and only needed here

        splits = datasets.load_dataset(hub_id)
    except Exception as error:  # network, missing repository, missing config: many unrelated types
        first_line = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{hub_id!r} is no local path and could not be loaded from the hub ({type(error).__name__}: {first_line}): "
            "set data.path to a local file or folder, or check the id and the network"
        ) from error
    names = list(splits)
    train = "train" if "train" in names else names[0]
    held_out = next((name for name in VALIDATION_SPLITS if name in names and name != train), None)
    for name in filter(None, (train, held_out)):
        if text_field not in splits[name].column_names:
            raise ValueError(
                f"{hub_id!r}: no column {text_field!r} among {splits[name].column_names[:8]}: set data.text_field"
            )

    def documents(name: str) -> Iterator[str]:
        rows = count()
        for batch in splits[name].iter(batch_size=1000):
            for value in batch[text_field]:
                yield checked_text(value, f"{hub_id!r} {name} row {next(rows)}: column {text_field!r}")

    return _Splits(documents(train), None if held_out is None else documents(held_out), [])


def _split_pool(texts: Iterable[str], config: DataConfig) -> tuple[list[str], list[str]]:
    """Split one stream by content hash, so that equal texts fall on one side whatever their order or number."""
    train: list[str] = []
    validation: list[str] = []

    def full(side: list[str], limit: int | None) -> bool:
        return limit is not None and len(side) >= limit

    for text in texts:
        held_out = _is_held_out(text, config.val_fraction)
        side, limit = (validation, config.val_documents) if held_out else (train, config.train_documents)
        if not full(side, limit):
            side.append(text)
        elif full(train, config.train_documents) and full(validation, config.val_documents):
            break
    return train, validation


def _is_held_out(text: str, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64 < fraction


def _without_overlap(train: list[str], validation: list[str], drop: bool) -> tuple[list[str], int]:
    held_out = set(validation)
    kept = [text for text in train if text not in held_out]
    overlap = len(train) - len(kept)
    if overlap and not drop:
        raise ValueError(
            f"data.drop_overlap=false, but {overlap} training documents also occur in validation: "
            "remove them from train with --set data.drop_overlap=true"
        )
    return kept, overlap
