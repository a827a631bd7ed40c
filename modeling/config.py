"""What a model is: plain dataclasses, checked when they are made, with exact counts that allocate nothing.

The sizes follow specs "Parameter arithmetic": trainable = base + L (attention + two norms + router),
total = trainable + L * E * (2 D F + F + D).
"""

from dataclasses import dataclass, field, replace

ROUTERS = ("linear", "mlp")
EXPERT_INITS = ("default", "orthogonal", "sparse")
NORM_POSITIONS = ("pre", "post")
EMBEDDING_INITS = ("scaled", "unit")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{key} = {value!r} is not one of: {', '.join(choices)}")


def _require_positive(prefix: str, **values: float) -> None:
    for name, value in values.items():
        _require(value > 0, f"{prefix}.{name} = {value} must be greater than 0")


@dataclass(frozen=True)
class KeyRules:
    """How the key store moves after an optimizer step. Presets carry the published values of one rule version."""

    alpha: float = 0.01
    """Attraction: how far an expert's key moves towards the queries that chose it."""
    beta: float = 0.005
    """Peer pull: how far the keys of experts that were chosen together move towards each other."""
    delta: float = 0.001
    """Decay of the keys of rarely used experts."""
    theta_percentile: float = 0.05
    """Quantile of the used experts' usage below which a key decays."""
    warmup_steps: int = 400
    """The first decay happens in update `warmup_steps + 1`."""
    ema_decay: float = 0.99
    """Decay of the moving average of usage, per update."""
    use_alpha: bool = True
    """Switch attraction off for an ablation."""
    use_beta: bool = True
    """Switch peer pull off for an ablation."""
    use_delta: bool = True
    """Switch decay off for an ablation."""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "delta", "warmup_steps"):
            _require(getattr(self, name) >= 0, f"model.some.rules.{name} = {getattr(self, name)} must not be negative")
        for name in ("theta_percentile", "ema_decay"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"model.some.rules.{name} = {value} must lie between 0 and 1")

    @staticmethod
    def preset(version: str, **overrides: float | int | bool) -> "KeyRules":
        """The rule of a published version with single values changed by keyword.

        Raises:
            ValueError: unknown version.
        """
        _require(version in RULE_PRESETS, f"key rules {version!r} are unknown; known: {', '.join(RULE_PRESETS)}")
        return KeyRules(**{**RULE_PRESETS[version], **overrides})


RULE_PRESETS: dict[str, dict] = {
    "v4": dict(alpha=0.01, beta=0.005, delta=0.001, theta_percentile=0.05, warmup_steps=400, ema_decay=0.99),
}


@dataclass(frozen=True)
class SoMEConfig:
    """One SoME layer: a query network, a key store and a pool of frozen random experts."""

    d_model: int = 512
    """Width D of the residual stream; a `ModelConfig` puts its own here."""
    num_experts: int = 64
    """Number E of frozen experts in the layer."""
    d_ffn: int = 1024
    """Hidden width F of one expert."""
    top_k: int = 4
    """Number K of experts that serve a token. With K = 1 the gate is constant and the query network does not learn."""
    router: str = "mlp"
    """Query network: `linear` (D to D) or `mlp` (D to router_mult * D to D, GELU)."""
    router_mult: float = 2.0
    """Hidden width of the `mlp` query network in units of D."""
    expert_init: str = "default"
    """Distribution of the experts' weights: `default`, `orthogonal` or `sparse`; biases are zero."""
    temperature: float = 0.8
    """Divides the K selected scores before the softmax that makes the gates."""
    eval_temperature: float | None = None
    """Temperature in evaluation; null = the training temperature (the published runs used 0.5)."""
    rules: KeyRules = field(default_factory=lambda: KeyRules.preset("v4"))
    """How the keys move."""

    def __post_init__(self) -> None:
        _require_positive(
            "model.some",
            d_model=self.d_model,
            num_experts=self.num_experts,
            d_ffn=self.d_ffn,
            top_k=self.top_k,
            router_mult=self.router_mult,
            temperature=self.temperature,
        )
        if self.eval_temperature is not None:
            _require_positive("model.some", eval_temperature=self.eval_temperature)
        _require_choice("model.some.router", self.router, ROUTERS)
        _require_choice("model.some.expert_init", self.expert_init, EXPERT_INITS)
        _require(
            self.top_k <= self.num_experts,
            f"model.some.top_k = {self.top_k} is more than model.some.num_experts = {self.num_experts}; "
            f"choose top_k between 1 and {self.num_experts}",
        )

    @property
    def router_hidden(self) -> int:
        """Hidden width of the `mlp` query network."""
        return max(1, int(self.router_mult * self.d_model))

    def num_router_parameters(self) -> int:
        D, H = self.d_model, self.router_hidden
        return D * D + D if self.router == "linear" else 2 * D * H + H + D

    def num_expert_parameters(self) -> int:
        """Parameters of one frozen expert, biases included."""
        return 2 * self.d_model * self.d_ffn + self.d_ffn + self.d_model


