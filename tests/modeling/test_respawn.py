"""Respawn: the right experts at the right update, on tokens that no layout of ranks and micro batches changes."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from modeling.some import KeyRules, KeyStatistics, KeyStore, KeyStoreUpdate, update_key_stores
from modeling.some.keys import key_store_hashes
from tests.distributed import run_ranks
from tests.modeling.test_keys import RESPAWNING, D, E, T, batch, loud
from tests.oracles.keys import choose_tokens, splitmix64

UPDATES = 6
LAYERS = 2

# Which tokens each rank holds: uneven, and one rank without any.
SHARES = {1: [(0, T)], 2: [(0, 13), (13, T)], 4: [(0, 25), (25, 25), (25, 53), (53, T)]}


# ---------------------------------------------------------------- when


def clustered_batch(used: int, experts: int, generator: torch.Generator):
    """Each of `used` experts is first choice for queries around its own axis (unevenly many), and second for another's."""
    first_T = torch.arange(used).repeat_interleave(torch.arange(2, 2 + used))
    queries_TD = torch.eye(experts)[first_T] + 0.1 * torch.randn(len(first_T), experts, generator=generator)
    return F.normalize(queries_TD, dim=-1), torch.stack([first_T, (first_T + 1) % used], dim=1)


# Fast attraction keeps a used key long against the fast decay of the least used expert.
SMALL = dict(alpha=0.5, delta=0.2, warmup_steps=3, respawn_threshold=0.5)
CASES = [
    pytest.param(version, numbers, id=f"{version}-{'small' if numbers else 'preset'}")
    for version, numbers in [
        ("v7", {}),
        ("v7", SMALL),
        ("v6", SMALL),
        ("v3.5", SMALL),
        ("corrected", {}),
        ("corrected", SMALL),
    ]
]


def predicted_respawn(rules: KeyRules) -> int:
    """The update after the warm-up in which (1 - delta)^k first falls below the threshold."""
    return rules.warmup_steps + math.floor(math.log(rules.respawn_threshold) / math.log(1 - rules.delta)) + 1


def test_predicted_updates():
    assert predicted_respawn(KeyRules.preset("v7")) == 200 + 460  # specs 3.11
    assert predicted_respawn(KeyRules.preset("v6")) == 200 + 2302  # specs 3.11
    assert predicted_respawn(KeyRules.preset("v7", **SMALL)) == 3 + 4  # .8^3 = .512, .8^4 = .41


@pytest.mark.parametrize("version, numbers", CASES)
def test_a_never_selected_expert_respawns_at_the_predicted_update(version, numbers):
    experts, rules = 4, KeyRules.preset(version, **numbers)
    predicted = predicted_respawn(rules)
    store = KeyStore(experts, experts, 2, rules, seed=5)
    generator = torch.Generator().manual_seed(0)
    start_D = store.keys[-1].clone()
    for update in range(1, predicted + 1):
        queries_TD, expert_ids_TK = clustered_batch(experts - 1, experts, generator)
        store.update(queries_TD, expert_ids_TK)
        assert store.respawns.item() == (update == predicted), update
        direction_D = F.normalize(store.keys[-1], dim=-1)
        if update < predicted:
            torch.testing.assert_close(direction_D, start_D)
            shrunk = (1 - rules.delta) ** max(0, update - rules.warmup_steps)
            measure = store.health[-1] if version == "corrected" else store.keys[-1].norm()
            assert measure.item() == pytest.approx(shrunk, rel=1e-3)
    similarity_T = queries_TD @ store.keys[-1]
    assert similarity_T.max() > 0.99 and store.keys[-1].norm().item() == pytest.approx(1), "it sits on a token"
    fair = (1 - rules.ema_decay**predicted) / experts if version == "corrected" else 0.0
    assert store.usage[-1].item() == pytest.approx(fair) and store.usage_mass[-1] == 0 and store.health[-1] == 1


@pytest.mark.parametrize("version, numbers", CASES)
def test_a_used_expert_never_respawns(version, numbers):
    rules = KeyRules.preset(version, **numbers)
    store = KeyStore(4, 4, 2, rules, seed=5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2 * predicted_respawn(rules)):
        store.update(*clustered_batch(4, 4, generator))
    assert store.respawns.item() == 0


