"""Which tokens dead keys are put on: the same ones on every rank and at any world size.

Every token of a step has a number that no layout changes (its sequence and position). Hashed with the seed, layer and
step it becomes the token's priority, and the n tokens of smallest priority are a uniform random draw of n tokens. Each
rank keeps only its own smallest; the smallest of all are among them.

Shapes: T tokens, D width, C candidates kept.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from modeling.seeding import derive_generator, derive_seed

NOISE = 0.01
NO_PRIORITY = torch.iinfo(torch.int64).max


@dataclass
class Candidates:
    """The tokens of smallest priority seen so far: `priorities_C` int64 ascending, `queries_CD` fp32, and the draw's
    `(seed, layer, step)`."""

    priorities_C: torch.Tensor
    queries_CD: torch.Tensor
    draw: tuple[int, int, int]

    @staticmethod
    def of(
        queries_TD: torch.Tensor, token_ids_T: torch.Tensor, limit: int, seed: int, layer: int, step: int
    ) -> "Candidates":
        """The at most `limit` tokens of smallest priority.

        Args:
            queries_TD: fp32 queries.
            token_ids_T: int64, distinct over the whole step.
            limit: most tokens that may be needed.
            seed: with layer and step it decides the draw.
            layer: index of the layer.
            step: the update that is being prepared, from 1.
        """
        priorities_T = token_priorities(token_ids_T, derive_seed(seed, "respawn", layer, step))
        kept_C = priorities_T.argsort()[:limit]
        return Candidates(priorities_T[kept_C], queries_TD[kept_C].float(), (seed, layer, step))

    def merge(self, other: "Candidates", limit: int) -> "Candidates":
        """The at most `limit` smallest of both."""
        priorities = torch.cat([self.priorities_C, other.priorities_C])
        queries = torch.cat([self.queries_CD, other.queries_CD])
        kept = priorities.argsort()[:limit]
        return Candidates(priorities[kept], queries[kept], self.draw)

    def gather(self, count: int, group: dist.ProcessGroup | None) -> "Candidates":
        """The at most `count` smallest over all ranks of `group`; a collective."""
        if group is None:
            return Candidates(self.priorities_C[:count], self.queries_CD[:count], self.draw)
        D = self.queries_CD.shape[1]
        priorities = self.priorities_C.new_full((count,), NO_PRIORITY)
        queries = self.queries_CD.new_zeros(count, D)
        mine = min(count, len(self.priorities_C))
        priorities[:mine], queries[:mine] = self.priorities_C[:mine], self.queries_CD[:mine]
        world = dist.get_world_size(group)
        all_priorities = [torch.empty_like(priorities) for _ in range(world)]
        all_queries = [torch.empty_like(queries) for _ in range(world)]
        dist.all_gather(all_priorities, priorities, group=group)
        dist.all_gather(all_queries, queries, group=group)
        priorities, queries = torch.cat(all_priorities), torch.cat(all_queries)
        kept = priorities.argsort()[:count]
        kept = kept[priorities[kept] != NO_PRIORITY]
        return Candidates(priorities[kept], queries[kept], self.draw)


def token_priorities(token_ids_T: torch.Tensor, draw: int) -> torch.Tensor:
    """(T,) int64: a splitmix64 hash of each id, a bijection, so that distinct tokens never tie."""
    x = (token_ids_T ^ draw) + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number; torch's int64 arithmetic wraps around."""
    return value - 2**64 if value >= 2**63 else value


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def respawned_keys(candidates: Candidates) -> torch.Tensor:
    """(C, D) fp32 unit keys beside the candidates' queries: a little noise keeps keys on equal tokens apart (specs 3.7)."""
    queries_CD = candidates.queries_CD
    noise_CD = torch.randn(
        queries_CD.shape, generator=derive_generator(candidates.draw[0], "respawn_noise", *candidates.draw[1:])
    )
    return F.normalize(queries_CD + NOISE * noise_CD.to(queries_CD.device), dim=-1)
