"""The rules by which keys move, as combinations of few switches; `modeling/some/keys.py` applies them.

A published version is a row of `RULE_PRESETS` (specs 3.8). `corrected` is this project's own:

- **Usage** is the share f_e = n_e / (K T) of an update's choices, averaged without bias: uhat = EMA(f) / (1 - rho^t).
  It does not depend on batch size or padding, and is right from the first update on. The published raw average starts at
  (1 - rho) n, which makes the first step alpha / (1 - rho), up to 3: an overshoot (specs F5).
- **Step.** The mass of an expert is the larger of what it got now and what it gets on average, m_e = max(n_e, K T uhat_e),
  so that attraction moves a key by at most alpha, and by less when it got fewer tokens than usual. Bounded for any counts;
  an expert that was idle for long moves like any other.
- **Winners attract.** Only the first choice of a token pulls its key: by alpha n_e1 / m_e towards the mean of the n_e1
  queries that it won, so an expert that is mostly second choice moves slowly. Published rules give all K chosen keys the
  same target, so keys that are chosen together coalesce and are always chosen together from then on (specs F4). With one
  winner a token the direction is that of online spherical k-means.
- **Peer pull** is divided by the own mass: sum_j beta c_ij / ((K - 1) m_i) = beta n_i / m_i <= beta, whatever the masses of
  the others. Divided by the smaller mass (v1.1 to v4) the total reaches 2.5 at 512 experts, where it is unstable.
- **Decay** acts on a health beside the key, which keeps its direction and norm: health is multiplied by 1 - delta while
  uhat_e < theta / E and returns to 1 otherwise. An expert that is never chosen reaches `respawn_threshold` after
  ceil(log(threshold) / log(1 - delta)) updates beyond the warm-up; one with its fair share never does. In the published
  rules normalisation undoes the decay, or one token does (specs F6).
- **Respawn** puts a dead key on a random real token, with norm 1 like all keys and the fair share as its usage, so that it
  neither outshines its neighbours by its norm nor moves at the speed of a light key (specs F17).
"""

import math
from dataclasses import dataclass

from modeling.checks import require, require_choice

USAGES = ("total", "average", "share")
ATTRACTIONS = ("slots", "winners")
PEER_MASSES = ("min", "max", "own")
NORMALISATIONS = ("all", "used", "clamp", "none")
DECAYS = ("after", "before", "health")
TOKEN_MASKS = ("all", "targets")