def test_corrected_gives_a_respawned_expert_time_to_be_chosen():
    """It starts from the fair share, so it weakens only once its average has fallen below theta / E, then needs as long."""
    rho, theta, experts = 0.5, 0.05, 4
    rules = KeyRules.preset("corrected", **SMALL, ema_decay=rho, theta_percentile=theta)
    store = KeyStore(experts, experts, 2, rules, seed=5)
    first, decays = 7, 4
    # uhat after i idle updates is rho^i / E * (1 - rho^first) / (1 - rho^(first + i)).
    idle = next(i for i in range(1, 99) if rho**i * (1 - rho**first) / (1 - rho ** (first + i)) < theta)
    assert idle > 1
    respawned_at, generator = [], torch.Generator().manual_seed(0)
    for update in range(1, first + idle + decays):
        store.update(*clustered_batch(experts - 1, experts, generator))
        if store.respawns.item() > len(respawned_at):
            respawned_at.append(update)
    assert respawned_at == [first, first + idle - 1 + decays]


@pytest.mark.parametrize("version", RESPAWNING)
def test_warmup_and_use_delta_do_not_hold_respawn_back(version):
    """Specs 3.7: every step, not gated by warm-up or flags; whatever made the expert weak."""
    store = KeyStore(E, D, 2, KeyRules.preset(version, warmup_steps=1000, use_delta=False), seed=5)
    queries_TD, expert_ids_TK, gates_TK, _ = batch(0, 2)  # never chooses the last expert
    if version == "corrected":
        weak = expert_ids_TK[0, 0]  # its usage and mass are not 0 before it respawns
        store.health[weak] = 0.05
    else:
        weak = E - 1
        store.keys[weak] *= 0.05
    store.update(queries_TD, expert_ids_TK, gates_TK)
    assert (queries_TD @ store.keys[weak]).max() > 0.99 and store.keys[weak].norm().item() == pytest.approx(1)
    assert store.health[weak] == 1 and store.usage_mass[weak] == 0
    fair = (1 - store.rules.ema_decay) / E if version == "corrected" else 0.0
    assert store.usage[weak].item() == pytest.approx(fair) and store.respawns.item() >= 1


# ---------------------------------------------------------------- how many tokens it needs


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("version", RESPAWNING)
def test_more_dead_experts_than_tokens_wait(version, masked):
    """Eleven of twelve are dead from update 1 on; they move once there are eleven tokens, each to a token of its own."""
    rules = KeyRules.preset(version, delta=0.9, warmup_steps=0, respawn_threshold=0.5, use_delta=True)
    store, dead = KeyStore(E, D, 1, rules, seed=5), E - 1
    directions_ED = store.keys.clone()
    for tokens in (1, 0, dead - 1, dead):
        queries_TD = batch(tokens, 1)[0][: 2 * tokens if masked else tokens]
        mask_T = torch.arange(len(queries_TD)) % 2 == 1 if masked else None
        expert_ids_TK = torch.zeros(len(queries_TD), 1, dtype=torch.int64)
        store.update(queries_TD, expert_ids_TK, mask_T=mask_T)
        assert store.keys.isfinite().all()
        if tokens < dead:
            assert store.respawns.item() == 0
            torch.testing.assert_close(F.normalize(store.keys[1:], dim=-1), directions_ED[1:])
    assert store.respawns.item() == dead
    allowed_TD = queries_TD if mask_T is None else queries_TD[mask_T]
    nearest_n = (store.keys[1:] @ allowed_TD.T).argmax(1)
    assert sorted(nearest_n.tolist()) == list(range(dead))


# ---------------------------------------------------------------- which tokens


def test_splitmix64_is_the_published_one():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # first output of SplitMix64 with seed 0
    assert splitmix64(1234567) == 6457827717110365317  # and with seed 1234567


