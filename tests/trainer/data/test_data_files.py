"""Byte order marks and line ends: the same documents, on whatever system a corpus was saved."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from trainer.data import DataConfig, check_source, load_documents
from trainer.data.files import read_documents

BOM = "\ufeff"
LINE_ENDS = {"LF": "\n", "CRLF": "\r\n", "CR": "\r"}
TEXT = "A cat.\n\nA dog.\n" * 400


def documents(path, content):
    """Those of a file with this content, which is a text or bytes."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    check_source(DataConfig(name="text", path=str(path)))
    return list(read_documents(path, "text"))


@pytest.mark.parametrize("suffix", [".txt", ".md", ".tokens", ".TXT"])
@pytest.mark.parametrize("end", LINE_ENDS)
@pytest.mark.parametrize("mark", ["", BOM])
def test_plain_text_is_the_same_with_every_mark_and_line_end(tmp_path, suffix, end, mark):
    found = documents(tmp_path / f"a{suffix}", mark + TEXT.replace("\n", LINE_ENDS[end]))
    assert found == documents(tmp_path / "b.txt", TEXT) and "".join(found) == TEXT and len(found) == 3


def test_mixed_line_ends_and_marks_of_joined_files(tmp_path):
    assert documents(tmp_path / "a.txt", f"{BOM}a\rb\r\nc\n\r{BOM}{BOM}d{BOM}e\n") == [f"a\nb\nc\n\nd{BOM}e\n"]
    assert documents(tmp_path / "b.txt", f"{BOM}a\r\n<|endoftext|>\r\n{BOM}b<|endoftext|>{BOM}") == ["a", "b", ""]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_other_separators_are_characters_in_every_format(tmp_path, character):
    text = f"one{character}two\n"
    assert documents(tmp_path / "a.txt", text) == [text]
    assert documents(tmp_path / "b.txt", f"{text}<|endoftext|>{character}") == [text.strip("\n"), character]
    for ascii_only in (True, False):
        line = json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n"
        assert documents(tmp_path / "a.jsonl", line * 2) == [text] * 2


@pytest.mark.parametrize("end", LINE_ENDS)
def test_json_lines_end_like_those_of_plain_text(tmp_path, end):
    texts = ["a\r\nb", f"{BOM}c", "", None, f"d{BOM}"]
    content = "".join(f"{BOM}{json.dumps({'text': text})}{LINE_ENDS[end]}{LINE_ENDS[end]}" for text in texts)
    assert documents(tmp_path / "a.jsonl", content) == ["a\r\nb", "c", "", "", f"d{BOM}"]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    assert list(read_documents(path, "text")) == ["a\r\nb", "c", "", "", f"d{BOM}"]


def test_the_line_of_an_error_is_counted_by_any_line_end(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl line 3: not JSON"):
        documents(tmp_path / "a.jsonl", '{"text": "a"}\r{"text": "b"}\r{oops}\r')


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".md"])
def test_a_file_of_nothing_but_a_mark_is_empty(tmp_path, suffix):
    with pytest.raises(ValueError, match=r"is empty \(nothing but a byte order mark\): remove it"):
        documents(tmp_path / f"a{suffix}", BOM)


def test_a_document_of_nothing_but_marks_is_empty(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": BOM}) + '\n{"text": "a"}\n')
    (tmp_path / "valid.txt").write_text(f"{BOM}\n{BOM}<|endoftext|>b")
    found = load_documents(DataConfig(name="text", path=str(tmp_path)), 0)
    assert (found.train, found.validation, found.dropped["empty"]) == (["a"], ["b"], 2)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_unicode_is_refused(tmp_path, encoding):
    for name in ("a.txt", "a.jsonl"):
        with pytest.raises(ValueError, match="is not UTF-8: convert|is NUL, as in binary|not JSON"):
            documents(tmp_path / name, ('{"text": "cat"}\n' * 3).encode(encoding))
