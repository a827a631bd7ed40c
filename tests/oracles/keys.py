"""Every key rule, one token, slot and pair at a time: specs/some.md 3.1-3.8 and the corrected rule.

`VERSIONS` is the table of 3.8 read downwards: what a version does in one update, in order. Each entry is a function below
that spells out one line of the specification. Everything is computed in float64, whatever comes in.

Shape suffixes: T tokens, K slots (top-k), E experts, D model width.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import permutations

import torch
from torch import Tensor

from modeling.seeding import derive_generator, derive_seed


@dataclass
class State:
    """What a key store carries from one update to the next, and what has happened to it (for tests to look at)."""

    keys_ED: Tensor
    usage_E: list[float]
    usage_mass_E: list[float]
    health_E: list[float]
    step: int = 0
    respawns: int = 0
    happened: Counter = field(default_factory=Counter)

    @staticmethod
    def start(keys_ED: Tensor) -> "State":
        """Before the first update: nothing used, everybody healthy."""
        E = len(keys_ED)
        return State(keys_ED.detach().to(torch.float64).clone(), [0.0] * E, [0.0] * E, [1.0] * E)


@dataclass(frozen=True)
class Numbers:
    """The numbers and flags of a rule; `theta_percentile` is a fraction (0.05)."""

    alpha: float
    beta: float
    delta: float
    theta_percentile: float
    warmup_steps: int
    ema_decay: float
    respawn_threshold: float = 0.0
    use_alpha: bool = True
    use_beta: bool = True
    use_delta: bool = True


@dataclass
class Step:
    """What one update sees. `tokens` are the positions of M (3.1): the masked-in ones."""

    numbers: Numbers
    tokens: list[int]
    queries_TD: Tensor
    ids_TK: list[list[int]]
    gates_TK: list[list[float]] | None
    token_ids_T: list[int]
    seed: int
    layer: int
    top_k: int
    mass_E: list[float] = field(default_factory=list)  # the usage line sets it, the lines below divide by it


def update_keys_per_token(
    version: str,
    state: State,
    queries_TD: Tensor,
    expert_ids_TK: Tensor,
    gates_TK: Tensor | None = None,
    mask_T: Tensor | None = None,
    token_ids_T: list[int] | None = None,
    *,
    seed: int = 0,
    layer: int = 0,
    **numbers: float | int | bool,
) -> State:
    """The state after one more update; `state` and the tensors are left as they are.

    The rule takes `queries_TD` as they are: raw ones for v1.1, unit ones for all others (3.8, line "query in update").
    """
    state = replace(
        state,
        keys_ED=state.keys_ED.clone(),
        usage_E=list(state.usage_E),
        usage_mass_E=list(state.usage_mass_E),
        health_E=list(state.health_E),
        happened=Counter(state.happened),
        step=state.step + 1,
    )
    step = Step(
        numbers=Numbers(**numbers),
        tokens=[t for t in range(len(queries_TD)) if mask_T is None or bool(mask_T[t])],
        queries_TD=queries_TD.detach().to(torch.float64),
        ids_TK=expert_ids_TK.tolist(),
        gates_TK=None if gates_TK is None else gates_TK.detach().to(torch.float64).tolist(),
        token_ids_T=list(range(len(queries_TD))) if token_ids_T is None else list(token_ids_T),
        seed=seed,
        layer=layer,
        top_k=expert_ids_TK.shape[1],
    )
    state.happened["unused"] += bool(step.tokens) and 0 in _counts(state, step)
    for line in VERSIONS[version]:
        line(state, step)
    return state


# ---------------------------------------------------------------- 1 usage, before the keys move


def usage_cumulative(state: State, step: Step) -> None:
    """v1.1: u <- u + n, never forgotten."""
    state.usage_E = [u + n for u, n in zip(state.usage_E, _counts(state, step), strict=True)]
    state.usage_mass_E = [w + g for w, g in zip(state.usage_mass_E, _gate_sums(state, step), strict=True)]
    step.mass_E = [1 + u for u in state.usage_E]


def usage_ema_raw(state: State, step: Step) -> None:
    """v2 to v7: u <- rho u + (1 - rho) n with raw counts and no bias correction."""
    rho = step.numbers.ema_decay
    state.usage_E = [rho * u + (1 - rho) * n for u, n in zip(state.usage_E, _counts(state, step), strict=True)]
    _mass_ema(state, step)
    step.mass_E = [1 + u for u in state.usage_E]


def usage_share(state: State, step: Step) -> None:
    """corrected: an EMA of the share f = n / (K T); the mass is the larger of this step's count and the expected count."""
    rho, slots = step.numbers.ema_decay, step.top_k * len(step.tokens)
    count_E = _counts(state, step)
    share_E = [n / slots if slots else 0.0 for n in count_E]
    state.usage_E = [rho * u + (1 - rho) * f for u, f in zip(state.usage_E, share_E, strict=True)]
    _mass_ema(state, step)
    step.mass_E = [max(n, slots * u) for n, u in zip(count_E, _corrected_share(state, step), strict=True)]


