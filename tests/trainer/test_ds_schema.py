"""The table of DeepSpeed's keys: complete for the installed DeepSpeed, and so strict that it finds nothing more."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.launch import FP32, REPOSITORY
from trainer.config import load_experiment
from trainer.ds_config import load_ds_config, set_precision
from trainer.ds_schema import AUTO, SHIPPED_BUCKET, TOP, Rule, documentation
from trainer.engine import check_ds_config
from trainer.launch import Launch
from trainer.layout import Layout
from trainer.plan import Sharding
from trainer.text import error_line


class Watched(dict):
    """A section that notes the keys that are looked for in it."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        self.seen: set[str] = set()

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.seen.add(key)
        return super().__contains__(key)

    def keys(self):
        return self

    def __copy__(self):
        return self


def test_every_key_that_deepspeed_looks_for_is_known():
    """One that is new in a later DeepSpeed belongs into the table: supported, or refused with a reason."""
    from deepspeed.runtime import config

    sections = {name: Watched({}) for name in ("flops_profiler", "data_types")}
    optimizer = Watched({"type": "AdamW", "params": {}})
    top = Watched({"train_batch_size": 1, "zero_optimization": {"stage": 2}, "optimizer": optimizer, **sections})
    config.DeepSpeedConfig(top)
    assert len(top.seen) > 50 and top.seen <= TOP.keys(), sorted(top.seen - TOP.keys())
    for name, watched in {**sections, "optimizer": optimizer}.items():
        assert watched.seen and watched.seen <= TOP[name].section.keys(), (name, watched.seen - TOP[name].section.keys())
    constants = [value for name, value in vars(config).items() if name.isupper() and name == str(value).upper()]
    assert {"zero_allow_untested_optimizer", "steps_per_print"} <= set(constants)
    assert not [key for key in constants if key in top.seen and key not in TOP]
    assert config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() <= TOP.keys()
    assert config._REMOVED_ZERO_CONFIG_KEYS.keys() <= TOP["zero_optimization"].section.keys()


def test_every_field_of_deepspeeds_models_is_known():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    zero = TOP["zero_optimization"].section
    models = {
        DeepSpeedZeroConfig: zero,
        DeepSpeedZeroOffloadOptimizerConfig: zero["offload_optimizer"].section,
        DeepSpeedBF16Config: TOP["bf16"].section,
        DeepSpeedFP16Config: TOP["fp16"].section,
        CommsLoggerConfig: TOP["comms_logger"].section,
    }
    for model, keys in models.items():
        names = {name for field, info in model.model_fields.items() for name in (field, info.alias) if name}
        assert names <= keys.keys(), (model.__name__, sorted(names - keys.keys()))
        stale = {key for key, rule in keys.items() if rule.values} - names
        assert not stale, f"{model.__name__} no longer has {stale}"


def test_the_documentation_holds_the_table():
    assert documentation() in (REPOSITORY / "docs" / "deepspeed.md").read_text(encoding="utf-8")


def leaves(keys: dict[str, Rule] = TOP, prefix: tuple[str, ...] = ()):
    """Every key that may be written, as its path, and its rule."""
    for key, rule in keys.items():
        if rule.section is not None:
            yield from leaves(rule.section, (*prefix, key))
        elif rule.values:
            yield (*prefix, key), rule


