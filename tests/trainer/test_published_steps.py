"""Every published run, at a fraction of its width, through the real trainer: two steps each, all in one process."""

import functools
import math
import traceback
from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.training import make_trainer, texts, train, write_texts
from trainer.config import load_experiment
from trainer.loop import Trainer
from trainer.published import published_ids, published_results

VOCAB, S, BATCH, TRAIN, VALIDATION, STEPS = 300, 32, 4, 24, 8, 2
LONGER, BEYOND = "v3.5 past an epoch", "v3.5 beyond its epochs"
SECONDS = 240  # a minute on two slow cores, with room for busy ones

# What specs 1.3 and 3.1 say of padding, run by run: only v5 to v7 leave it out of losses, routing and key updates.
WITHOUT_PADDING = {"v5-linear", "v5-mlp", "v6-phoenix", "v7-clamp"}
DENSE = {"cmp-dense-tinystories", "cmp-dense-tiny-textbooks"}
TEXTBOOKS = {"cmp-some-tiny-textbooks", "cmp-dense-tiny-textbooks"}


def reduced(run_id: str, folder: Path) -> list[str]:
    """The run as published, but for its sizes and where its text comes from."""
    sizes = [
        "model.d_model=32", "model.num_layers=2", "model.num_heads=2", f"model.max_seq_len={S}", f"model.vocab_size={VOCAB}",
        f"train.batch_size={BATCH}", f"data.train_documents={TRAIN}", f"data.val_documents={VALIDATION}",
        f"data.path={folder / 'text'}", "data.tokenizer_documents=null", "data.allow_fewer=true",
        f"data.cache_dir={folder / 'cache'}", "log.tensorboard=false",
    ]  # fmt: skip
    if run_id in TEXTBOOKS:
        sizes.append(f"data.tokenizer_from={folder / 'tokenizer'}")
    if run_id in DENSE:
        return [*sizes, "model.d_ffn=32"]
    top_k = min(4, load_experiment(run_id).model.some.top_k)
    return [*sizes, "model.some.num_experts=8", "model.some.d_ffn=16", f"model.some.top_k={top_k}"]


def write_data(folder: Path) -> None:
    write_texts(folder / "text", train=texts(TRAIN), validation=texts(VALIDATION, first=100))
    write_texts(folder / "tokenizer", train=texts(40, first=200))


def _all_runs(rank: int, folder: str) -> dict[str, dict]:
    """For each run what it did, or `error`: what stopped it. Beside them two that go on for longer."""
    write_data(Path(folder))
    results = {}
    runs = [(run_id, run_id, [], _two_steps) for run_id in published_ids()]
    runs.append((LONGER, "v3.5-c2-widthfix", [], functools.partial(_watched, stop=8)))
    runs.append((BEYOND, "v3.5-c2-widthfix", ["train.steps=20"], functools.partial(_watched, stop=20)))
    for name, run_id, settings, look in runs:
        try:
            trainer = make_trainer(Path(folder) / name, run_id, [*reduced(run_id, Path(folder)), *settings])
            results[name] = look(trainer)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    return results


def _two_steps(trainer: Trainer) -> dict:
    batches = [trainer.order.sequence_ids(step) for step in range(STEPS)]
    before = [store.keys.clone() for store in trainer.stores]
    rules = trainer.experiment.model.some.rules
    pools = [layer.pool.content_hash() for layer in trainer.engine.model.some_layers]
    records = train(trainer, STEPS)
    return {
        "records": records,
        "real": [int(trainer.dataset.train.lengths[ids].sum()) for ids in batches],
        "targets": [int(trainer.dataset.train.targets_per_row[ids].sum()) for ids in batches],
        "tokenizer": trainer.dataset.tokenizer_hash,
        "moved": [float((s.keys - keys).abs().max()) for s, keys in zip(trainer.stores, before, strict=True)],
        "moves": rules.moves,
        "ema": 1.0 if rules.usage == "total" else rules.ema_decay,
        "usage": [float(store.usage.sum()) for store in trainer.stores],
        "finite": all(bool(store.keys.isfinite().all()) for store in trainer.stores),
        "updates": [store.steps for store in trainer.stores],
        "respawns": sum(int(store.respawns) for store in trainer.stores),
        "top_k": trainer.experiment.model.some.top_k,
        "frozen": pools == [layer.pool.content_hash() for layer in trainer.engine.model.some_layers],
    }


