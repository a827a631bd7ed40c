"""Bad data, and checkpoints that do not go with what they are resumed by: one line with key or file, value and cure, exit
code 2, and nothing left behind."""

import json
import os
import shutil
import socket
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from tests.launch import FP32, records
from tests.refusals import MET, TINY, Bad, call, check_refused, make_tree, program, sets

TEXTS = [f"The cat with number {i} sat on a mat and counted to {i * i}." for i in range(300)]
LINES = [json.dumps({"text": text}) for text in TEXTS]
TEXT_DATA = ["data.name=text", "data.train_documents=null", "data.val_documents=null"]


def data(path: str, *settings: str) -> list[str]:
    """Flags that train on a file or folder."""
    return sets(*TEXT_DATA, f"data.path={path}", *settings)


def lines(*middle: str | bytes) -> bytes:
    """JSON lines with others after the 150th."""
    parts = [line if isinstance(line, bytes) else line.encode() for line in [*LINES[:150], *middle, *LINES[150:]]]
    return b"\n".join(parts)


def parquet(column: list, name: str = "text") -> bytes:
    """A parquet file of one column."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({name: column}), sink)
    return sink.getvalue().to_pybytes()


WHOLE = parquet(TEXTS)
FILES = {
    "empty/train.jsonl": (b"", ["empty/train.jsonl: is empty (0 bytes)", "remove it"]),
    "binary.txt": (bytes(range(256)) * 99, ["binary.txt: byte 128 (0x80) is not UTF-8: convert it"]),
    "late.txt": (b"word\n" * 50_000 + b"caf\xe9", ["late.txt: byte 250003 (0xe9) is not UTF-8: convert it"]),
    "utf16.jsonl": ("\n".join(LINES).encode("utf-16"), ["utf16.jsonl line 1: byte 0 (0xff) is not UTF-8"]),
    "utf16.txt": ("ab".encode("utf-16-le") * 9999, ["utf16.txt: character 1 is NUL, as in binary files and UTF-16"]),
    "latin1.jsonl": (lines(b'{"text": "caf\xe9"}'), ["latin1.jsonl line 151: byte 13 (0xe9) is not UTF-8"]),
    "cut.parquet": (WHOLE[: len(WHOLE) // 2], ["cut.parquet: not a readable parquet file", "write it again"]),
    "holed.parquet": (WHOLE[:200] + bytes(200) + WHOLE[400:], ["holed.parquet: not a readable parquet file"]),
    "column.parquet": (parquet(TEXTS, "body"), ["column.parquet: no column 'text' among ['body']: set data.text_field"]),
    "bytes.parquet": (parquet([b"a", b"b"]), ["bytes.parquet row 0: column 'text' is bytes, not text"]),
    "broken.jsonl": (lines('{"text": "oh'), ["broken.jsonl line 151: not JSON", "write one JSON object a line"]),
    "field.jsonl": (lines('{"body": "oh"}'), ["field.jsonl line 151: no field 'text' among ['body']"]),
    "type.jsonl": (lines('{"text": ["oh"]}'), ["type.jsonl line 151: field 'text' is list, not text"]),
    "nested.jsonl": (lines("[" * 100_000), ["nested.jsonl line 151: not JSON (maximum recursion depth"]),
    "digits.jsonl": (lines('{"n": %s}' % ("9" * 5000)), ["digits.jsonl line 151: not JSON", "5000 digits"]),
    "keys.jsonl": (
        json.dumps({"a" * 10**6: 1, "\x1b[31mred": 2}).encode(),
        ["keys.jsonl line 1: no field 'text' among ['\\x1b[31mred', 'aaaa", "aaa']: set data.text_field"],
    ),
    "array.jsonl": (json.dumps(TEXTS, indent=1).encode(), ["array.jsonl line 1: not JSON", "one JSON object a line"]),
    "suffix.csv": (b"text\na\n", ["suffix.csv: unknown suffix '.csv': convert it to one of .jsonl"]),
    "red\x1b[31m.txt": (b"\xff", ["red\\x1b[31m.txt: byte 0 (0xff) is not UTF-8"]),
}
"""Content, and what is said about it."""

OTHERS = {
    "missing": Bad(data("none"), ["data.path='none' does not exist: set it to an existing file or folder"]),
    "missing file": Bad(data("a/none.jsonl"), ["data.path='a/none.jsonl' does not exist"]),
    "long name": Bad(data("a" * 300 + ".txt"), ["data.path='aaa", "cannot be read (File name too long)"]),
    "no name": Bad(data('""'), ["data.path=None, but data.name=text needs one"]),
    "NUL name": Bad(data('"a\\0.txt"'), ["data.path='a\\x00.txt' cannot be read (embedded null byte)"]),
    "long line": Bad(
        data("long.jsonl"), ["long.jsonl line 1: field 'text' has 50,000,000 characters, more than 16,777,216"]
    ),
    "endless line": Bad(
        data("endless.jsonl"), ["endless.jsonl line 1: has over 134,217,728 bytes", "one JSON object a line"]
    ),
    "closed file": Bad(data("closed/train.jsonl"), ["closed/train.jsonl: cannot be read (Permission denied): change its"]),
    "closed folder": Bad(data("locked"), ["locked: cannot be read (Permission denied): change its permissions"]),
    "in closed folder": Bad(data("locked/train.jsonl"), ["data.path='locked/train.jsonl' cannot be read (Permission"]),
    "closed below": Bad(data("below"), ["below/inner: cannot be read (Permission denied)"]),
    "only held-out": Bad(data("heldout"), ["data.path='heldout' has no training files", "add a file named train*"]),
    "no files": Bad(data("bare"), ["data.path='bare' is a folder without files: put .jsonl"]),
    "blank split": Bad(data("blank"), ["data.path='blank' gives no validation documents: set data.path"]),
    "link circle": Bad(data("circle.txt"), ["data.path='circle.txt' cannot be read (Too many levels of symbolic links)"]),
    "folder circle": Bad(data("around"), ["around/again: is a link to a folder above it", "remove it"]),
    "link to nothing": Bad(data("dangling"), ["dangling/valid.jsonl: cannot be read (No such file or directory)"]),
    "pipe": Bad(data("pipe.jsonl"), ["pipe.jsonl: is a named pipe, not a file: write its content to a file"]),
    "pipe in folder": Bad(data("pipes"), ["pipes/valid.jsonl: is a named pipe, not a file"]),
    "device": Bad(data("zero.txt"), ["zero.txt: is a device, not a file"]),
    "socket": Bad(data("socket.txt"), ["socket.txt: is a socket, not a file"]),
    "field": Bad(data("good", "data.text_field=body"), ["train.jsonl line 1: no field 'body' among ['text']"]),
    "large vocabulary": Bad(
        data("good", "model.vocab_size=5000"),
        ["model.vocab_size=5000, but the tokenizer finds only", "lower it", "--set data.allow_fewer=true"],
    ),
    "small vocabulary": Bad(data("good", "model.vocab_size=100"), ["model.vocab_size=100 is too small", "use 258 or more"]),
    "large batch": Bad(data("good", "train.batch_size=2000"), ["train.batch_size=2000 is more than the", "lower it"]),
    "few documents": Bad(
        data("good", "data.train_documents=5000"), ["data.train_documents=5000, but the source has only 250", "lower it"]
    ),
    "tokenizer": Bad(data("good", "data.tokenizer_from=none"), ["data.tokenizer_from='none' does not exist"]),
    "hub": Bad(
        sets(*TEXT_DATA, "data.path=owner/name"),
        ["'owner/name' is no local path and could not be loaded from the hub", "set data.path"],
        {"HF_HUB_OFFLINE": "1"},
    ),
}
BAD = {name: Bad(data(json.dumps(name)), says) for name, (_, says) in FILES.items()} | OTHERS


@pytest.fixture(scope="module")
def box(tmp_path_factory) -> Path:
    """A user's working folder with everything that the cases name."""
    box = make_tree(tmp_path_factory.mktemp("data") / "box", {name: content for name, (content, _) in FILES.items()})
    train, valid = "\n".join(LINES[:250]), "\n".join(LINES[250:])
    make_tree(box, {"tiny.yaml": yaml.safe_dump(TINY), "good/train.jsonl": train, "good/valid.jsonl": valid})
    make_tree(box, {"words/train.jsonl": train})
    for folder in ("closed", "locked", "below", "blank", "around", "dangling", "pipes"):
        make_tree(box, {f"{folder}/train.jsonl": train})
    make_tree(box, {"below/inner/train.jsonl": train, "blank/valid.jsonl": "\n \n", "heldout/valid.jsonl": valid})
    make_tree(box, {"long.jsonl": json.dumps({"text": "word " * 10**7})})
    for folder in ("cache", "bare"):
        (box / folder).mkdir()
    with (box / "endless.jsonl").open("wb") as file:
        file.truncate(2**28)  # takes no space
    (box / "circle.txt").symlink_to("circle.txt")
    (box / "around" / "again").symlink_to("../around")
    (box / "dangling" / "valid.jsonl").symlink_to("gone")
    (box / "zero.txt").symlink_to("/dev/zero")
    os.mkfifo(box / "pipe.jsonl")
    os.mkfifo(box / "pipes" / "valid.jsonl")
    here = os.getcwd()
    os.chdir(box)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket.txt")
    finally:
        os.chdir(here)
    (box / "closed" / "train.jsonl").chmod(0)
    for folder in ("locked", "below/inner"):
        (box / folder).chmod(0)
    yield box
    for folder in ("locked", "below/inner"):
        (box / folder).chmod(0o700)


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused_in_one_line(name, box):
    check_refused(BAD[name], box)


