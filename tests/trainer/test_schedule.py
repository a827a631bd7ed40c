"""Learning rate and weight decay groups."""

import dataclasses

import pytest

from modeling import build_model
from tests.oracles import schedule as oracle
from trainer.config import load_experiment
from trainer.schedule import learning_rate, parameter_groups


@pytest.mark.parametrize(("warmup", "floor", "total"), [(0, 0.0, 50), (10, 0.1, 50), (10, 0.0, 11), (30, 0.1, 20)])
def test_learning_rate_equals_the_formula(warmup, floor, total):
    config = dataclasses.replace(
        load_experiment("a4").train, warmup_steps=warmup, min_learning_rate_ratio=floor, learning_rate=2.0
    )
    for step in range(total):
        expected = oracle.learning_rate(step, peak=2.0, warmup_steps=warmup, total_steps=total, min_ratio=floor)
        assert learning_rate(step, total, config) == pytest.approx(expected, rel=1e-12)


def test_only_matrices_decay_or_everything_does():
    experiment = load_experiment("quickstart")
    model = build_model(experiment.model)
    decay, rest = parameter_groups(model, experiment.train)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 2 for p in decay["params"])
    norms_biases_embedding = {id(p) for n, p in model.named_parameters() if p.ndim == 1 or n == "embedding.weight"}
    assert {id(p) for p in rest["params"]} == norms_biases_embedding
    (everything,) = parameter_groups(model, dataclasses.replace(experiment.train, weight_decay_on="all"))
    assert len(everything["params"]) == len(list(model.parameters())) == len(decay["params"]) + len(rest["params"])
