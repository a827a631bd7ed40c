"""What the experts of each layer serve: the tokens that they serve most, and the pairs of experts that serve the same.

Shapes: T routed positions, L SoME layers, E experts, K experts a token, V vocabulary, M tokens an expert names, N parts of
counts, R ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from modeling.some import Routing
from trainer.runfolder import MOST_PAIRS
from trainer.text import readable

MOST_TOKENS = 5
"""How many tokens an expert names."""


class ServedTokens:
    """Counts over an evaluation, on all ranks, how often each expert serves each token, which is the one that a layer reads.

    A table of E x V counts a layer would be larger than the core, and nearly all of it zeros. Kept are the pairs that occur,
    each as one number, expert * V + token, with its count.
    """

    def __init__(self, num_layers: int, num_experts: int, vocab_size: int, device: torch.device):
        self._sizes = num_experts, vocab_size
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        self._parts: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[(nothing, nothing)] for _ in range(num_layers)]

    def add(self, routing: list[Routing], token_ids_T: torch.Tensor, real_T: torch.Tensor) -> None:
        """Count one batch; `token_ids_T` int64, the tokens at the routed positions, `real_T` bool, those that count."""
        V = self._sizes[1]
        for parts, record in zip(self._parts, routing, strict=True):
            codes_TK = record.expert_ids_TK[real_T] * V + token_ids_T[real_T, None]
            parts.append(codes_TK.unique(return_counts=True))
            # Not sooner than what is new is as much as what is summed: so every count is summed again a few times only.
            if sum(len(codes) for codes, _ in parts[1:]) > len(parts[0][0]):
                parts[:] = [_summed(parts)]

    def most(self) -> list[torch.Tensor]:
        """Of each layer (E, M, 2) int64, each expert's tokens served most, most first, and how often; equal ones by number.

        Where fewer occur, counts are 0. A collective, the same result on every rank and for any number of them.
        """
        return [_most(*_on_their_ranks(*_summed(parts), *self._sizes), *self._sizes) for parts in self._parts]


def _summed(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Every code once, ascending, with the sum of its counts."""
    codes_N, counts_N = (torch.cat(values) for values in zip(*parts, strict=True))
    unique_P, place_N = codes_N.unique(return_inverse=True)
    return unique_P, torch.zeros_like(unique_P).index_add_(0, place_N, counts_N)


def _on_their_ranks(codes_P: torch.Tensor, counts_P: torch.Tensor, E: int, V: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All ranks' codes of the experts that this rank sums up, with their counts; experts are spread evenly over ranks."""
    ranks = dist.get_world_size()
    first_R = torch.arange(1, ranks, device=codes_P.device) * E // ranks * V
    ends = [*torch.searchsorted(codes_P, first_R).tolist(), len(codes_P)]
    outgoing = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    sizes_R = torch.tensor(outgoing, device=codes_P.device)
    incoming_R = torch.empty_like(sizes_R)
    dist.all_to_all_single(incoming_R, sizes_R)
    incoming = incoming_R.tolist()
    received_N2 = codes_P.new_empty(sum(incoming), 2)
    dist.all_to_all_single(received_N2, torch.stack([codes_P, counts_P], 1), incoming, outgoing)
    return _summed([(received_N2[:, 0], received_N2[:, 1])])


def _most(codes_P: torch.Tensor, counts_P: torch.Tensor, E: int, V: int) -> torch.Tensor:
    """(E, M, 2) tokens and counts of all ranks' experts, from those of this rank; a collective."""
    order_P = counts_P.argsort(descending=True, stable=True)
    order_P = order_P[(codes_P[order_P] // V).argsort(stable=True)]
    experts_P, tokens_P, counts_P = codes_P[order_P] // V, codes_P[order_P] % V, counts_P[order_P]
    begins_E = torch.searchsorted(experts_P, torch.arange(E, device=codes_P.device))
    place_P = torch.arange(len(experts_P), device=codes_P.device) - begins_E[experts_P]
    is_named_P = place_P < MOST_TOKENS
    most_EM2 = codes_P.new_zeros(E, MOST_TOKENS, 2)
    named = experts_P[is_named_P], place_P[is_named_P]
    most_EM2[named] = torch.stack([tokens_P, counts_P], 1)[is_named_P]
    dist.all_reduce(most_EM2)  # an expert's are on one rank, zeros on the others
    return most_EM2


def most_coselected(pairs_EE: torch.Tensor) -> list[list[int]]:
    """The pairs of experts that most tokens chose together, most first: [expert, expert, tokens]; equal ones by number."""
    left_P, right_P = torch.triu_indices(*pairs_EE.shape, offset=1, device=pairs_EE.device)
    tokens_P = pairs_EE[left_P, right_P]
    order_P = tokens_P.argsort(descending=True, stable=True)[:MOST_PAIRS]
    rows = torch.stack([left_P[order_P], right_P[order_P], tokens_P[order_P]], dim=1).tolist()
    return [row for row in rows if row[2] > 0]


def describe(most: list[torch.Tensor], pairs: list[torch.Tensor], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """A record a layer: `tokens`, of each expert [token, count], most first; `coselected` [expert, expert, tokens].

    Args:
        most: of each layer, as `ServedTokens.most` gives it.
        pairs: of each layer (E, E), how many tokens chose both experts.
        tokenizer: names the tokens.
    """
    names = {token: readable(tokenizer, token) for most_EM2 in most for token in most_EM2[..., 0].unique().tolist()}
    return [
        {
            "tokens": [[[names[token], count] for token, count in row if count] for row in most_EM2.tolist()],
            "coselected": most_coselected(pairs_EE),
        }
        for most_EM2, pairs_EE in zip(most, pairs, strict=True)
    ]
