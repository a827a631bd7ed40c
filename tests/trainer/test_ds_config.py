"""The DeepSpeed JSON: completion and refusals."""

import json
from pathlib import Path

import pytest

from tests.launch import REPOSITORY
from trainer.config import load_experiment
from trainer.ds_config import is_bf16, load_ds_config, precision_of, read_precision, set_precision
from trainer.launch import Launch
from trainer.layout import Layout

SHIPPED = sorted((REPOSITORY / "ds_configs").glob("*.json"))
ZERO2 = {"zero_optimization": {"stage": 2}}


def load(path: Path, ranks: int = 2):
    experiment = load_experiment("quickstart", ["train.max_micro_batch=8"])
    layout = Layout.of(experiment, Launch(0, ranks, 0, ranks))
    return load_ds_config(str(path), experiment, layout, ranks)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_are_completed(path):
    config = load(path)
    assert config["train_micro_batch_size_per_gpu"] == 8 and config["gradient_accumulation_steps"] == 2
    assert config["train_batch_size"] == 32 and config["gradient_clipping"] == 1.0
    assert precision_of(config) == ("fp32" if path.name == "zero2_fp32.json" else "auto")
    for precision in ("bf16", "fp32"):
        decided = set_precision(config, precision)
        assert is_bf16(decided) == (precision == "bf16" and path.name != "zero2_fp32.json")
        assert '"auto"' not in json.dumps(decided)


def test_the_four_promised_configs_are_shipped():
    assert [path.stem for path in SHIPPED] == ["zero1", "zero2", "zero2_fp32", "zero2_offload"]


def test_explicit_values_stay_and_auto_elsewhere_is_decided(tmp_path):
    path = tmp_path / "mine.json"
    for enabled, name in ((True, "bf16"), (False, "fp32"), ("auto", "auto")):
        values = {**ZERO2, "bf16": {"enabled": enabled, "check_grad_overflow": "auto"}, "gradient_clipping": "auto"}
        path.write_text(json.dumps(values))
        assert precision_of(load(path)) == name == read_precision(str(path))
        decided = set_precision(load(path), "fp32")
        assert decided["bf16"] == {"enabled": enabled is True} and decided["gradient_clipping"] == 1.0


def test_repeating_the_experiment_is_allowed(tmp_path):
    path = tmp_path / "same.json"
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1, "torch_adam": True}}
    path.write_text(json.dumps({**ZERO2, "train_batch_size": 32, "gradient_clipping": 1.0, "optimizer": optimizer}))
    assert "optimizer" not in load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds list"),
        ('{"zero_optimisation": {"stage": 2}}', r"unknown key zero_optimisation; did you mean zero_optimization\?"),
        ('{"zero_optimization": 2}', "zero_optimization = 2; expected a JSON object"),
        ("{}", "zero_optimization.stage = None; the trained core runs under stage 1 or 2"),
        ('{"zero_optimization": {"stage": 3}}', "zero_optimization.stage = 3"),
        (json.dumps({**ZERO2, "fp16": {"enabled": True}}), "fp16.enabled = True; use bf16"),
        (json.dumps({**ZERO2, "train_batch_size": 64}), "train_batch_size = 64 contradicts 32 from train.batch_size"),
        (json.dumps({**ZERO2, "gradient_clipping": 0.5}), "gradient_clipping = 0.5 contradicts 1.0"),
        (json.dumps({**ZERO2, "gradient_accumulation_steps": 4}), "gradient_accumulation_steps = 4 contradicts 2"),
        (json.dumps({**ZERO2, "train_micro_batch_size_per_gpu": 4}), "train_micro_batch_size_per_gpu = 4 contradicts 8"),
        (json.dumps({**ZERO2, "optimizer": {"type": "Lion"}}), "optimizer.type = 'Lion'; the optimizer is AdamW"),
        (json.dumps({**ZERO2, "optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}), "lr = 1.0 contradicts 0.003"),
        ('{"bf16": true, "zero_optimization": {"stage": 2}}', "bf16 = True; expected a JSON object"),
        (json.dumps({**ZERO2, "data_types": {"buffer_dtype": "bf16"}}), "data_types.buffer_dtype would cast the fp32 key"),
        (
            '{"bf16": {"enabled": true}, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}',
            "grad_accum_dtype = fp32 under stage 1 and bf16; remove it",
        ),
        (
            '{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, '
            '"data_types": {"grad_accum_dtype": "fp32"}}',
            "grad_accum_dtype = fp32 with offload_optimizer and bf16; remove it",
        ),
        (
            '{"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}',
            r"grad_accum_dtype = fp32 under stage 1 and bf16 \(auto\); remove it",
        ),
        ('{"bf16": {"enabled": "Auto"}, "zero_optimization": {"stage": 2}}', "bf16.enabled = 'Auto'; write true, false or"),
        (
            '{"bf16": {}, "fp16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}}',
            "fp16.enabled = 'auto'; use bf16, or fp32 with neither enabled; write false or remove it",
        ),
        (json.dumps({**ZERO2, "scheduler": {"type": "WarmupLR"}}), "scheduler would contradict the experiment's schedule"),
    ],
)
def test_refusals_are_one_line(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        load(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "none.json")
