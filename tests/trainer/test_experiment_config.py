"""Experiments: loading, overriding, and what is refused."""

from dataclasses import replace

import pytest
import yaml

from modeling import ModelConfig
from modeling.key_rules import RULE_PRESETS, KeyRules
from trainer.config import Experiment, experiment_from_dict, experiment_names, load_experiment
from trainer.published import published_ids

SERIES_B = {"a4": 701_496_320, "b1": 1_373_568_000, "b2": 2_717_711_360, "b3": 5_405_998_080}


def test_every_shipped_experiment_loads():
    assert experiment_names() == [*SERIES_B, "hash_readout", "quickstart", "study", *published_ids()]
    for name in experiment_names():
        experiment = load_experiment(name)
        assert experiment.name == name and isinstance(experiment.model, ModelConfig)


@pytest.mark.parametrize("name", SERIES_B)
def test_counts_of_series_b(name):
    counts = load_experiment(name).model.num_parameters()
    assert (counts.total, counts.trainable) == (SERIES_B[name], 29_424_640)


def test_base_is_merged_below():
    a4, b3 = load_experiment("a4"), load_experiment("b3")
    assert b3.model.some.num_experts == 512 and b3.model.some.d_ffn == a4.model.some.d_ffn
    assert replace(b3.train, max_micro_batch=a4.train.max_micro_batch) == a4.train and b3.data == a4.data


def test_overrides_reach_every_level_and_take_yaml_values():
    settings = [
        "train.learning_rate=6e-4",
        "model.some.rules.use_beta=false",
        "seed=7",
        "train.steps=null",
        "data.name=text",
        "data.path=a b",
    ]
    experiment = load_experiment("quickstart", settings)
    assert experiment.train.learning_rate == 6e-4 and isinstance(experiment.train.learning_rate, float)
    assert experiment.model.some.rules.use_beta is False
    assert (experiment.seed, experiment.train.steps, experiment.data.path) == (7, None, "a b")


def test_preset_gives_the_values_that_are_not_set():
    rules = load_experiment("quickstart", ["model.some.rules.alpha=0.5"]).model.some.rules
    assert (rules.alpha, rules.beta, rules.ema_decay, rules.warmup_steps) == (0.5, 0.005, 0.99, 20)


