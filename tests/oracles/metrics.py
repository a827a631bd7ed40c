"""Routing metrics as plain loops over Python floats (some.md section 4; the cosine measures flaw F4).

Shape suffixes: T tokens, K slots (top-k), E experts, D model width.
"""

import math
from itertools import combinations

import torch
from torch import Tensor


def gini(usage_E: Tensor) -> float:
    """Gini as mean absolute difference over twice the mean; 0 if nothing was used.

    [1, 1, 1, 1] -> 0.   [0, 0, 0, 1] -> 3/4.   [1, 3] -> 1/4.   [1, 2, 3] -> 2/9.   [0, 0] -> 0.
    """
    u = usage_E.detach().to(torch.float64).tolist()
    total = math.fsum(u)
    if total == 0:
        return 0.0
    mean_difference = math.fsum(abs(a - b) for a in u for b in u) / len(u) ** 2
    return mean_difference / (2 * total / len(u))


def entropy_bits(usage_E: Tensor) -> float:
    """Entropy in bits of the usage shares; unused experts add nothing, and nothing used at all gives 0.

    [1, 1, 1, 1] -> 2.   [0, 0, 0, 1] -> 0.   [2, 1, 1] -> 1.5.   [5, 5, 0] -> 1.
    """
    u = usage_E.detach().to(torch.float64).tolist()
    total = math.fsum(u)
    return math.fsum(-(a / total) * math.log2(a / total) for a in u if a > 0)


def mean_coselected_cosine(keys_ED: Tensor, expert_ids_TK: Tensor, mask_T: Tensor | None = None) -> float:
    """Cosine of the two keys of a slot pair, averaged over all pairs of all (unmasked) tokens; nan without any pair.

    keys [1,0], [0,2], [-3,0]: ids [[0, 1]] -> 0;  [[0, 2]] -> -1;  [[0, 1], [0, 2]] -> -1/2;  [[0, 1, 2]] -> -1/3.
    """
    keys: list[list[float]] = keys_ED.detach().to(torch.float64).tolist()
    cosines = []
    for t, ids_K in enumerate(expert_ids_TK.tolist()):
        if mask_T is None or bool(mask_T[t]):
            cosines += [_cosine(keys[i], keys[j]) for i, j in combinations(ids_K, 2)]
    return math.fsum(cosines) / len(cosines) if cosines else math.nan


def _cosine(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
