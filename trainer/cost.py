"""How long a step takes, part by part: a roofline for every part, added up. On GPUs the key stores' sums travel behind the
last backward and the optimizer; nothing else hides behind another part.

Symbols as in `trainer/plan.py`; U the tokens of a rank's micro batch at the mean length of rows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from modeling.config import ModelConfig
from trainer.cluster import Machine
from trainer.config import Experiment
from trainer.plan import (
    Deployment,
    all_reduce,
    exchange_bytes_per_token,
    expert_bytes,
    key_sums_bytes,
    parts,
    saved_bytes_per_token,
    traffic,
)

PASSES = 2
"""Times that an expert's weights are read in a micro batch: forward, and backward for the input's gradient alone."""
TOUCHES = 4
"""Times that a saved value's bytes cross memory outside of products: written, read by what follows, read in the backward,
and a gradient of its size written."""
COPIES = 4
"""Times that the bytes of copies on their way cross memory: written and read, forward and backward."""
EXCHANGES = 7
"""All-to-alls of a layer and micro batch: counts, slots with gates, inputs, partial sums; gradients of the sums, inputs and
gates."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the busiest rank."""

    core: float
    """Products of the trained core, query networks and head included."""
    attention: float
    """Fused attention."""
    scores: float
    """Queries against all keys, in fp32."""
    experts: float
    """Products of the experts, at the rate that their numbers of rows reach."""
    weights: float
    """What reading the experts' weights takes beyond their products: the floor for few rows an expert."""
    elementwise: float
    """Norms, GELU, gates, losses: passes over activations."""
    exchange: float
    """Tokens to their experts and back, and their copies made and added up."""
    gradients: float
    """Reduction of gradients, gathering of parameters."""
    optimizer: float
    """AdamW on this rank's shard."""
    keys: float
    """Sums over tokens, what their reduction takes beyond what it hides behind, and the update of the key stores."""
    fixed: float
    """Launches of kernels and Python: so much a step, a block and an expert, whatever their size."""

    @property
    def total(self) -> float:
        """All parts."""
        return sum(parts(self).values())


def step_time(experiment: Experiment, deployment: Deployment, machine: Machine, usage_LE: np.ndarray) -> StepTime:
    """Seconds of one step.

    Args:
        experiment: what is trained.
        deployment: on which ranks, and how.
        machine: what they are.
        usage_LE: (L, E) shares of choices, see `trainer/usage.py`.
    """
    model, layout, how = experiment.model, deployment.layout, deployment.sharding
    row = deployment.row_tokens or model.max_seq_len
    U, D, L, steps = layout.micro_batch * row, model.d_model, model.num_layers, layout.accumulation
    learned = model.channel_mixer == "some" and model.some.routing == "learned"
    flops, fp32 = machine.flops(how.bf16), machine.flops(bf16=False)
    dense, passes = flops * share(machine.share_by_rows, U), 1e9 * machine.elementwise_gb_s
    attention_flops = 6 * L * row * D * (2 - model.causal)
    scores_flops = 2 * L * D * model.some.num_experts * learned
    experts_flops = _expert_flops(model) * L * model.some.top_k if model.channel_mixer == "some" else 0
    core_flops = model.num_flops_per_token(row) - attention_flops - scores_flops - experts_flops
    peak = fp32 if deployment.device == "cpu" else flops
    # Scores and their gradient, each written and read once.
    scores_bytes = 4 * 4 * L * model.some.num_experts * learned
    products, streaming, active = _experts(model, deployment, machine, usage_LE, U)
    core, attention = steps * U * core_flops / dense, steps * U * attention_flops / (peak * machine.attention_share)
    elementwise = steps * U * TOUCHES * saved_bytes_per_token(model, deployment) / passes
    # The backward of the last micro batch takes at least half of its time.
    backward = (core + attention + elementwise + steps * products) / (2 * steps)
    optimizer = _optimizer(experiment, deployment, machine)
    return StepTime(
        core=core,
        attention=attention,
        scores=steps * U * max(scores_flops / (fp32 * share(machine.share_by_rows, U)), scores_bytes / passes),
        experts=steps * products,
        weights=steps * max(0.0, streaming - products),
        elementwise=elementwise,
        exchange=_exchange(experiment, deployment, machine),
        gradients=_gradients(experiment, deployment, machine),
        optimizer=optimizer,
        keys=_keys(experiment, deployment, machine, U) + _key_sums(model, deployment, machine, backward, optimizer),
        fixed=1e-6 * (machine.step_us + steps * (L * machine.layer_us + active * machine.expert_us)),
    )


def share(by_rows: dict[int, float], rows: Any) -> Any:
    """Share of the peak that products of so many rows (a number or an array) reach; beyond the table, that of its end."""
    known = sorted(by_rows)
    return np.interp(np.log(rows), np.log(known), [by_rows[n] for n in known])


