"""Controls: exactly what each changes, what is refused, and that each trains, stops and goes on."""

import math
import traceback
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from modeling import KeyRules, ModelConfig, SoMEConfig
from tests.distributed import run_ranks
from tests.training import make_trainer, texts, train, write_texts
from trainer.config import Experiment, experiment_from_dict, load_experiment
from trainer.controls import CONTROLS, apply_control
from trainer.loop import Trainer

FIXED = {f"model.some.rules.{name}": value for name, value in asdict(KeyRules.preset("fixed")).items()}

# Every key of the resolved experiment that may differ, and its value, for BASE: two experts a token of width 24 each.
CHANGES: dict[str, dict[str, object]] = {
    "attention_only": {"model.channel_mixer": "none"},
    "random_keys": FIXED,
    "frozen_router": {"model.some.train_router": False},
    "hash_routing": {"model.some.routing": "hash", **FIXED},
    "shared_expert": {"model.some.routing": "shared", "model.some.top_k": 1, **FIXED},
    "frozen_dense": {"model.channel_mixer": "frozen_dense", "model.d_ffn": 48},
    "dense": {"model.channel_mixer": "dense", "model.d_ffn": 48},
    "dense_equal_trained": {"model.channel_mixer": "dense", "model.d_ffn": 32},  # as wide as the query network's MLP
    "permuted_experts": {"model.some.permute_in_evaluation": True},
}
BASE = dict(
    name="small",
    seed=3,
    model=dict(
        vocab_size=300, d_model=16, num_layers=2, num_heads=2, max_seq_len=32,
        some=dict(num_experts=8, d_ffn=24, top_k=2, router="mlp", rules=dict(preset="corrected")),
    ),
    data=dict(name="text", path="text", train_documents=24, val_documents=8, allow_fewer=True),
    train=dict(batch_size=4, max_micro_batch=2, steps=4, eval_every=4, learning_rate=3e-3, warmup_steps=0),
    checkpoint=dict(every=2), log=dict(tensorboard=False), sample=dict(tokens=0), parallel=dict(check_every=1),
)  # fmt: skip
SECONDS = 240


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def base(control: str | None = None) -> Experiment:
    return experiment_from_dict({**BASE, "control": control})


def model(some: dict | None = None, **changes) -> ModelConfig:
    sizes = dict(vocab_size=300, d_model=16, num_layers=3, num_heads=2, max_seq_len=32)
    return ModelConfig(
        **{**sizes, **changes}, some=SoMEConfig(**{"num_experts": 8, "d_ffn": 24, "top_k": 2, **(some or {})})
    )


def test_every_control_is_in_the_table():
    assert list(CONTROLS) == list(CHANGES)


@pytest.mark.parametrize("control", CHANGES)
def test_a_control_changes_what_it_says_and_nothing_else(control):
    before, after = flatten(base().to_dict()), flatten(base(control).to_dict())
    assert before.keys() == after.keys()
    expected = {**before, "control": control, **CHANGES[control]}
    assert after == expected
    assert {key for key in before if after[key] != before[key]} > {"control"}


@pytest.mark.parametrize("control", CHANGES)
@pytest.mark.parametrize(
    "some",
    [dict(router="linear"), dict(router="mlp", router_mult=0.7), dict(top_k=1), dict(rules=KeyRules.preset("v7"))],
    ids=["linear", "mlp", "one expert a token", "v7"],
)
def test_twice_is_once(control, some):
    once = apply_control(model(some), control)
    assert apply_control(once, control) == once
    assert apply_control(model(some), None) == model(some)


@pytest.mark.parametrize("control", CHANGES)
def test_the_resolved_experiment_reads_back(control, tmp_path):
    experiment = base(control)
    assert experiment_from_dict(yaml.safe_load(yaml.safe_dump(experiment.to_dict()))) == experiment
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**experiment.to_dict(), "run": {"world_size": 2}}))
    again = load_experiment(str(path), ["train.steps=9"])
    assert again == replace(experiment, train=replace(experiment.train, steps=9))


@pytest.mark.parametrize("d_model", [16, 38, 512])
@pytest.mark.parametrize(
    "some",
    [dict(router="linear"), *(dict(router="mlp", router_mult=mult) for mult in (0.3, 1.0, 2.0))],
    ids=["linear", "mlp 0.3", "mlp 1", "mlp 2"],
)
def test_dense_equal_trained_has_the_parameters_of_the_query_network(some, d_model):
    config = model(some, d_model=d_model)
    dense = apply_control(config, "dense_equal_trained")
    difference = dense.num_parameters().trainable - config.num_parameters().trainable
    assert abs(difference) <= config.num_layers * d_model
    assert dense.num_parameters().frozen == 0


