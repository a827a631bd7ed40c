"""What a rank holds and sends, computed without building anything: the project's one model of memory and traffic.

`--dry_run` prints it for a job as it stands; `tools/plan.py` searches with it. Time is in `trainer/cost.py`.

Symbols in the formulas: T tokens of a rank's micro batch, D width, F expert hidden width, E experts, K experts a token,
L layers, V vocabulary, P ranks that share a pool, N ranks in all, w bytes of a value in compute precision.
"""

from dataclasses import dataclass, fields
from math import comb
from typing import Any

from modeling.config import ModelConfig
from trainer.config import Experiment
from trainer.ds_config import is_bf16
from trainer.layout import Layout
from trainer.memory import host_bytes
from trainer.precision import Precision

GIB = 2**30
DEEPSPEED_BUCKET = 500_000_000
"""Elements in a reduction bucket where the DeepSpeed JSON names none."""


@dataclass(frozen=True)
class Sharding:
    """What memory and traffic depend on in a DeepSpeed JSON."""

    bf16: bool = True
    """Core, experts and activations in bf16; else fp32."""
    stage: int = 2
    """ZeRO stage, 1 or 2."""
    offload: bool = False
    """Optimizer state in host memory."""
    bucket: int = DEEPSPEED_BUCKET
    """Elements that one gradient reduction takes together."""
    reduce_width: int = 4
    """Bytes of a gradient on its way to other ranks."""

    @staticmethod
    def of(ds_config: dict[str, Any]) -> "Sharding":
        """From a JSON that `load_ds_config` has checked."""
        zero, bf16 = ds_config["zero_optimization"], is_bf16(ds_config)
        return Sharding(
            bf16=bf16,
            stage=zero["stage"],
            offload="offload_optimizer" in zero,
            bucket=int(zero.get("reduce_bucket_size", DEEPSPEED_BUCKET)),
            reduce_width={"bf16": 2, "fp32": 4}[ds_config.get("communication_data_type") or ("bf16" if bf16 else "fp32")],
        )

    @property
    def width(self) -> int:
        """Bytes of a value in compute precision."""
        return 2 if self.bf16 else 4


@dataclass(frozen=True)
class Deployment:
    """How an experiment is spread over a cluster."""

    layout: Layout
    """EP size, micro batch, accumulation."""
    ranks: int
    """Ranks in all, N."""
    ranks_per_node: int
    """Consecutive ranks on one node; groups of `layout.ep_size` consecutive ranks share a pool."""
    sharding: Sharding = Sharding()
    """Precision and ZeRO stage."""
    device: str = "cuda"
    """`cuda`, or `cpu`, where attention runs in fp32."""
    replicas: int = 0
    """Extra copies of hot experts in a layer, over all ranks of a pool."""
    imbalance: float = 1.0
    """Rows at the busiest rank of a pool over the mean, in the worst layer."""
    row_tokens: int | None = None
    """Mean tokens in a row, padding to the longest of its micro batch included, for traffic and time; None =
    model.max_seq_len. Memory counts the longest rows."""

    @property
    def ep_in_node(self) -> int:
        """Ranks of a pool on one node."""
        return min(self.layout.ep_size, self.ranks_per_node)


@dataclass(frozen=True)
class Memory:
    """Bytes at a rank's peak. Exact, except activations and exchange, which are estimates for a micro batch of full rows."""

    pool: int
    """Frozen experts of all layers, with replicas."""
    core: int
    """Trained (and frozen) parameters outside the pool in compute precision, positions."""
    gradients: int
    """Accumulated gradients and DeepSpeed's reduction bucket."""
    optimizer: int
    """This rank's shard: fp32 master and two moments; 0 when offloaded."""
    activations: int
    """What the backward needs, and the largest intermediate values beside it."""
    exchange: int
    """Copies of tokens on their way to and from experts in the layer that runs."""
    keys: int
    """Key stores and one step's sums for their update."""

    @property
    def total(self) -> int:
        """All parts."""
        return sum(parts(self).values())


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends."""

    in_node: float = 0.0
    """To ranks of its node."""
    between_nodes: float = 0.0
    """To ranks of other nodes."""

    @property
    def total(self) -> float:
        """Both."""
        return self.in_node + self.between_nodes

    def times(self, factor: float) -> "Sent":
        """`factor` times as much."""
        return Sent(factor * self.in_node, factor * self.between_nodes)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in one optimizer step."""

    tokens: Sent
    """Token exchange, forward and backward, at even usage of the experts and full batches."""
    gradients: Sent
    """Reduction of gradients and gathering of parameters."""
    keys: Sent
    """Sums for the update of the key stores."""

    @property
    def total(self) -> float:
        """All parts."""
        return sum(sent.total for sent in parts(self).values())


