"""Numbers, texts and keys as settings write them: YAML 1.2, one value whatever reads it, and older files keep theirs."""

import math
import subprocess
import sys
from dataclasses import asdict

import pytest
import yaml

from tests.launch import REPOSITORY
from trainer.config import SampleConfig, experiment_from_dict, experiment_names, load_experiment
from trainer.plain_yaml import as_written, dump_yaml, parse_float, parse_yaml
from trainer.text import read_json, read_yaml

VALUES = {
    "010": 10, "08": 8, "-007": -7, "+12": 12, "0o10": 8, "0x1F": 31,
    "1e-3": 0.001, "1E5": 1e5, "+1.5e3": 1500.0, ".5": 0.5, "5.": 5.0, "-.5e+1": -5.0, "-.inf": -math.inf, ".INF": math.inf,
    "true": True, "FALSE": False, "~": None, "NULL": None, "": None,
    "1_000": "1_000", "1_0.5": "1_0.5", "1:30": "1:30", "190:20:30.15": "190:20:30.15", "0b11": "0b11", "-0x1F": "-0x1F",
    "yes": "yes", "no": "no", "on": "on", "Off": "Off", "y": "y", "tRUE": "tRUE", "nUll": "nUll",
    "2024-01-01": "2024-01-01", "2024-13-45": "2024-13-45", "2001-12-14t21:59:43.10-05:00": "2001-12-14t21:59:43.10-05:00",
    "nan": "nan", "inf": "inf", "1e": "1e", "e5": "e5", ".": ".", "=": "=", "\u0663": "\u0663",
    '"010"': "010", "'1e-3'": "1e-3", "!!str 010": "010", "!!int 010": 10, '!!float "1e3"': 1000.0,
    r'"\ud83d\ude00"': "\U0001f600", r'"a\uD83D\uDE00b"': "a\U0001f600b",
}  # fmt: skip
"""From the tables of YAML 1.2.2, section 10.3, and the texts that YAML 1.1 takes for something else."""


@pytest.mark.parametrize("text", VALUES)
def test_a_scalar_is_what_yaml_1_2_says(text):
    value, expected = parse_yaml(text), VALUES[text]
    assert value == expected and isinstance(value, type(expected)), value
    assert parse_yaml(f"{{k: [{text}]}}" if text else "{k: [~]}") == {"k": [expected]}


def test_not_a_number():
    assert math.isnan(parse_yaml(".nan")) and math.isnan(parse_yaml(".NaN"))
    assert parse_float("1_0") is None and parse_float(" 1") is None and parse_float("5e-1") == 0.5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: a stands twice"),
        ("x: {a: 1, a: 2}", "line 1: a stands twice"),
        ("{1: a, 01: b}", "line 1: 01 stands twice"),
        ("{0.001: a, 1e-3: b}", "line 1: 1e-3 stands twice"),
        ("{yes: a, 'yes': b}", "line 1: yes stands twice"),
        ("!!python/name:os.system", "line 1: could not determine a constructor"),
        ("!!timestamp x", "."),
        ("!!bool yes", "'yes' is not true or false"),
        ("!!int 1_0", "'1_0' is not a whole number"),
        ("!!float 1:30", "'1:30' is not a number"),
        ("[" * 51, "more than 50 open brackets"),
        ("\x00", "unacceptable character"),
        (r'{a: {b: "\ud83d"}}', "line 1: b: .* holds half a surrogate pair"),
        (r'[1, "x\ude00\ud83d"]', "holds half a surrogate pair"),
        (r'{"\ud83d": 1}', "holds half a surrogate pair"),
    ],
)
def test_what_is_no_plain_yaml_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse_yaml(text)


def test_merged_keys_may_be_replaced():
    assert parse_yaml("base: &b {x: 1, y: 2}\nz: {<<: *b, y: 3}")["z"] == {"x": 1, "y": 3}


@pytest.mark.parametrize("text", [*VALUES, "a: b", "caf\xe9", "- x", " ", "\U0001f600", "null", "<<", "12e03"])
def test_what_is_written_is_the_same_for_readers_of_either_version(text):
    values = {"text": text, "numbers": [1e-05, 0.1, 1e300, 3, -0.0, True, None, math.inf], "08": 1}
    assert parse_yaml(dump_yaml(values)) == yaml.safe_load(dump_yaml(values)) == values


@pytest.mark.parametrize("text", ["08", "1e3", "0o10", "1.5e3", "2024", "yes", "12:30"])
def test_names_in_older_config_files_keep_their_value(text):
    """The library left those without quotes which YAML 1.1 takes for text."""
    values = load_experiment("quickstart").to_dict() | {"sample": {**asdict(SampleConfig()), "prompt": text}}
    written = yaml.safe_dump(values)
    assert experiment_from_dict(parse_yaml(written)).to_dict() == values
    assert as_written(parse_yaml(f"commit: {text}" if text in ("08", "1e3") else f"commit: '{text}'")["commit"]) == text


def test_every_shipped_experiment_reads_the_same_from_its_own_config():
    for name in experiment_names():
        experiment = load_experiment(name)
        for written in (dump_yaml(experiment.to_dict()), yaml.safe_dump(experiment.to_dict())):
            assert experiment_from_dict(parse_yaml(written)) == experiment, name


def test_overrides_are_those_numbers():
    settings = ["train.steps=010", "seed=0100", "train.warmup_steps=08", "train.learning_rate=1E-3", "train.weight_decay=.5"]
    experiment = load_experiment("quickstart", [*settings, 'train.epsilon="1e-7"', "name=08", "sample.prompt=1e3"])
    train = experiment.train
    assert (train.steps, experiment.seed, train.warmup_steps) == (10, 100, 8)
    assert (train.learning_rate, train.weight_decay, train.epsilon) == (0.001, 0.5, 1e-7)
    assert (experiment.name, experiment.sample.prompt) == ("08", "1e3")
    assert all(type(value) in (int, float) for value in (train.steps, train.warmup_steps, train.learning_rate))


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    for name, read, text in (("a.yaml", read_yaml, "seed: 1"), ("a.json", read_json, '{"seed": 1}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read(tmp_path / name, name) == {"seed": 1}
    joined = tmp_path / "joined.json"
    joined.write_text(r'{"x": "\ud83d\ude00"}')
    assert read_json(joined, "x") == {"x": "\U0001f600"}


def test_settings_are_read_without_torch():
    code = "import sys, trainer.config, trainer.console; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
