"""Texts from outside: read with bounds and parsed safely, shown without what a terminal would obey.

Whoever names a file may have named a pipe, a device or gigabytes by mistake, and whoever wrote a text may have put escape
sequences into it.
"""

import json
import reprlib
import stat
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trainer.plain_yaml import Malformed, has_half, parse_yaml

MOST_BYTES = 2**20
"""Largest settings file that is read; shipped ones have a few thousand bytes, and those of runs not many more."""
LONGEST_LINE = 1500
"""Most characters of an error line; beyond, its middle is left out."""

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 120
_repr.maxlong = 40
_repr.maxlevel = 3


def visible(text: str, keep: str = "") -> str:
    """`text` with everything that does not print (control characters, ANSI escapes, bidirectional overrides, bytes of file
    names that are no text) written as an escape such as `\\x1b`, but for the characters in `keep`."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def readable(tokenizer: Tokenizer, token_id: int) -> str:
    """A token so that it can be told from others: spaces as `␣`, other white space and control characters as escapes; part
    of a character in the vocabulary's own letters."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    if not text or "\ufffd" in text:
        text = tokenizer.id_to_token(token_id) or f"id {token_id}"  # the model may have rows that no token uses
    return visible(text).replace(" ", "␣")


def shown(value: Any) -> str:
    """A value for an error message: its repr, cut short where it is long or deep."""
    return _repr.repr(value)


def error_line(error: Exception) -> str:
    """The one line that a refused user sees: starts with `error: `, prints as it is, and keeps its end, the cure."""
    line = visible(f"error: {' '.join(str(error).split())}")
    if len(line) <= LONGEST_LINE:
        return line
    half = LONGEST_LINE // 2
    return f"{line[:half]} ... {line[-half:]}"


def read_yaml(path: Path, what: str, max_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The keys and values of a YAML file: plain data only, no key twice.

    Args:
        path: the file.
        what: how errors call it, such as `--experiment FILE`.
        max_bytes: a larger one is refused.

    Raises:
        ValueError: a file that cannot be read, is not YAML, or holds something else.
    """
    try:
        values = parse_yaml(_read(path, what, max_bytes))
    except Malformed as error:
        raise ValueError(f"{what}: is not valid YAML ({error}); {error.cure or 'mend the file'}") from None
    return _mapping(values, what)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file, with no key twice; see `read_yaml`.

    Raises:
        ValueError: a file that cannot be read, is not JSON, or holds something else.
    """
    text = _read(path, what)
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # a whole number of thousands of digits is a plain ValueError
        raise ValueError(f"{what}: is not JSON ({error}); mend the file") from None
    return _mapping(values, what)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key} stands twice")
        if has_half(key) or isinstance(value, str) and has_half(value):
            raise ValueError(f"{shown(key)}: {shown(value)} holds half a surrogate pair")
        values[key] = value
    return values


def _read(path: Path, what: str, max_bytes: int = MOST_BYTES) -> str:
    try:
        # Opening a pipe would wait for its writer, and a device may never end.
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(f"{what}: is a {kind_of(mode)}, not a file; give an existing file")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"{what}: cannot be read ({error.strerror}); give an existing file") from None
    if len(data) > max_bytes:
        raise ValueError(f"{what}: has over {max_bytes:,} bytes, more than settings need; give another file")
    try:
        return data.decode("utf-8-sig")  # some editors begin a text with a mark of its encoding
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} (0x{data[error.start]:02x})"
        raise ValueError(f"{what}: is not text in UTF-8 ({byte}); convert it, for example with iconv") from None


def kind_of(mode: int) -> str:
    """What a path is that is no regular file, from its `st_mode`."""
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def _mapping(values: Any, what: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{what}: holds {type(values).__name__}, not keys and values; see the shipped ones")
    return values
