"""Measures what the cost model wants to know of a machine, and what a real step takes beside what the model says.

    python tools/plan.py quickstart --calibrate this_machine.yaml
    torchrun --nproc-per-node 2 tools/plan.py a4 --set train.batch_size=4 --calibrate this_machine.yaml

All ranks measure at once, as they compute at once in training. What a single rank cannot measure (links) stays what
--bandwidth or the preset or file named with --machine says.
"""

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from modeling import build_model
from modeling.config import ModelConfig, SoMEConfig
from modeling.some import KeyStatistics, KeyStoreUpdate, SoMELayer
from tools.options import Cluster, Option, evaluate
from tools.outputs import check_writable, write_output
from tools.peak_memory import PeakMemory
from trainer.cluster import Machine
from trainer.config import Experiment
from trainer.console import Console
from trainer.cost import TOUCHES
from trainer.distributed import (
    broadcast_text,
    check_gpus,
    choose_device,
    expert_parallel_group,
    init_process_group,
    key_store_group,
)
from trainer.ds_config import load_ds_config, precision_of, set_precision
from trainer.engine import Engine
from trainer.launch import Launch
from trainer.layout import Layout
from trainer.memory import FreedMemory
from trainer.metrics import accumulate_statistics
from trainer.numerics import set_numerics
from trainer.plain_yaml import dump_yaml
from trainer.plan import GIB, Sharding, parts
from trainer.precision import Precision, choose_precision
from trainer.usage import Usage

ROWS, OTHER_ROWS = (16, 64, 256, 2048), 256
EXPERT_ROWS = (1, 16, 64, 256, 1024)
EXPERTS, ELEMENTS, ATTENDED = 8, 2**21, 2048
COPIED, SENT = 2**27, 2**23
TURNS, STEPS = 7, 5
WARM_UP = 4
"""Steps that do not count: bf16 on CPUs compiles a kernel for every new number of rows."""


@dataclass(frozen=True)
class Measured:
    """Steps of a real run, on the rank that took longest."""

    seconds: list[float]
    """Of every step after the warm-up."""
    memory: int
    """Bytes by which the process, or what it holds on its GPU, grew at its peak."""
    usage_LE: np.ndarray
    """Shares of choices that the steps made."""


