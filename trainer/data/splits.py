"""Which files of a folder are training, which validation, and which are neither: told by their names, and said in notes."""

import os
import re
from pathlib import Path

from trainer.data.files import SUFFIXES, check_readable, list_files
from trainer.text import visible

MAX_NAMED, MAX_NAME = 5, 100
"""Most files that a note names, and most characters of a name, whose end is shown where it is longer."""

TRAIN = re.compile(r"train(ing)?(set|data)?")
VALIDATION = re.compile(r"valid(ate|ation)?(set|data)?|val|dev|eval")
TEST = re.compile(r"test")
AMBIGUOUS = ("training", "val", "dev", "eval", "test")
"""Words that often mean something else: `dev-blog.txt`, `training-manual.txt`."""
COUNTERS = ("of", "part", "shard", "chunk", "split", "set", "data", "file")
"""Words that may follow that of a split: `dev-00000-of-00002`, `test_set`."""

COMPANIONS = re.compile(
    r"readme([._-][a-z]{2}([_-][a-z]{2,4})?)?(\.(md|txt|rst|html))?|"
    r"licen[cs]e([._-](mit|bsd|apache|gpl|cc)[\w.-]*)?(\.(md|txt|rst|html))?|"
    r"(copying|notice|authors|contributing|changelog|citation|code_of_conduct|data_?sheet|data(set)?_?card)"
    r"(\.(md|txt|rst|cff|bib|html))?|"
    r"(md5|sha(1|256|512))sums?(\.txt)?|_success|dataset_(infos?|dict)\.json|state\.json|desktop\.ini|thumbs\.db"
)
"""Files that come with data and are none, in small letters."""


def split_files(path: Path) -> tuple[list[Path], list[Path] | None, list[str]]:
    """Files of train, files of validation (None: train is one pool), notes on which file became what.

    Raises ValueError for what `list_files` refuses, and for a folder whose files are all held out.
    """
    files = list_files(path)
    if path.is_file():
        check_readable(path)
        return files, None, []
    about = _companions(files)
    files = [file for file in files if file not in about]
    if not files:
        raise ValueError(f"data.path={str(path)!r} is a folder without data: put {', '.join(SUFFIXES)} files there")
    for file in files:
        check_readable(file)
    kinds: dict[str, list[Path]] = {"train": [], "validation": [], "test": [], "other": []}
    names = {file: str(file.relative_to(path)) for file in files}
    has_train = any(_kind(name) == "train" for name in names.values())
    for file, name in names.items():
        kinds[_kind(name, has_train)].append(file)
    # Test files serve as validation only where nothing else does; training on them would be worse than leaving them.
    held_out = "validation" if kinds["validation"] else "test"
    train = "train" if kinds["train"] else "other"
    if not kinds[train]:
        raise ValueError(f"data.path={str(path)!r} has no training files, only held-out ones: add a file named train*")
    # Names that leave no doubt need no note: the same texts are the same data, wherever they come from.
    is_plain = all(_kind(names[file]) == kind for kind in ("train", "validation") for file in kinds[kind])
    is_said = train == "other" or held_out == "test" or not is_plain
    parts = [(f"by name, train is {_named(kinds[train], path)}; validation is", kinds[held_out] if is_said else [])]
    if train == "other":
        doubtful = [file for file in kinds[train] if _kind(names[file], True) != "other"]
        parts.append(("not held out, as its name may mean other things and no file is named train:", doubtful))
    unused = [file for kind, group in kinds.items() if kind not in (train, held_out) for file in group]
    parts.append((f"not used, neither {train} nor {held_out} by name:", unused))
    parts.append(("not used, as it tells about the data:", sorted(about)))
    parts.append(("read again under another name:", _repeated([*kinds[train], *kinds[held_out]])))
    return kinds[train], kinds[held_out] or None, [f"{what} {_named(group, path)}" for what, group in parts if group]


def _companions(files: list[Path]) -> set[Path]:
    """Those of `files` that tell about the data at or below their folder, where there is some."""
    about = {file for file in files if COMPANIONS.fullmatch(file.name.lower())}
    with_data = {folder for file in files if file not in about for folder in file.parents}
    return {file for file in about if file.parent in with_data or file.suffix.lower() not in SUFFIXES}


def _repeated(files: list[Path]) -> list[Path]:
    """Links to files that come before them."""
    seen: set[tuple[int, int]] = set()
    repeated = []
    for file in files:
        stat = os.stat(file)
        if (key := (stat.st_dev, stat.st_ino)) in seen:
            repeated.append(file)
        seen.add(key)
    return repeated


def _kind(name: str, has_train: bool = False) -> str:
    """train, validation, test or other, by the whole words in the names of a file and its folders: `wiki.train.tokens` and
    `train-00.jsonl` are train; `contest.txt` is other.

    Without files named train, what is ambiguous must end a name: `wiki.test.tokens` is test, `dev-blog.txt` is other.
    """
    stem = name[: -len(Path(name).suffix)] if Path(name).suffix else name
    parts = [[word for word in re.split(r"[\W\d_]+", part.lower()) if word] for part in stem.split("/")]
    last = {next((word for word in reversed(words) if word not in COUNTERS), "") for words in parts}
    words = {word for words in parts for word in words if has_train or word not in AMBIGUOUS} | last
    for kind, pattern in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        if any(pattern.fullmatch(word) for word in words):
            return kind
    return "other"


def _named(files: list[Path], folder: Path) -> str:
    """`a.jsonl, b.jsonl, c.jsonl and 11,997 more`: short, however many there are."""
    names = [visible(str(file.relative_to(folder))) for file in files[:MAX_NAMED]]
    names = [name if len(name) <= MAX_NAME else f"...{name[-MAX_NAME:]}" for name in names]
    more = len(files) - len(names)
    return ", ".join(names) + (f" and {more:,} more" if more else "")
