"""The frozen expert pool: how its weights come to be, and how tokens pass through them.

An expert e computes y_e(x) = W_up gelu(W_down x + b_down) + b_up with exact GELU (specs section 2). Its weights are a pure
function of (seed, layer, expert, init, shape, dtype): never trained, sent or saved, only materialised.

Shapes: T tokens, K experts a token, r rows of one expert, D width, F expert hidden width, E experts in the layer, e experts
in this rank's shard.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn

from modeling.config import SoMEConfig
from modeling.some import experts_amx, experts_simd
from modeling.some.experts_amx import amx_experts, can_use_amx, why_not_amx
from modeling.some.experts_grouped import can_use_grouped, grouped_experts
from modeling.some.experts_loop import loop_experts
from modeling.some.experts_simd import can_use_simd, simd_experts, why_not_simd
from modeling.some.rows import RoutedRows
from modeling.some.weights import GRID_DTYPES, ExpertWeights, expert_weights, scales

KERNELS = {"amx": amx_experts, "simd": simd_experts, "grouped": grouped_experts, "loop": loop_experts}
"""Implementations: `amx` (fused, bf16 on CPUs that have AMX), `simd` (fused, fp32 on CPUs that have AVX2 or AVX-512),
`grouped` (grouped products, for GPUs), `loop` (everywhere)."""


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Draw with single-threaded kernels: the rounding of a QR decomposition depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class FrozenExpertPool(nn.Module):
    """The experts of one layer that this rank holds.

    The weights are non-persistent buffers: no optimizer, broadcast or checkpoint sees them. They follow a move to another
    device and a cast, except that matrices on a grid stay in its dtype; the kernel is then chosen anew.

    Args:
        config: sizes and init.
        layer: index of the layer in the model.
        seed: the experiment's seed.
        expert_ids: global ids of the experts to hold, in shard order; all when None.
        dtype: floating dtype in which the experts compute, and are kept unless `expert_grid` says otherwise.
        device: where they are kept.
    """

    def __init__(
        self,
        config: SoMEConfig,
        layer: int = 0,
        seed: int = 0,
        expert_ids: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.config, self.layer, self.seed = config, layer, seed
        self.expert_ids = list(range(config.num_experts)) if expert_ids is None else list(expert_ids)
        D, H, n = config.d_model, config.d_ffn, len(self.expert_ids)
        self.scale_down, self.scale_up = scales(config)
        shapes = {"w_down_eFD": (n, H, D), "b_down_eF": (n, H), "w_up_eDF": (n, D, H), "b_up_eD": (n, D)}
        for name, shape in shapes.items():
            kept = GRID_DTYPES.get(config.expert_grid, dtype) if name.startswith("w_") else dtype
            self.register_buffer(name, torch.zeros(shape, dtype=kept, device=device), persistent=False)
        self.kernel = self._best_kernel()
        """Which of `KERNELS` computes."""
        workers = torch.get_num_threads()
        with _one_thread_each(), ThreadPoolExecutor(workers) as threads:
            list(threads.map(self._materialise, range(n)))

    def _materialise(self, slot: int) -> None:
        """Write one expert straight into its place; the fp32 draw of a single expert is all that exists besides."""
        w_down_FD, w_up_DF, b_down_F, b_up_D = expert_weights(self.config, self.seed, self.layer, self.expert_ids[slot])
        self.w_down_eFD[slot].copy_(w_down_FD / self.scale_down)
        self.w_up_eDF[slot].copy_(w_up_DF / self.scale_up)
        self.b_down_eF[slot].copy_(b_down_F)
        self.b_up_eD[slot].copy_(b_up_D)

    def _best_kernel(self) -> str:
        """The fastest of `KERNELS` for weights of this size, in this dtype and on this device."""
        uses = {"amx": can_use_amx, "simd": can_use_simd, "grouped": can_use_grouped, "loop": lambda weights: True}
        return next(name for name, usable in uses.items() if usable(self.weights))

    def _apply(self, fn, recurse=True):
        for name, buffer in list(self.named_buffers(recurse=False)):
            # In another dtype than the grid's, nothing would tell that the values still want their scale.
            on_grid = buffer.dtype in GRID_DTYPES.values()
            setattr(self, name, buffer.to(fn(buffer[:0]).device) if on_grid else fn(buffer))
        self.kernel = self._best_kernel()
        return self

    def describe_kernel(self) -> str:
        """Which kernel computes; where it is the slow one on a CPU, why."""
        fused = {torch.bfloat16: (why_not_amx, experts_amx.MULTIPLE), torch.float32: (why_not_simd, experts_simd.MULTIPLE)}
        if self.kernel != "loop" or self.weights.dtype not in fused or self.w_down_eFD.device.type != "cpu":
            return self.kernel
        why_not, multiple = fused[self.weights.dtype]
        return f"loop, as {why_not(self.w_down_eFD.dtype) or f'widths are not multiples of {multiple}'}"

    @property
    def weights(self) -> ExpertWeights:
        """The buffers, as the kernels take them."""
        return ExpertWeights(self.w_down_eFD, self.b_down_eF, self.w_up_eDF, self.b_up_eD, self.scale_down, self.scale_up)

    def hold(self, expert_ids: Sequence[int]) -> None:
        """From now on hold exactly these experts, in this order: those that are here are kept, the others drawn.

        While it moves, one matrix of the shard exists twice.
        """
        slot_of = {expert: slot for slot, expert in enumerate(self.expert_ids)}
        missing = [expert for expert in expert_ids if expert not in slot_of]
        dtype, device = self.weights.dtype, self.w_down_eFD.device
        drawn = dict(FrozenExpertPool(self.config, self.layer, self.seed, missing, dtype, device).named_buffers())
        for name, buffer in list(self.named_buffers()):
            new = dict(zip(missing, drawn[name], strict=True))
            setattr(self, name, torch.stack([new[e] if e in new else buffer[slot_of[e]] for e in expert_ids]))
        self.expert_ids = list(expert_ids)

    def forward(self, x_TD: torch.Tensor, gates_TK: torch.Tensor, slots_TK: torch.Tensor) -> torch.Tensor:
        """Gate-weighted sum of each token's experts.

        Args:
            x_TD: inputs, any floating dtype.
            gates_TK: fp32 weights of a token's experts.
            slots_TK: int64 places of these experts in the shard, distinct within a token; -1 = not here.

        Returns:
            (T, D) in the dtype of `x_TD`; zero for a token that has no expert here.
        """
        rows = RoutedRows.of(slots_TK, len(self.expert_ids))
        return KERNELS[self.kernel](x_TD, gates_TK, rows, self.weights)

    def reference(self, x_TD: torch.Tensor, gates_TK: torch.Tensor, slots_TK: torch.Tensor) -> torch.Tensor:
        """What `forward` computes, in plain differentiable operations."""
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for slot in range(len(self.expert_ids)):
            tokens_r, places_r = (slots_TK == slot).nonzero(as_tuple=True)
            w_down_FD, w_up_DF = self.weights.matrices(slot)
            h_rF = F.gelu(F.linear(x_TD[tokens_r].to(w_down_FD.dtype), w_down_FD, self.b_down_eF[slot]))
            y_rD = F.linear(h_rF, w_up_DF, self.b_up_eD[slot])
            y_TD = y_TD.index_add(0, tokens_r, gates_TK[tokens_r, places_r, None] * y_rD.float())
        return y_TD.to(x_TD.dtype)

    def content_hash(self) -> str:
        """SHA-256 of every byte that this rank holds."""
        digest = hashlib.sha256()
        for buffer in self.buffers():
            digest.update(buffer.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def pool_manifest(config: SoMEConfig, num_layers: int, seed: int) -> dict:
    """What identifies a pool without its bytes: how it is drawn, and a hash of four sample experts as drawn here.

    A checkpoint carries it; equal manifests mean equal pools on any rank count, dtype and device.
    """
    digest = hashlib.sha256()
    with _one_thread_each():
        for layer in (0, num_layers - 1):
            for expert in (0, config.num_experts - 1):
                for weight in expert_weights(config, seed, layer, expert):
                    digest.update(weight.numpy())
    return {
        "seed": seed,
        "init": config.expert_init,
        "bias": config.expert_bias,
        "gain": config.expert_gain,
        "grid": config.expert_grid,
        "num_layers": num_layers,
        "num_experts": config.num_experts,
        "d_model": config.d_model,
        "d_ffn": config.d_ffn,
        "sample_sha256": digest.hexdigest(),
    }
