"""The published runs: parameter counts, conventions by version, and every figure against its source where that is there."""

import json
import math
from pathlib import Path

import pytest

from modeling.key_rules import RULE_PRESETS
from trainer.config import Experiment, experiment_from_dict, experiment_names
from trainer.published import PublishedRun, merge, published_experiment, published_ids, published_results

SOURCE = Path(__file__).parents[3] / "shared" / "published_runs.json"

# Total and trainable parameters of each run.
COUNTS = {
    "nb-v1.1-v4.3": (3_244_339_200, 18_919_424),
    "nb-v2.2-baseline-v5.2": (3_244_339_200, 18_919_424),
    "nb-v2.1-speedrun": (615_805_184, 10_744_064),
    "v2pro-v1": (1_022_142_208, 13_707_008),
    "v2pro-v2": (1_022_142_208, 13_707_008),
    "v2pro-v3-nobeta": (1_022_142_208, 13_707_008),
    "v3-1-v1": (72_795_136, 5_522_432),
    "v3-1-v2": (313_274_624, 10_744_064),
    "v3-1-v3": (3_244_339_200, 18_919_424),
    "v3-1-v4": (319_574_272, 17_043_712),
    "v3-1-v5": (1_825_632_512, 10_744_064),
    "v3-1-v6": (693_621_760, 21_550_080),
    "v3-1-v7": (313_274_624, 10_744_064),
    "v3-1-v8": (313_274_624, 10_744_064),
    "v3-1-v9": (313_274_624, 10_744_064),
    "v3-1-v10": (313_274_624, 10_744_064),
    "v3-2-a2": (313_274_624, 10_744_064),
    "v3-2-a3": (313_274_624, 10_744_064),
    "v3-2-b1": (1_222_151_168, 12_225_536),
    "v3-2-b2": (1_526_114_048, 13_707_008),
    "v3-2-c1": (1_631_629_312, 18_919_424),
    "v3-2-c2": (2_454_517_760, 36_239_360),
    "v3-3-v1": (2_037_437_440, 21_550_080),
    "v3-3-v2": (2_711_147_520, 21_550_080),
    "v3-3-v3": (2_711_147_520, 21_550_080),
    "v3.5-c2-widthfix": (2_454_517_760, 36_239_360),
    "v4-a1": (419_144_704, 15_770_624),
    "v4-a2": (562_876_416, 25_219_072),
    "v4-a3": (522_355_968, 18_138_368),
    "v4-a4": (701_496_320, 29_424_640),
    "v4-a5": (625_567_232, 20_506_112),
    "v4-a6": (1_117_356_032, 42_041_344),
    "v4-b1": (1_373_568_000, 29_424_640),
    "v4-b2": (2_717_711_360, 29_424_640),
    "v4-b3": (5_405_998_080, 29_424_640),
    "v4-c1": (701_496_320, 29_424_640),
    "v4-c2": (2_717_711_360, 29_424_640),
    "v4-c3": (5_405_998_080, 29_424_640),
    "v5-linear": (2_709_181_440, 21_550_080),
    "v5-mlp": (2_711_808_000, 24_176_640),
    "v6-phoenix": (2_175_848_448, 25_219_072),
    "v7-clamp": (2_175_848_448, 25_219_072),
    "cmp-some-tinystories": (1_631_629_312, 18_919_424),
    "cmp-dense-tinystories": (33_615_872, 33_615_872),
    "cmp-some-tiny-textbooks": (1_631_629_312, 18_919_424),
    "cmp-dense-tiny-textbooks": (33_615_872, 33_615_872),
}