@pytest.mark.parametrize("ids", ["places", "large"])
def test_tokens_are_chosen_by_their_ids(ids):
    """The ids decide, not the order in which the tokens stand."""
    queries_TD, expert_ids_TK, _, mask_T = batch(0, 2)
    token_ids_T = torch.arange(T) if ids == "places" else (torch.arange(T) * 2654435761 * 2**20 - 2**62)
    stores = [KeyStore(E, D, 2, KeyRules.preset("v7"), seed=5, layer=3) for _ in range(2)]
    order_T = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    for store, order in zip(stores, (torch.arange(T), order_T), strict=True):
        store.keys[-2:] *= 0.05
        store.update(queries_TD[order], expert_ids_TK[order], mask_T=mask_T[order], token_ids_T=token_ids_T[order])
        assert store.respawns.item() == 2
    assert torch.equal(stores[0].keys[-2:], stores[1].keys[-2:])
    expected = choose_tokens(mask_T.nonzero().flatten().tolist(), token_ids_T.tolist(), seed=5, layer=3, step=1)[:2]
    assert (stores[0].keys[-2:] @ queries_TD.T).argmax(1).tolist() == expected


def test_the_draw_changes_with_seed_layer_and_step():
    chosen = {
        tuple(choose_tokens(list(range(T)), list(range(T)), seed, layer, step)[:3])
        for seed, layer, step in [(5, 3, 1), (6, 3, 1), (5, 4, 1), (5, 3, 2)]
    }
    assert len(chosen) == 4


def test_candidates_exist_only_where_the_rule_respawns():
    queries_TD, _, _, mask_T = batch(0, 2)
    assert KeyStore(E, D, 2, KeyRules.preset("v4")).candidates(queries_TD, torch.arange(T), mask_T) is None
    assert KeyStore(E, D, 2, KeyRules.preset("v7")).candidates(queries_TD, torch.arange(T), mask_T) is not None


# ---------------------------------------------------------------- ranks and micro batches


def _updates(rank: int, world: int, version: str, in_parts: bool) -> tuple[torch.Tensor, ...]:
    """Keys (updates, layers, E, D), the other buffers (updates, layers, 3 E + 1) and hashes after every update."""
    group = dist.group.WORLD if dist.is_initialized() else None
    stores = [KeyStore(E, D, 3, loud(version), seed=1, layer=layer) for layer in range(LAYERS)]
    keys, others, hashes = [], [], []
    for step in range(UPDATES):
        update = _update_in_parts if in_parts else _update_at_once
        update(stores, step, SHARES[world][rank], group)
        keys.append(torch.stack([s.keys for s in stores]))
        rest = [torch.cat([s.usage, s.usage_mass, s.health, s.respawns.float().view(1)]) for s in stores]
        others.append(torch.stack(rest))
        hashes.append(key_store_hashes(stores))
    return torch.stack(keys), torch.stack(others), torch.stack(hashes)


def _update_at_once(stores: list[KeyStore], step: int, share: tuple[int, int], group: dist.ProcessGroup | None) -> None:
    """Ids unsaid: they continue from rank to rank."""
    for layer, store in enumerate(stores):
        store.update(*(tensor[slice(*share)] for tensor in batch(10 * layer + step, 3)), group=group)


def _update_in_parts(stores: list[KeyStore], step: int, share: tuple[int, int], group: dist.ProcessGroup | None) -> None:
    """Three micro batches a rank, the second one empty, and the later tokens first."""
    start, end = share
    middle = start + (end - start) // 3
    totals = []
    for layer, store in enumerate(stores):
        tensors, total = batch(10 * layer + step, 3), None
        for part in (slice(middle, end), slice(middle, middle), slice(start, middle)):
            queries_TD, expert_ids_TK, gates_TK, mask_T = (tensor[part] for tensor in tensors)
            candidates = store.candidates(queries_TD, torch.arange(T)[part], mask_T)
            statistics = KeyStatistics.of(E, queries_TD, expert_ids_TK, gates_TK, mask_T, candidates)
            total = statistics if total is None else total.add_(statistics)
        totals.append(total)
    update_key_stores(stores, totals, group)


