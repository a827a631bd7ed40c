"""What a model is: plain dataclasses, checked when they are made, with exact counts that allocate nothing.

The sizes follow specs "Parameter arithmetic": trainable = base + L (attention + two norms + router),
total = trainable + L * E * (2 D F + F + D).
"""

from dataclasses import dataclass, field, replace

from modeling.checks import require, require_choice, require_positive
from modeling.key_rules import KeyRules

ROUTERS = ("linear", "mlp")
ROUTER_INITS = ("torch", "normal")
ROUTINGS = ("learned", "hash", "shared")
EXPERT_GRIDS = ("none", "int8", "fp8")
EXPERT_BIASES = ("zero", "torch")
CHANNEL_MIXERS = ("some", "dense", "frozen_dense", "none")
EXPERT_INITS = ("default", "orthogonal", "sparse")
NORM_POSITIONS = ("pre", "post")
EMBEDDING_INITS = ("scaled", "unit")


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
    router_init: str = "torch"
    """Initial values of the query network: `torch` (its linear layers' own) or `normal` (N(0, 0.02), zero biases)."""
    train_router: bool = True
    """False leaves the query network at its random start."""
    normalise_query: bool = True
    """Give queries norm 1, so that scores are cosines (published v1.1: False)."""
    routing: str = "learned"
    """Who chooses: `learned` (queries and keys), `hash` (a fixed random set of experts for each token id, equal gates) or
    `shared` (every token goes to the first top_k experts, equal gates). The last two have no query network."""
    expert_init: str = "default"
    """Distribution of the experts' weights: `default`, `orthogonal` or `sparse`."""
    expert_grid: str = "none"
    """`int8`: draw the matrices as whole numbers of 8 bits times a power of two, with the variance of the `default` init,
    and keep them in one byte a weight; `fp8`: as values of E4M3 times a power of two, meant for GPUs (on CPUs the fused
    kernel does not read it). Nothing is approximated: bf16 and fp32 hold these values exactly."""
    expert_bias: str = "zero"
    """Biases of the experts: `zero` or `torch` (drawn like those of torch's linear layers, as in v1.1 and v2.2)."""
    expert_gain: float = 1.0
    """Factor on what an expert puts out (on its second matrix and bias)."""
    learned_gain: bool = False
    """Train one factor an expert on what it puts out, starting at 1."""
    permute_in_evaluation: bool = False
    """In evaluation let expert e + 1 compute for expert e: if the loss does not care, the choice of experts does not
    matter."""
    temperature: float = 0.8
    """Divides the K selected scores before the softmax that makes the gates."""
    eval_temperature: float | None = None
    """Temperature in evaluation; null = `temperature` (most published runs used 0.5)."""
    rules: KeyRules = field(default_factory=lambda: KeyRules.preset("v4"))
    """How the keys move: `KeyRules.preset("corrected")` or the rule of a published version."""

    def __post_init__(self) -> None:
        require_positive(
            "model.some",
            d_model=self.d_model,
            num_experts=self.num_experts,
            d_ffn=self.d_ffn,
            top_k=self.top_k,
            router_mult=self.router_mult,
            temperature=self.temperature,
            expert_gain=self.expert_gain,
        )
        if self.eval_temperature is not None:
            require_positive("model.some", eval_temperature=self.eval_temperature)
        require_choice("model.some.router", self.router, ROUTERS)
        require_choice("model.some.router_init", self.router_init, ROUTER_INITS)
        require_choice("model.some.routing", self.routing, ROUTINGS)
        require_choice("model.some.expert_init", self.expert_init, EXPERT_INITS)
        require_choice("model.some.expert_grid", self.expert_grid, EXPERT_GRIDS)
        require(
            self.expert_grid == "none" or self.expert_init == "default",
            f"model.some.expert_grid = {self.expert_grid} draws uniform values, and model.some.expert_init = "
            f"{self.expert_init} is not uniform; set expert_init = default or expert_grid = none",
        )
        require_choice("model.some.expert_bias", self.expert_bias, EXPERT_BIASES)
        require(
            self.routing == "learned" or not self.rules.moves,
            f"model.some.routing = {self.routing} has no queries to move keys by; set model.some.rules.preset = fixed",
        )
        require(
            self.top_k <= self.num_experts,
            f"model.some.top_k = {self.top_k} is more than model.some.num_experts = {self.num_experts}; "
            f"choose top_k between 1 and {self.num_experts}",
        )

    @property
    def router_hidden(self) -> int:
        """Hidden width of the `mlp` query network."""
        return max(1, int(self.router_mult * self.d_model))

    def num_router_parameters(self) -> int:
        """Parameters of the query network, trained or not."""
        D, H = self.d_model, self.router_hidden
        if self.routing != "learned":
            return 0
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
    """The Transformer: embedding, `num_layers` blocks of attention and a channel mixer (a SoME layer), and a head."""

    vocab_size: int = 8192
    """Number V of token ids."""
    d_model: int = 512
    """Width D of the residual stream."""
    num_layers: int = 10
    """Number L of blocks."""
    num_heads: int = 8
    """Attention heads; must divide d_model."""
    max_seq_len: int = 768
    """Longest input S in tokens; longer documents are split (data.rows = chunks) or cut off (padded, as published)."""
    norm_position: str = "pre"
    """`pre` (normalise the input of every sub-layer, and once more before the head, without parameters) or `post`
    (published: normalise after every residual sum). Both have the same number of parameters."""
    embedding_init: str = "scaled"
    """`scaled`: standard deviation D^-0.5, so that sqrt(D) * embedding has unit size beside the positions; `unit`
    (published): N(0, 1), which drowns the positions."""
    causal: bool = True
    """False lets every position see the future, as v1.1 did: its losses are no language model's."""
    channel_mixer: str = "some"
    """What follows attention in a block: `some`, `dense` (a trained FFN), `frozen_dense` (one frozen random FFN) or
    `none`."""
    d_ffn: int | None = None
    """Hidden width of the `dense` or `frozen_dense` mixer; null with the others (that of an expert is `some.d_ffn`)."""
    input_map: bool = False
    """Add a trained linear map of the channel mixer's input to that input."""
    readout: bool = False
    """Normalise what the channel mixer puts out (without parameters) and pass it through a trained D x D layer that starts
    at zero. With channel_mixer = none it reads gelu of the mixer's input."""
    some: SoMEConfig = field(default_factory=SoMEConfig)
    """The SoME layers; their `d_model` is the model's."""

    def __post_init__(self) -> None:
        require_positive(
            "model",
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            max_seq_len=self.max_seq_len,
        )
        require_choice("model.norm_position", self.norm_position, NORM_POSITIONS)
        require_choice("model.embedding_init", self.embedding_init, EMBEDDING_INITS)
        require(
            self.d_model % self.num_heads == 0,
            f"model.num_heads = {self.num_heads} does not divide model.d_model = {self.d_model}",
        )
        require(self.d_model % 2 == 0, f"model.d_model = {self.d_model} must be even (sine and cosine positions)")
        require_choice("model.channel_mixer", self.channel_mixer, CHANNEL_MIXERS)
        has_width = self.channel_mixer in ("dense", "frozen_dense")
        require(
            not has_width or (self.d_ffn or 0) > 0,
            f"model.d_ffn = {self.d_ffn}, but model.channel_mixer = {self.channel_mixer} needs its hidden width; set one",
        )
        require(
            has_width or self.d_ffn is None,
            f"model.d_ffn = {self.d_ffn} has no effect with model.channel_mixer = {self.channel_mixer}; leave it out (the "
            f"width of an expert is model.some.d_ffn)",
        )
        require(
            not self.input_map or self.channel_mixer != "none" or self.readout,
            "model.input_map = True feeds nothing with model.channel_mixer = none; set model.readout = true or leave it out",
        )
        object.__setattr__(self, "some", replace(self.some, d_model=self.d_model))

    def num_parameters(self) -> ParameterCounts:
        """Exact counts by formula; allocates nothing."""
        D, V, L, some = self.d_model, self.vocab_size, self.num_layers, self.some
        base = 2 * V * D + V
        linear = D * D + D
        trained = 4 * linear + 4 * D + (self.input_map + self.readout) * linear
        frozen = 0
        if self.channel_mixer == "some":
            router = some.num_router_parameters()
            trained, frozen = trained + router * some.train_router, router * (not some.train_router)
            trained += some.num_experts * some.learned_gain
            frozen += some.num_experts * some.num_expert_parameters()
        elif self.channel_mixer == "dense":
            trained += self.num_dense_parameters()
        elif self.channel_mixer == "frozen_dense":
            frozen += self.num_dense_parameters()
        return ParameterCounts(total=base + L * (trained + frozen), trainable=base + L * trained, frozen=L * frozen)

    def num_dense_parameters(self) -> int:
        """Parameters of one FFN of width `d_ffn`, biases included."""
        return 2 * self.d_model * self.d_ffn + self.d_ffn + self.d_model

    def num_flops_per_token(self, context: int) -> float:
        """Multiply-add FLOPs of one training step (forward and backward) per token, in rows of `context` tokens.

        Trained matrices cost 6 FLOPs a weight; frozen experts 4, since no weight gradient is computed; keys 2, since only
        the K chosen ones enter a gradient; causal attention 6 * L * context * D (half of the full square).
        """
        D, L, some = self.d_model, self.num_layers, self.some
        trained, frozen, scores = 4 * D * D + (self.input_map + self.readout) * D * D, 0, 0
        if self.channel_mixer == "some":
            router = some.num_router_parameters() and (D * D if some.router == "linear" else 2 * D * some.router_hidden)
            trained, frozen = trained + router * some.train_router, router * (not some.train_router)
            frozen += some.top_k * 2 * D * some.d_ffn
            scores = 2 * D * some.num_experts * (some.routing == "learned")
        elif self.channel_mixer == "dense":
            trained += 2 * D * self.d_ffn
        elif self.channel_mixer == "frozen_dense":
            frozen += 2 * D * self.d_ffn
        return 6 * (self.vocab_size * D + L * trained) + L * (4 * frozen + scores) + 6 * L * context * D * (2 - self.causal)
