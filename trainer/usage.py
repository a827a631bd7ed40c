"""How often experts are used, and how unevenly that loads the ranks that share them.

Shapes: L layers, E experts, P ranks that share a pool.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from modeling.some.balance import plan
from modeling.some.placement import Placement
from trainer.checkpoint import KEYS
from trainer.resume import NoCheckpoint, checkpoint_at

PLACEMENTS = ("contiguous", "balanced")


@dataclass(frozen=True)
class Usage:
    """How often experts are chosen."""

    shares_LE: np.ndarray
    """(L, E) float64, each layer's shares of all choices; rows sum to 1 and no share is above 1 / top_k."""
    is_measured: bool
    """Whether each expert's share is known, or only how uneven shares are."""

    def imbalances(self, ranks: int, placement: str, replicas: int) -> list[float]:
        """Of each layer, `imbalance`."""
        return [imbalance(shares_E, ranks, placement, replicas, self.is_measured) for shares_E in self.shares_LE]


def read_usage(text: str, num_layers: int, num_experts: int, top_k: int) -> Usage:
    """Shares by a law, or those of a run.

    Args:
        text: `zipf:S` (the r-th most used expert is chosen in proportion to r^-S; 0 = evenly) or a run's folder, whose last
            checkpoint tells how its key stores were used.
        num_layers: L.
        num_experts: E.
        top_k: experts a token.

    Raises:
        ValueError: not such a text, a negative exponent, or a checkpoint of other sizes or without usage.
    """
    match = re.fullmatch(r"zipf:(\d+\.?\d*)", text)
    if match:
        weights_E = np.arange(1, num_experts + 1) ** -float(match[1])
        # An expert's number says nothing of its rank: every layer has its own fixed order.
        generator = np.random.default_rng(0)
        drawn = [at_most_once_a_token(generator.permutation(weights_E), top_k) for _ in range(num_layers)]
        return Usage(np.stack(drawn), is_measured=False)
    if text.startswith("zipf"):
        raise ValueError(f"--usage {text}: write it as zipf:0.6, an exponent from 0 up")
    folder = Path(text)
    if not folder.is_dir():
        raise ValueError(f"--usage {text}: no such run; give zipf:0.6 or a run's folder with a checkpoint")
    try:
        found = checkpoint_at(folder)
    except NoCheckpoint as error:
        raise ValueError(f"--usage {error}") from None
    with safe_open(found.folder / KEYS, framework="np") as file:
        layers = sum(name.endswith("/usage") for name in file.keys())
        usage = [file.get_tensor(f"{layer}/usage").astype(np.float64) for layer in range(layers)]
    if len(usage) != num_layers or len(usage[0]) != num_experts:
        held = f"{len(usage)} layers of {len(usage[0]) if usage else 0} experts"
        raise ValueError(f"--usage {text}: holds {held}, the plan is for {num_layers} of {num_experts}; give another run")
    if any(usage_E.sum() == 0 for usage_E in usage):
        raise ValueError(f"--usage {text}: no token was counted at step {found.state.step}; give a run that has trained")
    return Usage(np.stack([at_most_once_a_token(usage_E, top_k) for usage_E in usage]), is_measured=True)


def at_most_once_a_token(weights_E: np.ndarray, top_k: int) -> np.ndarray:
    """(E,) shares in proportion to the weights, but none above 1 / top_k: a token's experts are distinct."""
    shares_E, full_E = weights_E / weights_E.sum(), np.zeros(len(weights_E), dtype=bool)
    while (shares_E > (1 + 1e-12) / top_k).any():
        full_E |= shares_E >= 1 / top_k
        rest_E = np.where(full_E, 0, weights_E)
        left = 1 - full_E.sum() / top_k
        # With fewer used experts than top_k, unused ones share what is left.
        rest_E = rest_E if rest_E.sum() > 0 else np.where(full_E, 0.0, 1.0)
        shares_E = np.where(full_E, 1 / top_k, left * rest_E / max(rest_E.sum(), 1e-300))
    return shares_E


def imbalance(shares_E: np.ndarray, ranks: int, placement: str, replicas: int, is_measured: bool) -> float:
    """Rows at the busiest rank over the mean.

    contiguous: exact, for experts in blocks by number. balanced: of measured shares that of the plan which a run would make
    from them; of others the bound max(1, hottest share * P / (1 + its copies)), which no placement can beat, and which
    longest-processing-time packing comes close to where a rank holds many experts (field measurement: 1.08 against 1.00 for
    Zipf(0.6), 128 experts on 8 ranks).

    Args:
        shares_E: (E,) shares of all choices, summing to 1.
        ranks: P.
        placement: `contiguous` or `balanced`.
        replicas: extra copies, each given to the expert whose copies are busiest.
        is_measured: whether the shares are those of each expert, or a law's.
    """
    if placement == "contiguous":
        return float(shares_E.reshape(ranks, -1).sum(1).max() * ranks)
    if is_measured:
        load_E = shares_E.tolist()
        return plan(load_E, replicas, Placement.contiguous(len(load_E), ranks)).max_over_mean(load_E)
    copies_E = np.ones(len(shares_E))
    for _ in range(replicas):
        # More copies than ranks serve nobody.
        copies_E[np.where(copies_E < ranks, shares_E / copies_E, -1.0).argmax()] += 1
    return float(max(1.0, (shares_E / copies_E).max() * ranks))
