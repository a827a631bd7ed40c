"""The key store's update, in every rule version, against the specification's rule token by token."""

import dataclasses
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from modeling.some import KeyRules, KeyStatistics, KeyStore
from modeling.some.keys import key_store_hashes
from tests.oracles.keys import VERSIONS, Numbers, State, update_keys_per_token

E, D, T = 12, 8, 60
NEVER_CHOSEN = (E - 2, E - 1)
EMPTY_STEP = 3
UPDATES = 8

# Large enough for every branch within eight updates: two decays make a key or a health of 1 fall below the threshold.
# alpha / (1 - rho) = 3 is the published overshoot, which makes keys longer than 1.
# theta: no quantile of up to 12 values falls on a value, which fp32 and float64 could put on different sides.
NUMBERS = dict(alpha=0.3, beta=0.05, delta=0.5, theta_percentile=0.37, warmup_steps=2, ema_decay=0.9)
THRESHOLD = 0.3

# From specs 3.8, respawn threshold from 3.7; v1.1 has no moving average.
#              alpha   beta   delta  theta warm-up  rho  respawn
PUBLISHED = {
    "v1.1": (0.010, 0.001, 0.001, 0.05, 2000, None, 0.0),
    "v2.1": (0.015, 0.001, 0.001, 0.05, 400, 0.995, 0.0),
    "v2.2": (0.010, 0.001, 0.001, 0.05, 2000, 0.99, 0.0),
    "v3": (0.015, 0.001, 0.001, 0.05, 400, 0.995, 0.0),
    "v3.5": (0.015, 0.001, 0.001, 0.05, 400, 0.995, 0.1),
    "v4": (0.010, 0.005, 0.001, 0.05, 400, 0.99, 0.0),
    "v5": (0.005, 0.001, 0.001, 0.05, 400, 0.995, 0.0),
    "v6": (0.015, 0.001, 0.001, 0.05, 200, 0.995, 0.1),
    "v7": (0.015, 0.001, 0.005, 0.05, 200, 0.995, 0.1),
    "cmp": (0.015, 0.001, 0.001, 0.05, 400, 0.995, 0.0),
}
RESPAWNING = ("v3.5", "v6", "v7", "corrected")

# What must have happened at least once in every run of a version, or the run shows nothing about it.
COMMON = {"attracted", "unused", "decayed", "decayed, never used"}
BRANCHES = {version: COMMON | ({"respawned"} if version in RESPAWNING else set()) for version in VERSIONS}
BRANCHES["v6"] |= {"left short"}
BRANCHES["v7"] |= {"cut", "left short"}
BRANCHES["corrected"] |= {"recovered"}


def batch(step: int, top_k: int):
    """Unit queries, distinct experts a token, gates and a mask that is empty in one step.

    The queries lean to one side, or the keys, as means of queries, would all be short. Two experts are never chosen; the
    use of the others is uneven and changes, so that some are idle in some steps and one is nearly always first.
    """
    generator = torch.Generator().manual_seed(step)
    queries_TD = F.normalize(torch.randn(T, D, generator=generator) + torch.eye(D)[0] * 3, dim=-1)
    popularity = torch.arange(1.0, E - 1).pow(3).roll(2 * step).expand(T, -1)
    expert_ids_TK = torch.multinomial(popularity, top_k, generator=generator).sort(descending=True).values
    gates_TK = torch.softmax(torch.randn(T, top_k, generator=generator), -1)
    mask_T = (torch.rand(T, generator=generator) < 0.7) & (step != EMPTY_STEP)
    return queries_TD, expert_ids_TK, gates_TK, mask_T


def loud(version: str, **overrides) -> KeyRules:
    """The preset's switches with numbers under which everything happens soon."""
    threshold = THRESHOLD if version in RESPAWNING else 0.0
    flags = dict(use_alpha=True, use_beta=True, use_delta=True)
    return KeyRules.preset(version, **{**NUMBERS, "respawn_threshold": threshold, **flags, **overrides})


