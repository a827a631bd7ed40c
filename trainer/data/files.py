"""Readers of local files: each yields the documents of one file, in order, and names file and place in its errors.

In every format a byte order mark (U+FEFF) at the start of a file, line or document is dropped. Lines end with LF, CRLF or
CR. In plain text (.txt, .tokens, .md) all three become LF, so that a corpus saved on another system is the same data; what
JSON escapes and parquet hold is text, and stays as it is. U+2028, U+2029, U+0085, vertical tab and form feed end no line
anywhere: they are characters of a document.
"""

import codecs
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pyarrow
import pyarrow.parquet

from trainer.text import kind_of, shown

SUFFIXES = (".jsonl", ".parquet", ".txt", ".tokens", ".md")
BOM = "\ufeff"
END_OF_TEXT = "<|endoftext|>"
DOCUMENT_CHARACTERS = 2000  # target size of a document cut from plain text that marks no documents
MOST_CHARACTERS = 2**24  # in one document: five times War and Peace; tokenising one takes far more memory than its text
MOST_LINE_BYTES = 8 * MOST_CHARACTERS  # of JSON: a document in escapes, and other fields beside it
LONG_LINE_CHARACTERS = 4 * DOCUMENT_CHARACTERS  # a longer line is cut at spaces: some corpora are one single line


def list_files(path: Path) -> list[Path]:
    """The files at `path`: the file itself, or all files below a folder, sorted, hidden ones left out.

    Links are followed, as caches of downloads are made of them. Raises ValueError for a missing path, a folder without
    files, and for links that lead in a circle.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        found = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({reason})"
        raise ValueError(f"data.path={str(path)!r} {found}: set it to an existing file or folder") from None
    files = _files_below(path) if stat.S_ISDIR(mode) else [path]
    if not files:
        raise ValueError(f"data.path={str(path)!r} is a folder without files: put {', '.join(SUFFIXES)} files there")
    return files


def _files_below(folder: Path) -> list[Path]:
    """Everything below `folder` that is no folder, sorted; hidden names are left out."""

    def fail(error: OSError) -> NoReturn:
        raise ValueError(f"{error.filename}: cannot be read ({error.strerror}): change its permissions or data.path")

    files = []
    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            inner = Path(here, name)
            if inner.is_symlink() and Path(here).resolve().is_relative_to(inner.resolve()):
                raise ValueError(f"{inner}: is a link to a folder above it, which has no end: remove it")
        files += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(files)


def check_readable(file: Path) -> None:
    """Raises ValueError for a file that is empty, cannot be read, is none (a pipe, a device, a link to nothing) or has an
    unknown suffix."""
    if file.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{file}: unknown suffix {file.suffix!r}: convert it to one of {', '.join(SUFFIXES)}, "
            "or move it out of data.path"
        )
    try:
        # Opening a pipe would wait for its writer, and a device may never end.
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(f"{file}: is a {kind_of(mode)}, not a file: write its content to a file")
        with file.open("rb") as handle:
            head = handle.read(len(codecs.BOM_UTF8) + 1)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}): change its permissions or data.path") from error
    if head in (b"", codecs.BOM_UTF8):
        found = "nothing but a byte order mark" if head else "0 bytes"
        raise ValueError(f"{file}: is empty ({found}): remove it or set data.path to a file with text")


def read_documents(file: Path, text_field: str) -> Iterator[str]:
    """Yield the documents of one file; null texts come out as "". Raises ValueError naming file, finding and cure."""
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        return _read_jsonl(file, text_field)
    if suffix == ".parquet":
        return _read_parquet(file, text_field)
    text = _plain(_decode(file.read_bytes(), str(file)))
    if "\0" in text:
        raise ValueError(
            f"{file}: character {text.index(chr(0))} is NUL, as in binary files and UTF-16: convert it to UTF-8"
        )
    return (checked_text(part, f"{file} document {number}") for number, part in enumerate(split_text(text), start=1))


def _plain(text: str) -> str:
    """Without marks at the start of a line, which files joined by `cat` have in their middle, and with LF for line ends."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(rf"^{BOM}+", "", text, flags=re.MULTILINE) if BOM in text else text