# The conventions of specs sections 1, 2 and 10; BY_VERSION has their values in this order.
CONVENTIONS = {
    "causal": lambda e: e.model.causal,
    "append_eos": lambda e: e.data.append_eos,
    "count_padding": lambda e: e.data.count_padding,
    "token_mask": lambda e: e.model.some.rules.token_mask,
    "drop_last_validation": lambda e: e.data.drop_last_validation,
    "tokenizer_documents": lambda e: e.data.tokenizer_documents,
    "betas": lambda e: (e.train.beta1, e.train.beta2),
    "normalise_query": lambda e: e.model.some.normalise_query,
    "expert_bias": lambda e: e.model.some.expert_bias,
    "temperatures": lambda e: (e.model.some.temperature, e.train.temperature_end, e.model.some.eval_temperature),
}
WHOLE, HEAD, B95, B999 = 2_119_719, 20_000, (0.9, 0.95), (0.9, 0.999)
BY_VERSION = {
    "v1.1": (False, False, True, "all", True, WHOLE, B95, False, "torch", (1.0, None, 1.0)),
    "v2.1": (True, True, True, "all", True, WHOLE, B95, True, "zero", (1.0, None, 0.5)),
    "v2.2": (True, True, True, "all", True, WHOLE, B95, True, "torch", (0.8, None, 0.5)),
    "v3": (True, True, True, "all", True, WHOLE, B95, True, "zero", (1.0, None, 0.5)),
    "v3.5": (True, True, True, "all", True, WHOLE, B95, True, "zero", (2.0, 1.0, 0.5)),
    "v4": (True, True, True, "all", True, WHOLE, B95, True, "zero", (0.8, None, 0.5)),
    "v5": (True, True, False, "targets", False, WHOLE, B95, True, "zero", (1.0, None, 1.0)),
    "v6": (True, True, False, "targets", False, WHOLE, B999, True, "zero", (1.0, None, 1.0)),
    "v7": (True, True, False, "targets", False, WHOLE, B999, True, "zero", (1.0, None, 1.0)),
    "cmp": (True, True, True, "all", True, HEAD, B95, True, "zero", (1.0, None, 0.5)),
}

# Router, its hidden width in units of d and its initial values: by version, and the one run that differs from its version.
ROUTERS = {"v4": ("mlp", 2.0, "torch"), "v6": ("mlp", 2.0, "normal"), "v7": ("mlp", 2.0, "normal")}
ROUTERS_BY_RUN = {"v5-mlp": ("mlp", 1.0, "normal")}


@pytest.fixture(scope="module")
def experiments() -> dict[str, Experiment]:
    return {run_id: experiment_from_dict(published_experiment(run_id)) for run_id in published_ids()}


@pytest.fixture(scope="module")
def source() -> dict[str, dict]:
    if not SOURCE.exists():
        pytest.skip(f"needs the list of published runs at {SOURCE}")
    return {run["id"]: run for run in json.loads(SOURCE.read_text(encoding="utf-8"))["runs"]}


def steps(experiment: Experiment) -> float:
    return experiment.data.train_documents // experiment.train.batch_size * experiment.train.epochs


def test_all_runs_are_there_and_count_exactly(experiments):
    counts = {run_id: experiment.model.num_parameters() for run_id, experiment in experiments.items()}
    assert {run_id: (count.total, count.trainable) for run_id, count in counts.items()} == COUNTS
    assert all(experiment.name == run_id for run_id, experiment in experiments.items())


@pytest.mark.parametrize("version", BY_VERSION)
def test_conventions_of_the_version(experiments, version):
    runs = [e for run_id, e in experiments.items() if published_results(run_id).rule_version == version]
    for experiment in runs:
        assert tuple(get(experiment) for get in CONVENTIONS.values()) == BY_VERSION[version], experiment.name
        use_beta = experiment.name != "v2pro-v3-nobeta"
        assert experiment.model.some.rules == experiment.model.some.rules.preset(version, use_beta=use_beta)
        some = experiment.model.some
        router, mult, init = ROUTERS_BY_RUN.get(experiment.name) or ROUTERS.get(version, ("linear", None, "torch"))
        assert (some.router, some.router_init) == (router, init) and mult in (None, some.router_mult)
    assert runs and version in RULE_PRESETS


