"""The key store's update against the per-token rule of the specification."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from modeling.some import KeyRules, KeyStatistics, KeyStore, update_key_stores
from modeling.some.keys import key_store_hashes
from tests.distributed import run_ranks
from tests.oracles.keys import update_keys_per_token, update_usage_mass_per_token

E, D, T = 12, 8, 60
RULES = KeyRules.preset("v4", alpha=0.3, beta=0.05, delta=0.2, theta_percentile=0.4, warmup_steps=2, ema_decay=0.7)


def batch(step: int, top_k: int, experts: int = E - 2):
    """Unit queries and distinct experts a token; the last two experts are never chosen, and use is uneven."""
    generator = torch.Generator().manual_seed(step)
    queries_TD = F.normalize(torch.randn(T, D, generator=generator), dim=-1)
    popularity = torch.arange(1, experts + 1, dtype=torch.float32).expand(T, -1)
    expert_ids_TK = torch.multinomial(popularity, top_k, generator=generator)
    gates_TK = torch.softmax(torch.randn(T, top_k, generator=generator), -1)
    mask_T = torch.rand(T, generator=generator) < 0.7
    return queries_TD, expert_ids_TK, gates_TK, mask_T


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("off", [None, "use_alpha", "use_beta", "use_delta"])
def test_update_equals_the_rule_token_by_token(top_k, masked, off):
    rules = dataclasses.replace(RULES, **({off: False} if off else {}))
    store = KeyStore(E, D, top_k, rules, seed=1)
    keys, usage, mass, steps = store.keys.double(), store.usage.double(), store.usage_mass.double(), 0
    values = dataclasses.asdict(rules)
    for step in range(6):
        queries_TD, expert_ids_TK, gates_TK, mask_T = batch(step, top_k)
        mask_T = mask_T if masked else None
        store.update(queries_TD, expert_ids_TK, gates_TK, mask_T)
        mass = update_usage_mass_per_token(mass, expert_ids_TK, gates_TK, mask_T, ema_decay=rules.ema_decay)
        keys, usage, steps = update_keys_per_token(keys, usage, steps, queries_TD, expert_ids_TK, mask_T, **values)
        torch.testing.assert_close(store.keys.double(), keys, atol=2e-6, rtol=0)
        torch.testing.assert_close(store.usage.double(), usage, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(store.usage_mass.double(), mass, atol=1e-5, rtol=1e-5)
        assert store.steps == steps
    decayed = (store.keys.norm(dim=-1) < 0.99).any()
    assert decayed == rules.use_delta, "the data must make the decay happen, or it is not tested"


def test_statistics_add_up():
    queries_TD, expert_ids_TK, gates_TK, _ = batch(0, 3)
    whole = KeyStatistics.of(E, queries_TD, expert_ids_TK, gates_TK)
    parts = [KeyStatistics.of(E, queries_TD[s], expert_ids_TK[s], gates_TK[s]) for s in (slice(0, 17), slice(17, T))]
    total = parts[0].add_(parts[1])
    assert torch.equal(total.counts_EK, whole.counts_EK) and torch.equal(total.pairs_EE, whole.pairs_EE)
    torch.testing.assert_close(total.query_sums_KED, whole.query_sums_KED)
    torch.testing.assert_close(total.gate_mass_E, whole.gate_mass_E)
    assert torch.equal(whole.pairs_EE, whole.pairs_EE.T) and not whole.pairs_EE.diagonal().any()


def test_no_tokens_still_counts_as_an_update():
    store = KeyStore(E, D, 2, RULES)
    before = store.keys.clone()
    store.update(torch.zeros(0, D), torch.zeros(0, 2, dtype=torch.int64))
    assert store.steps == 1
    torch.testing.assert_close(store.keys, before)


def test_keys_stay_fp32_when_the_model_is_cast():
    store = KeyStore(E, D, 2, RULES, seed=3)
    keys = store.keys.clone()
    store.bfloat16()
    assert store.keys.dtype == torch.float32 and torch.equal(store.keys, keys)


def test_state_dict_carries_everything():
    store = KeyStore(E, D, 2, RULES, seed=3)
    store.update(*batch(0, 2)[:3])
    other = KeyStore(E, D, 2, RULES, seed=4)
    other.load_state_dict(store.state_dict())
    assert torch.equal(other.keys, store.keys) and torch.equal(other.usage, store.usage)
    assert other.steps == 1


def _sharded_updates(rank: int) -> tuple:
    """Two layers, five updates, tokens split unevenly (rank 0 has none in update 2)."""
    stores = [KeyStore(E, D, 3, RULES, seed=1, layer=layer) for layer in range(2)]
    for step in range(5):
        statistics = []
        for layer in range(2):
            queries_TD, expert_ids_TK, gates_TK, _ = batch(10 * layer + step, 3)
            cut = 0 if step == 2 else 20
            mine = slice(0, cut) if rank == 0 else slice(cut, T)
            statistics.append(KeyStatistics.of(E, queries_TD[mine], expert_ids_TK[mine], gates_TK[mine]))
        update_key_stores(stores, statistics, dist.group.WORLD)
    return [store.keys for store in stores], key_store_hashes(stores).tolist()


def test_ranks_agree_bitwise_and_with_one_rank():
    (keys_0, hashes_0), (keys_1, hashes_1) = run_ranks(_sharded_updates, 2)
    for a, b in zip(keys_0, keys_1, strict=True):
        assert torch.equal(a, b)
    assert hashes_0 == hashes_1
    for layer in range(2):
        store = KeyStore(E, D, 3, RULES, seed=1, layer=layer)
        for step in range(5):
            store.update(*batch(10 * layer + step, 3)[:3])
        torch.testing.assert_close(keys_0[layer], store.keys, atol=2e-6, rtol=0)


def test_hash_sees_a_single_bit():
    store = KeyStore(E, D, 2, RULES)
    before = key_store_hashes([store])
    store.keys[3, 4] = torch.nextafter(store.keys[3, 4], torch.tensor(2.0))
    assert before != key_store_hashes([store])