def test_links_to_other_places_are_followed(box, tmp_path):
    """Caches of downloads are made of links; and a line too long for JSON lines is cut in plain text."""
    (tmp_path / "box" / "set").mkdir(parents=True)
    (tmp_path / "box" / "set" / "train").symlink_to(box / "good")
    (tmp_path / "box" / "set" / "valid.jsonl").symlink_to(box / "good" / "valid.jsonl")
    make_tree(tmp_path / "box", {"tiny.yaml": yaml.safe_dump(TINY)})
    arguments = ["--experiment", "tiny.yaml", "--ds_config", FP32, *data("set", "data.drop_overlap=true")]
    ending = call(*arguments, folder=tmp_path / "box", SOME_CACHE_DIR=str(tmp_path / "cache"))
    assert ending.code == MET, ending
    assert "dropped 50 documents (overlap)" in ending.out


RUN = [
    *("--experiment", "tiny.yaml", "--ds_config", FP32, "--output_dir", "run"),
    *data("good", "data.tokenizer_from=words"),
]


@pytest.fixture(scope="module")
def stopped(box) -> Path:
    """The folder of a run that was stopped half-way, made by the command line, on a tokenizer of other data."""
    ending = program(*RUN, "--max_steps", "2", folder=box, SOME_CACHE_DIR=str(box / "cache"))
    assert ending.code == 0, ending
    return box / "run"


