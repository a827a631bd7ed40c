"""What a run will need, computed without building anything: parameters, memory a rank, bytes sent a step.

Shapes in the formulas: T tokens of a rank's micro batch, D width, F expert hidden width, E experts, K experts a token,
L layers, V vocabulary, P ranks that share a pool, N ranks in all.
"""

from dataclasses import dataclass
from math import comb

from trainer.config import Experiment
from trainer.distributed import Layout

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Bytes a rank holds and sends; sums of exact sizes, except activations, which are an upper estimate."""

    pool: int
    """Frozen experts, with the replicas (`auto`: one a rank, which is the most it takes)."""
    core: int
    """Trained parameters and gradients in compute precision, fp32 master and moments of this rank's shard."""
    activations: int
    """Estimate for a micro batch of the longest sequences."""
    exchange_per_step: int
    """Sent to other ranks by dispatch and combine, forward and backward, if routing is even and batches are full."""
    gradients_per_step: int
    """All-reduce of fp32 gradients for every micro batch (as DeepSpeed's ZeRO-2 does it) and all-gather of parameters."""
    keys_per_step: int
    """Statistics of the key stores, all-reduced once a step."""


def make_plan(experiment: Experiment, layout: Layout, world_size: int, bf16: bool) -> Plan:
    """The plan of one rank."""
    model, some = experiment.model, experiment.model.some
    has_some = model.channel_mixer == "some"
    D, H, E, K, L, V = model.d_model, some.d_ffn, some.num_experts, some.top_k, model.num_layers, model.vocab_size
    P, N, width = layout.ep_size, world_size, 2 if bf16 else 4
    counts = model.num_parameters()
    T = layout.micro_batch * model.max_seq_len

    # Kept for the backward per token and layer: residual, norms, qkv, attention and router inputs; h of its K rows.
    mixer = width * (some.router_hidden * 2 + K * H) + 4 * 2 * E if has_some else width * 2 * (model.d_ffn or 0)
    per_token = L * (width * 12 * D + 4 * 4 * D + mixer) + 3 * 4 * V
    copies_elsewhere = distinct_ranks(K, P, E) * (P - 1) / P
    tokens_per_step = T * layout.accumulation
    # Inputs and partial sums, each with its gradient; gates (fp32) and their gradient; slots (int32).
    row = 4 * width * D + 3 * 4 * K
    ring = (N - 1) / N
    slots = -(-(E + _replicas(experiment, P)) // P)
    return Plan(
        pool=width * (L * slots * some.num_expert_parameters() if has_some else counts.frozen),
        core=counts.trainable * 2 * width + 12 * counts.trainable // N,
        activations=T * per_token,
        exchange_per_step=int(has_some * L * tokens_per_step * copies_elsewhere * row),
        gradients_per_step=int(counts.trainable * ring * (2 * 4 * layout.accumulation + width)),
        keys_per_step=int(has_some * 2 * ring * L * 4 * (E * K + E * E + E * D + E)),
    )


def _replicas(experiment: Experiment, ranks: int) -> int:
    """Most replicas that a layer may have."""
    replicas = experiment.parallel.replicas
    return replicas if replicas != "auto" else ranks if ranks > 1 else 0


def distinct_ranks(top_k: int, ranks: int, experts: int) -> float:
    """Expected number of ranks among which a token's K experts lie when every choice is equally likely."""
    return ranks * (1 - comb(experts - experts // ranks, top_k) / comb(experts, top_k))


def describe(experiment: Experiment, layout: Layout, world_size: int, bf16: bool) -> str:
    """The plan as text for `--dry_run`."""
    plan, counts = make_plan(experiment, layout, world_size, bf16), experiment.model.num_parameters()
    held = plan.pool + plan.core + plan.activations
    lines = [
        f"experiment       {experiment.name}, {'bf16' if bf16 else 'fp32'}, {world_size} rank(s), EP size {layout.ep_size}",
        f"parameters       {counts.total:,} total, {counts.trainable:,} trained, {counts.frozen:,} frozen",
        f"global batch     {experiment.train.batch_size} sequences = {world_size} rank(s) x {layout.micro_batch} "
        f"x {layout.accumulation} accumulation",
        f"memory a rank    {held / GIB:.2f} GiB: pool {plan.pool / GIB:.2f}, core and optimizer {plan.core / GIB:.2f}, "
        f"activations about {plan.activations / GIB:.2f} (micro batch of {experiment.model.max_seq_len} tokens a sequence)",
        f"sent a step      {(plan.exchange_per_step + plan.gradients_per_step + plan.keys_per_step) / 1e6:,.1f} MB a rank: "
        f"token exchange up to {plan.exchange_per_step / 1e6:,.1f}, gradients and parameters "
        f"{plan.gradients_per_step / 1e6:,.1f}, key statistics {plan.keys_per_step / 1e6:,.1f}",
    ]
    return "\n".join(lines)
