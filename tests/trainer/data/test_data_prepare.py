"""Prepared data: built once, found again, rebuilt when damaged, never seen half written."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from trainer.data import DataConfig, open_data, prepare, prepare_data, tokenizer_hash

VOCAB, SEQ = 400, 64


@pytest.fixture
def config(tmp_path):
    return DataConfig(train_documents=60, val_documents=10, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def builds(monkeypatch):
    """Names of what was built, in order."""
    done = []
    for name in ("train_tokenizer", "write_sequences"):
        original = getattr(prepare, name)
        monkeypatch.setattr(prepare, name, lambda *a, _o=original, _n=name: (done.append(_n), _o(*a))[1])
    return done


ALL = ["train_tokenizer", "write_sequences", "write_sequences"]


def entries(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize("name", ["stories", "tinystories"])
def test_what_is_opened_is_what_was_loaded(config, request, name):
    if name == "tinystories":
        path = str(request.getfixturevalue("real_data") / "tinystories")
        config = dataclasses.replace(config, name=name, path=path)
    documents = prepare.load_documents(config, 5)
    data = open_data(prepare_data(config, VOCAB, SEQ, 5))
    for texts, sequences, split in (
        (documents.train, data.train, "train"),
        (documents.validation, data.validation, "validation"),
    ):
        ids: list[list[int]] = []
        for row, starts in zip(sequences, sequences.starts_document, strict=True):
            if starts:
                ids.append(row[1:].tolist())
            else:
                ids[-1] += row[1:].tolist()
        assert [data.tokenizer.decode(i[:-1]) for i in ids] == texts
        assert data.summary[split]["documents"] == sequences.num_documents == len(texts)
        assert data.summary[split]["tokens"] == sequences.lengths.sum() == sum(map(len, ids))
        assert data.summary[split]["bytes"] == sequences.num_bytes.sum() == sum(len(t.encode()) for t in texts)
        assert sequences.lengths.max() <= SEQ
    assert data.tokenizer_hash == tokenizer_hash(data.tokenizer)
    assert data.summary["dropped"] == {"empty": 0, "overlap": 0}


def test_second_call_builds_nothing(config, builds, tmp_path, capsys):
    folder = prepare_data(config, VOCAB, SEQ, 0)
    assert builds == ALL
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert prepare_data(config, VOCAB, SEQ, 0) == folder
    assert builds == ALL
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert len(entries(tmp_path)) == 2, "temporary files were left"
    assert "rebuilding" not in capsys.readouterr().out


def test_keys_follow_content(config, builds, tmp_path):
    first = prepare_data(config, VOCAB, SEQ, 0)
    fingerprints = {open_data(first).fingerprint}
    more = DataConfig(train_documents=60, val_documents=11, cache_dir=config.cache_dir)
    for other, vocab, seq, seed, trains in (
        (config, VOCAB, SEQ + 1, 0, False),
        (more, VOCAB, SEQ, 0, False),
        (config, VOCAB + 1, SEQ, 0, True),
        (config, VOCAB, SEQ, 1, True),
    ):
        builds.clear()
        folder = prepare_data(other, vocab, seq, seed)
        assert ("train_tokenizer" in builds) == trains
        fingerprints.add(open_data(folder).fingerprint)
    assert len(fingerprints) == 5
    # The same texts from a file are the same data, wherever they come from.
    documents = prepare.load_documents(config, 0)
    for name, texts in (("train", documents.train), ("valid", documents.validation)):
        file = tmp_path / "local" / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    local = DataConfig(name="text", path=str(tmp_path / "local"), cache_dir=config.cache_dir)
    builds.clear()
    assert prepare_data(local, VOCAB, SEQ, 9) == first
    assert builds == []


def test_a_changed_word_of_equal_length_is_other_data(tmp_path):
    fingerprints = set()
    for word in ("cat", "dog"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / "train.txt").write_text("the cat and the dog")
        (tmp_path / "in" / "valid.txt").write_text(f"a {word}")
        config = DataConfig(name="text", path=str(tmp_path / "in"), allow_fewer=True, cache_dir=str(tmp_path / "cache"))
        data = open_data(prepare_data(config, 300, 8, 0))
        assert data.tokenizer.decode(data.validation[0].tolist()) == f"a {word}"
        fingerprints.add(data.fingerprint)
    assert len(fingerprints) == 2


@pytest.mark.parametrize("name", prepare.FILES + (prepare.META,))
@pytest.mark.parametrize("how", ["truncate", "flip", "delete"])
def test_damage_is_repaired_with_a_message(config, capsys, tmp_path, name, how):
    folder = prepare_data(config, VOCAB, SEQ, 0)
    original = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    victim = folder / name
    content = victim.read_bytes()
    if how == "delete":
        victim.unlink()
    else:
        middle = len(content) // 2
        victim.write_bytes(content[:-1] if how == "truncate" else content[:middle] + b"\xff" + content[middle + 1 :])
    capsys.readouterr()
    assert prepare_data(config, VOCAB, SEQ, 0) == folder
    out = capsys.readouterr().out
    assert "rebuilding" in out and str(folder) in out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == original
    assert len(entries(tmp_path)) == 2, "the damaged entry was left"


def test_damaged_tokenizer_cache_is_rebuilt(config, builds, tmp_path, capsys):
    folder = prepare_data(config, VOCAB, SEQ, 0)
    (file,) = (tmp_path / "cache").glob("tokenizer-*.json")
    content = file.read_bytes()
    file.write_bytes(content[:100])
    builds.clear()
    assert prepare_data(config, VOCAB, SEQ, 0) == folder
    assert builds == ["train_tokenizer"] and file.read_bytes() == content
    assert "rebuilding" in capsys.readouterr().out


def test_interrupted_build_leaves_no_entry(config, monkeypatch, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_hash_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_data(config, VOCAB, SEQ, 0)
    assert [name for name in entries(tmp_path) if not name.startswith("tokenizer-")] == []
    assert len(open_data(prepare_data(config, VOCAB, SEQ, 0)).validation) >= 10


def test_what_a_killed_process_left_behind_is_removed_and_what_a_live_one_builds_is_not(config, tmp_path):
    host, folder = socket.gethostname(), prepare_data(config, VOCAB, SEQ, 0)
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    owners = [(host, ended.pid), (host, os.getpid()), ("elsewhere", ended.pid)]
    names = [f".data-x.{name}.{process}.0123abcd.tmp" for name, process in owners]
    for name in names:
        (folder.parent / name).mkdir()
        (folder.parent / name / "part").touch()
    prepare_data(config, VOCAB, SEQ + 1, 0)
    assert [(folder.parent / name).exists() for name in names] == [False, True, True]


def test_an_entry_does_not_tell_of_other_settings(config):
    """Two runs with the same texts and tokens, of which one asked for a larger vocabulary than the text fills."""
    config = dataclasses.replace(config, train_documents=3, allow_fewer=True)
    few, more = (open_data(prepare_data(config, size, SEQ, 0)) for size in (4000, 5000))
    assert few.fingerprint == more.fingerprint and few.validation_hash == more.validation_hash
    for data, size in ((few, 4000), (more, 5000)):
        assert data.summary["vocab_size"] == size and f"model.vocab_size={size}" in data.summary["notes"][-1]


def test_another_run_got_there_first(config, monkeypatch, tmp_path):
    folder = prepare_data(config, VOCAB, SEQ, 0)
    kept = tmp_path / "kept"
    shutil.move(folder, kept)
    write = prepare.write_sequences

    def slow_write(*args):
        if not folder.exists():
            shutil.copytree(kept, folder)  # the other run finishes while this one is at work
        return write(*args)

    monkeypatch.setattr(prepare, "write_sequences", slow_write)
    assert prepare_data(config, VOCAB, SEQ, 0) == folder
    assert len(open_data(folder).train) == len(open_data(kept).train)
    assert len(entries(tmp_path)) == 2


def test_bad_settings(config, tmp_path):
    with pytest.raises(ValueError, match=r"model\.vocab_size=100"):
        prepare_data(config, 100, SEQ, 0)
    with pytest.raises(ValueError, match=r"model\.max_seq_len=0"):
        prepare_data(config, VOCAB, 0, 0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"data\.cache_dir="):
        prepare_data(DataConfig(train_documents=5, val_documents=2, cache_dir=str(tmp_path / "file")), VOCAB, SEQ, 0)


def test_notes_and_dropped_documents_are_printed(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.jsonl").write_text('{"text": "a"}\n{"text": " "}\n{"text": "v"}\n')
    (tmp_path / "in" / "valid.jsonl").write_text('{"text": "v"}\n')
    config = DataConfig(
        name="text",
        path=str(tmp_path / "in"),
        drop_overlap=True,
        train_documents=9,
        allow_fewer=True,
        cache_dir=str(tmp_path / "cache"),
    )
    data = open_data(prepare_data(config, 300, 8, 0))
    out = capsys.readouterr().out
    assert "dropped 1 documents (empty)" in out and "dropped 1 documents (overlap)" in out
    assert "data.train_documents=9" in out and "model.vocab_size=300, but the tokenizer finds only 258 tokens" in out
    assert data.summary["dropped"] == {"empty": 1, "overlap": 1}
    assert len(data.summary["notes"]) == 2


def test_open_data_names_a_bad_folder(config, tmp_path):
    with pytest.raises(ValueError, match="nothing: not a folder of tokenised data"):
        open_data(tmp_path / "nothing")
    folder = prepare_data(config, VOCAB, SEQ, 0)
    other = prepare_data(config, VOCAB + 50, SEQ, 0)
    shutil.copy(other / "tokenizer.json", folder / "tokenizer.json")
    with pytest.raises(ValueError, match="differs from the tokenizer of this data"):
        open_data(folder)


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_CACHE_DIR", str(tmp_path / "env"))
    assert DataConfig().cache_root() == tmp_path / "env"
    assert DataConfig(cache_dir=str(tmp_path)).cache_root() == tmp_path
    monkeypatch.delenv("SOME_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DataConfig().cache_root() == tmp_path / ".cache" / "some"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
def test_words_that_are_too_long_are_cut_and_counted_in_every_format(tmp_path, capsys, suffix):
    texts = [f"The cat with number {i} sat on a mat.\n" for i in range(60)] + [" " * 100_000 + "x\n"]
    (tmp_path / "in").mkdir()
    for name, part in (("train", texts), ("valid", ["The dog sat on the mat.\n"])):
        file = tmp_path / "in" / f"{name}{suffix}"
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": part}), file)
        else:
            file.write_text("".join(part if suffix == ".txt" else [json.dumps({"text": text}) + "\n" for text in part]))
    config = DataConfig(name="text", path=str(tmp_path / "in"), allow_fewer=True, cache_dir=str(tmp_path / "cache"))
    data = open_data(prepare_data(config, 300, 64, 0))
    said = capsys.readouterr().out
    assert re.search(r"data: [\d,]+ words of over 1,200 bytes are cut to train the tokenizer, and only there\n", said)
    # Told again by a run that finds everything in the cache.
    prepare_data(config, 300, 64, 0)
    assert capsys.readouterr().out == said
    assert max(map(len, data.tokenizer.get_vocab())) <= 1200
    assert "".join(data.tokenizer.decode(row[1:].tolist()) for row in data.train).replace("[EOS]", "") == "".join(texts)


def test_what_takes_long_says_what_it_is(config, monkeypatch, capsys):
    monkeypatch.setattr("trainer.data.progress.FIRST_SECONDS", 0.0)
    prepare_data(config, VOCAB, SEQ, 0)
    said = capsys.readouterr().out
    assert "data: training the tokenizer on 60 documents: 0 s so far" in said
    assert "data: tokenising 60 train documents: 0 s so far" in said
