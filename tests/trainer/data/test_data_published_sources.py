"""Settings and sources of the published data conventions: what is read, what is refused, what the tokenizer sees."""

import dataclasses
import json

import datasets
import pytest

from trainer.data import (
    DataConfig,
    check_source,
    load_documents,
    open_data,
    prepare_data,
    story,
    tokenizer_hash,
    train_tokenizer,
)

STORIES = [story(i) for i in range(60)]
VOCAB = 500


def write_jsonl(folder, field="text", **files):
    folder.mkdir(exist_ok=True)
    for name, texts in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return str(folder)


def prepared(config, S=32):
    return open_data(prepare_data(config, VOCAB, S, 0))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"tokenizer": "chars"}, r"data\.tokenizer='chars'.*words"),
        ({"rows": "packed"}, r"data\.rows='packed'.*padded"),
        ({"append_eos": False}, r"data\.append_eos=false.*data\.rows=chunks.*: set"),
        ({"count_padding": True}, r"data\.count_padding=true.*data\.rows=chunks.*: set"),
        ({"tokenizer_documents": 0}, r"data\.tokenizer_documents=0"),
        ({"tokenizer_from": ""}, r"data\.tokenizer_from=''"),
        ({"validation_from_train": True}, r"data\.val_documents=null"),
        ({"validation_from_train": True, "val_documents": 5, "drop_overlap": True}, r"data\.drop_overlap=true"),
    ],
)
def test_settings_are_checked(settings, match):
    with pytest.raises(ValueError, match=match) as error:
        DataConfig(**settings)
    assert "\n" not in str(error.value)


def test_fewer_documents_are_refused_unless_allowed(tmp_path):
    path = write_jsonl(tmp_path / "in", train=["a", "b", "c"], valid=["v", "w"])
    config = DataConfig(name="text", path=path, train_documents=3, val_documents=2)
    assert load_documents(config, 0).notes == ()
    for key, wanted, has in (("train_documents", 4, 3), ("val_documents", 3, 2)):
        more = dataclasses.replace(config, **{key: wanted})
        with pytest.raises(ValueError, match=rf"data\.{key}={wanted}.* only {has} .*data\.allow_fewer=true"):
            load_documents(more, 0)
        (note,) = load_documents(dataclasses.replace(more, allow_fewer=True), 0).notes
        assert f"data.{key}={wanted}" in note
    # What is dropped as overlap does not make the source smaller.
    write_jsonl(tmp_path / "in", valid=["a", "w"])
    assert load_documents(dataclasses.replace(config, drop_overlap=True), 0).train == ["b", "c"]


def test_validation_from_train(tmp_path):
    path = write_jsonl(tmp_path / "in", train=list("abcdef"), valid=["v"])
    config = DataConfig(name="text", path=path, train_documents=3, val_documents=2, validation_from_train=True)
    documents = load_documents(config, 0)
    assert (documents.train, documents.validation) == (["a", "b", "c"], ["a", "b"])
    assert documents.dropped["overlap"] == 0 and "validation_from_train=true" in documents.notes[0]
    longer = load_documents(dataclasses.replace(config, val_documents=5), 0)
    assert (longer.train, longer.validation) == (list("abc"), list("abcde"))
    assert load_documents(dataclasses.replace(config, train_documents=None), 0).train == list("abcdef")
    with pytest.raises(ValueError, match=r"data\.val_documents=7, .* only 6"):
        load_documents(dataclasses.replace(config, val_documents=7), 0)
    # One pool: nothing is held out of it.
    pool = write_jsonl(tmp_path / "pool", all=list("abcdef"))
    assert load_documents(dataclasses.replace(config, path=pool, train_documents=6), 0).train == list("abcdef")
    made = DataConfig(train_documents=3, val_documents=5, validation_from_train=True)
    assert load_documents(made, 0).validation == STORIES[:5]


@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_tokenizer_documents_are_the_first_of_the_source(tmp_path, kind, capsys):
    path = write_jsonl(tmp_path / "in", train=[" ", *STORIES[:40]], valid=STORIES[40:45])
    config = DataConfig(
        name="text", path=path, train_documents=5, tokenizer=kind, tokenizer_documents=30, cache_dir=str(tmp_path / "cache")
    )
    assert tokenizer_hash(train_tokenizer(STORIES[:30], VOCAB, kind)) == prepared(config).tokenizer_hash
    own = dataclasses.replace(config, tokenizer_documents=None, allow_fewer=True)
    assert prepared(own).tokenizer_hash == tokenizer_hash(train_tokenizer(STORIES[:5], VOCAB, kind))
    capsys.readouterr()
    whole = dataclasses.replace(config, tokenizer_documents=2119719)
    with pytest.raises(ValueError, match="tokenizer_documents=2119719, but the source has only 40: lower it, or take"):
        prepared(whole)
    data = prepared(dataclasses.replace(whole, allow_fewer=True))
    assert data.summary["tokenizer_documents"] == 40
    assert data.tokenizer_hash == tokenizer_hash(train_tokenizer(STORIES[:40], VOCAB, kind))
    (note,) = data.summary["notes"]
    assert "tokenizer_documents=2119719, but the source has only 40" in note and note in capsys.readouterr().out
    made = DataConfig(train_documents=5, val_documents=2, tokenizer_documents=30, cache_dir=config.cache_dir, tokenizer=kind)
    assert prepared(made).tokenizer_hash == tokenizer_hash(train_tokenizer(STORIES[:30], VOCAB, kind))


