"""Sources: what becomes a document, which split it goes to, and one-line errors that name file, finding and cure."""

import json
import random
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from trainer.data import DataConfig, check_source, load_documents, story
from trainer.data.files import split_text


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")


def write_parquet(path, texts, field="text"):
    pyarrow.parquet.write_table(pyarrow.table({field: texts}), path)


def text_config(path, **settings):
    return DataConfig(name="text", path=str(path), **settings)


def fails(match, config, check=True):
    """The load, and the early check too unless check=False, stop with one line that matches."""
    for call in [lambda: check_source(config)] * check + [lambda: load_documents(config, 0)]:
        with pytest.raises(ValueError, match=match) as error:
            call()
        assert "\n" not in str(error.value)
        assert ": " in str(error.value), "no cure"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"name": "storys"}, r"data\.name='storys'.*stories"),
        ({"name": "text"}, r"data\.path=None"),
        ({"name": "stories", "path": "x"}, r"data\.path='x'"),
        ({"train_documents": 0}, r"data\.train_documents=0"),
        ({"val_documents": -1}, r"data\.val_documents=-1"),
        ({"val_fraction": 0.0}, r"data\.val_fraction=0\.0"),
        ({"val_fraction": 1.0}, r"data\.val_fraction=1\.0"),
        ({"text_field": ""}, r"data\.text_field=''"),
    ],
)
def test_settings_are_checked(settings, match):
    with pytest.raises(ValueError, match=match):
        DataConfig(**settings)


def test_stories():
    config = DataConfig(train_documents=50, val_documents=7)
    check_source(config)
    documents = load_documents(config, seed=3)
    assert documents.train == [story(i, 3) for i in range(50)]
    assert len(documents.validation) == 7
    assert documents.dropped == {"empty": 0, "overlap": 0}
    assert load_documents(config, seed=4).train != documents.train


def test_split_by_name_in_a_folder(tmp_path):
    write_jsonl(tmp_path / "train-0.jsonl", ["a", "b"])
    write_parquet(tmp_path / "train-1.parquet", ["c", None, " \n"])
    (tmp_path / "valid.txt").write_text("v<|endoftext|>\nw\n<|endoftext|>")
    (tmp_path / "test.txt").write_text("t")
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".hidden").write_text("x")
    check_source(text_config(tmp_path))
    documents = load_documents(text_config(tmp_path), 0)
    assert documents.train == ["a", "b", "c"]
    assert documents.validation == ["v", "w"]
    assert documents.dropped == {"empty": 3, "overlap": 0}
    assert any("README.md" in note for note in documents.notes) and any("test.txt" in note for note in documents.notes)


def test_test_files_are_validation_only_without_others(tmp_path):
    write_jsonl(tmp_path / "contest.jsonl", ["a"])
    write_jsonl(tmp_path / "corpus.test.jsonl", ["t"])
    documents = load_documents(text_config(tmp_path), 0)
    assert (documents.train, documents.validation) == (["a"], ["t"])


def test_only_held_out_files(tmp_path):
    write_jsonl(tmp_path / "valid.jsonl", ["a"])
    fails("no training files", text_config(tmp_path))


def test_limits_take_the_first_and_say_when_short(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ["", "a", "b", "c"])
    write_jsonl(tmp_path / "valid.jsonl", ["v", "w"])
    config = text_config(tmp_path, train_documents=2, val_documents=5, allow_fewer=True)
    documents = load_documents(config, 0)
    assert (documents.train, documents.validation) == (["a", "b"], ["v", "w"])
    assert any("val_documents=5" in note and "2" in note for note in documents.notes)


def test_pool_splits_by_content(tmp_path):
    rng = random.Random(0)
    texts = [f"text {rng.randrange(400)}" for _ in range(1000)]
    write_jsonl(tmp_path / "one.jsonl", texts)
    config = text_config(tmp_path / "one.jsonl", val_fraction=0.2)
    documents = load_documents(config, 0)
    train, validation = set(documents.train), set(documents.validation)
    assert not train & validation
    assert sorted(documents.train + documents.validation) == sorted(texts)
    assert 0.1 < len(validation) / len(train | validation) < 0.3
    rng.shuffle(texts)
    write_jsonl(tmp_path / "one.jsonl", texts + ["another one"])
    assert validation <= set(load_documents(config, 1).validation), "the side of a text must depend on nothing else"
    limited = load_documents(text_config(tmp_path / "one.jsonl", val_fraction=0.2, train_documents=9, val_documents=4), 0)
    assert (len(limited.train), len(limited.validation)) == (9, 4)


def test_pool_without_validation(tmp_path):
    write_jsonl(tmp_path / "one.jsonl", ["only"])
    fails(r"no (train|validation) documents: change data\.val_fraction", text_config(tmp_path / "one.jsonl"), check=False)


def test_overlap(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ["a", "b", "a", "c"])
    write_jsonl(tmp_path / "valid.jsonl", ["a", "v"])
    fails(r"2 training documents.*--set data\.drop_overlap=true", text_config(tmp_path), check=False)
    documents = load_documents(text_config(tmp_path, drop_overlap=True), 0)
    assert (documents.train, documents.validation) == (["b", "c"], ["a", "v"])
    assert documents.dropped["overlap"] == 2
    write_jsonl(tmp_path / "train.jsonl", ["a"])
    fails("no train documents", text_config(tmp_path, drop_overlap=True), check=False)