def numbers_of(rules: KeyRules) -> dict:
    """What the oracle is told: numbers and flags, none of the switches."""
    return {number.name: getattr(rules, number.name) for number in dataclasses.fields(Numbers)}


def assert_equal(store: KeyStore, state: State) -> None:
    torch.testing.assert_close(store.keys.double(), state.keys_ED, atol=2e-6, rtol=2e-6)
    for name in ("usage", "usage_mass", "health"):
        expected_E = torch.tensor(getattr(state, f"{name}_E"), dtype=torch.float64)
        torch.testing.assert_close(
            getattr(store, name).double(), expected_E, atol=1e-6, rtol=2e-6, msg=lambda m, n=name: n + m
        )
    assert store.steps == state.step and store.respawns.item() == state.respawns


def follow(version: str, top_k: int, masked: bool, **overrides) -> Counter:
    """The store and the oracle side by side through all updates, compared after each; what happened in them."""
    rules = loud(version, **overrides)
    store = KeyStore(E, D, top_k, rules, seed=1, layer=2)
    state = State.start(store.keys)
    for step in range(UPDATES):
        queries_TD, expert_ids_TK, gates_TK, mask_T = batch(step, top_k)
        if version == "v1.1":
            queries_TD = queries_TD * torch.linspace(0.5, 2, T)[:, None]  # raw queries have any length
        mask_T = mask_T if masked else None
        state = update_keys_per_token(
            version, state, queries_TD, expert_ids_TK, gates_TK, mask_T, seed=1, layer=2, **numbers_of(rules)
        )
        store.update(queries_TD, expert_ids_TK, gates_TK, mask_T)
        assert_equal(store, state)
    return state.happened


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("version", VERSIONS)
def test_update_equals_the_rule_token_by_token(version, top_k, masked):
    happened = follow(version, top_k, masked)
    expected = BRANCHES[version] | ({"pulled"} if top_k > 1 else set())
    if masked and version in RESPAWNING:
        expected |= {"too few tokens"}
    missing = {branch for branch in expected if not happened[branch]}
    assert not missing, "the data must make it happen, or it is not tested"


@pytest.mark.parametrize("off, branches", [("alpha", {"attracted"}), ("beta", {"pulled"}), ("delta", {"decayed"})])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("version", ["v4", "v7", "corrected"])
def test_each_part_can_be_switched_off(version, top_k, off, branches):
    happened = follow(version, top_k, masked=True, **{f"use_{off}": False})
    assert not any(happened[branch] for branch in branches)


def test_health_decides_nothing_when_its_decay_is_off():
    assert not follow("corrected", 2, masked=False, use_delta=False)["respawned"]


def test_v7_cuts_a_key_before_it_decays():
    """A long key of an unused expert: 3 is cut to 1 and then halved; the other order would leave 1."""
    store = KeyStore(E, D, 2, loud("v7", warmup_steps=0))
    store.keys[-1] *= 3
    store.update(*batch(0, 2))
    assert store.keys[-1].norm().item() == pytest.approx(1 - NUMBERS["delta"])


def test_corrected_compares_the_unbiased_share_with_a_part_of_the_fair_share():
    """theta / E = .125: of 100 tokens, 12 are too few and 13 are enough, from the first update on."""
    rules = loud("corrected", theta_percentile=0.5, warmup_steps=0, delta=0.1)
    store = KeyStore(4, D, 1, rules)
    expert_ids_TK = torch.arange(3).repeat_interleave(torch.tensor([12, 13, 75]))[:, None]
    for update in range(1, 5):
        store.update(torch.zeros(100, D), expert_ids_TK)
        weak = 0.9**update
        torch.testing.assert_close(store.health, torch.tensor([weak, 1.0, 1.0, weak]))