def _all_versions(rank: int, world: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """Every version both ways, so that the ranks start only once."""
    return {
        f"{version} {'in parts' if in_parts else 'at once'}": _updates(rank, world, version, in_parts)
        for version in RESPAWNING
        for in_parts in (False, True)
    }


@pytest.mark.parametrize("world", [1, 2, 4])
def test_respawn_is_the_same_on_any_number_of_ranks(world):
    """Equal keys after a respawn are the same tokens chosen: two tokens are much further apart than the tolerance."""
    ranks = run_ranks(_all_versions, world, world)
    for version in RESPAWNING:
        keys, others, _ = _updates(0, 1, version, in_parts=False)
        respawns = others[:, :, -1]
        assert (respawns[-1] > 1).all() and (respawns.diff(dim=0) > 1).any(), "several at once, or their order is not tested"
        for way in ("at once", "in parts"):
            first_keys, first_others, first_hashes = ranks[0][f"{version} {way}"]
            for rank in ranks[1:]:
                other_keys, other_others, other_hashes = rank[f"{version} {way}"]
                assert torch.equal(other_keys, first_keys) and torch.equal(other_others, first_others)
                assert torch.equal(other_hashes, first_hashes)
            torch.testing.assert_close(first_keys, keys, atol=2e-6, rtol=0)
            torch.testing.assert_close(first_others, others, atol=2e-6, rtol=2e-6)
            assert torch.equal(first_others[:, :, -1], respawns)


def test_a_respawned_key_does_not_depend_on_the_layout_at_all():
    """No sums go into it, so not even the last bit differs between one batch and three parts."""
    whole, parts = (KeyStore(E, D, 3, KeyRules.preset("v7"), seed=1) for _ in range(2))
    for store in (whole, parts):
        store.keys[-2:] *= 0.05
    _update_at_once([whole], 0, (0, T), None)
    _update_in_parts([parts], 0, (0, T), None)
    assert whole.respawns.item() == parts.respawns.item() == 2
    assert torch.equal(whole.keys[-2:], parts.keys[-2:])


def test_adding_parts_keeps_no_more_candidates_than_experts():
    """However many micro batches there are, memory stays that of one."""
    store = KeyStore(E, D, 3, KeyRules.preset("v7"))
    total = None
    for step in range(4):
        queries_TD, expert_ids_TK, gates_TK, _ = batch(step, 3)
        candidates = store.candidates(queries_TD, torch.arange(T) + step * T)
        statistics = KeyStatistics.of(E, queries_TD, expert_ids_TK, gates_TK, None, candidates)
        total = statistics if total is None else total.add_(statistics)
    assert len(total.candidates.priorities_C) == len(total.candidates.queries_CD) == E
    expected = choose_tokens(list(range(4 * T)), list(range(4 * T)), seed=0, layer=0, step=1)[:E]
    all_queries_TD = torch.cat([batch(step, 3)[0] for step in range(4)])
    assert torch.equal(total.candidates.queries_CD, all_queries_TD[expected])


def _in_three_moves(rank: int) -> bool:
    """Updates of which every second is dropped, between other traffic and with late ranks; against updates in one go."""
    other_group = dist.new_group()
    waited, at_once = ([KeyStore(E, D, 3, loud("v7"), seed=1, layer=layer) for layer in range(LAYERS)] for _ in range(2))
    equal, traffic = [], torch.ones(64)
    for step in range(2 * UPDATES):
        totals = []
        for stores in (waited, at_once):
            total = []
            for layer, store in enumerate(stores):
                tensors = [tensor[slice(*SHARES[2][rank])] for tensor in batch(10 * layer + step, 3)]
                numbers_T = torch.arange(T)[slice(*SHARES[2][rank])]
                candidates = store.candidates(tensors[0], numbers_T, tensors[3])
                total.append(KeyStatistics.of(E, *tensors, candidates))
            totals.append(total)
        before = key_store_hashes(waited)
        update = KeyStoreUpdate(waited, totals[0], other_group)
        dist.all_reduce(traffic)
        if rank == step % 2:
            torch.randn(400, 400) @ torch.randn(400, 400)  # the other rank has to wait
        update.fold()
        dist.all_reduce(traffic)
        equal.append(torch.equal(key_store_hashes(waited), before))
        update.finish(apply=step % 2 == 0)
        if step % 2 == 0:
            update_key_stores(at_once, totals[1], dist.group.WORLD)
        for ours, theirs in zip(waited, at_once, strict=True):
            equal += [torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True)]
            equal.append(ours.steps == theirs.steps == step // 2 + 1)
    return all(equal) and bool((traffic == 2.0 ** (4 * UPDATES)).all()) and all(s.respawns > 0 for s in waited)


def test_an_update_in_three_moves_is_bitwise_one_in_one_go():
    assert run_ranks(_in_three_moves, 2) == [True, True]