def test_a_run_is_resumed_only_by_what_made_it(box, stopped):
    cache = str(box / "cache")
    make_tree(box, {"bf16.json": json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}})})
    for other, says in [
        (sets("seed=1"), ["seed = 1 but the checkpoint run/checkpoints/step_00000002 has 0; set it back"]),
        (sets("model.some.top_k=1"), ["model.some.top_k = 1 but the checkpoint", "has 2; set it back"]),
        (["--ds_config", "bf16.json"], ["precision = bf16 but", "has fp32; use the --ds"]),
        (sets("data.path=heldout/valid.jsonl"), ["data = ", "but the checkpoint", "use the data it was trained on"]),
        (["--resume", "good"], ["--resume good: holds no checkpoint; give a run's folder"]),
    ]:
        check_refused(Bad([*RUN, *other], says), box)

    shutil.move(box / "words", box / "kept")
    make_tree(box, {"words/train.jsonl": "\n".join(json.dumps({"text": text[::-1]}) for text in TEXTS)})
    ending = check_refused(Bad(RUN, ["tokenizer = ", "but the checkpoint", "use the data it was trained on"]), box)
    assert ending == program(*RUN, folder=box, SOME_CACHE_DIR=cache), "a program of its own says the same"
    shutil.rmtree(box / "words")
    shutil.move(box / "kept", box / "words")

    ending = call(*RUN, folder=box, SOME_CACHE_DIR=cache)
    assert ending.code == MET, ending
    assert len(records(stopped, "train")) == 2