@pytest.mark.parametrize("version", PUBLISHED)
def test_presets_carry_the_published_numbers(version):
    rules = KeyRules.preset(version)
    alpha, beta, delta, theta, warmup_steps, rho, respawn = PUBLISHED[version]
    assert (rules.alpha, rules.beta, rules.delta) == (alpha, beta, delta)
    assert (rules.theta_percentile, rules.warmup_steps, rules.respawn_threshold) == (theta, warmup_steps, respawn)
    assert rho is None or rules.ema_decay == rho
    assert rules.use_alpha and rules.use_beta and rules.use_delta
    assert rules.token_mask == ("targets" if version in ("v5", "v6", "v7") else "all")


def test_every_preset_has_an_oracle():
    for version in VERSIONS:
        KeyRules.preset(version)
    with pytest.raises(ValueError, match="v99"):
        KeyRules.preset("v99")


def test_fixed_keys_never_move():
    store = KeyStore(E, D, 2, KeyRules.preset("fixed", warmup_steps=0), seed=1)
    before_ED = store.keys.clone()
    for step in range(4):
        store.update(*batch(step, 2))
    torch.testing.assert_close(store.keys, before_ED)  # normalising a unit key may change its last bit


# ---------------------------------------------------------------- the corrected rule is bounded

SHARES = [  # slot-1 experts of one step's tokens; slot 2 is always the next expert
    [0, 0, 0, 1, 2, 2],  # the first step, where the published rules overshoot
    [3] * 50,  # long idle, then everything at once
    [0],
    [],
    [0, 1, 2, 3] * 10,
    [3, 2, 2],
]


def test_corrected_attraction_steps_by_at_most_alpha():
    """Keys on the axes and all queries on a spare axis: the key's part on that axis is the step."""
    alpha, experts = 0.3, 5
    rules = KeyRules.preset("corrected", alpha=alpha, use_alpha=True, use_beta=False, use_delta=False, normalise="none")
    store = KeyStore(experts, experts + 1, 2, rules)
    largest = 0.0
    for share in SHARES * 2:
        store.keys.copy_(torch.eye(experts, experts + 1))
        first_T = torch.tensor(share, dtype=torch.int64)
        queries_TD = torch.eye(experts + 1)[-1].expand(len(share), -1)
        store.update(queries_TD, torch.stack([first_T, (first_T + 1) % experts], dim=1))
        step_E = store.keys[:, -1]
        assert (step_E <= alpha * (1 + 1e-6)).all() and (step_E >= 0).all()
        assert (step_E[torch.bincount(first_T, minlength=experts) == 0] == 0).all(), "only winners attract"
        torch.testing.assert_close(1 - store.keys.diagonal(), step_E)
        largest = max(largest, step_E.max().item())
    assert largest == pytest.approx(alpha), "the bound is reached by an expert that wins as often as ever"


@pytest.mark.parametrize("top_k", [2, 3, 5])
def test_corrected_peer_pull_weighs_at_most_beta(top_k):
    """Keys on the axes: after the pull a key's parts on the other axes are the weights of its peers."""
    beta, experts = 0.3, 5
    rules = KeyRules.preset("corrected", beta=beta, use_alpha=False, use_beta=True, use_delta=False, normalise="none")
    store = KeyStore(experts, experts, top_k, rules)
    largest = 0.0
    for share in SHARES * 2:
        store.keys.copy_(torch.eye(experts))
        first_T = torch.tensor(share, dtype=torch.int64)
        expert_ids_TK = (first_T[:, None] + torch.arange(top_k)) % experts
        store.update(torch.zeros(len(share), experts), expert_ids_TK)
        weight_EE = store.keys - torch.diag(store.keys.diagonal())
        weight_E = weight_EE.sum(1)
        assert (weight_EE >= 0).all() and (weight_E <= beta * (1 + 1e-6)).all()
        torch.testing.assert_close(1 - store.keys.diagonal(), weight_E)
        largest = max(largest, weight_E.max().item())
    assert largest == pytest.approx(beta)


# ---------------------------------------------------------------- statistics and state


