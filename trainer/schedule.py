"""Learning rate and weight decay: which parameters, how much, when."""

import math

from torch import nn

from trainer.config import TrainConfig


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then a cosine that reaches `min_learning_rate_ratio` of it when the run is over.

    Args:
        step: optimizer step, from 0.
        total_steps: length of the whole run.
        config: peak, warm-up and floor.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Parameters with and without weight decay. `matrices`: only the weights of linear layers decay; `all`: everything."""
    decay, rest = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            is_matrix = isinstance(module, nn.Linear) and name == "weight"
            (decay if is_matrix or config.weight_decay_on == "all" else rest).append(parameter)
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