def parts(record: Any) -> dict[str, Any]:
    """Fields of a dataclass by name, in order."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


def memory(experiment: Experiment, deployment: Deployment) -> Memory:
    """What a rank holds at the peak of a step."""
    model, some, how = experiment.model, experiment.model.some, deployment.sharding
    D, E, K, L, P = model.d_model, some.num_experts, some.top_k, model.num_layers, deployment.layout.ep_size
    w, N, counts, has_some = how.width, deployment.ranks, model.num_parameters(), model.channel_mixer == "some"
    T = deployment.layout.micro_batch * model.max_seq_len
    pooled, expert = num_pool_parameters(model), expert_bytes(model, w)

    # The grouped products of GPUs read bf16: matrices on a grid exist in both for as long as a layer runs.
    expanded = deployment.device == "cuda" and has_some and some.expert_grid != "none"
    held = -(-(E + deployment.replicas) // P)
    trained = counts.trainable
    if how.stage == 1 or how.offload:
        # Whole gradients until the last micro batch, then this rank's part in fp32.
        gradients = w * trained + max(w * how.bucket, 4 * trained // N)
    else:
        # In fp32 DeepSpeed lists the parameters of its part beside their flat copy, on one rank they are the same.
        gradients = (1 if how.bf16 else min(2, N)) * 4 * trained // N + 4 * how.bucket
    # The sums of a step, and one more layer's pair counts while they are made (int64 and int32).
    sums = L * 4 * (E * K + E * E + K * E * D + E) + 12 * E * E
    return Memory(
        pool=L * held * expert if has_some else pooled * w,
        core=w * (counts.total - pooled) + 4 * model.max_seq_len * D,
        gradients=gradients,
        optimizer=0 if how.offload else 12 * trained // N,
        activations=T * _activation_bytes_per_token(model, deployment) + expanded * held * 2 * D * some.d_ffn * w,
        exchange=int(T * exchange_bytes_per_token(deployment, D, E, K, w)) if P > 1 else 0,
        keys=has_some * (L * 4 * E * (D + 3) + sums),
    )


def check_expert_size(model: ModelConfig) -> None:
    """Refuse experts that this machine cannot even draw, one at a time.

    Raises:
        ValueError: naming the sizes that make an expert.
    """
    needed = 8 * max(model.some.num_expert_parameters(), model.num_dense_parameters() if model.d_ffn else 0)
    if needed > host_bytes():
        raise ValueError(
            f"model.d_model = {model.d_model} makes experts that take {needed / GIB:,.0f} GiB to draw, and this machine has "
            f"{host_bytes() / GIB:,.0f}; lower it, model.some.d_ffn or model.d_ffn"
        )


def check_memory(experiment: Experiment, deployment: Deployment) -> None:
    """Refuse a model whose experts and core alone are more than this machine's memory: it would fail only after minutes.

    Raises:
        ValueError: naming the sizes that count most.
    """
    held = memory(experiment, deployment)
    needed, model = held.pool + held.core, experiment.model
    if deployment.device == "cuda":
        import torch  # here alone: what plans must not wait for it

        available, where = torch.cuda.get_device_properties(0).total_memory, "its GPU"
    else:
        available, where = host_bytes() // deployment.ranks_per_node, "its share of this machine"
    if needed > available:
        raise ValueError(
            f"model.num_layers = {model.num_layers}, model.some.num_experts = {model.some.num_experts}, model.d_model = "
            f"{model.d_model} and model.vocab_size = {model.vocab_size} need {needed / GIB:,.1f} GiB a rank for weights, "
            f"and {where} has {available / GIB:,.1f}; lower them, or let more ranks share the pool (parallel.ep_size)"
        )


def num_pool_parameters(model: ModelConfig) -> int:
    """Parameters of all frozen experts of the model."""
    if model.channel_mixer == "some":
        return model.num_layers * model.some.num_experts * model.some.num_expert_parameters()
    return model.num_layers * model.num_dense_parameters() if model.channel_mixer == "frozen_dense" else 0


def expert_bytes(model: ModelConfig, width: int) -> int:
    """What one expert of a SoME layer takes: biases in compute precision, matrices too or, on a grid, one byte a weight."""
    some = model.some
    biases = model.d_model + some.d_ffn
    return width * biases + (width if some.expert_grid == "none" else 1) * (some.num_expert_parameters() - biases)


def most_replicas(experiment: Experiment, ep_size: int) -> int:
    """Most replicas that a layer may have; `auto` takes up to one a rank."""
    replicas = experiment.parallel.replicas
    return replicas if replicas != "auto" else ep_size if ep_size > 1 else 0


def saved_bytes_per_token(model: ModelConfig, deployment: Deployment) -> int:
    """What is kept of one token from the forward, all layers, at the busiest rank, for the backward and the key stores."""
    D, V, L, some, w = model.d_model, model.vocab_size, model.num_layers, model.some, deployment.sharding.width
    K, hidden = some.top_k, some.router_hidden
    # Per block: the inputs of both norms, of qkv and of attention's output map; norm statistics.
    nothing_reads = model.channel_mixer == "none" and not model.readout
    block = (4 - nothing_reads) * D * w + 4 * w
    # Fused attention keeps q, k, v, its output and one normaliser a head.
    block += 4 * D * (4 if deployment.device == "cpu" else w) + 4 * model.num_heads
    if model.channel_mixer == "some":
        if some.routing == "learned":
            # The query before normalisation and its norm; the mlp's activation before GELU. Trained maps keep their inputs.
            block += 4 * D + 8 + hidden * w * (some.router == "mlp")
            block += (D + hidden * (some.router == "mlp")) * w * some.train_router
        # Queries in the order of real tokens wait for their sums; ids, gates and sorted rows.
        block += 4 * D + 36 * K
        block += int(K * some.d_ffn * w * deployment.imbalance)
    elif model.channel_mixer == "dense":
        block += (D + 2 * model.d_ffn) * w
    elif model.channel_mixer == "frozen_dense":
        block += model.d_ffn * w + 12
    block += D * w * (model.input_map + 2 * model.readout)
    final_norm = (D + 2) * w if model.norm_position == "pre" else 0
    # The loss keeps its gradient with respect to the logits.
    return L * block + final_norm + D * w + V * w + 8


def _activation_bytes_per_token(model: ModelConfig, deployment: Deployment) -> int:
    """What is saved, but of what does not live at the same time the largest: queries of all layers until their sums are
    taken, before the backward; logits; scores of all keys and their gradient."""
    has_some = model.channel_mixer == "some"
    queries = has_some * model.num_layers * 4 * model.d_model
    scores = 8 * model.some.num_experts if has_some and model.some.routing == "learned" else 0
    largest = max(queries, model.vocab_size * deployment.sharding.width, scores)
    return saved_bytes_per_token(model, deployment) - queries + largest


def exchange_bytes_per_token(deployment: Deployment, D: int, E: int, K: int, width: int) -> float:
    """Copies out and back (own ones too), those received with their fp32 sum, and the fp32 sum of what returns."""
    copies = distinct_ranks(K, deployment.layout.ep_size, E)
    received = min(copies * deployment.imbalance, deployment.layout.ep_size)
    return 2 * copies * D * width + received * (2 * D * width + 4 * D) + 4 * D


def traffic(experiment: Experiment, deployment: Deployment) -> Traffic:
    """What a rank sends in one optimizer step."""
    model, some, how = experiment.model, experiment.model.some, deployment.sharding
    L, layout, trained = model.num_layers, deployment.layout, model.num_parameters().trainable
    has_some = model.channel_mixer == "some"
    tokens = layout.micro_batch * layout.accumulation * (deployment.row_tokens or model.max_seq_len)
    per_token = exchange_per_token(some.top_k, some.num_experts, model.d_model, deployment)
    reductions = layout.accumulation if how.stage == 2 else 1
    # An all-gather is half of an all-reduce.
    reduced = trained * (how.reduce_width * reductions + how.width / 2)
    return Traffic(
        tokens=per_token.times(has_some * L * tokens),
        gradients=all_reduce(reduced, deployment),
        keys=all_reduce(has_some * sum(key_sums_bytes(model)), deployment),
    )


def exchange_per_token(top_k: int, experts: int, width: int, deployment: Deployment) -> Sent:
    """Expected bytes a token and layer, forward and backward, when every choice of experts is equally likely.

    A token travels once to each rank that holds any of its experts, and each such rank is equally likely. With the counts of
    copies that every rank tells the others (8 bytes each) left out, this is what a rank sends on average.
    """
    P = deployment.layout.ep_size
    to_one_rank = distinct_ranks(top_k, P, experts) / P * bytes_per_copy(width, top_k, deployment.sharding.width)
    near = deployment.ep_in_node
    return Sent(in_node=(near - 1) * to_one_rank, between_nodes=(P - near) * to_one_rank)


def bytes_per_copy(d_model: int, top_k: int, width: int) -> int:
    """Bytes that one (token, rank) pair costs in one layer and step, both ways: the input, its partial sum and the gradients
    of both in compute precision; slots (int32), gates (fp32) and their gradients."""
    return 4 * width * d_model + 3 * 4 * top_k


def distinct_ranks(top_k: int, ranks: int, experts: int) -> float:
    """Expected number of ranks among which a token's K experts lie when every choice is equally likely.

    Each of `ranks` ranks holds `experts / ranks` of them (specs: hypergeometric).
    """
    return ranks * (1 - comb(experts - experts // ranks, top_k) / comb(experts, top_k))


def key_sums_bytes(model: ModelConfig) -> tuple[int, int]:
    """Bytes of the two all-reduces of a key update over all layers: counts and pairs, then query sums and gate mass."""
    E, some = model.some.num_experts, model.some
    per_layer = E * some.top_k + E * E, E * model.d_model + E
    return 4 * model.num_layers * per_layer[0], 4 * model.num_layers * per_layer[1]


def all_reduce(payload: float, deployment: Deployment) -> Sent:
    """What a rank sends when `payload` bytes are summed over all ranks: inside nodes, then a part each between nodes.

    The sum is the bound 2 (N - 1) / N * payload, which a ring over all ranks meets too.
    """
    near = min(deployment.ranks, deployment.ranks_per_node)
    nodes = deployment.ranks / near
    return Sent(2 * (near - 1) / near * payload, 2 * (nodes - 1) / nodes * payload / near)


def describe(experiment: Experiment, deployment: Deployment, precision: Precision) -> str:
    """The plan as text for `--dry_run`."""
    counts, layout, model = experiment.model.num_parameters(), deployment.layout, experiment.model
    held, sent = memory(experiment, deployment), traffic(experiment, deployment)
    sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts(held).items() if size)
    lines = [
        f"experiment       {experiment.name}, {precision.name}, {deployment.ranks} rank(s), EP size {layout.ep_size}",
        f"precision        {precision}",
        f"parameters       {counts.total:,} total, {counts.trainable:,} trained, {counts.frozen:,} frozen",
        f"global batch     {experiment.train.batch_size} sequences = {deployment.ranks} rank(s) x {layout.micro_batch} "
        f"x {layout.accumulation} accumulation",
        f"memory a rank    {held.total / GIB:.2f} GiB: {sizes} (rows of {model.max_seq_len} tokens)",
        f"sent a step      {sent.total / 1e6:,.1f} MB a rank: token exchange {sent.tokens.total / 1e6:,.1f}, gradients and "
        f"parameters {sent.gradients.total / 1e6:,.1f}, key statistics {sent.keys.total / 1e6:,.1f}",
    ]
    return "\n".join(lines)