def test_statistics_add_up():
    queries_TD, expert_ids_TK, gates_TK, _ = batch(0, 3)
    whole = KeyStatistics.of(E, queries_TD, expert_ids_TK, gates_TK)
    parts = [KeyStatistics.of(E, queries_TD[s], expert_ids_TK[s], gates_TK[s]) for s in (slice(0, 17), slice(17, T))]
    total = parts[0].add_(parts[1])
    assert torch.equal(total.counts_EK, whole.counts_EK) and torch.equal(total.pairs_EE, whole.pairs_EE)
    torch.testing.assert_close(total.query_sums_KED, whole.query_sums_KED)
    torch.testing.assert_close(total.gate_mass_E, whole.gate_mass_E)
    assert torch.equal(whole.pairs_EE, whole.pairs_EE.T) and not whole.pairs_EE.diagonal().any()


@pytest.mark.parametrize("version", VERSIONS)
def test_no_tokens_still_counts_as_an_update(version):
    store = KeyStore(E, D, 2, KeyRules.preset(version))
    before_ED = store.keys.clone()
    store.update(torch.zeros(0, D), torch.zeros(0, 2, dtype=torch.int64))
    assert store.steps == 1 and store.respawns.item() == 0
    torch.testing.assert_close(store.keys, before_ED)
    assert torch.equal(store.usage, torch.zeros(E)) and torch.equal(store.health, torch.ones(E))


def test_buffers_keep_their_type_when_the_model_is_cast():
    store = KeyStore(E, D, 2, loud("corrected"), seed=3)
    keys_ED = store.keys.clone()
    store.bfloat16()
    assert store.keys.dtype == store.usage.dtype == store.usage_mass.dtype == store.health.dtype == torch.float32
    assert store.respawns.dtype == torch.int64 and torch.equal(store.keys, keys_ED)


@pytest.mark.parametrize("version", ["v4", "v7", "corrected"])
def test_state_dict_carries_everything(version):
    """A copy made between a decay and a respawn goes on like the original."""
    store, other = (KeyStore(E, D, 2, loud(version), seed=seed) for seed in (3, 4))
    for step in range(UPDATES):
        store.update(*batch(step, 2))
    assert version == "v4" or store.respawns.item() > 0
    other.load_state_dict(store.state_dict())
    other.seed = store.seed  # the draws' seed is the model's, not a part of its state
    for step in range(UPDATES, UPDATES + 4):
        assert other.steps == step
        for name in ("keys", "usage", "usage_mass", "health", "respawns"):
            assert torch.equal(getattr(other, name), getattr(store, name)), name
        store.update(*batch(step, 2))
        other.update(*batch(step, 2))


@pytest.mark.parametrize("name, index", [("keys", (3, 4)), ("usage", 3), ("health", 3)])
def test_hash_sees_a_single_bit(name, index):
    store = KeyStore(E, D, 2, loud("corrected"))
    store.update(*batch(0, 2))
    before = key_store_hashes([store])
    buffer = getattr(store, name)
    buffer[index] = torch.nextafter(buffer[index], torch.tensor(2.0))
    assert before != key_store_hashes([store])


def test_a_negative_beta_pushes_keys_apart_and_needs_its_bound():
    stores = {
        beta: KeyStore(E, D, 4, KeyRules.preset("corrected", beta=beta, use_alpha=False), seed=1) for beta in (0.0, -0.2)
    }
    for step in range(20):
        for store in stores.values():
            store.update(*batch(step, 4)[:2])
    cosines = {}
    for beta, store in stores.items():
        chosen_KD = store.keys[batch(0, 4)[1][0]]
        cosines[beta] = (chosen_KD @ chosen_KD.T).mean().item()
    assert cosines[-0.2] < cosines[0.0] - 0.02
    with pytest.raises(ValueError, match="beta = -0.1 must not be negative unless .*peer_mass = own"):
        KeyRules.preset("v4", beta=-0.1)