def test_conventions_of_all_versions(experiments):
    for run_id, experiment in experiments.items():
        model, data, train = experiment.model, experiment.data, experiment.train
        assert (model.norm_position, model.embedding_init) == ("post", "unit")
        assert (data.tokenizer, data.rows, data.allow_fewer, data.drop_overlap) == ("words", "padded", False, False)
        assert (train.weight_decay, train.weight_decay_on, train.gradient_clipping) == (0.1, "all", 1.0)
        assert (train.warmup_steps, train.min_learning_rate_ratio, train.eval_every) == (0, 0.0, "epoch")
        assert train.max_micro_batch == (32 if model.max_seq_len == 256 else 8) and train.steps is None
        assert experiment.sample.tokens == 0 and model.channel_mixer == ("dense" if "dense" in run_id else "some")
        textbooks = run_id.endswith("tiny-textbooks")
        tokenizer_from = "roneneldan/TinyStories" if textbooks else None
        path = "nampdn-ai/tiny-textbooks" if textbooks else None
        assert (data.name, data.path) == ("text" if textbooks else "tinystories", path)
        assert (data.tokenizer_from, data.validation_from_train) == (tokenizer_from, textbooks)


def test_only_v1_sees_the_future_and_only_v5_to_v7_leave_padding_out(experiments):
    assert [run_id for run_id, e in experiments.items() if not e.model.causal] == ["nb-v1.1-v4.3"]
    without = ["v5-linear", "v5-mlp", "v6-phoenix", "v7-clamp"]
    assert [run_id for run_id, e in experiments.items() if not e.data.count_padding] == without
    assert [run_id for run_id in published_ids() if not published_results(run_id).pads_counted] == without


def test_figures_agree_with_each_other(experiments):
    """Perplexity is exp(loss), Gini and entropy keep their bounds, and printed counts are the computed ones, rounded."""
    for run_id, experiment in experiments.items():
        run, some = published_results(run_id), experiment.model.some
        numbers = [result.epoch for result in run.epochs]
        assert numbers == sorted(set(numbers)) and all(0 < n <= experiment.train.epochs for n in numbers)
        for result in run.epochs:
            assert math.exp(result.val_loss) == pytest.approx(result.val_ppl, abs=0.005 + 5e-5 * result.val_ppl)
            assert result.gini is None or 0 < result.gini <= 1 - some.top_k / some.num_experts
            bounds = math.log2(some.top_k), math.log2(some.num_experts)
            assert result.entropy_bits is None or bounds[0] <= result.entropy_bits <= bounds[1]
        for printed, count in zip((run.printed_total_millions, run.printed_trainable_millions), COUNTS[run_id], strict=True):
            assert printed is None or printed == pytest.approx(count / 1e6, abs=0.00501)


def test_steps_that_were_printed(experiments, source):
    printed = {run_id: run["train"]["steps"] for run_id, run in source.items() if run["train"]["steps"] is not None}
    assert printed == {run_id: steps(experiments[run_id]) for run_id in printed} and len(printed) > 30


def test_steps_of_some_runs(experiments):
    expected = {"nb-v2.1-speedrun": 468, "v3-2-a2": 1904, "v3-2-a3": 2580, "v4-a4": 1248, "v5-mlp": 1664, "v7-clamp": 2500}
    assert {run_id: steps(experiments[run_id]) for run_id in expected} == expected


def test_every_figure_equals_the_source(source):
    assert list(source) == published_ids()
    for run_id, run in source.items():
        printed, result = run["published"], published_results(run_id)
        assert (result.id, result.report_name) == (run_id, run["report_name"])
        assert (result.rule_version, result.dataset) == (run["rule_version"], run["dataset"])
        assert result.printed_total_millions == printed["total_params_millions"]
        assert result.printed_trainable_millions == printed["trainable_params_millions"]
        assert [vars(epoch) for epoch in result.epochs] == printed["epochs"]