def test_the_tokenizer_sees_nothing_that_is_held_out(tmp_path):
    path = write_jsonl(tmp_path / "pool", all=STORIES)
    config = DataConfig(name="text", path=path, val_fraction=0.3, cache_dir=str(tmp_path / "cache"))
    train = load_documents(config, 0).train
    data = prepared(dataclasses.replace(config, tokenizer_documents=20))
    assert len(train) < 60 and data.tokenizer_hash == tokenizer_hash(train_tokenizer(train[:20], VOCAB))


def test_tokenizer_from_other_data(tmp_path):
    path = write_jsonl(tmp_path / "in", field="body", train=STORIES[:10], valid=STORIES[10:12])
    other = write_jsonl(tmp_path / "other", train=STORIES[20:50], valid=STORIES[50:52])
    config = DataConfig(
        name="text", path=path, text_field="body", tokenizer_from=other, tokenizer="words", cache_dir=str(tmp_path / "cache")
    )
    check_source(config)
    assert prepared(config).tokenizer_hash == tokenizer_hash(train_tokenizer(STORIES[20:50], VOCAB, "words"))
    first = dataclasses.replace(config, tokenizer_documents=8)
    assert prepared(first).tokenizer_hash == tokenizer_hash(train_tokenizer(STORIES[20:28], VOCAB, "words"))
    missing = dataclasses.replace(config, tokenizer_from=str(tmp_path / "no-such"))
    for call in (check_source, prepared):
        with pytest.raises(ValueError, match=r"data\.tokenizer_from='.*no-such' does not exist"):
            call(missing)


def test_tokenizer_from_the_hub(tmp_path, monkeypatch):
    """The published tiny-textbooks runs: the text in one column, the tokenizer from other data, in another."""
    hub = {"o/textbooks": ("textbook", STORIES[:20]), "o/stories": ("text", STORIES[20:60])}

    def load_dataset(name):
        field, texts = hub[name]
        splits = {"train": {field: texts[:15]}, "test": {field: texts[15:]}}
        return datasets.DatasetDict({key: datasets.Dataset.from_dict(columns) for key, columns in splits.items()})

    config = DataConfig(
        name="text",
        path="o/textbooks",
        text_field="textbook",
        tokenizer_from="o/stories",
        tokenizer_documents=10,
        cache_dir=str(tmp_path),
    )
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda name: pytest.fail("the early check must not load from the hub"))
        check_source(config)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = prepared(config)
    assert data.tokenizer_hash == tokenizer_hash(train_tokenizer(STORIES[20:30], VOCAB))
    assert data.train.num_documents == 15


def test_every_switch_is_other_data(tmp_path):
    other = write_jsonl(tmp_path / "other", train=STORIES[30:40])
    base = DataConfig(
        train_documents=20, val_documents=4, tokenizer="words", rows="padded", cache_dir=str(tmp_path / "cache")
    )
    variants = [
        base,
        *(
            dataclasses.replace(base, **change)
            for change in (
                {"tokenizer": "bytes"},
                {"tokenizer_documents": 10},
                {"tokenizer_from": other},
                {"rows": "chunks"},
                {"append_eos": False},
                {"count_padding": True},
                {"validation_from_train": True},
            )
        ),
    ]
    folders = [prepare_data(config, VOCAB, 32, 0) for config in variants]
    assert len(set(folders)) == len(variants)
    assert len({open_data(folder).fingerprint for folder in folders}) == len(variants)
    assert [prepare_data(config, VOCAB, 32, 0) for config in variants] == folders
    for config, folder in zip(variants, folders, strict=True):
        layout = open_data(folder).train.layout
        assert (layout.rows, layout.append_eos, layout.count_padding) == (
            config.rows,
            config.append_eos,
            config.count_padding,
        )
        assert (layout.max_seq_len, layout.pad_id) == (32, 1 if config.tokenizer == "words" else 0)
    # These choose what is done with the data, not what it is.
    for change in ({"allow_fewer": True}, {"drop_last_validation": True}):
        assert prepare_data(dataclasses.replace(base, **change), VOCAB, 32, 0) == folders[0]


def test_data_without_targets_is_refused(tmp_path):
    path, cache = write_jsonl(tmp_path / "in", train=["a b"], valid=["a"]), str(tmp_path / "cache")
    shape = dict(tokenizer="words", rows="padded", append_eos=False)
    config = DataConfig(name="text", path=path, **shape, allow_fewer=True, cache_dir=cache)
    with pytest.raises(ValueError, match="no document has a second token"):
        prepared(config)
    with pytest.raises(ValueError, match=r"model\.max_seq_len=1 leaves no targets: use 2"):
        prepared(config, 1)
    assert prepared(dataclasses.replace(config, append_eos=True)).validation.lengths.tolist() == [1]