def _expert_flops(model: ModelConfig) -> int:
    """A row at an expert: two products forward, two for the input's gradient."""
    return 8 * model.d_model * model.some.d_ffn


def _experts(
    model: ModelConfig, deployment: Deployment, machine: Machine, usage_LE: np.ndarray, tokens: int
) -> tuple[float, float, float]:
    """Of a micro batch and all layers: seconds of products and of reading weights on the busiest rank, and experts with rows
    at a rank."""
    if model.channel_mixer != "some":
        return 0.0, 0.0, 0.0
    some, P, how = model.some, deployment.layout.ep_size, deployment.sharding
    # All ranks of a group send to one copy of an expert.
    rows_LE = tokens * P * some.top_k * usage_LE
    active_LE = 1 - (1 - np.minimum(some.top_k * usage_LE, 1.0)) ** (tokens * P)
    rows_each_LE = np.maximum(rows_LE / np.maximum(active_LE, 1e-12), 1.0)
    rate_LE = machine.flops(how.bf16) * share(machine.expert_share_by_rows, rows_each_LE)
    products = deployment.imbalance * float((rows_LE * _expert_flops(model) / rate_LE).sum()) / P
    active = float(active_LE.sum()) / P
    read = active * PASSES * expert_bytes(model, how.width)
    return products, read / (1e9 * machine.memory_gb_s), active


def _exchange(experiment: Experiment, deployment: Deployment, machine: Machine) -> float:
    layout, model, some = deployment.layout, experiment.model, experiment.model.some
    if layout.ep_size == 1 or model.channel_mixer != "some":
        return 0.0
    # The busiest rank gets more copies, though no more than every token once.
    sent = traffic(experiment, deployment).tokens
    latency = machine.latency(deployment.ep_in_node, -(-layout.ep_size // deployment.ranks_per_node))
    passes, width = layout.accumulation * model.num_layers, deployment.sharding.width
    tokens = layout.micro_batch * (deployment.row_tokens or model.max_seq_len)
    copied = COPIES * tokens * exchange_bytes_per_token(deployment, model.d_model, some.num_experts, some.top_k, width)
    here = passes * (EXCHANGES * latency + copied / (1e9 * machine.memory_gb_s))
    return machine.seconds(sent.times(deployment.imbalance)) + here


def _gradients(experiment: Experiment, deployment: Deployment, machine: Machine) -> float:
    trained, how = experiment.model.num_parameters().trainable, deployment.sharding
    reductions = deployment.layout.accumulation if how.stage == 2 else 1
    collectives = reductions * -(-trained // how.bucket) + 1
    return machine.seconds(traffic(experiment, deployment).gradients) + collectives * _world_latency(deployment, machine)


def _optimizer(experiment: Experiment, deployment: Deployment, machine: Machine) -> float:
    """The gradient is read, master and two moments are read and written, all fp32; the parameter is written."""
    how = deployment.sharding
    values = experiment.model.num_parameters().trainable / deployment.ranks
    memory = 1e9 * (machine.host_gb_s if how.offload else machine.memory_gb_s)
    return values * (7 * 4 + how.width) / memory


def _keys(experiment: Experiment, deployment: Deployment, machine: Machine, tokens: int) -> float:
    model = experiment.model
    if model.channel_mixer != "some":
        return 0.0
    D, E, K, L, rules = model.d_model, model.some.num_experts, model.some.top_k, model.num_layers, model.some.rules
    # Sums of a micro batch: K times every query is read, and a row of sums read and written; pairs are counted in int64, and
    # made int32, symmetric and added up.
    counted = tokens * K * D * 3 * 4 + E * E * (8 + 6 * 4)
    # The update: counts become weights in about five passes over (E, E), and weights times keys.
    pulls = rules.moves and rules.use_beta and K > 1
    updated = (E * E * 5 * 8 * pulls) + E * D * 6 * 8
    memory = 1e9 * machine.memory_gb_s
    local = L * (deployment.layout.accumulation * counted + updated) / memory
    products = L * 2 * E * E * D * pulls / (machine.flops(bf16=False) * share(machine.share_by_rows, E))
    return local + products


def _key_sums(model: ModelConfig, deployment: Deployment, machine: Machine, backward: float, optimizer: float) -> float:
    """What is left of the two reductions: counts hide behind the backward and folded sums behind the optimizer, except on
    CPUs, where whoever sends does not compute."""
    if model.channel_mixer != "some":
        return 0.0
    counts, sums = (
        machine.seconds(all_reduce(size, deployment)) + _world_latency(deployment, machine) for size in key_sums_bytes(model)
    )
    if deployment.device == "cpu":
        return counts + sums
    return max(0.0, counts - backward) + max(0.0, sums - optimizer)


def _world_latency(deployment: Deployment, machine: Machine) -> float:
    """An empty all-reduce over all ranks: up the tree and down again."""
    near = min(deployment.ranks, deployment.ranks_per_node)
    return 2 * machine.latency(near, -(-deployment.ranks // near))
