"""The v4 key update, one token, slot and pair at a time (some.md 3.2-3.6 and the v4 column of 3.8).

Order: usage EMA, alpha (slot after slot), beta (all pairs at once), normalise every key, decay.
Everything is computed in float64 and returned in float64, whatever comes in; the inputs are left as they are.

Shape suffixes: T tokens, K slots (top-k), E experts, D model width.
"""

import math
from itertools import combinations

import torch
from torch import Tensor


def update_keys_per_token(
    keys_ED: Tensor,
    usage_E: Tensor,
    step: int,
    queries_TD: Tensor,
    expert_ids_TK: Tensor,
    mask_T: Tensor | None = None,
    gates_TK: Tensor | None = None,
    *,
    alpha: float,
    beta: float,
    delta: float,
    theta_percentile: float,
    warmup_steps: int,
    ema_decay: float,
    use_alpha: bool = True,
    use_beta: bool = True,
    use_delta: bool = True,
) -> tuple[Tensor, Tensor, int]:
    """One update after one training step: (keys_ED, usage_E, step). v4 makes no use of `gates_TK`.

    The rule takes `queries_TD` as they are: hand it unit queries. `theta_percentile` is a fraction (0.05).
    """
    keys_ED = keys_ED.detach().to(torch.float64).clone()
    queries_TD = queries_TD.detach().to(torch.float64)
    ids_TK: list[list[int]] = expert_ids_TK.tolist()
    tokens = _used_tokens(len(ids_TK), mask_T)
    num_experts, top_k = keys_ED.shape[0], expert_ids_TK.shape[1]
    step += 1

    # 3.2 usage: an EMA of raw counts, before any key moves
    count_E = [0] * num_experts
    for t in tokens:
        for e in ids_TK[t]:
            count_E[e] += 1
    usage = [ema_decay * u + (1 - ema_decay) * n for u, n in zip(_floats(usage_E), count_E, strict=True)]
    mass = [1 + u for u in usage]

    # 3.3 alpha: all tokens of one slot pull at the same old key; the next slot sees the moved key
    if use_alpha:
        for a in range(top_k):
            old_ED = keys_ED.clone()
            for t in tokens:
                e = ids_TK[t][a]
                keys_ED[e] += alpha / mass[e] * (queries_TD[t] - old_ED[e])

    # 3.4 beta: all pairs of all tokens pull at the keys that alpha left, the lighter key's mass divides
    if use_beta and top_k > 1:
        old_ED = keys_ED.clone()
        for t in tokens:
            for i, j in combinations(ids_TK[t], 2):
                pull_D = beta / min(mass[i], mass[j]) * (old_ED[j] - old_ED[i])
                keys_ED[i] += pull_D
                keys_ED[j] -= pull_D

    # 3.5 every key back to length 1
    for e in range(num_experts):
        keys_ED[e] /= keys_ED[e].norm()

    # 3.6 delta: rarely used keys shrink, from update warmup_steps + 1 on
    used = [u for u in usage if u > 0]
    if use_delta and step > warmup_steps and used:
        theta = quantile(used, theta_percentile)
        for e in range(num_experts):
            if usage[e] < theta:
                keys_ED[e] *= 1 - delta

    return keys_ED, torch.tensor(usage, dtype=torch.float64), step


def update_usage_mass_per_token(
    usage_mass_E: Tensor,
    expert_ids_TK: Tensor,
    gates_TK: Tensor,
    mask_T: Tensor | None = None,
    *,
    ema_decay: float,
) -> Tensor:
    """EMA of the gate weight that each expert received in this step (3.2, a metric only)."""
    ids_TK: list[list[int]] = expert_ids_TK.tolist()
    weights_TK: list[list[float]] = gates_TK.detach().to(torch.float64).tolist()
    received_E = [0.0] * usage_mass_E.shape[0]
    for t in _used_tokens(len(ids_TK), mask_T):
        for e, gate in zip(ids_TK[t], weights_TK[t], strict=True):
            received_E[e] += gate
    masses = [ema_decay * w + (1 - ema_decay) * r for w, r in zip(_floats(usage_mass_E), received_E, strict=True)]
    return torch.tensor(masses, dtype=torch.float64)


def quantile(values: list[float], p: float) -> float:
    """Quantile with linear interpolation. quantile([4, 1, 2], 0.25) = 1.5."""
    ordered = sorted(values)
    position = p * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def _used_tokens(num_tokens: int, mask_T: Tensor | None) -> list[int]:
    return [t for t in range(num_tokens) if mask_T is None or bool(mask_T[t])]


def _floats(values_E: Tensor) -> list[float]:
    return values_E.detach().to(torch.float64).tolist()