def test_a_preset_that_is_set_replaces_every_rule_of_the_file(tmp_path):
    """Also of a run's config.yaml, which names all of them; what else is set counts on top, in any order."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(load_experiment("quickstart").to_dict()))
    (tmp_path / "built_on_it.yaml").write_text("base: config.yaml\nmodel: {some: {rules: {preset: v7, alpha: 0.5}}}")
    rules = [
        load_experiment(source, settings).model.some.rules
        for source, settings in [
            (str(path), ["model.some.rules.alpha=0.5", "model.some.rules.preset=v7"]),
            ("quickstart", ["model.some.rules={preset: v7, alpha: 0.5}"]),
            (str(tmp_path / "built_on_it.yaml"), []),
        ]
    ]
    assert rules == [KeyRules(**RULE_PRESETS["v7"] | {"alpha": 0.5})] * 3


def test_a_section_that_is_set_keeps_the_keys_that_it_does_not_name():
    train = load_experiment("quickstart", ["train={steps: 3}", "train.batch_size=4", "train={warmup_steps: 0}"]).train
    assert train == replace(load_experiment("quickstart").train, steps=3, batch_size=4, warmup_steps=0)


def test_a_control_cannot_be_taken_back_from_a_resolved_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(load_experiment("quickstart", ["control=attention_only"]).to_dict()))
    assert load_experiment(str(path), ["control=attention_only"]).model.channel_mixer == "none"
    for control in ("null", "dense"):
        with pytest.raises(ValueError, match=r"--set control=.* is its control attention_only already; start from the"):
            load_experiment(str(path), [f"control={control}"])


def test_a_file_without_a_name_is_called_by_its_own(tmp_path):
    for name, text in {"mine": "seed: 3", "wide": "base: a4", "named": "{name: x, base: a4}"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "wider.yaml").write_text("base: named.yaml")
    names = {name: load_experiment(str(tmp_path / f"{name}.yaml")).name for name in ("mine", "wide", "named", "wider")}
    assert names == {"mine": "mine", "wide": "wide", "named": "x", "wider": "wider"}


@pytest.mark.parametrize("key", ["path", "cache_dir", "tokenizer_from"])
def test_paths_of_a_file_stay_where_it_lies_or_where_we_are(tmp_path, monkeypatch, key):
    """A file may come from someone else."""
    folder, other, file = tmp_path / "theirs", tmp_path / "elsewhere", tmp_path / "theirs" / "theirs.yaml"
    (other / "below").mkdir(parents=True)
    folder.mkdir()
    (folder / "link").symlink_to(other)
    for path in (str(other), str(folder / "link"), str(folder / ".." / "elsewhere"), "/etc"):
        file.write_text(yaml.safe_dump({"data": {"name": "text", "path": str(folder), key: path}}))
        with pytest.raises(ValueError, match=rf"data.{key} = .* lies outside .* with --set data.{key}="):
            load_experiment(str(file))
        assert getattr(load_experiment(str(file), [f"data.{key}={path}"]).data, key) == path
    monkeypatch.chdir(other)
    for path in (str(folder / "data"), "below", "some-user/some-data"):
        file.write_text(yaml.safe_dump({"data": {"name": "text", "path": str(folder), key: path}}))
        assert getattr(load_experiment(str(file)).data, key) == path


def test_round_trip_through_yaml(tmp_path):
    experiment = load_experiment("b2", ["model.some.rules.alpha=0.5"])
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump({**experiment.to_dict(), "run": {"world_size": 8}}))
    assert load_experiment(str(path)) == experiment
    assert experiment_from_dict({}) == Experiment()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("quikstart", [], r"--experiment quikstart: unknown; did you mean quickstart\?"),
        ("zzz", [], "known: a4, b1, b2, b3, hash_readout, quickstart, study, nb-v1.1-v4.3, .*"),
        ("missing.yaml", [], "missing.yaml: cannot be read"),
        ("quickstart", ["train.lerning_rate=1"], r"train.lerning_rate: unknown key; did you mean learning_rate\?"),
        ("quickstart", ["model.some.topk=1"], r"model.some.topk: unknown key; did you mean top_k\?"),
        ("quickstart", ["modle.d_model=1"], r"modle: unknown key; did you mean model\?"),
        ("quickstart", ["train.batch_size=many"], "train.batch_size = 'many' is str; expected int"),
        ("quickstart", ["train.batch_size=1.5"], "train.batch_size = 1.5 is float; expected int"),
        ("quickstart", ["train.batch_size=true"], "train.batch_size = True is bool; expected int"),
        ("quickstart", ["train.deterministic=1"], "train.deterministic = 1 is int; expected bool"),
        ("quickstart", ["train=3"], "train = 3: expected keys and values"),
        ("quickstart", ["name.x=3"], "name = .* is dict; expected str"),
        ("quickstart", ["name=a", "name.x=3"], "name is a value and has no keys below it"),
        ("quickstart", ["train.batch_size"], "write it as key=value"),
        ("quickstart", ["train.batch_size=[1"], "not valid YAML"),
        ("quickstart", ["train.batch_size=0"], "train.batch_size = 0 must be a number greater than 0"),
        ("quickstart", ["train.learning_rate=.nan"], "train.learning_rate = nan must be a finite number"),
        ("quickstart", ["train.epochs=.inf"], "train.epochs = inf must be a finite number"),
        ("quickstart", ["train.beta2=1.0"], "train.beta2 = 1.0 must be less than 1"),
        ("quickstart", ["model.some.rules.preset=[v4]"], "model.some.rules.preset = .* is unknown; known: v1.1"),
        ("quickstart", ["train.weight_decay_on=some"], "train.weight_decay_on = 'some'"),
        ("quickstart", ["model.some.top_k=17"], "model.some.top_k = 17 is more than model.some.num_experts = 16"),
        ("quickstart", ["model.some.rules.preset=v99"], "model.some.rules.preset = 'v99' is unknown; known: v1.1"),
        ("quickstart", ["parallel.ep_size=all"], "parallel.ep_size = 'all' must be a number of ranks or auto"),
        ("quickstart", ["parallel.chunks=0"], "parallel.chunks = 0 must be a number greater than 0"),
        ("quickstart", ["parallel.placement=even"], "parallel.placement = 'even' is not one of: contiguous, balanced"),
        ("quickstart", ["parallel.replicas=-1"], "parallel.replicas = -1 must be a number of experts, 0 or more, or auto"),
        ("quickstart", ["parallel.replicas=some"], "parallel.replicas = 'some' must be a number of experts"),
        (
            "quickstart",
            ["parallel.replicas=auto"],
            "parallel.replicas = auto has no effect with .* = contiguous; set .*=balanced",
        ),
        ("quickstart", ["parallel.replan_every=-1"], "parallel.replan_every = -1 must be a number of steps, or 0 for never"),
        ("quickstart", ["data.name=stories2"], "data.name"),
    ],
)
def test_refusals_are_one_line_with_key_value_and_cure(name, settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        load_experiment(name, settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "just text", "base: quickstart2", "base: 3"])
def test_bad_files_are_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as refused:
        load_experiment(str(path))
    assert "\n" not in str(refused.value)