def _mass_ema(state: State, step: Step) -> None:
    rho = step.numbers.ema_decay
    sum_E = _gate_sums(state, step)
    state.usage_mass_E = [rho * w + (1 - rho) * g for w, g in zip(state.usage_mass_E, sum_E, strict=True)]


def _corrected_share(state: State, step: Step) -> list[float]:
    """uhat: the average starts at 0, which 1 - rho^t takes out again."""
    return [u / (1 - step.numbers.ema_decay**state.step) for u in state.usage_E]


# ---------------------------------------------------------------- 2 alpha, attraction


def attract_every_slot(state: State, step: Step) -> None:
    """3.3: all tokens of one slot pull at the same old key; the next slot sees the moved key."""
    for slot in range(step.top_k):
        _attract(state, step, slot)


def attract_first_slot(state: State, step: Step) -> None:
    """corrected: only a token's best expert moves towards it."""
    _attract(state, step, slot=0)


def _attract(state: State, step: Step, slot: int) -> None:
    if not step.numbers.use_alpha:
        return
    old_ED = state.keys_ED.clone()
    for t in step.tokens:
        e = step.ids_TK[t][slot]
        state.keys_ED[e] += step.numbers.alpha / step.mass_E[e] * (step.queries_TD[t] - old_ED[e])
        state.happened["attracted"] += 1


# ---------------------------------------------------------------- 3 beta, peer pull


def pull_divided_by_lighter(state: State, step: Step) -> None:
    """v1 to v4, v3.5, cmp."""
    _pull(state, step, lambda i, j: min(step.mass_E[i], step.mass_E[j]))


def pull_divided_by_heavier(state: State, step: Step) -> None:
    """v5 to v7."""
    _pull(state, step, lambda i, j: max(step.mass_E[i], step.mass_E[j]))


def pull_divided_by_own(state: State, step: Step) -> None:
    """corrected: every token has K - 1 peers to offer, so this sums to at most beta an expert."""
    _pull(state, step, lambda i, j: (step.top_k - 1) * step.mass_E[i])


def _pull(state: State, step: Step, mu: Callable[[int, int], float]) -> None:
    """3.4: every pair of every token pulls at the keys that alpha left."""
    if not step.numbers.use_beta:
        return
    old_ED = state.keys_ED.clone()
    for t in step.tokens:
        for i, j in permutations(step.ids_TK[t], 2):
            state.keys_ED[i] += step.numbers.beta / mu(i, j) * (old_ED[j] - old_ED[i])
            state.happened["pulled"] += 1


# ---------------------------------------------------------------- 4 or 5 length


def normalise_all(state: State, step: Step) -> None:
    for e in range(len(state.keys_ED)):
        state.keys_ED[e] /= state.keys_ED[e].norm()


def normalise_used(state: State, step: Step) -> None:
    """v6: an expert without a token in this step keeps its length."""
    for e, n in enumerate(_counts(state, step)):
        if n > 0:
            state.keys_ED[e] /= state.keys_ED[e].norm()
        elif state.keys_ED[e].norm() < 0.999:
            state.happened["left short"] += 1


def clamp(state: State, step: Step) -> None:
    """v7: only long keys are cut, short ones stay short."""
    for e in range(len(state.keys_ED)):
        length = state.keys_ED[e].norm()
        if length > 1:
            state.keys_ED[e] /= length
        state.happened["cut"] += bool(length > 1.001)
        state.happened["left short"] += bool(length < 0.999)


# ---------------------------------------------------------------- 4 or 5 delta, decay


def decay(state: State, step: Step) -> None:
    """3.6: rarely used keys shrink, never-used ones included, from update warmup_steps + 1 on."""
    used = [u for u in state.usage_E if u > 0]
    if not step.numbers.use_delta or state.step <= step.numbers.warmup_steps or not used:
        return
    theta = quantile(used, step.numbers.theta_percentile)
    for e, u in enumerate(state.usage_E):
        if u < theta:
            state.keys_ED[e] *= 1 - step.numbers.delta
            state.happened["decayed" if u > 0 else "decayed, never used"] += 1


def weaken(state: State, step: Step) -> None:
    """corrected: the keys keep length 1; a separate health falls while the share is below theta / E and is 1 again above."""
    if not step.numbers.use_delta or state.step <= step.numbers.warmup_steps:
        return
    E = len(state.keys_ED)
    for e, share in enumerate(_corrected_share(state, step)):
        if share < step.numbers.theta_percentile / E:
            state.health_E[e] *= 1 - step.numbers.delta
            state.happened["decayed" if share > 0 else "decayed, never used"] += 1
        else:
            state.happened["recovered"] += state.health_E[e] < 1
            state.health_E[e] = 1.0


