"""Evaluation against loops over rows and positions: per real token, and by the published convention (specs 1.3, F1, F2)."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from modeling import Transformer, build_model
from tests.distributed import run_ranks
from tests.oracles import metrics as oracle
from tests.training import texts, write_texts
from trainer.config import Experiment, experiment_from_dict
from trainer.data import DataConfig, Dataset, eos_id, open_data, pad_id, prepare_data
from trainer.evaluate import Evaluation, evaluate, mean_of_batch_means

S, BATCH, VOCAB = 24, 4, 300
# Rows of a single token, of more than a row, and a last batch of three.
VALIDATION = [*texts(9, first=100), "the", "a dog"]
WORDS = dict(tokenizer="words", rows="padded")

CASES: dict[str, dict] = {
    "v1.1": dict(
        data=dict(**WORDS, append_eos=False, count_padding=True, drop_last_validation=True), model=dict(causal=False)
    ),
    "v4": dict(data=dict(**WORDS, count_padding=True, drop_last_validation=True)),
    "padding, last batch kept": dict(data=dict(**WORDS, count_padding=True)),
    "v5": dict(data=WORDS),
    "v5, last batch dropped": dict(data=dict(**WORDS, drop_last_validation=True)),
    "v5 without eos": dict(data=dict(**WORDS, append_eos=False)),
    "less than a batch": dict(data=dict(**WORDS, count_padding=True, drop_last_validation=True), train=dict(batch_size=16)),
    "bytes in padded rows": dict(data=dict(rows="padded", count_padding=True)),
    "dense": dict(data=dict(**WORDS, count_padding=True), model=dict(channel_mixer="dense", d_ffn=20)),
    "chunks": dict(data={}),
    "experts on both ranks": dict(data=dict(**WORDS, count_padding=True)),
}


def experiment_of(case: dict, folder: Path) -> Experiment:
    some = dict(num_experts=8, d_ffn=12, top_k=2, temperature=0.9, eval_temperature=0.05)
    model = dict(vocab_size=VOCAB, d_model=16, num_layers=2, num_heads=2, max_seq_len=S, some=some) | case.get("model", {})
    data = dict(name="text", path=str(folder / "text"), cache_dir=str(folder / "cache")) | case["data"]
    return experiment_from_dict(dict(model=model, data=data, train=dict(batch_size=BATCH) | case.get("train", {})))


def model_of(experiment: Experiment, ep_group=None) -> Transformer:
    """With a loud head, so that losses differ from token to token, and some usage to measure."""
    model = build_model(experiment.model, seed=4, ep_group=ep_group)
    model.head.weight.data.mul_(4)
    for number, layer in enumerate(model.some_layers):
        layer.store.usage.copy_((torch.arange(8.0) * (number + 3)) % 7)
    return model


def dataset_of(experiment: Experiment) -> Dataset:
    return open_data(prepare_data(experiment.data, VOCAB, S, seed=0))


def _evaluate_all(rank: int, folder: str) -> dict[str, dict]:
    results = {}
    for name, case in CASES.items():
        experiment = experiment_of(case, Path(folder))
        shared = name == "experts on both ranks" and dist.get_world_size() > 1
        model = model_of(experiment, dist.group.WORLD if shared else None)
        keys = [layer.store.keys.clone() for layer in model.some_layers]
        evaluation = evaluate(model, dataset_of(experiment).validation, experiment, 3, torch.device("cpu"))
        assert model.training and all(p.grad is None for p in model.parameters())
        for layer, before in zip(model.some_layers, keys, strict=True):
            assert torch.equal(layer.store.keys, before) and layer.store.steps == 0, "evaluation moves no key"
        results[name] = evaluation.record | {"served": served_of(evaluation), "pairs": evaluation.pairs}
    return results


def served_of(evaluation: Evaluation) -> list[list[list[tuple[int, int]]]]:
    """Of each layer and expert the tokens that it serves most, with their counts."""
    return [[[(token, n) for token, n in row if n] for row in most_EM2.tolist()] for most_EM2 in evaluation.served]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_texts(folder / "text", train=texts(30), validation=VALIDATION)
    for case in CASES.values():  # the ranks only read the cache
        prepare_data(experiment_of(case, folder).data, VOCAB, S, seed=0)
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def measured(request, folder) -> list[dict[str, dict]]:
    return run_ranks(_evaluate_all, request.param, str(folder))


class Row:
    """One row of the specification: `ids`, padded to S where the convention says so, and what the model makes of it."""

    def __init__(self, model: Transformer, ids: list[int], length: int):
        self.length, self.ids = length, ids
        with torch.no_grad():
            out = model(torch.tensor([ids]))
        logits_SV = out.logits[0].double()
        self.nats = []  # of the token after each position but the last
        for position in range(len(ids) - 1):
            probabilities_V = torch.exp(logits_SV[position] - logits_SV[position].max())
            self.nats.append(-math.log(float(probabilities_V[ids[position + 1]] / probabilities_V.sum())))
        self.experts = [record.expert_ids_TK for record in out.routing]

    @property
    def real(self) -> list[bool]:
        """For each position but the last, whether a real token follows."""
        return [position + 1 < self.length for position in range(len(self.ids) - 1)]


def rows_of(experiment: Experiment, dataset: Dataset, model: Transformer) -> list[Row]:
    tokenizer, data, rows = dataset.tokenizer, experiment.data, []
    end, pad = eos_id(tokenizer), pad_id(tokenizer)
    for text in VALIDATION:
        ids = tokenizer.encode(text).ids
        if data.rows == "padded":
            ids = (ids + [end] * data.append_eos)[:S]
            rows.append(Row(model, ids + [pad] * (S - len(ids)), len(ids)))
        else:
            ids = [end, *ids, end]
            for start in range(0, len(ids) - 1, S):
                piece = ids[start : start + S + 1]
                rows.append(ChunkRow(model, piece))
    return rows


class ChunkRow(Row):
    """A piece of S + 1 ids at most: the last one is a target only."""

    def __init__(self, model: Transformer, ids: list[int]):
        super().__init__(model, ids[:-1], len(ids))
        logits_V = model(torch.tensor([ids[:-1]])).logits[0, -1].detach().double()
        self.nats.append(-float(logits_V.log_softmax(-1)[ids[-1]]))
        self.ids = ids


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, dict]:
    return {name: specification(experiment_of(case, folder)) for name, case in CASES.items()}


def specification(experiment: Experiment) -> dict:
    dataset, model = dataset_of(experiment), model_of(experiment).eval()
    rows = rows_of(experiment, dataset, model)
    data, batch_size = experiment.data, experiment.train.batch_size
    real = [nats for row in rows for nats, is_real in zip(row.nats, row.real, strict=True) if is_real]
    result = {
        "val_loss": sum(real) / len(real),
        "val_ppl": math.exp(sum(real) / len(real)),
        "val_tokens": len(real),
        "nats_per_story": sum(real) / len(VALIDATION),
    }
    if data.rows == "padded":
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        if data.drop_last_validation and len(batches) > 1 and len(batches[-1]) < batch_size:
            batches = batches[:-1]
        means = []
        for batch in batches:
            pairs = [pair for row in batch for pair in zip(row.nats, row.real, strict=True)]
            counted = [nats for nats, is_real in pairs if is_real or data.count_padding]
            means += [sum(counted) / len(counted)] if counted else []
        name = "val_loss_with_padding" if data.count_padding else "val_loss_batch_mean"
        result[name] = sum(means) / len(means)
    result["bits_per_byte"] = sum(real) / math.log(2) / sum(covered_bytes(text, dataset, data) for text in VALIDATION)
    layers = range(len(model.some_layers))
    result["layers"] = [routing_of(model, rows, layer, data) for layer in layers]
    result["served"] = [served_by(rows, layer) for layer in layers]
    result["pairs"] = [pairs_of(rows, layer) for layer in layers]
    return result


def choices_of(rows: list[Row], layer: int) -> list[tuple[int, list[int]]]:
    """Every token that is read and followed by a real one, with its experts."""
    return [
        (row.ids[position], row.experts[layer][position].tolist())
        for row in rows
        for position, is_real in enumerate(row.real)
        if is_real
    ]


def served_by(rows: list[Row], layer: int) -> list[list[tuple[int, int]]]:
    """Of each expert the five tokens that it serves most often."""
    counts = [Counter(token for token, ids_K in choices_of(rows, layer) if e in ids_K) for e in range(8)]
    return [sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:5] for counted in counts]


def pairs_of(rows: list[Row], layer: int) -> Counter:
    """Of each pair of experts, of whom a token has two, the tokens that chose both."""
    return Counter(tuple(sorted(ids_K)) for _, ids_K in choices_of(rows, layer))


def covered_bytes(text: str, dataset: Dataset, data: DataConfig) -> int:
    """UTF-8 bytes that the real targets stand for: of a padded row what follows its first token, as far as it is kept."""
    if data.rows == "chunks":
        return len(text.encode())
    ends = [end for _, end in dataset.tokenizer.encode(text).offsets][:S]
    return len(text[ends[0] : ends[-1]].encode())


def routing_of(model: Transformer, rows: list[Row], layer: int, data: DataConfig) -> dict:
    real_E, routed_E = torch.zeros(8), torch.zeros(8)
    for row in rows:
        for position, ids_K in enumerate(row.experts[layer].tolist()):
            is_real = position < len(row.real) and row.real[position]
            for e in ids_K:
                real_E[e] += is_real
                routed_E[e] += is_real or data.count_padding
    store = model.some_layers[layer].store
    usage = {"usage_gini": oracle.gini(store.usage), "usage_entropy_bits": oracle.entropy_bits(store.usage)}
    padded = {"gini_with_padding": oracle.gini(routed_E), "entropy_bits_with_padding": oracle.entropy_bits(routed_E)}
    return {
        "gini": oracle.gini(real_E),
        "entropy_bits": oracle.entropy_bits(real_E),
        "gini_of_bound": oracle.gini(real_E) / (1 - 2 / 8),
        "experts_used": int((real_E > 0).sum()),
        **usage,
        **(padded if data.count_padding else {}),
    }


@pytest.mark.parametrize("name", CASES)
def test_losses_equal_the_loops(measured, expected, name):
    for of_rank in measured:
        ours, theirs, first = (
            {key: value for key, value in values.items() if isinstance(value, int | float)}
            for values in (of_rank[name], expected[name], measured[0][name])
        )
        assert ours == pytest.approx(theirs, rel=1e-6) and len(ours) >= 5
        assert ours == first, "the same on every rank"


@pytest.mark.parametrize("name", CASES)
def test_routing_is_that_of_real_tokens_and_with_padding_beside_it(measured, expected, name):
    for of_rank in measured:
        assert len(of_rank[name]["layers"]) == len(expected[name]["layers"]) == (0 if name == "dense" else 2)
        for ours, theirs in zip(of_rank[name]["layers"], expected[name]["layers"], strict=True):
            assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=1e-6)
            assert ("gini_with_padding" in ours) == ("gini_with_padding" in theirs)


@pytest.mark.parametrize("name", CASES)
def test_experts_name_the_tokens_that_they_serve(measured, expected, name):
    for of_rank in measured:
        assert of_rank[name]["served"] == expected[name]["served"]
        for ours_EE, theirs in zip(of_rank[name]["pairs"], expected[name]["pairs"], strict=True):
            found = {(left, right): int(ours_EE[left, right]) for left, right in ours_EE.triu().nonzero().tolist()}
            assert found == theirs


def test_the_conventions_differ_in_these_data(expected):
    """Or the comparisons above would show nothing."""
    v4, kept, v5, dropped = (expected[n] for n in ("v4", "padding, last batch kept", "v5", "v5, last batch dropped"))
    assert v4["val_loss"] == pytest.approx(v5["val_loss"]), "a real token's loss does not depend on the convention"
    numbers = [v4["val_loss_with_padding"], kept["val_loss_with_padding"], v5["val_loss_batch_mean"],
               dropped["val_loss_batch_mean"], v4["val_loss"]]  # fmt: skip
    assert min(abs(a - b) for i, a in enumerate(numbers) for b in numbers[:i]) > 1e-3
    assert abs(v4["layers"][0]["gini_with_padding"] - v4["layers"][0]["gini"]) > 0.02


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "mean"),
    [
        (2, False, ((1 + 5) / 4 + 9 / 3 + 4 / 1) / 3),
        (2, True, ((1 + 5) / 4 + 9 / 3) / 2),
        (5, True, 19 / 8),
        (5, False, 19 / 8),
        (9, True, 19 / 8),  # less than one batch: there is nothing else
        (1, True, (1 / 1 + 5 / 3 + 9 / 3 + 4 / 1) / 4),  # the batch without targets has no mean
        (4, True, 15 / 7),
    ],
)
def test_mean_of_batch_means(batch_size, drop_last, mean):
    """By hand: five rows of (nats, targets), one without any target."""
    rows_N2 = torch.tensor([[1.0, 1.0], [5.0, 3.0], [9.0, 3.0], [0.0, 0.0], [4.0, 1.0]], dtype=torch.float64)
    assert mean_of_batch_means(rows_N2, batch_size, drop_last) == pytest.approx(mean)
