"""Which files of a folder are training, which validation, and that the rest is said in few words."""

import os

import pytest

from tests.refusals import make_tree
from trainer.data.splits import split_files


def split(folder, *names):
    """The names in train and in validation (None: one pool), and the notes."""
    make_tree(folder, dict.fromkeys(names, "word"))
    train, validation, notes = split_files(folder)
    both = [None if files is None else [str(file.relative_to(folder)) for file in files] for files in (train, validation)]
    return *both, notes


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        (["wiki.train.tokens"], ["wiki.valid.tokens"]),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], ["dev-00000-of-00001.parquet"]),
        (["a.TXT", "b.JSONL"], ["valid.JSONL"]),
        (["train/a/part.txt", "train/b/part.txt"], ["validation/part.txt"]),
        (["en/train.txt", "fr/train.txt"], ["en/val.txt", "fr/val.txt"]),
        (["train-clean.txt"], ["dev-clean.txt"]),
        (["corpus.txt"], ["corpus_dev_2.txt"]),
        (["corpus.txt"], ["test_set.txt"]),
        (["contest.txt"], ["eval.txt"]),
        (["training.md"], ["valid.md"]),
        (["trainset.txt"], ["validation_set.txt"]),
        (["data.txt"], ["dev/blog.txt"]),
    ],
)
def test_names_that_mean_a_split(tmp_path, train, validation):
    found = split(tmp_path, *train, *validation)
    assert found[:2] == (train, validation)
    if any("train" in name for name in train) and "clean" not in train[0] and "test" not in validation[0]:
        assert found[2] == [], "nothing is in doubt"
    else:
        (note,) = found[2]
        assert note.startswith(f"by name, train is {train[0]}") and f"; validation is {validation[0]}" in note


@pytest.mark.parametrize(
    "name",
    ["dev-blog.txt", "val-d-oise.txt", "test driven.txt", "eval_harness_docs.md", "dévalué.txt", "dev-notes/one.txt"]
    + ["training-manual.txt", "contest.jsonl", "valet.txt", "latest.txt", "trainspotting.txt", "validity.txt"],
)
def test_names_that_do_not(tmp_path, name):
    train, validation, notes = split(tmp_path, name, "notes.txt")
    assert (sorted(train), validation) == (sorted([name, "notes.txt"]), None)
    doubtful = {"dev", "val", "test", "eval", "training"} & set(name.replace("-", " ").replace("_", " ").split())
    assert [note.split(": ")[-1] for note in notes] == [name] * bool(doubtful)


def test_beside_train_an_ambiguous_name_is_validation_and_the_note_says_so(tmp_path):
    train, validation, notes = split(tmp_path, "train.jsonl", "dev-blog.txt")
    assert (train, validation) == (["train.jsonl"], ["dev-blog.txt"])
    assert notes == ["by name, train is train.jsonl; validation is dev-blog.txt"]


def test_thousands_of_unused_files_are_one_short_note(tmp_path):
    names = [f"raw/{'long name ' * 15}{i:05}.txt" for i in range(1200)]
    train, validation, notes = split(tmp_path, "train.jsonl", "valid.jsonl", *names)
    assert (train, validation) == (["train.jsonl"], ["valid.jsonl"])
    (note,) = notes
    assert note.startswith("not used, neither train nor validation by name: ...")
    assert note.endswith("00004.txt and 1,195 more") and len(note) < 700


def test_hundreds_of_shards_are_named_in_short(tmp_path):
    (note,) = split(tmp_path, *(f"part-{i:03}.jsonl" for i in range(300)), "valid.jsonl")[2]
    assert note.startswith("by name, train is part-000.jsonl, ")
    assert note.endswith("part-004.jsonl and 295 more; validation is valid.jsonl")


@pytest.mark.parametrize(
    "name",
    ["README.md", "readme.txt", "README", "README.zh-CN.md", "LICENSE", "LICENCE.txt", "LICENSE-APACHE", "COPYING"]
    + ["CITATION.cff", "dataset_infos.json", "_SUCCESS", "SHA256SUMS", "CHANGELOG.md", "dataset_card.md"],
)
def test_what_tells_about_data_is_none(tmp_path, name):
    make_tree(tmp_path, {name: ""})  # empty, as _SUCCESS is
    train, validation, notes = split(tmp_path, "data/data-000.jsonl", "data-001.jsonl")
    assert (train, validation) == (["data/data-000.jsonl", "data-001.jsonl"], None)
    assert notes == [f"not used, as it tells about the data: {name}"]


def test_a_readme_that_is_all_there_is_is_data(tmp_path):
    assert split(tmp_path / "one", "README.md")[0] == ["README.md"]
    readmes = ["a/README.md", "b/README.md"]
    assert split(tmp_path / "many", *readmes, "c/guide.md", "c/README.md")[0] == [*readmes, "c/guide.md"]
    assert split_files(tmp_path / "one" / "README.md")[0] == [tmp_path / "one" / "README.md"]
    make_tree(tmp_path, {"none/LICENSE": "x"})
    with pytest.raises(ValueError, match="none' is a folder without data: put .jsonl"):
        split_files(tmp_path / "none")


@pytest.mark.parametrize(
    "name", ["data.csv", "train.csv", "readme-corpus.json", "vocab.json", "notes.docx", "train.jsonl.gz"]
)
def test_other_suffixes_are_still_refused(tmp_path, name):
    with pytest.raises(ValueError, match="unknown suffix .*: convert it"):
        split(tmp_path, "train.jsonl", "README.md", name)


@pytest.mark.parametrize("name", ["notice-board.jsonl", "license-texts.txt", "README.jsonl", "citation-corpus.md"])
def test_names_that_begin_as_such_do_are_data(tmp_path, name):
    assert sorted(split(tmp_path, name, "a.txt")[0]) == sorted([name, "a.txt"])


def test_a_shard_that_is_read_twice_is_said(tmp_path):
    make_tree(tmp_path, {"train-0.jsonl": "word", "valid.jsonl": "word"})
    (tmp_path / "train-1.jsonl").symlink_to("train-0.jsonl")
    os.link(tmp_path / "train-0.jsonl", tmp_path / "train-2.jsonl")
    assert split_files(tmp_path)[2][0] == "read again under another name: train-1.jsonl, train-2.jsonl"


def test_names_that_are_no_text_stay_printable(tmp_path):
    make_tree(tmp_path, {"train.txt": "word", "\x1b[31m.txt": "word"})
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("word")
    (note,) = split_files(tmp_path)[2]
    assert "\\x1b[31m.txt" in note and "caf\\udce9.txt" in note and note.isprintable()