@dataclass(frozen=True)
class ParameterCounts:
    """Exact parameter counts; buffers (keys, usage, positions) are not parameters."""

    total: int
    trainable: int
    frozen: int


@dataclass(frozen=True)
class ModelConfig:
    """The Transformer: embedding, `num_layers` blocks of attention and a SoME layer, and a head."""

    vocab_size: int = 8192
    """Number V of token ids."""
    d_model: int = 512
    """Width D of the residual stream."""
    num_layers: int = 10
    """Number L of blocks."""
    num_heads: int = 8
    """Attention heads; must divide d_model."""
    max_seq_len: int = 768
    """Longest input S in tokens; longer documents are split, never cut off."""
    norm_position: str = "pre"
    """`pre` (normalise the input of every sub-layer, and once more before the head, without parameters) or `post`
    (published: normalise after every residual sum). Both have the same number of parameters."""
    embedding_init: str = "scaled"
    """`scaled`: standard deviation D^-0.5, so that sqrt(D) * embedding has unit size beside the positions; `unit`
    (published): N(0, 1), which drowns the positions."""
    some: SoMEConfig = field(default_factory=SoMEConfig)
    """The SoME layers; their `d_model` is the model's."""

    def __post_init__(self) -> None:
        _require_positive(
            "model",
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            max_seq_len=self.max_seq_len,
        )
        _require_choice("model.norm_position", self.norm_position, NORM_POSITIONS)
        _require_choice("model.embedding_init", self.embedding_init, EMBEDDING_INITS)
        _require(
            self.d_model % self.num_heads == 0,
            f"model.num_heads = {self.num_heads} does not divide model.d_model = {self.d_model}",
        )
        _require(self.d_model % 2 == 0, f"model.d_model = {self.d_model} must be even (sine and cosine positions)")
        object.__setattr__(self, "some", replace(self.some, d_model=self.d_model))

    def num_parameters(self) -> ParameterCounts:
        """Exact counts by formula; allocates nothing."""
        D, V, L = self.d_model, self.vocab_size, self.num_layers
        base = 2 * V * D + V
        attention_and_norms = 4 * D * D + 4 * D + 4 * D
        trainable = base + L * (attention_and_norms + self.some.num_router_parameters())
        frozen = L * self.some.num_experts * self.some.num_expert_parameters()
        return ParameterCounts(total=trainable + frozen, trainable=trainable, frozen=frozen)

    def num_flops_per_token(self, context: int) -> float:
        """Multiply-add FLOPs of one training step (forward and backward) per token that sees `context` tokens.

        Trained matrices cost 6 FLOPs a weight; frozen experts and keys 4, since no weight gradient is computed; causal
        attention 6 * L * context * D (half of the full square).
        """
        D, L, some = self.d_model, self.num_layers, self.some
        router = D * D if some.router == "linear" else 2 * D * some.router_hidden
        trained = self.vocab_size * D + L * (4 * D * D + router)
        frozen = L * (some.top_k * 2 * D * some.d_ffn + D * some.num_experts)
        return 6 * trained + 4 * frozen + 6 * L * context * D