# ---------------------------------------------------------------- last: respawn


def respawn_short(state: State, step: Step) -> None:
    """3.7: every step, whatever the warm-up and the flags are. A new key starts as if it had never been used."""
    threshold = step.numbers.respawn_threshold
    _respawn(state, step, [e for e, k_D in enumerate(state.keys_ED) if k_D.norm() < threshold], usage=0.0)


def respawn_unhealthy(state: State, step: Step) -> None:
    """corrected: health decides, and a new key starts as if it had had the fair share 1 / E."""
    threshold, E = step.numbers.respawn_threshold, len(state.keys_ED)
    fair = (1 - step.numbers.ema_decay**state.step) / E
    _respawn(state, step, [e for e, h in enumerate(state.health_E) if h < threshold], usage=fair)


def _respawn(state: State, step: Step, dead: list[int], usage: float) -> None:
    state.happened["too few tokens"] += len(dead) > len(step.tokens)
    if not 0 < len(dead) <= len(step.tokens):
        return
    chosen = choose_tokens(step.tokens, step.token_ids_T, step.seed, step.layer, state.step)[: len(dead)]
    generator = derive_generator(step.seed, "respawn_noise", step.layer, state.step)
    noise_ND = torch.randn(len(dead), state.keys_ED.shape[1], generator=generator).to(torch.float64)
    for e, t, noise_D in zip(dead, chosen, noise_ND, strict=True):
        key_D = step.queries_TD[t] + 0.01 * noise_D
        state.keys_ED[e] = key_D / key_D.norm()
        state.usage_E[e], state.usage_mass_E[e], state.health_E[e] = usage, 0.0, 1.0
        state.respawns += 1
        state.happened["respawned"] += 1


def choose_tokens(tokens: list[int], token_ids_T: list[int], seed: int, layer: int, step: int) -> list[int]:
    """The step's tokens by ascending priority: splitmix64 of the token's id and the step's draw, as a signed number."""
    draw = derive_seed(seed, "respawn", layer, step)
    return sorted(tokens, key=lambda t: _signed(splitmix64(token_ids_T[t] ^ draw)))


def splitmix64(x: int) -> int:
    """Unsigned 64-bit hash of an unsigned 64-bit number. splitmix64(0) = 0xE220A8397B1DCDAF."""
    z = (x + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    return z - 2**64 if z >= 2**63 else z


# ---------------------------------------------------------------- 3.8: the order of operations

Line = Callable[[State, Step], None]

_V2_TO_V4: tuple[Line, ...] = (usage_ema_raw, attract_every_slot, pull_divided_by_lighter, normalise_all, decay)

VERSIONS: dict[str, tuple[Line, ...]] = {
    "v1.1": (usage_cumulative, attract_every_slot, pull_divided_by_lighter, normalise_all, decay),
    "v2.1": _V2_TO_V4,
    "v2.2": _V2_TO_V4,
    "v3": _V2_TO_V4,
    "v4": _V2_TO_V4,
    "v3.5": (usage_ema_raw, attract_every_slot, pull_divided_by_lighter, decay, respawn_short),
    "cmp": (usage_ema_raw, attract_every_slot, pull_divided_by_lighter, decay, normalise_all),
    "v5": (usage_ema_raw, attract_every_slot, pull_divided_by_heavier, normalise_all, decay),
    "v6": (usage_ema_raw, attract_every_slot, pull_divided_by_heavier, normalise_used, decay, respawn_short),
    "v7": (usage_ema_raw, attract_every_slot, pull_divided_by_heavier, clamp, decay, respawn_short),
    "corrected": (usage_share, attract_first_slot, pull_divided_by_own, normalise_all, weaken, respawn_unhealthy),
}


# ---------------------------------------------------------------- counting


def _counts(state: State, step: Step) -> list[int]:
    """n_e: how often an expert was chosen, in any slot."""
    count_E = [0] * len(state.keys_ED)
    for t in step.tokens:
        for e in step.ids_TK[t]:
            count_E[e] += 1
    return count_E


def _gate_sums(state: State, step: Step) -> list[float]:
    """The gate weight that each expert received; nothing where no gates are known."""
    sum_E = [0.0] * len(state.keys_ED)
    for t in step.tokens if step.gates_TK else []:
        for e, gate in zip(step.ids_TK[t], step.gates_TK[t], strict=True):
            sum_E[e] += gate
    return sum_E


def quantile(values: list[float], p: float) -> float:
    """Quantile with linear interpolation. quantile([4, 1, 2], 0.25) = 1.5."""
    ordered = sorted(values)
    position = p * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