def test_every_setting_equals_the_source(experiments, source):
    for run_id, run in source.items():
        given, data, train = run["model"], run["train"], experiments[run_id].train
        model, documents = experiments[run_id].model, experiments[run_id].data
        for key, source_key in (("d_model",) * 2, ("num_layers",) * 2, ("num_heads",) * 2, ("max_seq_len", "seq_len")):
            assert getattr(model, key) == given[source_key], (run_id, key)
        assert model.vocab_size == (8192 if run_id == "v3-1-v5" else given["vocab_size"])
        assert (train.batch_size, train.epochs, train.learning_rate) == (
            data["batch_size"],
            data["epochs"],
            data["learning_rate"],
        )
        assert (documents.train_documents, documents.val_documents) == (data["train_stories"], data["val_stories"] or 4000)
        if run["heuristics"] is None:
            assert model.channel_mixer == "dense" and model.d_ffn == given["d_ffn"]
        else:
            check_routing(run_id, experiments[run_id], run)


def check_routing(run_id: str, experiment: Experiment, run: dict) -> None:
    some, given, heuristics = experiment.model.some, run["model"], dict(run["heuristics"])
    for key in ("num_experts", "d_ffn", "top_k"):
        assert getattr(some, key) == given[key], (run_id, key)
    init, _, bias = given["expert_init"].partition("+")
    assert (some.expert_init, some.expert_bias) == (init, "torch" if bias else "zero")
    assert some.router == given["router"]["type"] and given["router"].get("hidden_mult") in (None, some.router_mult)

    del heuristics["stated_in_report"]
    epochs = range(int(experiment.train.epochs))
    end, start = experiment.train.temperature_end, some.temperature
    falling = [start - (start - (end or start)) * epoch / len(epochs) for epoch in epochs]
    given_temperature = heuristics.pop("train_temperature") or 1.0  # v1.1 has none, which is 1
    assert falling == (given_temperature if end else [given_temperature] * len(epochs))
    assert some.eval_temperature == (heuristics.pop("eval_temperature") or 1.0)
    if heuristics["ema_decay"] is None:
        assert some.rules.usage == "total" and heuristics.pop("ema_decay") is None
    for key, value in {"respawn_threshold": 0, "use_beta": True, **heuristics}.items():
        assert getattr(some.rules, key) == value, (run_id, key)


def test_what_the_source_remarks_or_leaves_open_is_said(source):
    for run_id, run in source.items():
        result = published_results(run_id)
        assert len(result.notes) >= len(run["notes"])
        stated = run["train"]["val_stories"] is not None and (run["heuristics"] or {}).get("stated_in_report", True)
        assert bool(result.assumptions) != stated, run_id
    assert any("8192" in note for note in published_results("v3-1-v5").notes)
    assert any("1.0" in note for note in published_results("v5-mlp").notes)


def test_the_table_is_no_experiment_and_callers_own_what_they_get():
    assert not {"published", "conventions", "runs"} & set(experiment_names())
    published_experiment("v4-a4")["model"]["d_model"] = 1
    published_results("v4-a4").epochs.clear()
    assert published_experiment("v4-a4")["model"]["d_model"] == 512
    result = published_results("v4-a4")
    assert isinstance(result, PublishedRun) and [epoch.val_loss for epoch in result.epochs][-1] == 0.7126
    assert published_results("v3-3-v3").epochs == []


def test_merge_changes_neither_side():
    below, above = {"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"y": 4}, "b": {"z": 5}}
    assert merge(below, above) == {"a": {"x": 1, "y": 4}, "b": {"z": 5}}
    assert below == {"a": {"x": 1, "y": 2}, "b": 3}


@pytest.mark.parametrize(
    ("run_id", "cure"), [("v4-a44", r"did you mean v4-a4\?"), ("gpt", "known: nb-v1.1-v4.3, nb-v2.2-baseline-v5.2")]
)
def test_unknown_runs_are_refused_in_one_line(run_id, cure):
    for read in (published_experiment, published_results):
        with pytest.raises(ValueError, match=f"published run '{run_id}' is unknown; {cure}") as refused:
            read(run_id)
        assert "\n" not in str(refused.value)
