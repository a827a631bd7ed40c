"""Settings of the data: where the text comes from, how much of it is used, where prepared data is cached."""

from dataclasses import dataclass
from pathlib import Path

from trainer.paths import cache_root

SOURCE_NAMES = ("stories", "tinystories", "text")
TOKENIZERS = ("bytes", "words")
ROWS = ("chunks", "padded")


@dataclass(frozen=True)
class DataConfig:
    """Which documents a run trains on. Raises ValueError, one line with key, value and cure, if that cannot work."""

    name: str = "stories"
    """Source: `stories` (built-in generator, no network), `tinystories` (hub or local copy) or `text` (any text)."""

    path: str | None = None
    """Local file or folder (.jsonl, .parquet, .txt, .tokens, .md); for `text` also a hub id such as `owner/dataset`.
    `tinystories` without a path is `roneneldan/TinyStories` from the hub."""

    text_field: str = "text"
    """Field (jsonl) or column (parquet, hub) that holds the text."""

    train_documents: int | None = None
    """Use the first N training documents. None: all of them; 20,000 for `stories`."""

    val_documents: int | None = None
    """Use the first N validation documents. None: all of them; 1,000 for `stories`."""

    val_fraction: float = 0.05
    """Share of documents held out, chosen by content hash, when the source has no validation split of its own."""

    drop_overlap: bool = False
    """Remove from train every document that also occurs in validation, in place of stopping with an error."""

    allow_fewer: bool = False
    """Go on with a note, in place of stopping with an error, where the source has fewer documents than asked for."""

    tokenizer: str = "bytes"
    """`bytes`: byte-level BPE, lossless. `words`: the published one, BPE inside words, which discards white space."""

    tokenizer_documents: int | None = None
    """Train the tokenizer on the first N documents of the source's training split. None: on the run's own."""

    tokenizer_from: str | None = None
    """Local path or hub id of other data, on whose training split the tokenizer is trained; it is read with
    data.text_field, or with `text` where it has no such field. None: the run's own data."""

    rows: str = "chunks"
    """`chunks`: [EOS] text [EOS] in overlapping pieces, nothing lost. `padded`: the published one, one document a row,
    cut at model.max_seq_len ids."""

    append_eos: bool = True
    """Whether [EOS] follows a document (before it is cut); false needs padded rows."""

    count_padding: bool = False
    """Pad rows to model.max_seq_len and treat padding as text: it is a target, is routed and moves keys. All
    published versions but v5 to v7 did so. Needs padded rows."""

    drop_last_validation: bool = False
    """Leave the rows beyond the last full batch of train.batch_size out of the published validation loss."""

    validation_from_train: bool = False
    """Validate on the first val_documents of the training split, which stay in train: a published flaw."""

    cache_dir: str | None = None
    """Folder of cached tokenizers and tokenised data. None: the variable SOME_CACHE_DIR, else ~/.cache/some."""

    def __post_init__(self) -> None:
        if self.name not in SOURCE_NAMES:
            raise ValueError(f"data.name={self.name!r} is not a known source: use one of {', '.join(SOURCE_NAMES)}")
        if self.name == "text" and not self.path:
            raise ValueError("data.path=None, but data.name=text needs one: set data.path to a file, folder or hub id")
        if self.name == "stories" and self.path is not None:
            raise ValueError(
                f"data.path={self.path!r} has no meaning for data.name=stories: "
                "set data.name=text (or tinystories), or leave data.path out"
            )
        if not self.text_field:
            raise ValueError(f"data.text_field={self.text_field!r} is empty: name the field that holds the text")
        for key in ("train_documents", "val_documents", "tokenizer_documents"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"data.{key}={value} leaves no documents: use 1 or more, or null for the default")
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"data.val_fraction={self.val_fraction} must lie between 0 and 1: use for example 0.05")
        self._check_conventions()

    def _check_conventions(self) -> None:
        for key, known in (("tokenizer", TOKENIZERS), ("rows", ROWS)):
            if getattr(self, key) not in known:
                raise ValueError(f"data.{key}={getattr(self, key)!r} is not known: use one of {', '.join(known)}")
        if self.tokenizer_from == "":
            raise ValueError("data.tokenizer_from='' is empty: name a path or hub id, or use null for the run's own data")
        if self.rows != "padded":
            if not self.append_eos:
                raise ValueError(
                    f"data.append_eos=false has no meaning for data.rows={self.rows}, where [EOS] separates documents: "
                    "set data.rows=padded, or leave data.append_eos out"
                )
            if self.count_padding:
                raise ValueError(
                    f"data.count_padding=true has no meaning for data.rows={self.rows}: "
                    "set data.rows=padded, or leave data.count_padding out"
                )
        if self.validation_from_train:
            if self.val_documents is None:
                raise ValueError(
                    "data.val_documents=null with data.validation_from_train=true would validate on all of train: "
                    "set data.val_documents to a number"
                )
            if self.drop_overlap:
                raise ValueError(
                    "data.drop_overlap=true would remove from train what data.validation_from_train=true validates on: "
                    "leave one of them out"
                )

    def cache_root(self) -> Path:
        """The cache folder in force (not created here)."""
        return cache_root(self.cache_dir)
