"""The key store: which token goes to which expert, learned by rule.

After an optimizer step every layer's keys move by sums over the step's tokens: counts per expert and slot, query sums and
co-selection counts. The sums are all-reduced, and then every rank applies the same update to bitwise equal keys. What an
update does is decided by the switches of `KeyRules`; it always runs in the order usage, attraction, peer pull, decay or
normalisation, respawn (specs 3.8).

Shapes: T tokens, D width, E experts, K slots (the k-th choice of a token).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from modeling.key_rules import KeyRules
from modeling.seeding import derive_generator
from modeling.some.respawn import Candidates, respawned_keys
from modeling.some.statistics import KeyStatistics


class KeyStore(nn.Module):
    """Keys and usage of one layer. Persistent buffers, equal on every rank, fp32 whatever the model's dtype.

    Attributes:
        keys: (E, D) fp32; rows start as random unit vectors.
        usage: (E,) fp32, what `KeyRules.usage` says of the tokens that an expert gets.
        usage_mass: (E,) fp32 the same of gate weight, unnormalised; for metrics.
        health: (E,) fp32 in (0, 1]; moves with `decay = health` only.
        respawns: () int64, keys put on a token since the start.
        steps: int, updates applied.
        moved: () fp32, mean distance that a key went in the last update, respawns apart; no buffer, since it is only told.
    """

    def __init__(self, num_experts: int, d_model: int, top_k: int, rules: KeyRules, seed: int = 0, layer: int = 0):
        super().__init__()
        self.top_k, self.rules, self.seed, self.layer, self.steps = top_k, rules, seed, layer, 0
        keys = torch.randn(num_experts, d_model, generator=derive_generator(seed, "keys", layer))
        self.register_buffer("keys", F.normalize(keys, dim=-1))
        self.register_buffer("usage", torch.zeros(num_experts))
        self.register_buffer("usage_mass", torch.zeros(num_experts))
        self.register_buffer("health", torch.ones(num_experts))
        self.register_buffer("respawns", torch.zeros((), dtype=torch.int64))
        self.moved = torch.zeros(())

    def _apply(self, fn, recurse=True):
        """Follow a move to another device but not a change of dtype: routing and keys are fp32."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            setattr(self, name, buffer.to(fn(buffer).device))
        return self

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, state: int) -> None:
        self.steps = int(state)

    @torch.no_grad()
    def update(
        self,
        queries_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        gates_TK: torch.Tensor | None = None,
        mask_T: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        group: dist.ProcessGroup | None = None,
        token_ids_T: torch.Tensor | None = None,
    ) -> None:
        """One update from one batch of tokens.

        Args:
            queries_TD: fp32 queries.
            expert_ids_TK: int64 chosen experts, best first.
            gates_TK: fp32 gates, for `usage_mass`.
            mask_T: bool, the tokens that count; all when None.
            generator: seeds the draw of a respawn, equally on every rank; None = the store's seed, layer and step do.
            group: ranks over which the sums are all-reduced; None = this rank alone.
            token_ids_T: int64, distinct over all ranks; None = the tokens' places, rank after rank.
        """
        if token_ids_T is None:
            before = _tokens_before(len(queries_TD), queries_TD.device, group)
            token_ids_T = torch.arange(len(queries_TD), device=queries_TD.device) + before
        seed = None if generator is None else int(torch.randint(2**62, (), generator=generator))
        candidates = self.candidates(queries_TD, token_ids_T, mask_T, seed)
        statistics = KeyStatistics.of(len(self.keys), queries_TD, expert_ids_TK, gates_TK, mask_T, candidates)
        update_key_stores([self], [statistics], group)

    def candidates(
        self,
        queries_TD: torch.Tensor,
        token_ids_T: torch.Tensor,
        mask_T: torch.Tensor | None = None,
        seed: int | None = None,
    ) -> Candidates | None:
        """The tokens of this batch on which the next update may put dead keys; None where the rule never does."""
        if self.rules.respawn_threshold == 0:
            return None
        if mask_T is not None:
            queries_TD, token_ids_T = queries_TD[mask_T], token_ids_T[mask_T]
        seed = self.seed if seed is None else seed
        return Candidates.of(queries_TD, token_ids_T, len(self.keys), seed, self.layer, self.steps + 1)

    def usage_after(self, counts_EK: torch.Tensor) -> torch.Tensor:
        """(E,) what `usage` becomes with one more step's counts (specs 3.2)."""
        counts_E = counts_EK.sum(1)
        if self.rules.usage == "share":
            counts_E = counts_E / counts_E.sum().clamp(min=1)
        return self.averaged(self.usage, counts_E)

    def mass(self, counts_E: torch.Tensor, usage_E: torch.Tensor, steps: int) -> torch.Tensor:
        """(E,) what divides the moves of an expert in update number `steps`, given the usage that counts it already:
        1 + usage, or with shares max(n_e, K T uhat_e)."""
        if self.rules.usage == "share":
            return torch.maximum(counts_E.float(), counts_E.sum() * self.share(usage_E, steps))
        return 1 + usage_E

    def share(self, usage_E: torch.Tensor, steps: int) -> torch.Tensor:
        """(E,) the average share of all choices after `steps` updates, with the bias of the first ones taken out."""
        return usage_E / (1 - self.rules.ema_decay**steps)

    def attraction(self, counts_EK: torch.Tensor, usage_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the K sequential attraction steps of the next update do to a key, as one affine map (specs 3.3).

        With eta_k = alpha n_k / m, slot after slot: key <- (1 - eta_k) key + alpha / m * query_sum_k. Unrolled:
        key <- keep_E * key + sum_k weights_EK * query_sum_k. Where only winners attract, the first slot is all there is.

        Args:
            counts_EK: int, the step's counts.
            usage_E: fp32 usage after them.
        """
        rules, mass_E = self.rules, self.mass(counts_EK.sum(1), usage_E, self.steps + 1)
        step_E = _ratio(torch.full_like(usage_E, rules.alpha * rules.use_alpha), mass_E)
        keep_E = torch.ones_like(self.usage)
        weights_EK = torch.zeros(counts_EK.shape, device=keep_E.device)
        slots = self.top_k if rules.attract == "slots" else 1
        for slot in reversed(range(slots)):
            weights_EK[:, slot] = step_E * keep_E
            keep_E = keep_E * (1 - step_E * counts_EK[:, slot])
        return keep_E, weights_EK

    def move_keys(self, keep_E: torch.Tensor, pull_ED: torch.Tensor, pairs_EE: torch.Tensor, counts_E: torch.Tensor) -> None:
        """Attraction (`keep_E`, `pull_ED`), peer pull (`pairs_EE`), decay and normalisation."""
        rules = self.rules
        keys_ED = keep_E[:, None] * self.keys + pull_ED
        if rules.use_beta and self.top_k > 1:
            weights_EE = rules.beta * _ratio(pairs_EE.float(), self._peer_mass(counts_E))
            keys_ED = keys_ED + weights_EE @ keys_ED - weights_EE.sum(1, keepdim=True) * keys_ED
        if rules.decay == "before":
            keys_ED = self._decayed(keys_ED)
        keys_ED = self._normalised(keys_ED, counts_E)
        if rules.decay == "after":
            keys_ED = self._decayed(keys_ED)
        if rules.decay == "health" and self._decays_now:
            rare_E = self.share(self.usage, self.steps) < rules.theta_percentile / len(self.keys)
            self.health.copy_(torch.where(rare_E, (1 - rules.delta) * self.health, 1.0))
        self.moved = (keys_ED - self.keys).norm(dim=-1).mean()
        self.keys.copy_(keys_ED)

    def dead_experts(self) -> torch.Tensor:
        """(n,) int64, the experts to respawn."""
        measure_E = self.health if self.rules.decay == "health" else self.keys.norm(dim=-1)
        return (measure_E < self.rules.respawn_threshold).nonzero().flatten()

    def respawn(self, dead_n: torch.Tensor, candidates: Candidates) -> None:
        """Put each dead key on one of the candidate tokens (specs 3.7)."""
        self.keys[dead_n] = respawned_keys(candidates)
        self.usage[dead_n] = (1 - self.rules.ema_decay**self.steps) / len(self.keys) if self.rules.usage == "share" else 0.0
        self.usage_mass[dead_n] = 0.0
        self.health[dead_n] = 1.0
        self.respawns += len(dead_n)

    def averaged(self, average_E: torch.Tensor, new_E: torch.Tensor) -> torch.Tensor:
        """(E,) an average (or a total, where the rule keeps one) with one step's sums taken in."""
        if self.rules.usage == "total":
            return average_E + new_E
        return (self.rules.ema_decay * average_E).add_(new_E, alpha=1 - self.rules.ema_decay)

    def _peer_mass(self, counts_E: torch.Tensor) -> torch.Tensor:
        """(E, E): row i holds what divides the pull of every j on i."""
        mass_E = self.mass(counts_E, self.usage, self.steps)
        if self.rules.peer_mass == "own":
            return ((self.top_k - 1) * mass_E)[:, None].expand(-1, len(mass_E))
        choose = torch.minimum if self.rules.peer_mass == "min" else torch.maximum
        return choose(mass_E[:, None], mass_E)

    @property
    def _decays_now(self) -> bool:
        return self.rules.use_delta and self.steps > self.rules.warmup_steps

    def _decayed(self, keys_ED: torch.Tensor) -> torch.Tensor:
        """Keys of experts below the usage quantile, shortened (specs 3.6)."""
        used_u = self.usage[self.usage > 0]
        if not self._decays_now or not len(used_u):
            return keys_ED
        rare_E = self.usage < torch.quantile(used_u, self.rules.theta_percentile)
        return torch.where(rare_E[:, None], (1 - self.rules.delta) * keys_ED, keys_ED)

    def _normalised(self, keys_ED: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        if self.rules.normalise == "none":
            return keys_ED
        unit_ED = F.normalize(keys_ED, dim=-1)
        if self.rules.normalise == "all":
            return unit_ED
        chosen_E = counts_E > 0 if self.rules.normalise == "used" else keys_ED.norm(dim=-1) > 1
        return torch.where(chosen_E[:, None], unit_ED, keys_ED)


class KeyStoreUpdate:
    """One update of every layer's key store from its statistics, summed over the ranks of `group` (None = this rank).

    It comes in three moves, so that the sums can travel while the caller does something else: making it sends the counts,
    `fold` waits for them and sends the rest, `finish` waits for that and moves the keys, if at all. Until then the stores
    are as they were. All ranks make the same moves in the same order among the collectives of `group`.

    Two collectives for all layers together: integer counts first; with the global counts known, the K attraction slots
    fold into one (E, D) sum a layer, which is the second. A layer with dead keys gathers candidates in two more.
    """

    @torch.no_grad()
    def __init__(
        self,
        stores: Sequence[KeyStore],
        statistics: Sequence[KeyStatistics],
        group: dist.ProcessGroup | None = None,
    ):
        for store, stats in zip(stores, statistics, strict=True):
            assert store.rules.respawn_threshold == 0 or stats.candidates is not None, (
                "a rule that respawns needs candidates"
            )
        self.layers, self.group = list(zip(stores, statistics, strict=True)), group
        self._counts = _Reduction([*(s.counts_EK for s in statistics), *(s.pairs_EE for s in statistics)], group)

    @torch.no_grad()
    def fold(self) -> None:
        """Make one sum of the query sums of all slots."""
        self._counts.wait()
        self._usages = [store.usage_after(stats.counts_EK) for store, stats in self.layers]
        self._keeps, self._pulls = [], []
        for (store, stats), usage_E in zip(self.layers, self._usages, strict=True):
            keep_E, weights_EK = store.attraction(stats.counts_EK, usage_E)
            self._keeps.append(keep_E)
            self._pulls.append(torch.einsum("ek,ked->ed", weights_EK, stats.query_sums_KED))
        self._sums = _Reduction([*self._pulls, *(stats.gate_mass_E for _, stats in self.layers)], self.group)

    @torch.no_grad()
    def finish(self, apply: bool = True) -> None:
        """Move the keys; with `apply` False (the step was skipped) only wait for what is on its way."""
        self._sums.wait()
        if not apply:
            return
        for (store, stats), usage_E, keep_E, pull_ED in zip(
            self.layers, self._usages, self._keeps, self._pulls, strict=True
        ):
            counts_E = stats.counts_EK.sum(1)
            store.steps += 1
            store.usage.copy_(usage_E)
            store.usage_mass.copy_(store.averaged(store.usage_mass, stats.gate_mass_E))
            store.move_keys(keep_E, pull_ED, stats.pairs_EE, counts_E)
            if store.rules.respawn_threshold > 0:
                dead_n = store.dead_experts()
                # With fewer tokens than dead keys nothing is drawn (specs 3.9).
                if 0 < len(dead_n) * store.top_k <= int(counts_E.sum()):
                    store.respawn(dead_n, stats.candidates.gather(len(dead_n), self.group))


def update_key_stores(
    stores: Sequence[KeyStore], statistics: Sequence[KeyStatistics], group: dist.ProcessGroup | None = None
) -> None:
    """A `KeyStoreUpdate` in one go."""
    update = KeyStoreUpdate(stores, statistics, group)
    update.fold()
    update.finish()


def _ratio(numerator: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """numerator / mass; 0 where there is no mass, since nothing moves there."""
    return torch.where(mass > 0, numerator / mass, 0.0)


def _tokens_before(tokens: int, device: torch.device, group: dist.ProcessGroup | None) -> int:
    """How many tokens the ranks before this one hold."""
    if group is None:
        return 0
    mine = torch.tensor([tokens], device=device)
    counts = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, mine, group=group)
    return sum(int(count) for count in counts[: dist.get_rank(group)])


class _Reduction:
    """Equal-dtype tensors on their way to their sums over the ranks, in place and in one collective."""

    def __init__(self, tensors: list[torch.Tensor], group: dist.ProcessGroup | None):
        self._tensors, self._work = tensors, None
        if tensors and group is not None and dist.get_world_size(group) > 1:
            self._flat = torch.cat([t.flatten() for t in tensors])
            self._work = dist.all_reduce(self._flat, group=group, async_op=True)

    def wait(self) -> None:
        """Until the tensors hold the sums."""
        if self._work is None:
            return
        self._work.wait()
        for tensor, part in zip(self._tensors, self._flat.split([t.numel() for t in self._tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
        self._flat = None


def key_store_hashes(stores: Sequence[KeyStore]) -> torch.Tensor:
    """(L,) int64, one hash per layer of the exact bytes of keys and usage; cheap enough to compare often."""
    hashes = []
    for store in stores:
        bits = torch.cat([store.keys.flatten(), store.usage, store.health]).view(torch.int32).to(torch.int64)
        weights = torch.arange(1, len(bits) + 1, device=bits.device) * 2654435761
        hashes.append((bits * weights).sum())
    return torch.stack(hashes)
