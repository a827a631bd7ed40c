"""Settings of the data: where the text comes from, how much of it is used, where prepared data is cached."""

import os
from dataclasses import dataclass
from pathlib import Path

SOURCE_NAMES = ("stories", "tinystories", "text")


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
        for key, value in (("train_documents", self.train_documents), ("val_documents", self.val_documents)):
            if value is not None and value < 1:
                raise ValueError(f"data.{key}={value} leaves no documents: use 1 or more, or null for the default")
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"data.val_fraction={self.val_fraction} must lie between 0 and 1: use for example 0.05")

    def cache_root(self) -> Path:
        """The cache folder in force (not created here)."""
        return Path(self.cache_dir or os.environ.get("SOME_CACHE_DIR") or "~/.cache/some").expanduser()
