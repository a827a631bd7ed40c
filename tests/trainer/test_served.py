"""What experts serve, against counting one by one."""

from collections import Counter

import pytest
import torch

from modeling.some import Routing
from tests.distributed import run_ranks
from trainer.data.tokenizer import train_tokenizer
from trainer.runfolder import MOST_PAIRS
from trainer.served import MOST_TOKENS, ServedTokens, describe, most_coselected

E, K, V, LAYERS = 7, 3, 11, 2
SIZES = ((40, 5, 0, 60), (0, 0, 0, 0), (3, 200, 1, 30))
"""Tokens of each rank's batches: one rank has none at all, and sums of all sizes are merged."""


def batches(rank: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each batch the layers' choices (L, T, K), the tokens (T,) and which count; expert 5 is chosen by none and
    expert 4 by three at most, fewer than it may name, and many tokens are served as often as others."""
    generator, found = torch.Generator().manual_seed(rank), []
    weights_E = torch.tensor([5.0, 5, 3, 2, 0, 0, 1])
    for tokens in SIZES[rank]:
        ids_LTK = torch.multinomial(weights_E.expand(LAYERS * max(tokens, 1), -1), K, generator=generator)
        ids_LTK = ids_LTK.view(LAYERS, -1, K)[:, :tokens]
        if rank == 0:
            ids_LTK[:, 1:2, 0] = 4
        token_ids_T = torch.randint(V, (tokens,), generator=generator)
        found.append((ids_LTK, token_ids_T, torch.arange(tokens) % 4 > 0))
    return found


def _routing(ids_TK: torch.Tensor) -> Routing:
    rest_T = torch.zeros(len(ids_TK))
    return Routing(
        queries_TD=rest_T[:, None], expert_ids_TK=ids_TK, gates_TK=rest_T.expand(K, -1).T,
        output_squares_T=rest_T, residual_squares_T=rest_T,
    )  # fmt: skip


def _serve(rank: int, parts: list[list[int]]) -> list[list]:
    """The batches of these of the three ranks, whoever has them."""
    served = ServedTokens(LAYERS, E, V, torch.device("cpu"))
    for one in parts[rank]:
        for ids_LTK, token_ids_T, real_T in batches(one):
            served.add([_routing(ids_TK) for ids_TK in ids_LTK], token_ids_T, real_T)
    return [most_EM2.tolist() for most_EM2 in served.most()]


@pytest.mark.parametrize("parts", [[[0, 1, 2]], [[2, 1], [0]], [[0], [1], [2]]], ids=["1 rank", "2 ranks", "3 ranks"])
def test_the_most_served_tokens_are_those_of_counting_one_by_one(parts):
    of_ranks = run_ranks(_serve, len(parts), parts)
    assert all(found == of_ranks[0] for found in of_ranks)
    for layer, found in enumerate(of_ranks[0]):
        counters = [Counter() for _ in range(E)]
        for rank in range(3):
            for ids_LTK, token_ids_T, real_T in batches(rank):
                for ids_K, token in zip(ids_LTK[layer][real_T].tolist(), token_ids_T[real_T].tolist(), strict=True):
                    for expert in ids_K:
                        counters[expert][token] += 1
        for row, counter in zip(found, counters, strict=True):
            most = sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:MOST_TOKENS]
            assert [(token, count) for token, count in row if count] == most
        assert len(counters[5]) == 0 < len(counters[4]) < MOST_TOKENS < len(counters[0]), "the cases are there"


def test_pairs_are_named_most_first_and_so_many_at_most():
    generator = torch.Generator().manual_seed(0)
    half_EE = torch.randint(0, 9, (40, 40), generator=generator, dtype=torch.int32).triu(1)
    pairs = {(a, b): int(half_EE[a, b]) for a in range(40) for b in range(a + 1, 40)}
    most = sorted(((a, b, n) for (a, b), n in pairs.items() if n), key=lambda pair: (-pair[2], pair[:2]))
    assert len(most) > MOST_PAIRS
    assert most_coselected(half_EE + half_EE.T) == [list(pair) for pair in most[:MOST_PAIRS]]
    few_EE = torch.tensor([[0, 0, 2], [0, 0, 3], [2, 3, 0]])
    assert most_coselected(few_EE) == [[1, 2, 3], [0, 2, 2]], "none that nobody chose"


def test_tokens_are_named_so_that_they_can_be_told_apart():
    tokenizer = train_tokenizer(["a line\n and <b> another"], 258)
    ids = {text: tokenizer.encode(text).ids[0] for text in (" ", "\n", "a", "<")}
    most_EM2 = torch.tensor([[[ids[" "], 9], [ids["\n"], 4], [ids["a"], 4]], [[ids["<"], 1], [0, 0], [0, 0]], [[0, 0]] * 3])
    pairs_EE = torch.tensor([[0, 4, 0], [4, 0, 0], [0, 0, 0]])
    assert describe([most_EM2], [pairs_EE], tokenizer) == [
        {"tokens": [[["␣", 9], ["\\n", 4], ["a", 4]], [["<", 1]], []], "coselected": [[0, 1, 4]]}
    ]