def test_plain_text_concatenates_back():
    rng = random.Random(0)
    for _ in range(100):
        lines = [
            rng.choice("ab é🙂\x0b\u2028") * rng.randrange(900) + rng.choice(["\n", "\r\n", "\n\n", " "])
            for _ in range(rng.randrange(30))
        ]
        text = "".join(lines)
        documents = split_text(text)
        assert "".join(documents) == text
        for document in documents[:-1]:
            assert document.endswith("\n") or len(document) > 2000
            assert 2000 <= len(document) <= 2000 + 8001
    assert split_text("x" * 2500 + "\n \n\n") == ["x" * 2500 + "\n \n\n"]
    one_line = "word " * 10000
    assert "".join(split_text(one_line)) == one_line and len(split_text(one_line)) > 20
    assert max(map(len, split_text("x" * 100_000))) <= 8001


def test_separator_needs_no_neighbours():
    assert split_text("a\nb\n<|endoftext|>\n  c<|endoftext|>d") == ["a\nb", "  c", "d"]


def test_paths_and_suffixes(tmp_path):
    fails("missing", text_config(tmp_path / "missing"))
    fails("does not exist", text_config("owner/file.txt"))
    fails("does not exist", DataConfig(name="tinystories", path="owner/name"))
    fails("folder without files", text_config(tmp_path))
    (tmp_path / "data.csv").write_text("a,b")
    fails(r"data\.csv: unknown suffix '\.csv'.*jsonl", text_config(tmp_path))
    fails(r"data\.csv: unknown suffix '\.csv'", text_config(tmp_path / "data.csv"))
    (tmp_path / "data.csv").unlink()
    (tmp_path / "e.txt").touch()
    fails(r"e\.txt: is empty", text_config(tmp_path))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"{oops", r"x\.jsonl line 3: not JSON"),
        (b"[1]", r"x\.jsonl line 3: a JSON list"),
        (b'{"body": "a"}', r"x\.jsonl line 3: no field 'text' among \['body'\].*data\.text_field"),
        (b'{"text": 5}', r"x\.jsonl line 3: field 'text' is int"),
        (b'{"text": "caf\xe9"}', r"x\.jsonl line 3: byte 13 \(0xe9\) is not UTF-8"),
        (b'{"text": "\\ud83d"}', r"x\.jsonl line 3: field 'text' has a lone surrogate"),
    ],
)
def test_bad_jsonl_lines(tmp_path, line, match):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "first"}\n\n' + line + b"\n")
    fails(match, text_config(tmp_path))


def test_text_field(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ["a"], field="story")
    write_parquet(tmp_path / "valid.parquet", ["v"], field="story")
    fails(r"train\.jsonl line 1: no field 'text'", text_config(tmp_path))
    check_source(text_config(tmp_path, text_field="story"))
    assert load_documents(text_config(tmp_path, text_field="story"), 0).validation == ["v"]
    write_jsonl(tmp_path / "train.jsonl", ["a"])
    fails(r"valid\.parquet: no column 'text'.*story", text_config(tmp_path))


def test_bad_parquet_and_text(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"not parquet at all")
    fails(r"x\.parquet: not a readable parquet file", text_config(tmp_path))
    (tmp_path / "x.parquet").unlink()
    write_parquet(tmp_path / "n.parquet", [1, 2])
    fails(r"n\.parquet row 0: column 'text' is int", text_config(tmp_path))
    (tmp_path / "n.parquet").unlink()
    (tmp_path / "x.txt").write_bytes(b"caf\xe9 au lait")
    fails(r"x\.txt: byte 3 \(0xe9\) is not UTF-8", text_config(tmp_path))


def test_the_check_may_cut_a_character(tmp_path):
    (tmp_path / "x.txt").write_text("a" + "é" * 200_000)
    check_source(text_config(tmp_path / "x.txt"))


def fake_hub(monkeypatch, **splits):
    asked = []

    def load_dataset(name):
        asked.append(name)
        return datasets.DatasetDict({key: datasets.Dataset.from_dict(columns) for key, columns in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hub(monkeypatch):
    asked = fake_hub(monkeypatch, train={"text": ["a", "", None, "b", "c"]}, validation={"text": ["v"]})
    config = DataConfig(name="tinystories", train_documents=2)
    check_source(config)
    documents = load_documents(config, 0)
    assert asked == ["roneneldan/TinyStories"]
    assert (documents.train, documents.validation, documents.dropped["empty"]) == (["a", "b"], ["v"], 2)


def test_hub_without_validation_is_a_pool(monkeypatch):
    asked = fake_hub(monkeypatch, train={"body": [f"text {i}" for i in range(200)]})
    documents = load_documents(text_config("owner/name", text_field="body", val_fraction=0.3), 0)
    assert asked == ["owner/name"]
    assert len(documents.train) + len(documents.validation) == 200 and len(documents.validation) > 30
    fails(r"'owner/name': no column 'text' among \['body'\]", text_config("owner/name"), check=False)


def test_hub_failure_is_one_line(monkeypatch):
    def load_dataset(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    fails(r"owner/name.*ConnectionError: no route.*data\.path", text_config("owner/name"), check=False)


def test_hub_needs_datasets(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="`datasets`"):
        check_source(DataConfig(name="tinystories"))


def test_real_tinystories(real_data):
    config = DataConfig(name="tinystories", path=str(real_data / "tinystories"), train_documents=300, val_documents=50)
    check_source(config)
    documents = load_documents(config, 0)
    first = json.loads((real_data / "tinystories" / "train.jsonl").read_text(encoding="utf-8").split("\n", 1)[0])
    assert documents.train[0] == first["text"]
    assert (len(documents.train), len(documents.validation)) == (300, 50)


def test_real_wikitext(real_data):
    config = text_config(real_data / "wikitext2")
    check_source(config)
    documents = load_documents(config, 0)
    whole = (real_data / "wikitext2" / "wiki.valid.tokens").read_bytes().decode("utf-8")
    assert "".join(documents.validation) == whole
    assert any(re.search(r"not used, .*: wiki\.test\.tokens", note) for note in documents.notes)