def with_value(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The JSON in fp32 with one key set."""
    config = json.loads(Path(FP32).read_text(encoding="utf-8"))
    section = config
    for name in path[:-1]:
        section = section.setdefault(name, {})
        if name in ("fp16", "comms_logger", "flops_profiler"):
            section.setdefault("enabled", name != "fp16")
        if name == "offload_optimizer":
            section.setdefault("device", "cpu")
        if name == "optimizer":
            section.setdefault("type", "AdamW")
    section[path[-1]] = value
    return config


EXPERIMENT = load_experiment("quickstart", ["train.max_micro_batch=8"])


def load(path: Path, config: dict[str, Any], ranks: int = 2) -> dict[str, Any]:
    """The JSON as DeepSpeed gets it."""
    path.write_text(json.dumps(config), encoding="utf-8")
    return load_ds_config(str(path), EXPERIMENT, Layout.of(EXPERIMENT, Launch(0, ranks, 0, ranks)), ranks)


WRONG = [
    None, True, False, 0, 1, 2, -1, 7, 0.5, -0.5, 5e8, 10**15, 10**30, math.inf, -math.inf, math.nan, "", "true", "1", AUTO,
    "fp32", "AdamW", [], [1], ["all_reduce"], {}, {"enabled": True}, [[[[{}]]]],
]  # fmt: skip


@pytest.mark.parametrize(("path", "rule"), [pytest.param(*leaf, id=".".join(leaf[0])) for leaf in leaves()])
def test_deepspeed_finds_nothing_in_what_the_table_lets_through(path, rule, tmp_path, monkeypatch):
    """Every value is refused in one line by this key's name, or is one with which DeepSpeed's own check is content."""
    monkeypatch.setattr("trainer.engine._check_room", lambda *_: None)  # is refused with its own words
    monkeypatch.chdir(tmp_path)
    accepted = []
    for value in WRONG:
        try:
            config = load(tmp_path / "a.json", with_value(path, value))
        except ValueError as error:
            line = error_line(error)
            assert line.startswith(f"error: --ds_config {tmp_path / 'a.json'}: ") and len(line) < 1000
            assert ".".join(path) in line or path[-1] in line and rule.accepts(value)
            continue
        accepted.append(value)
        check_ds_config("a.json", set_precision(config, "fp32"))
        assert Sharding.of(set_precision(config, "fp32")).bucket > 0
    assert len(accepted) < len(WRONG) / 2, accepted
    assert not any(isinstance(value, list) for value in accepted) or path[-1] == "prof_ops"


REFUSED_TOO = {
    "bf16": [1, None, [], "auto"],
    "zero_optimization": [True, 2, None, "auto", []],
    "data_types": [None, "fp32"],
    "comms_logger": [True, None],
    "flops_profiler": [True, None],
    "optimizer": [None, "AdamW", {"params": {}}],
    "fp16": [True, None, "auto"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in REFUSED_TOO.items() for value in values], ids=str
)
def test_sections_that_are_none_are_refused(key, value, tmp_path):
    with pytest.raises(ValueError, match=key):
        load(tmp_path / "a.json", json.loads(Path(FP32).read_text()) | {key: value})


def refused_keys(keys: dict[str, Rule] = TOP, prefix: tuple[str, ...] = ()):
    """Every key that is refused by name."""
    for key, rule in keys.items():
        if rule.section is not None:
            yield from refused_keys(rule.section, (*prefix, key))
        elif not rule.values:
            yield (*prefix, key)


def test_refused_keys_say_why_and_what_to_do(tmp_path):
    for path, value in itertools.product(refused_keys(), (True, None, {})):
        with pytest.raises(ValueError, match=r"; (remove it|write |set |see )") as refused:
            load(tmp_path / "a.json", with_value(path, value))
        assert f"a.json: {'.'.join(path)} " in str(refused.value)


def test_auto_buckets_are_those_of_the_shipped_files(tmp_path):
    config = load(tmp_path / "a.json", with_value(("zero_optimization", "reduce_bucket_size"), "auto"))
    assert config["zero_optimization"]["reduce_bucket_size"] == SHIPPED_BUCKET
    assert Sharding.of(config).bucket == SHIPPED_BUCKET
    for path in (REPOSITORY / "ds_configs").glob("*.json"):
        zero = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
        assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == SHIPPED_BUCKET


def test_numbers_are_whole_however_they_are_written(tmp_path):
    config = load(tmp_path / "a.json", with_value(("zero_optimization", "allgather_bucket_size"), 2e8))
    assert repr(config["zero_optimization"]["allgather_bucket_size"]) == "200000000"
    assert repr(load(tmp_path / "a.json", with_value(("steps_per_print",), 10.0))["steps_per_print"]) == "10"


def test_a_logger_that_is_off_is_left_out(tmp_path):
    """DeepSpeed would switch it on."""
    assert "comms_logger" not in load(tmp_path / "a.json", with_value(("comms_logger", "enabled"), False))
    assert load(tmp_path / "a.json", with_value(("comms_logger", "verbose"), True))["comms_logger"]["enabled"]


@pytest.mark.parametrize(("precision", "said", "width"), [
    ("fp32", None, 4), ("fp32", "fp32", 4), ("fp32", "bf16", 2), ("bf16", None, 2), ("bf16", "fp32", 4), ("bf16", "bf16", 2),
])  # fmt: skip
def test_the_plan_knows_how_wide_gradients_travel(precision, said, width, tmp_path):
    config = load(tmp_path / "a.json", with_value(("communication_data_type",), said) | {"bf16": {"enabled": AUTO}})
    assert Sharding.of(set_precision(config, precision)).reduce_width == width
