"""Figures of a trace: what each expert serves, which experts go together, and what changes without one.

Everything is plain data, which `tools/inspect_experts.py` prints, writes as JSON and makes a page of.

Shapes: T tokens, L SoME layers, E experts, K experts a token, V token types that occur.
"""

import math
from typing import Any

import torch
from tokenizers import Tokenizer

from modeling import Transformer
from tools.expert_traces import Trace
from trainer.metrics import entropy_bits
from trainer.text import readable

MOST_TOKENS, MOST_PAIRS, MOST_CHANGED = 8, 20, 20
"""How many token types an expert names, how many pairs of experts a layer names, how many tokens a disabled expert names."""


def describe_tokens(trace: Trace, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """One record a token: what it is and what follows, the loss of that, and of each layer its experts and gates."""
    names = _Names(tokenizer)
    return [
        {
            "row": row,
            "position": position,
            "token": names[token],
            "next": names[target],
            "loss": loss,
            "experts": experts_LK,
            "gates": gates_LK,
        }
        for row, position, token, target, loss, experts_LK, gates_LK in zip(
            trace.rows_T.tolist(),
            trace.positions_T.tolist(),
            trace.token_ids_T.tolist(),
            trace.targets_T.tolist(),
            trace.losses_T.tolist(),
            trace.expert_ids_LTK.transpose(0, 1).tolist(),
            trace.gates_LTK.transpose(0, 1).tolist(),
            strict=True,
        )
    ]


def describe_layers(trace: Trace, num_experts: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """One record a layer."""
    return [_describe_layer(layer, trace, num_experts, _Names(tokenizer)) for layer in range(len(trace.expert_ids_LTK))]


def _describe_layer(layer: int, trace: Trace, E: int, names: "_Names") -> dict[str, Any]:
    expert_ids_TK, gates_TK = trace.expert_ids_LTK[layer], trace.gates_LTK[layer]
    types_V, type_of_T = trace.token_ids_T.unique(return_inverse=True)
    slots_TK = expert_ids_TK * len(types_V) + type_of_T[:, None]
    counts_EV = torch.bincount(slots_TK.flatten(), minlength=E * len(types_V)).view(E, -1)
    visits_E, occurrences_V = counts_EV.sum(1), torch.bincount(type_of_T)
    mass_E = torch.bincount(expert_ids_TK.flatten(), gates_TK.flatten().double(), minlength=E)
    used = visits_E.nonzero().flatten()
    experts = []
    for expert in used[visits_E[used].argsort(descending=True, stable=True)].tolist():
        top = counts_EV[expert].sort(descending=True, stable=True)
        tokens = [
            {"token": names[int(types_V[place])], "count": count, "share_of_token": count / int(occurrences_V[place])}
            for count, place in zip(top.values[:MOST_TOKENS].tolist(), top.indices[:MOST_TOKENS].tolist(), strict=True)
            if count
        ]
        visits = int(visits_E[expert])
        experts.append(
            {
                "expert": expert,
                "tokens": visits,
                "share": visits / len(expert_ids_TK),
                "mean_gate": float(mass_E[expert]) / visits,
                "token_types": int((counts_EV[expert] > 0).sum()),
                "top_tokens": tokens,
            }
        )
    return {
        "layer": layer,
        "experts_used": len(used),
        "effective_experts": 2 ** entropy_bits(visits_E),
        "largest_gate": float(gates_TK[:, 0].mean()),
        "experts": experts,
        "overlap": _overlap(expert_ids_TK, counts_EV, used),
    }


def _overlap(expert_ids_TK: torch.Tensor, counts_EV: torch.Tensor, used: torch.Tensor) -> dict[str, Any]:
    """Jaccard indices of pairs of used experts: of the tokens that choose them, and of the types of these tokens."""
    T, E = len(expert_ids_TK), len(counts_EV)
    chosen_TE = torch.zeros(T, E).scatter_(1, expert_ids_TK, 1.0)[:, used]
    tokens_PP, types_PP = _jaccard(chosen_TE), _jaccard((counts_EV[used] > 0).float().T)
    left, right = torch.triu_indices(len(used), len(used), offset=1)
    tokens, types = tokens_PP[left, right], types_PP[left, right]
    # By tokens, and among equals by types.
    order = (tokens.double() * 1e6 + types.double()).argsort(descending=True, stable=True)[:MOST_PAIRS]
    return {
        "mean_of_tokens": float(tokens.mean()) if len(tokens) else None,
        "mean_of_types": float(types.mean()) if len(types) else None,
        "pairs": [
            {
                "experts": [int(used[left[p]]), int(used[right[p]])],
                "of_tokens": float(tokens[p]),
                "of_types": float(types[p]),
            }
            for p in order.tolist()
            if types[p] > 0
        ],
    }


def _jaccard(members_NP: torch.Tensor) -> torch.Tensor:
    """(P, P) of P sets, none of them empty, from the indicator of N members: |A and B| / |A or B|."""
    both_PP = members_NP.T @ members_NP
    sizes_P = both_PP.diagonal()
    return both_PP / (sizes_P[:, None] + sizes_P - both_PP)


def describe_change(layer: int, expert: int, whole: Trace, without: Trace, tokenizer: Tokenizer) -> dict[str, Any]:
    """What is different in a trace `without` an expert."""
    names = _Names(tokenizer)
    visits_T = (whole.expert_ids_LTK[layer] == expert).any(1)
    change_T = without.losses_T - whole.losses_T
    moved_LT = (whole.expert_ids_LTK.sort(-1).values != without.expert_ids_LTK.sort(-1).values).any(-1)
    order = change_T.abs().argsort(descending=True, stable=True)[:MOST_CHANGED].tolist()
    return {
        "layer": layer,
        "expert": expert,
        "tokens": int(visits_T.sum()),
        "loss": float(whole.losses_T.mean()),
        "loss_without": float(without.losses_T.mean()),
        "change_at_its_tokens": _mean(change_T[visits_T]),
        "change_elsewhere": _mean(change_T[~visits_T]),
        "routed_otherwise": moved_LT.float().mean(1).tolist(),
        "most_changed": [
            {
                "index": index,
                "token": names[int(whole.token_ids_T[index])],
                "next": names[int(whole.targets_T[index])],
                "loss": float(whole.losses_T[index]),
                "loss_without": float(without.losses_T[index]),
                "chose_it": bool(visits_T[index]),
            }
            for index in order
            if change_T[index] != 0
        ],
    }


def check_experts(wanted: list[str], model: Transformer) -> list[tuple[int, int]]:
    """`LAYER:EXPERT` texts as numbers.

    Raises:
        ValueError: another form, or no such expert.
    """
    layers, E, pairs = len(model.some_layers), model.config.some.num_experts, []
    for text in wanted:
        layer, _, expert = text.partition(":")
        if not (layer.isdecimal() and expert.isdecimal() and int(layer) < layers and int(expert) < E):
            raise ValueError(f"--disable {text}: give LAYER:EXPERT, layers 0 to {layers - 1} and experts 0 to {E - 1}")
        pairs.append((int(layer), int(expert)))
    return pairs


class _Names(dict):
    """Token id to its readable form, each looked up once."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str:
        self[token_id] = readable(self._tokenizer, token_id)
        return self[token_id]


def _mean(values: torch.Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def perplexity(loss: float) -> float:
    """exp of nats a token."""
    return math.exp(min(loss, 700.0))