def check_file(file: Path, text_field: str) -> None:
    """Parse the first few documents of a file, reading no more of it than that needs. Raises ValueError."""
    if file.suffix.lower() in (".jsonl", ".parquet"):
        for _, _ in zip(range(8), read_documents(file, text_field), strict=False):
            pass
        return
    with file.open("rb") as handle:
        head = handle.read(65536)
    _decode(head, str(file), final=False)


def checked_text(value: object, where: str) -> str:
    """`value` as a document: null is an empty document; anything else must be a string that UTF-8 can express."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where} is {type(value).__name__}, not text: set data.text_field to the field with the text")
    value = value.lstrip(BOM) if value.startswith(BOM) else value
    if len(value) > MOST_CHARACTERS:
        raise ValueError(f"{where} has {len(value):,} characters, more than {MOST_CHARACTERS:,}: cut it into documents")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} has a lone surrogate at character {error.start}: remove or repair it") from None
    return value


def split_text(text: str) -> list[str]:
    """Documents of a plain text: what `<|endoftext|>` separates, without the line ends around the separator; in a text
    without separators, consecutive lines of about 2,000 characters whose concatenation is exactly `text`."""
    if END_OF_TEXT in text:
        return [part.strip("\r\n") for part in text.split(END_OF_TEXT)]
    documents: list[str] = []
    lines: list[str] = []
    size, is_blank = 0, True
    for line in io.StringIO(text, newline="\n"):
        for piece in _pieces(line):
            lines.append(piece)
            size += len(piece)
            is_blank = is_blank and piece.isspace()
            # White space alone would be dropped as an empty document: it begins the next one.
            if size >= (MOST_CHARACTERS // 2 if is_blank else DOCUMENT_CHARACTERS):
                documents.append("".join(lines))
                lines, size, is_blank = [], 0, True
    rest = "".join(lines)
    if documents and not rest.strip():
        documents[-1] += rest  # for the same reason
    elif rest:
        documents.append(rest)
    return documents


def _pieces(line: str) -> list[str]:
    if len(line) <= LONG_LINE_CHARACTERS:
        return [line]
    # About 2,000 characters and on to the next white space, or 8,000 where there is none.
    extra = LONG_LINE_CHARACTERS - DOCUMENT_CHARACTERS
    return re.findall(rf".{{{DOCUMENT_CHARACTERS}}}\S{{0,{extra}}}\s?|.+", line, flags=re.DOTALL)


def _decode(data: bytes, where: str, final: bool = True) -> str:
    # final=False: `data` is the head of a file and may end inside a character.
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data, final)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8: convert it, for example with iconv"
        ) from None


def _read_jsonl(file: Path, text_field: str) -> Iterator[str]:
    for number, raw in enumerate(_lines(file), start=1):
        where = f"{file} line {number}"
        line = _decode(raw, where).lstrip(BOM).strip()
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise ValueError(f"{where}: not JSON ({reason}): write one JSON object a line") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a JSON {type(record).__name__}, not an object: write one JSON object a line")
        if text_field not in record:
            raise ValueError(
                f"{where}: no field {text_field!r} among {shown(sorted(record))}: set data.text_field to one of them"
            )
        yield checked_text(record[text_field], f"{where}: field {text_field!r}")


def _lines(file: Path) -> Iterator[bytes]:
    """The lines of a file. JSON has no bare CR inside a text, so that one always ends a line."""
    number = 0
    with file.open("rb") as handle:
        for raw in iter(lambda: handle.readline(MOST_LINE_BYTES + 1), b""):
            if len(raw) > MOST_LINE_BYTES:
                raise ValueError(
                    f"{file} line {number + 1}: has over {MOST_LINE_BYTES:,} bytes: "
                    "write one JSON object a line, one a document"
                )
            for line in raw.splitlines():  # of bytes: at LF, CRLF and CR only
                number += 1
                yield line


def _read_parquet(file: Path, text_field: str) -> Iterator[str]:
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise ValueError(
                    f"{file}: no column {text_field!r} among {shown(names)}: set data.text_field to one of them"
                )
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    yield checked_text(value, f"{file} row {row}: column {text_field!r}")
                    row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file}: not a readable parquet file ({first_line}): write it again") from error
