"""The shipped experiments as `--list` prints them."""

from trainer.config import experiment_names, load_experiment
from trainer.console import say
from trainer.published import published_ids, published_results


def print_experiments() -> None:
    """One line an experiment; for a published run, its last published validation loss."""
    for name in experiment_names():
        experiment = load_experiment(name)
        model, counts = experiment.model, experiment.model.num_parameters()
        mixer = f"{model.some.num_experts} experts, top {model.some.top_k}"
        shape = f"{model.num_layers} layers, {mixer if model.channel_mixer == 'some' else model.channel_mixer}"
        size = f"{counts.total:>13,} parameters {counts.trainable:>10,} trained"
        line = f"{name:25} {size}   {shape:29} {experiment.data.name:11}"
        say(f"{line} {describe_published(name)}".rstrip())


def describe_published(name: str) -> str:
    """The last published result of a run; empty for an experiment that is none."""
    if name not in published_ids():
        return ""
    epochs = published_results(name).epochs
    if not epochs:
        return "no published result"
    last = epochs[-1]
    return f"published: val {last.val_loss:.4f} (ppl {last.val_ppl:.2f}) after {last.epoch} epochs"