@pytest.mark.parametrize("router", ["linear", "mlp"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_dense_and_frozen_dense_have_the_active_flops_of_the_experts(router, top_k):
    config, S = model(dict(router=router, top_k=top_k)), 20
    flops = {control: apply_control(config, control).num_flops_per_token(S) for control in CONTROLS}
    L, D, products = 3, 16, top_k * 2 * 16 * 24
    assert flops["frozen_dense"] - flops["attention_only"] == 4 * L * products
    assert flops["dense"] - flops["attention_only"] == 6 * L * products
    query = (D * D if router == "linear" else 4 * D * D) * 6
    assert config.num_flops_per_token(S) - flops["frozen_dense"] == L * (query + 2 * D * 8), "queries and scores"
    assert flops["hash_routing"] == flops["frozen_dense"]
    assert flops["shared_expert"] == flops["hash_routing"] - 4 * L * (top_k - 1) * 2 * 16 * 24
    trained = {control: apply_control(config, control).num_parameters().trainable for control in CONTROLS}
    assert trained["frozen_dense"] == trained["hash_routing"] == trained["attention_only"] == trained["frozen_router"]
    assert trained["dense"] == trained["attention_only"] + L * (products + top_k * 24 + D)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("quickstart", ["control=attention"], "control = 'attention' is unknown; choose one of: attention_only, random"),
        ("quickstart", ["control=true"], "control = True is bool; expected str or null"),
        ("quickstart", ["control=permuted_experts", "model.some.num_experts=1", "model.some.top_k=1"],
         "control = 'permuted_experts' has one expert and nothing to swap; leave control out"),
        *(("cmp-dense-tinystories", [f"control={control}"],
           f"control = '{control}' takes a SoME layer apart and does not fit model.channel_mixer = 'dense'; leave control")
          for control in CHANGES),
        ("quickstart", ["control=dense", "model.channel_mixer=none"], "control = 'dense' takes a SoME layer apart"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(name, settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        load_experiment(name, settings)
    assert "\n" not in str(refused.value)


# Whether keys and query network move in training; None: there are none.
MOVES: dict[str | None, tuple[bool | None, bool | None]] = {
    None: (True, True),
    "attention_only": (None, None),
    "random_keys": (False, True),
    "frozen_router": (True, False),
    "hash_routing": (False, None),
    "shared_expert": (False, None),
    "frozen_dense": (None, None),
    "dense": (None, None),
    "dense_equal_trained": (None, None),
    "permuted_experts": (True, True),
}


def _train_all(rank: int, folder: str) -> dict[str, dict]:
    """Each control four steps in one go, and two and two; or `error`."""
    path = Path(folder)
    write_texts(path / "text", train=texts(24), validation=texts(8, first=100))
    results = {}
    for control in MOVES:
        settings = [f"data.path={path / 'text'}", f"data.cache_dir={path / 'cache'}"]
        settings += [] if control is None else [f"control={control}"]
        (path / "small.yaml").write_text(yaml.safe_dump(BASE))

        def make(name: str, control=control, settings=settings) -> Trainer:
            return make_trainer(path / f"{control} {name}", str(path / "small.yaml"), settings)

        unbroken = make("unbroken")
        results[str(control)] = _in_one_go(unbroken)
        try:
            results[str(control)] |= _stopped_and_resumed(make, unbroken)
        except Exception:
            results[str(control)] |= {"error": traceback.format_exc()}
    return results


def _in_one_go(unbroken: Trainer) -> dict:
    layers = unbroken.engine.model.some_layers
    keys = [layer.store.keys.clone() for layer in layers]
    queries = [p.detach().clone() for layer in layers if layer.query for p in layer.query.parameters()]
    records = train(unbroken, 4)
    moved = [float((layer.store.keys - before).abs().max()) for layer, before in zip(layers, keys, strict=True)]
    after = [p.detach() for layer in layers if layer.query for p in layer.query.parameters()]
    query_moved = [float((p - before).abs().max()) for p, before in zip(after, queries, strict=True)]
    return {"keys": moved, "query": query_moved, "records": records}


def _stopped_and_resumed(make, unbroken: Trainer) -> dict:
    train(make("stopped"), 2)
    resumed = make("stopped")
    started_at = resumed.state.step
    resumed_records = train(resumed, 4)
    core, theirs = resumed.engine.core_state(), unbroken.engine.core_state()
    same = all(torch.equal(core.parameters[name], p) for name, p in theirs.parameters.items())
    for ours, other in zip(resumed.stores, unbroken.stores, strict=True):
        same = same and all(torch.equal(a, b) for a, b in zip(ours.buffers(), other.buffers(), strict=True))
    trained = {name for name, p in unbroken.engine.model.named_parameters() if p.requires_grad}
    return {"started_at": started_at, "resumed": resumed_records, "same": same, "saved": set(core.parameters) == trained}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, dict]:
    (of_rank_0,) = run_ranks(_train_all, 1, str(tmp_path_factory.mktemp("controls")), seconds=SECONDS)
    return of_rank_0


def losses(records: list[dict], event: str = "train", key: str = "loss") -> list[float]:
    return [record[key] for record in records if record["event"] == event]


@pytest.mark.parametrize("control", MOVES)
def test_training_is_finite_and_moves_what_it_should(trained, control):
    result = trained[str(control)]
    values = losses(result["records"]) + losses(result["records"], "eval", "val_loss")
    assert len(values) == 4 + 2 and all(v is not None and math.isfinite(v) for v in values)
    assert values[-1] < values[-2], "it learns"
    keys_move, query_moves = MOVES[control]
    assert len(result["keys"]) == (0 if keys_move is None else 2)
    assert all((moved > 1e-4) == keys_move and (keys_move or moved < 1e-6) for moved in result["keys"])
    assert len(result["query"]) == (0 if query_moves is None else 2 * 4)
    assert all((moved > 1e-5) == query_moves and (query_moves or moved == 0) for moved in result["query"])


@pytest.mark.parametrize("control", MOVES)
def test_a_stopped_run_goes_on_as_if_it_had_not(trained, control):
    result = trained[str(control)]
    assert "error" not in result, result["error"]
    assert result["started_at"] == 2 and result["same"] and result["saved"]
    assert losses(result["resumed"]) == losses(result["records"])
    assert losses(result["resumed"], "eval", "val_loss")[-1] == losses(result["records"], "eval", "val_loss")[-1]


def test_permuted_experts_train_as_ever_and_evaluate_otherwise(trained):
    plain, permuted = trained["None"], trained["permuted_experts"]
    assert losses(permuted["records"]) == losses(plain["records"])
    assert losses(permuted["records"], "eval", "val_loss") != losses(plain["records"], "eval", "val_loss")
