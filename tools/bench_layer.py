"""A SoME layer, and the update of its keys, beside what they are measured against, in one process.

Shapes: T tokens, D width, E experts, K experts a token.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from modeling.some import KeyStatistics, KeyStore, Routing, SoMEConfig, SoMELayer, update_key_stores
from modeling.some.router import route
from tools.bench_baselines import (
    DeepSpeedMoE,
    DenseFrozen,
    HuggingFaceMoE,
    StraightforwardLayer,
    pairwise_update,
)
from tools.bench_table import SPREAD, Table, choose_device, measure, spread
from trainer.config import TrainConfig
from trainer.numerics import set_numerics

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DENSE, LAYER = "dense frozen FFN and query network", "SoME layer, forward + backward"
"""What a layer and a key update are compared with. The dense block has the FLOPs of the experts, and the query network is
trained in both: what is left is the price of choosing among experts."""
Contenders = dict[str, Callable[[], None]]


def bench_layer(arguments: argparse.Namespace) -> Table:
    """Forward and backward of one layer.

    Raises:
        ValueError: sizes that make no layer.
    """
    configs, device, dtype = configs_of(arguments), choose_device(), DTYPES[arguments.precision]
    table = Table(
        "layer",
        conditions_of(arguments, "forward + backward"),
        {"contender": "", "experts": "d", "tokens": "d", **SPREAD, "x_dense": ".2f"},
    )
    for config in configs:
        layer = some_layer(config, dtype, device)
        others, notes = other_layers(layer, dtype, device)
        table.notes += [note for note in notes if note not in table.notes]
        for tokens in arguments.tokens:
            times = measure(_layer_contenders(layer, others, tokens, dtype, device), arguments.repeats, device)
            dense = spread(times[DENSE])["ms"]
            for name, milliseconds in times.items():
                row = {"contender": name, "experts": config.num_experts, "tokens": tokens, **spread(milliseconds)}
                table.rows.append({**row, "x_dense": row["ms"] / dense})
    return table


def bench_update(arguments: argparse.Namespace) -> Table:
    """The key update after a step, as sums over tokens and as the published code computes it.

    Raises:
        ValueError: sizes that make no layer.
    """
    configs, device, dtype = configs_of(arguments), choose_device(), DTYPES[arguments.precision]
    table = Table(
        "update",
        conditions_of(arguments, "rules v4"),
        {"contender": "", "experts": "d", "tokens": "d", **SPREAD, "of_layer": ".1%"},
    )
    for config in configs:
        layer = some_layer(config, dtype, device)
        for tokens in arguments.tokens:
            times = measure(_update_contenders(layer, tokens, dtype, device), arguments.repeats, device)
            whole = spread(times[LAYER])["ms"]
            for name, milliseconds in times.items():
                row = {"contender": name, "experts": config.num_experts, "tokens": tokens, **spread(milliseconds)}
                table.rows.append({**row, "of_layer": row["ms"] / whole})
    return table


def configs_of(arguments: argparse.Namespace) -> list[SoMEConfig]:
    """One for each number of experts."""
    if arguments.top_k > min(arguments.experts):
        raise ValueError(f"--top_k {arguments.top_k} is more than --experts {min(arguments.experts)}; choose fewer")
    sizes = {"d_model": arguments.d_model, "d_ffn": arguments.d_ffn, "top_k": arguments.top_k}
    return [SoMEConfig(num_experts=experts, **sizes) for experts in arguments.experts]


def conditions_of(arguments: argparse.Namespace, what: str) -> dict:
    """What holds for all rows of a table."""
    names = {"D": "d_model", "F": "d_ffn", "k": "top_k", "precision": "precision", "repeats": "repeats"}
    sizes = {name: getattr(arguments, key) for name, key in names.items()}
    return {"measured": what, **sizes, "device": str(choose_device()), "threads": torch.get_num_threads()}


def some_layer(
    config: SoMEConfig, dtype: torch.dtype, device: torch.device, ep_group: dist.ProcessGroup | None = None
) -> SoMELayer:
    """As the trainer has it: core and experts in one dtype, keys in fp32; from here on this process computes so, too."""
    set_numerics(TrainConfig.deterministic)
    layer = SoMELayer(config, ep_group=ep_group, pool_dtype=dtype, device=device)
    layer.query.to(dtype)
    return layer


def other_layers(layer: SoMELayer, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, nn.Module], list[str]]:
    """What `layer` is compared with, and what to know of each, or why it is missing."""
    config = layer.config
    straightforward = StraightforwardLayer(config, pool_dtype=dtype, device=device)
    straightforward.query, straightforward.store = layer.query, layer.store
    gridded = some_layer(replace(config, expert_grid="int8"), dtype, device)
    gridded.query, gridded.store = layer.query, layer.store
    layers: dict[str, nn.Module] = {
        f"SoME layer, pool of 8 bits, kernel {gridded.pool.kernel}": gridded,
        "straightforward algorithm": straightforward,
    }
    notes = []
    for name, build, cure in (
        ("DeepSpeed MoE, dropless", DeepSpeedMoE, "deepspeed"),
        ("Hugging Face Qwen3-MoE block", HuggingFaceMoE, "transformers"),
    ):
        try:
            layers[name] = build(config, dtype, device)
            notes.append(build.NOTE)
        except ImportError as error:
            notes.append(f"{name} is skipped ({error}); for it: pip install {cure}")
    return layers, notes


def _layer_contenders(
    layer: SoMELayer, others: dict[str, nn.Module], tokens: int, dtype: torch.dtype, device: torch.device
) -> Contenders:
    """All of them get the same input and the same gradient of their output."""
    config, kernel, dense = layer.config, layer.pool.kernel, DenseFrozen(layer.config, dtype, device)
    x_1TD, grad_1TD = _random_batch(tokens, config.d_model, dtype, device)

    def forward_backward(module: nn.Module) -> Callable[[], None]:
        def run() -> None:
            x_1TD.grad = None
            y = module(x_1TD)
            (y[0] if isinstance(y, tuple) else y).backward(grad_1TD)

        return run

    def with_kernel(name: str) -> Callable[[], Routing]:
        def run() -> Routing:
            layer.pool.kernel = name
            x_1TD.grad = None
            y_1TD, routing = layer(x_1TD)
            y_1TD.backward(grad_1TD)
            return routing

        return run

    # A store of its own: moved keys would change the routing from turn to turn.
    store = KeyStore(config.num_experts, config.d_model, config.top_k, config.rules).to(device)

    def with_update() -> None:
        _update(store, with_kernel(kernel)())

    def routing_alone() -> None:
        x_1TD.grad = None
        gates_TK, _ = route(layer.query(x_1TD).flatten(0, 1), layer.store.keys, config.top_k, config.temperature)
        gates_TK.backward(torch.ones_like(gates_TK))

    def dense_and_query() -> None:
        x_1TD.grad = None
        torch.autograd.backward((dense(x_1TD), layer.query(x_1TD)), (grad_1TD, grad_1TD.float()))

    kernels = [kernel] if kernel == "loop" else [kernel, "loop"]
    contenders: Contenders = {DENSE: dense_and_query, "dense frozen FFN alone": forward_backward(dense)}
    contenders |= {f"SoME layer, kernel {name}": with_kernel(name) for name in kernels}
    contenders[f"SoME layer, kernel {kernel}, and key update"] = with_update
    contenders["its query network and routing alone"] = routing_alone
    return contenders | {name: forward_backward(module) for name, module in others.items()}


def _update_contenders(layer: SoMELayer, tokens: int, dtype: torch.dtype, device: torch.device) -> Contenders:
    """The layer's own time, and the update of stores of their own from its routing."""
    config = layer.config
    x_1TD, grad_1TD = _random_batch(tokens, config.d_model, dtype, device)
    routing = layer(x_1TD)[1]
    sums = KeyStatistics.of(config.num_experts, routing.queries_TD, routing.expert_ids_TK, routing.gates_TK)
    ours, rule_only, theirs = (
        KeyStore(config.num_experts, config.d_model, config.top_k, config.rules).to(device) for _ in range(3)
    )

    def forward_backward() -> None:
        x_1TD.grad = None
        layer(x_1TD)[0].backward(grad_1TD)

    return {
        LAYER: forward_backward,
        "key update": lambda: _update(ours, routing),
        "of it the rule, without the sums over tokens": lambda: update_key_stores([rule_only], [sums]),
        "key update, token by token and pair by pair": lambda: pairwise_update(
            theirs, routing.queries_TD, routing.expert_ids_TK, routing.gates_TK
        ),
    }


def _update(store: KeyStore, routing: Routing) -> None:
    store.update(routing.queries_TD, routing.expert_ids_TK, routing.gates_TK)


def _random_batch(tokens: int, d_model: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`(x_1TD, gradient_1TD)`, the first as a leaf."""
    x_1TD, grad_1TD = (torch.randn(1, tokens, d_model, device=device).to(dtype) for _ in range(2))
    return x_1TD.requires_grad_(), grad_1TD