@dataclass(frozen=True)
class KeyRules:
    """How the key store moves after an optimizer step. The defaults are those of v4."""

    alpha: float = 0.01
    """Attraction: how far an expert's key moves towards the queries that chose it."""
    beta: float = 0.005
    """Peer pull: how far the keys of experts that were chosen together move towards each other; with peer_mass = own it may
    be negative, which pushes them apart."""
    delta: float = 0.001
    """Decay of the keys (or of the health) of rarely used experts."""
    theta_percentile: float = 0.05
    """Quantile of the used experts' usage below which a key decays; with decay = health, a part of the fair share 1/E."""
    warmup_steps: int = 400
    """The first decay happens in update `warmup_steps + 1`."""
    ema_decay: float = 0.99
    """Decay rho of the moving average of usage, per update."""
    respawn_threshold: float = 0.0
    """An expert whose key norm (with decay = health, whose health) is below this is put on a random token; 0 = never."""
    use_alpha: bool = True
    """Switch attraction off for an ablation."""
    use_beta: bool = True
    """Switch peer pull off for an ablation."""
    use_delta: bool = True
    """Switch decay off for an ablation."""
    usage: str = "average"
    """What usage is: `total` (all choices so far), `average` (of raw counts) or `share` (average share of all choices)."""
    attract: str = "slots"
    """Who is attracted: the K experts of a token one `slots` after the other, or only the `winners`, its first choices."""
    peer_mass: str = "min"
    """What divides peer pull: the `min` or `max` of both masses, or the `own` mass times K - 1."""
    normalise: str = "all"
    """Which keys get norm 1 after moving: `all`, the ones `used` in this step, those longer than 1 (`clamp`), or `none`."""
    decay: str = "after"
    """Decay of the key `after` or `before` normalisation, or of its `health`, which only triggers respawn."""
    token_mask: str = "all"
    """Tokens that move keys: `all` that are routed, or only positions with a real `targets` token (no padding)."""

    def __post_init__(self) -> None:
        prefix = "model.some.rules"
        for name in ("alpha", "delta", "warmup_steps"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{prefix}.{name} = {value} must be a number that is not negative")
        for name in ("theta_percentile", "ema_decay", "respawn_threshold", "delta"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{prefix}.{name} = {value} must lie between 0 and 1")
        require(
            math.isfinite(self.beta) and (self.beta >= 0 or self.peer_mass == "own"),
            f"{prefix}.beta = {self.beta} must not be negative unless {prefix}.peer_mass = own, which bounds its effect",
        )
        require(
            self.usage != "share" or self.ema_decay < 1,
            f"{prefix}.ema_decay = {self.ema_decay} must be less than 1 with {prefix}.usage = share",
        )
        for name, choices in (
            ("usage", USAGES),
            ("attract", ATTRACTIONS),
            ("peer_mass", PEER_MASSES),
            ("normalise", NORMALISATIONS),
            ("decay", DECAYS),
            ("token_mask", TOKEN_MASKS),
        ):
            require_choice(f"{prefix}.{name}", getattr(self, name), choices)
        for name in ("peer_mass", "decay"):
            value = getattr(self, name)
            require(
                value not in ("own", "health") or self.usage == "share",
                f"{prefix}.{name} = {value} needs shares; set {prefix}.usage = share",
            )

    @staticmethod
    def preset(version: str, **overrides: float | int | bool | str) -> "KeyRules":
        """The rule of a published version, `corrected` or `fixed`, with single values changed by keyword.

        Raises:
            ValueError: unknown version.
        """
        require(version in RULE_PRESETS, f"key rules {version!r} are unknown; known: {', '.join(RULE_PRESETS)}")
        return KeyRules(**{**RULE_PRESETS[version], **overrides})

    @property
    def moves(self) -> bool:
        """Whether any part of the rule can change a key."""
        return self.use_alpha or self.use_beta or self.use_delta or self.respawn_threshold > 0


def _average(alpha: float, beta: float, delta: float, warmup_steps: int, ema_decay: float, **switches: str | float) -> dict:
    """The common rule of v2.1 to v4 with its numbers, and what a version changes."""
    numbers = dict(alpha=alpha, beta=beta, delta=delta, warmup_steps=warmup_steps, ema_decay=ema_decay)
    return {**numbers, "theta_percentile": 0.05, **switches}


_FROM_V5 = dict(peer_mass="max", token_mask="targets")

RULE_PRESETS: dict[str, dict] = {
    "v1.1": _average(0.01, 0.001, 0.001, 2000, 0.99, usage="total"),
    "v2.1": _average(0.015, 0.001, 0.001, 400, 0.995),
    "v2.2": _average(0.01, 0.001, 0.001, 2000, 0.99),
    "v3": _average(0.015, 0.001, 0.001, 400, 0.995),
    "v3.5": _average(0.015, 0.001, 0.001, 400, 0.995, normalise="none", respawn_threshold=0.1),
    "v4": _average(0.01, 0.005, 0.001, 400, 0.99),
    "v5": _average(0.005, 0.001, 0.001, 400, 0.995, **_FROM_V5),
    "v6": _average(0.015, 0.001, 0.001, 200, 0.995, normalise="used", respawn_threshold=0.1, **_FROM_V5),
    "v7": _average(0.015, 0.001, 0.005, 200, 0.995, normalise="clamp", respawn_threshold=0.1, **_FROM_V5),
    "cmp": _average(0.015, 0.001, 0.001, 400, 0.995, decay="before"),
    "corrected": dict(
        alpha=0.05,
        beta=0.001,
        delta=0.02,
        theta_percentile=0.05,
        warmup_steps=20,
        ema_decay=0.98,
        respawn_threshold=0.1,
        usage="share",
        attract="winners",
        peer_mass="own",
        decay="health",
        token_mask="targets",
    ),
    "fixed": dict(use_alpha=False, use_beta=False, use_delta=False, normalise="none"),
}
"""Rule versions by name; `fixed` leaves the keys where they start."""