def calibrate(experiment: Experiment, ds_config: str, base: Machine, path: Path) -> None:
    """Write the measured machine to `path` and print predicted beside measured.

    Args:
        experiment: what is trained for the comparison, on random tokens; its sizes are those of the measured products.
        ds_config: path of the DeepSpeed JSON.
        base: what is not measured (links of a lone rank, memory) is taken from it.
        path: the YAML file; rank 0 writes it.

    Raises:
        ValueError: a job that cannot run on these ranks, no SoME layers, or a file that cannot be written.
    """
    launch = Launch.from_environment()
    layout = Layout.of(experiment, launch)
    config = load_ds_config(ds_config, experiment, layout, launch.world_size)
    precision = choose_precision(precision_of(config), ds_config, None, experiment.model, launch.local_rank)
    if experiment.model.channel_mixer != "some":
        raise ValueError(f"--calibrate: {experiment.name} has no SoME layers to measure; name an experiment that has")
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--calibrate {path}: must be a .yaml file")
    if launch.rank == 0:
        check_writable(path, "--calibrate")
    launch.export()
    check_gpus(launch)
    device, freed_memory = choose_device(launch), FreedMemory()
    set_numerics(experiment.train.deterministic)
    init_process_group(device, experiment.parallel.timeout_minutes)
    console = Console(launch.rank == 0)
    try:
        precision = Precision.parse(broadcast_text(str(precision)))
        config = set_precision(config, precision.name)
        sharding = Sharding.of(config)
        console.say(f"precision {precision}")
        console.say("measuring products, memory and links")
        machine = measure_machine(experiment.model, base, launch, sharding.bf16, device)
        fixed = step_seconds(experiment, config, sharding, 1e-6 * machine.layer_us, device)
        machine = replace(machine, step_us=1e6 * fixed)
        # What the C library kept of it would serve the steps and hide what they need.
        freed_memory.release(slack_bytes=0)
        console.say(f"taking {WARM_UP + STEPS} steps of {experiment.name}, {experiment.train.batch_size} rows each")
        measured = measure_steps(experiment, layout, config, sharding, device)
        cluster = Cluster(machine, launch.world_size // launch.local_world_size, launch.local_world_size, sharding)
        planned = evaluate(experiment, cluster, Usage(measured.usage_LE, is_measured=True), layout, "contiguous", 0)
        if launch.rank == 0:
            write_output(path, dump_yaml(dataclasses.asdict(machine)), "--calibrate")
        console.say(compare(planned, measured))
        console.say(f"machine: {path}")
    finally:
        dist.destroy_process_group()


def measure_machine(model: ModelConfig, base: Machine, launch: Launch, bf16: bool, device: torch.device) -> Machine:
    """The base machine with every figure that these ranks can measure, in the precision that trains."""
    D, F_ = model.d_model, model.some.d_ffn
    ours, other = (torch.bfloat16, torch.float32) if bf16 else (torch.float32, torch.bfloat16)
    trained = {rows: trained_rate(rows, D, F_, ours, device) for rows in ROWS}
    experts = {rows: expert_rate(rows, model.some, ours, device) for rows in EXPERT_ROWS}
    # Few rows of the other: a CPU without bf16 would take minutes for many.
    peaks = {other: product_rate(OTHER_ROWS, D, F_, other, device), ours: product_rate(max(ROWS), D, F_, ours, device)}
    peaks[ours] = max(peaks[ours], *trained.values(), *experts.values())
    memory = memory_rate(device)
    links = measure_links(launch, device)
    fused = attention_rate(model, device) / peaks[torch.float32 if device.type == "cpu" else ours]
    name = platform.processor() or platform.machine() if device.type == "cpu" else torch.cuda.get_device_name()
    return replace(
        base,
        describe=f"measured: {name}, {torch.get_num_threads()} thread(s) a rank, {'bf16' if bf16 else 'fp32'}",
        device=device.type,
        ranks_per_node=launch.local_world_size,
        memory_gib=memory_size(device, launch.local_world_size) / GIB,
        bf16_tflops=peaks[torch.bfloat16] / 1e12,
        fp32_tflops=peaks[torch.float32] / 1e12,
        share_by_rows={rows: rate / peaks[ours] for rows, rate in trained.items()},
        expert_share_by_rows={rows: rate / peaks[ours] for rows, rate in experts.items()},
        attention_share=min(1.0, fused),
        memory_gb_s=memory / 1e9,
        elementwise_gb_s=elementwise_rate(ours, device) / 1e9,
        host_gb_s=memory / 1e9 if device.type == "cpu" else base.host_gb_s,
        layer_us=1e6 * layer_seconds(model, device),
        expert_us=0.0,  # part of the experts' rates at few rows
        **links,
    )


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Median over turns, after one that does not count."""
    times = []
    for _ in range(TURNS + 1):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def product_rate(rows: int, inner: int, outer: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of (rows, inner) times (inner, outer)."""
    x, weight = torch.randn(rows, inner, device=device).to(dtype), torch.randn(outer, inner, device=device).to(dtype)
    # Enough of them that the clock and the first touch of memory do not matter.
    repeats = max(1, int(2e8 / (2 * rows * inner * outer)))

    def run() -> None:
        for _ in range(repeats):
            F.linear(x, weight)

    return 2 * rows * inner * outer * repeats / seconds_of(run, device)


def trained_rate(rows: int, inner: int, outer: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a trained map of (rows, inner) to (rows, outer), forward and backward."""
    x = torch.randn(rows, inner, device=device).to(dtype).requires_grad_()
    weight = torch.randn(outer, inner, device=device).to(dtype).requires_grad_()
    gradient = torch.randn(rows, outer, device=device).to(dtype)

    def run() -> None:
        x.grad = weight.grad = None
        F.linear(x, weight).backward(gradient)

    return 6 * rows * inner * outer / seconds_of(run, device)


def expert_rate(rows: int, some: SoMEConfig, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of frozen experts with so many rows each, forward and input gradients, by the kernel that training uses."""
    config = replace(some, num_experts=EXPERTS, top_k=1, learned_gain=False)
    layer = SoMELayer(config, pool_dtype=dtype, device=device)
    x_TD = torch.randn(rows * EXPERTS, some.d_model, device=device).to(dtype).requires_grad_()
    ids_TK = torch.arange(EXPERTS, device=device).repeat(rows)[:, None]
    gates_TK = torch.ones(rows * EXPERTS, 1, device=device, requires_grad=True)
    gradient_TD = torch.randn_like(x_TD)

    def run() -> None:
        x_TD.grad = gates_TK.grad = None
        layer.exchange(x_TD, gates_TK, ids_TK, layer.pool).backward(gradient_TD)

    return 8 * rows * EXPERTS * some.d_model * some.d_ffn / seconds_of(run, device)


def elementwise_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Bytes/s that the cost model's count of passes makes of a norm and a GELU, forward and backward."""
    x = torch.randn(ELEMENTS // 512, 512, device=device).to(dtype).requires_grad_()
    gradient = torch.randn_like(x)

    def run() -> None:
        x.grad = None
        F.gelu(F.layer_norm(x, (512,))).backward(gradient)

    # Both keep their input for the backward.
    return TOUCHES * 2 * dtype.itemsize * ELEMENTS / seconds_of(run, device)


def attention_rate(model: ModelConfig, device: torch.device) -> float:
    """Counted FLOP/s of fused attention, forward and backward, on as many rows as have `ATTENDED` tokens."""
    S, H, D = model.max_seq_len, model.num_heads, model.d_model
    rows = max(1, ATTENDED // S)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(rows, H, S, D // H, device=device, dtype=dtype).requires_grad_() for _ in range(3))

    def run() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=model.causal).sum().backward()

    return 6 * rows * S * S * D * (2 - model.causal) / seconds_of(run, device)


def memory_rate(device: torch.device) -> float:
    """Bytes/s read and written by a copy."""
    source, target = (torch.zeros(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * COPIED / seconds_of(lambda: target.copy_(source), device)


def memory_size(device: torch.device, ranks_per_node: int) -> int:
    """Bytes of the device, or a rank's share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks_per_node


def measure_links(launch: Launch, device: torch.device) -> dict[str, float]:
    """The fields of `Machine` that describe links, as far as there are ranks to measure them."""
    near, world, found = launch.local_world_size, launch.world_size, {}
    inside = [list(range(first, first + near)) for first in range(0, world, near)]
    across = [list(range(local, world, near)) for local in range(near)]
    for link, groups in (("in_node", inside), ("between_nodes", across)):
        mine = [(dist.new_group(ranks), ranks) for ranks in groups]
        group, ranks = next((group, ranks) for group, ranks in mine if launch.rank in ranks)
        if len(ranks) == 1:
            continue
        small, large = (_all_to_all_seconds(size, len(ranks), group, device) for size in (len(ranks) * 64, SENT))
        depth = int(np.ceil(np.log2(len(ranks))))
        found |= {
            f"{link}_us": 1e6 * small / depth,
            f"{link}_gb_s": SENT * (len(ranks) - 1) / len(ranks) / max(large - small, 1e-9) / 1e9,
        }
    return found


def _all_to_all_seconds(size: int, ranks: int, group: dist.ProcessGroup, device: torch.device) -> float:
    outgoing = torch.zeros(size // ranks * ranks, dtype=torch.uint8, device=device)
    incoming = torch.empty_like(outgoing)
    return seconds_of(lambda: dist.all_to_all_single(incoming, outgoing, group=group), device)


def layer_seconds(model: ModelConfig, device: torch.device) -> float:
    """What one more block costs when there is next to nothing to compute."""
    times = []
    for layers in (2, 6):
        small = build_model(tiny_model(model, layers), device=device)
        ids_BS = torch.zeros(1, 2, dtype=torch.int64, device=device)
        mask_BS = torch.ones(1, 2, dtype=torch.bool, device=device)
        times.append(
            seconds_of(lambda: small(ids_BS, mask_BS, targets_BS=ids_BS).losses_T.sum().backward(), device)  # noqa: B023
        )
    return max(0.0, (times[1] - times[0]) / 4)


def tiny_model(model: ModelConfig, layers: int) -> ModelConfig:
    """The model's parts at sizes that cost nothing."""
    some = replace(model.some, num_experts=1, top_k=1, d_ffn=1)
    return replace(model, vocab_size=16, d_model=2 * model.num_heads, num_layers=layers, max_seq_len=2, some=some)


def step_seconds(experiment: Experiment, config: dict, sharding: Sharding, layer: float, device: torch.device) -> float:
    """What a step costs beyond its blocks when there is next to nothing to compute; `layer` seconds a block."""
    # A control is in the model already, and may not fit one expert.
    small = replace(experiment, model=tiny_model(experiment.model, 2), control=None)
    sizes = {
        "train_batch_size": dist.get_world_size(),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
    }
    measured = measure_steps(small, Layout(1, 1, 1), config | sizes, sharding, device)
    return max(0.0, statistics.median(measured.seconds) - 2 * layer)


def measure_steps(
    experiment: Experiment, layout: Layout, config: dict, sharding: Sharding, device: torch.device
) -> Measured:
    """A few optimizer steps on random full rows, as the training loop takes them."""
    parallel, E = experiment.parallel, experiment.model.some.num_experts
    ep_group = expert_parallel_group(layout.ep_size, parallel.timeout_minutes)
    key_group = key_store_group(parallel.timeout_minutes)
    pool_dtype = torch.bfloat16 if sharding.bf16 else torch.float32
    times, generator, freed_memory = [], torch.Generator().manual_seed(dist.get_rank()), FreedMemory()
    with PeakMemory(device) as memory:
        model = build_model(experiment.model, experiment.seed, ep_group, pool_dtype, device, parallel.chunks)
        engine = Engine(model, experiment.train, config)
        counts_LE = torch.zeros(len(model.some_layers), E, dtype=torch.int64, device=device)
        for _ in range(WARM_UP + STEPS):
            dist.barrier()
            _wait(device)
            began = time.perf_counter()
            sums = _step(engine, experiment, layout, key_group, generator)
            freed_memory.release()
            _wait(device)
            times.append(time.perf_counter() - began)
            counts_LE += torch.stack([layer_sums.counts_EK.sum(1) for layer_sums in sums])
    slowest = torch.tensor([*times[WARM_UP:], memory.growth], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    usage_LE = counts_LE.double().cpu().numpy()
    *seconds, growth = slowest.tolist()
    return Measured(seconds, int(growth), usage_LE / usage_LE.sum(1, keepdims=True))


def _step(
    engine: Engine, experiment: Experiment, layout: Layout, key_group: dist.ProcessGroup, generator: torch.Generator
) -> list[KeyStatistics]:
    """What `Trainer._step` computes and sends, on random rows; the sums of all ranks for the key stores."""
    stores = [layer.store for layer in engine.model.some_layers]
    S, rate, sums = experiment.model.max_seq_len, experiment.train.learning_rate, [None] * len(stores)
    total = torch.zeros((), device=engine.device)
    for number in range(1, layout.accumulation + 1):
        ids_BS = torch.randint(experiment.model.vocab_size, (layout.micro_batch, S), generator=generator).to(engine.device)
        everything_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        out = engine.forward(ids_BS, everything_BS, targets_BS=ids_BS)
        loss = out.losses_T.sum() / (experiment.train.batch_size * S)
        real_T, numbers_T = everything_BS.flatten(), torch.arange(ids_BS.numel(), device=engine.device)
        # Distinct over ranks is enough for a respawn.
        sums = accumulate_statistics(sums, out.routing, stores, real_T, numbers_T + dist.get_rank() * len(numbers_T))
        del out
        total += loss.detach()
        if number == layout.accumulation:
            update = KeyStoreUpdate(stores, sums, key_group)
        engine.backward(loss)
        if number == layout.accumulation:
            update.fold()
        result = engine.end_micro_batch(rate)
    update.finish(apply=result.applied)
    dist.all_reduce(total)
    return sums


def compare(planned: Option, measured: Measured) -> str:
    """Predicted beside measured, and the prediction by part."""
    seconds, predicted = statistics.median(measured.seconds), planned.time.total
    spread = f"{1e3 * min(measured.seconds):,.1f} to {1e3 * max(measured.seconds):,.1f}"
    by_part = ", ".join(f"{name} {1e3 * part:,.1f}" for name, part in parts(planned.time).items())
    return "\n".join(
        [
            f"step: predicted {1e3 * predicted:,.1f} ms, measured {1e3 * seconds:,.1f} ms ({spread}), "
            f"{100 * (predicted / seconds - 1):+.0f} %",
            f"predicted by part, ms: {by_part}",
            f"memory: predicted {planned.memory.total / GIB:.2f} GiB, the process grew by {measured.memory / GIB:.2f} GiB",
            f"usage: {json.dumps([round(float(usage_E.max() * len(usage_E)), 2) for usage_E in measured.usage_LE])} "
            f"hottest expert over the mean, by layer",
        ]
    )