def _watched(trainer: Trainer, stop: int) -> dict:
    """The gates' temperature in every step and evaluation."""
    forward, used, evaluated = trainer.engine.forward, [], []
    evaluation_forward = trainer.engine.model.some_layers[0].forward

    def watched(*inputs, **keywords):
        used.append(keywords["temperature"])
        return forward(*inputs, **keywords)

    def watched_layer(x_BSD, mask_BS, temperature, *rest):
        if not trainer.engine.model.training:
            evaluated.append(trainer.engine.model.some_layers[0]._temperature(temperature))
        return evaluation_forward(x_BSD, mask_BS, temperature, *rest)

    trainer.engine.forward = watched
    trainer.engine.model.some_layers[0].forward = watched_layer
    records = train(trainer, stop)
    return {"used": used, "evaluated": evaluated, "records": records, "total": trainer.state.total_steps}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    (of_rank_0,) = run_ranks(_all_runs, 1, str(tmp_path_factory.mktemp("published")), seconds=SECONDS)
    return of_rank_0


def of(results: dict[str, dict], run_id: str) -> dict:
    assert "error" not in results[run_id], results[run_id]["error"]
    return results[run_id]


def events(result: dict, event: str) -> list[dict]:
    return [record for record in result["records"] if record["event"] == event]


@pytest.mark.parametrize("run_id", published_ids())
def test_two_steps_with_finite_losses_that_start_at_a_guess(results, run_id):
    result = of(results, run_id)
    losses = [record["loss"] for record in events(result, "train")]
    first, last = events(result, "eval")
    values = [*losses, first["val_loss"], last["val_loss"], *(record["grad_norm"] for record in events(result, "train"))]
    assert len(losses) == STEPS and all(v is not None and math.isfinite(v) and v > 0 for v in values)
    assert [first["step"], last["step"]] == [0, STEPS] and events(result, "end")[0]["step"] == STEPS
    # The head's logits have variance 1/3: a sixth of a nat above the uniform guess. Padding is one token, of any luck.
    assert first["val_loss"] == pytest.approx(math.log(VOCAB) + 1 / 6, abs=0.3)
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=1.5)
    assert last["val_loss"] != first["val_loss"]
    assert events(result, "train")[-1]["skipped"] == 0


@pytest.mark.parametrize("run_id", published_ids())
def test_keys_move_if_the_rules_do(results, run_id):
    result = of(results, run_id)
    layers = 0 if run_id in DENSE else 2
    assert len(result["moved"]) == len(events(result, "eval")[0]["layers"]) == layers
    assert all((moved > 1e-4) == result["moves"] for moved in result["moved"]) and result["finite"] and result["frozen"]
    assert result["updates"] == [STEPS] * layers


@pytest.mark.parametrize("run_id", published_ids())
def test_padding_counts_where_the_table_says(results, run_id):
    result = of(results, run_id)
    counts = run_id not in WITHOUT_PADDING
    assert published_results(run_id).pads_counted == counts
    assert result["targets"] == ([BATCH * (S - 1)] * STEPS if counts else result["real"])
    assert sum(result["real"]) < 0.95 * STEPS * BATCH * (S - 1), "without padding nothing would be shown"
    for record in events(result, "eval"):
        assert ("val_loss_with_padding" in record) == counts and ("val_loss_batch_mean" in record) != counts
        for layer in record["layers"]:
            assert ("gini_with_padding" in layer) == counts
    if run_id not in DENSE:
        assert result["respawns"] == 0, "a respawned key's usage starts anew"
        # Every routed position of the rows of 32 is in the usage, or only those with a real target (specs 3.1 and 3.2).
        first, second = [BATCH * S] * STEPS if counts else result["real"]
        rho = result["ema"]
        total = first + second if rho == 1 else (1 - rho) * (rho * first + second)
        assert result["usage"] == pytest.approx([result["top_k"] * total] * 2, rel=1e-4)


def test_textbooks_bring_the_tokenizer_of_other_data(results):
    assert of(results, "cmp-some-tinystories")["tokenizer"] == of(results, "v4-a4")["tokenizer"]
    assert of(results, "cmp-some-tiny-textbooks")["tokenizer"] == of(results, "cmp-dense-tiny-textbooks")["tokenizer"]
    assert of(results, "cmp-some-tiny-textbooks")["tokenizer"] != of(results, "v4-a4")["tokenizer"]


def test_temperature_falls_by_the_epoch_and_every_epoch_is_evaluated(results):
    result = of(results, LONGER)
    assert result["total"] == 2 * TRAIN // BATCH
    assert result["used"] == [2.0] * 6 + [1.5] * 2, "T = 2 - (2 - 1) e / 2 in epochs e = 0 and 1 (specs 1.4)"
    assert set(result["evaluated"]) == {0.5}
    assert [(r["step"], r["epoch"]) for r in events(result, "eval")] == [(0, 0), (6, 1), (8, pytest.approx(8 / 6))]


def test_temperature_never_falls_below_its_end(results):
    """train.steps goes before train.epochs: here for 20 steps, in place of 2 epochs of 6."""
    result = of(results, BEYOND)
    assert result["total"] == len(result["used"]) == 20
    assert result["used"][0] == 2.0 and all(1.0 <= temperature <= 2.0 for temperature in result["used"])
