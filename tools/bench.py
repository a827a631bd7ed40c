"""Time a SoME layer and its key update beside a dense frozen FFN of equal FLOPs, in one process.

    python tools/bench.py [--tokens 8192] [--experts 64 512] [--dtype bf16] [--repeats 7] [--json]

The contenders take turns, so a machine whose speed drifts treats them alike; medians with the smallest and largest time.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.nn.functional as F

from modeling.some import KeyStatistics, SoMEConfig, SoMELayer, update_key_stores

D, H, K = 512, 1024, 4


def some_layer(tokens: int, experts: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], None]]:
    """Forward and backward of a layer (routing included), and the key update from its routing."""
    config = SoMEConfig(d_model=D, num_experts=experts, d_ffn=H, top_k=K)
    layer = SoMELayer(config, pool_dtype=dtype, device=device)
    layer.query.to(dtype)
    x_BSD = torch.randn(1, tokens, D, device=device).to(dtype).requires_grad_()
    grad_BSD = torch.randn(1, tokens, D, device=device).to(dtype)
    routing = layer(x_BSD)[1]

    def forward_backward() -> None:
        x_BSD.grad = None
        layer(x_BSD)[0].backward(grad_BSD)

    def update() -> None:
        statistics_ = KeyStatistics.of(experts, routing.queries_TD, routing.expert_ids_TK, routing.gates_TK)
        update_key_stores([layer.store], [statistics_])

    return {f"SoME layer E={experts}": forward_backward, f"key update E={experts}": update}


def dense_frozen(tokens: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """One frozen FFN of K * H hidden units: the same FLOPs a token as K experts, no routing."""
    w_down = torch.randn(K * H, D, device=device).div_(D**0.5).to(dtype)
    w_up = torch.randn(D, K * H, device=device).div_((K * H) ** 0.5).to(dtype)
    x_TD = torch.randn(tokens, D, device=device).to(dtype).requires_grad_()
    grad_TD = torch.randn(tokens, D, device=device).to(dtype)

    def forward_backward() -> None:
        x_TD.grad = None
        F.linear(F.gelu(F.linear(x_TD, w_down)), w_up).backward(grad_TD)

    return forward_backward


def measure(contenders: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of every run of every contender, in turns, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - began))
    return times


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time a SoME layer beside a dense frozen FFN of equal FLOPs.")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens in a batch")
    parser.add_argument("--experts", type=int, nargs="+", default=[64, 512], help="pool sizes")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="dtype of experts and inputs")
    parser.add_argument("--repeats", type=int, default=7, help="counted runs of each contender")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    contenders = {"dense frozen FFN": dense_frozen(arguments.tokens, dtype, device)}
    for experts in arguments.experts:
        contenders |= some_layer(arguments.tokens, experts, dtype, device)
    times = measure(contenders, arguments.repeats, device)

    dense = statistics.median(times["dense frozen FFN"])
    rows = [
        {
            "name": name,
            "ms": statistics.median(t),
            "ms_min": min(t),
            "ms_max": max(t),
            "of_dense": statistics.median(t) / dense,
        }
        for name, t in times.items()
    ]
    if arguments.json:
        print(json.dumps({"tokens": arguments.tokens, "dtype": arguments.dtype, "device": str(device), "rows": rows}))
        return
    threads = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name()
    print(f"T={arguments.tokens} D={D} F={H} k={K} {arguments.dtype}, forward + backward, {threads}")
    for row in rows:
        spread = f"({row['ms_min']:.1f} to {row['ms_max']:.1f})"
        print(f"{row['name']:20} {row['ms']:9.1f} ms  {spread:20} {row['of_dense']:.2f} x dense")


if __name__ == "__main__":
    main()
