"""The frozen expert pool: how its weights come to be, and how tokens pass through them.

An expert e computes y_e(x) = W_up gelu(W_down x + b_down) + b_up with exact GELU (specs section 2). Its weights are a pure
function of (seed, layer, expert, init, shape, dtype): never trained, sent or saved, only materialised.

Shapes: T tokens, R routed rows (a row is one token at one expert), B rows in blocks, D width, F expert hidden width,
E experts in the layer, e experts in this rank's shard.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn

from modeling.config import SoMEConfig
from modeling.seeding import derive_generator


def expert_weights(
    config: SoMEConfig, seed: int, layer: int, expert: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One expert's `(w_down_FD, w_up_DF, b_down_F, b_up_D)` in fp32 (specs section 2)."""
    D, H, gain = config.d_model, config.d_ffn, config.expert_gain
    generator = derive_generator(seed, "expert", layer, expert)
    w_down_FD, w_up_DF = _draw(config.expert_init, H, D, generator), _draw(config.expert_init, D, H, generator)
    b_down_F, b_up_D = torch.zeros(H), torch.zeros(D)
    if config.expert_bias == "torch":
        b_down_F.uniform_(-(D**-0.5), D**-0.5, generator=generator)
        b_up_D.uniform_(-(H**-0.5), H**-0.5, generator=generator)
    return w_down_FD, gain * w_up_DF, b_down_F, gain * b_up_D


def _draw(init: str, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    if init == "default":
        bound = 1 / math.sqrt(columns)
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
    if init == "orthogonal":
        return nn.init.orthogonal_(torch.empty(rows, columns), generator=generator)
    assert init == "sparse", init
    weight = torch.empty(rows, columns).normal_(0, 0.01, generator=generator)
    # Exactly ceil(rows / 2) zeros in each column, at the places where random numbers rank lowest.
    ranks = torch.rand(rows, columns, generator=generator).argsort(dim=0)
    return weight.scatter_(0, ranks[: math.ceil(rows / 2)], 0.0)


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

    The weights are non-persistent buffers: they follow `.to(device)`, but no optimizer, broadcast or checkpoint sees them.

    Args:
        config: sizes and init.
        layer: index of the layer in the model.
        seed: the experiment's seed.
        expert_ids: global ids of the experts to hold, in shard order; all when None.
        dtype: floating dtype in which the experts are kept and compute.
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
        shapes = {"w_down_eFD": (n, H, D), "b_down_eF": (n, H), "w_up_eDF": (n, D, H), "b_up_eD": (n, D)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        workers = torch.get_num_threads()
        with _one_thread_each(), ThreadPoolExecutor(workers) as threads:
            list(threads.map(self._materialise, range(n)))

    def _materialise(self, slot: int) -> None:
        """Write one expert straight into its place; the fp32 draw of a single expert is all that exists besides."""
        weights = expert_weights(self.config, self.seed, self.layer, self.expert_ids[slot])
        places = (self.w_down_eFD, self.w_up_eDF, self.b_down_eF, self.b_up_eD)
        for place, weight in zip(places, weights, strict=True):
            place[slot].copy_(weight)

    def hold(self, expert_ids: Sequence[int]) -> None:
        """From now on hold exactly these experts, in this order: those that are here are kept, the others drawn.

        While it moves, one matrix of the shard exists twice.
        """
        slot_of = {expert: slot for slot, expert in enumerate(self.expert_ids)}
        missing = [expert for expert in expert_ids if expert not in slot_of]
        dtype, device = self.w_down_eFD.dtype, self.w_down_eFD.device
        drawn = dict(FrozenExpertPool(self.config, self.layer, self.seed, missing, dtype, device).named_buffers())
        for name, buffer in list(self.named_buffers()):
            new = dict(zip(missing, drawn[name], strict=True))
            setattr(self, name, torch.stack([new[e] if e in new else buffer[slot_of[e]] for e in expert_ids]))
        self.expert_ids = list(expert_ids)

    def forward(
        self, x_TD: torch.Tensor, gates_R: torch.Tensor, tokens_R: torch.Tensor, rows_e: Sequence[int]
    ) -> torch.Tensor:
        """Gate-weighted sum of the experts' outputs for each token.

        Args:
            x_TD: inputs, any floating dtype.
            gates_R: fp32 weight of each row.
            tokens_R: int64 token index of each row; rows are sorted by expert of the shard, and an expert's rows name
                distinct tokens.
            rows_e: number of rows of each expert of the shard.

        Returns:
            (T, D) in the dtype of `x_TD`; zero for a token without rows.
        """
        return _FrozenExperts.apply(
            x_TD, gates_R, tokens_R, rows_e, self.w_down_eFD, self.b_down_eF, self.w_up_eDF, self.b_up_eD
        )

    def reference(
        self, x_TD: torch.Tensor, gates_R: torch.Tensor, tokens_R: torch.Tensor, rows_e: Sequence[int]
    ) -> torch.Tensor:
        """What `forward` computes, in plain differentiable operations."""
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for slot, rows in enumerate(_segments(rows_e)):
            x_rD = x_TD[tokens_R[rows]].to(self.w_down_eFD.dtype)
            h_rF = F.gelu(F.linear(x_rD, self.w_down_eFD[slot], self.b_down_eF[slot]))
            y_rD = F.linear(h_rF, self.w_up_eDF[slot], self.b_up_eD[slot])
            y_TD = y_TD.index_add(0, tokens_R[rows], gates_R[rows, None] * y_rD.float())
        return y_TD.to(x_TD.dtype)

    def content_hash(self) -> str:
        """SHA-256 of every byte that this rank holds."""
        digest = hashlib.sha256()
        for buffer in self.buffers():
            digest.update(buffer.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


class _FrozenExperts(torch.autograd.Function):
    """Experts without weight gradients: the backward needs the pre-activations h and nothing else per row.

    Each expert's rows are computed as one block (see `_blocks`); rows beyond its own are zeros and are left out of every
    sum. Shapes there: b rows of one block, r <= b rows that are real.
    """

    @staticmethod
    def forward(ctx, x_TD, gates_R, tokens_R, rows_e, w_down_eFD, b_down_eF, w_up_eDF, b_up_eD):
        x_in_TD = x_TD.to(w_down_eFD.dtype)
        blocks = _blocks(rows_e, x_in_TD)
        # Sums over experts in fp32: bf16 would round once per expert.
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        keep = any(ctx.needs_input_grad)
        h_BF = x_in_TD.new_empty(blocks[-1][2].stop if keep and blocks else 0, w_down_eFD.shape[1])
        for slot, rows, block in blocks:
            tokens_r, r = tokens_R[rows], rows.stop - rows.start
            x_bD = _gather(x_in_TD, tokens_r, block)
            out = h_BF[block] if keep else None
            h_bF = torch.addmm(b_down_eF[slot], x_bD, w_down_eFD[slot].T, out=out)
            y_bD = torch.addmm(b_up_eD[slot], F.gelu(h_bF), w_up_eDF[slot].T)
            y_TD.index_add_(0, tokens_r, y_bD[:r].float().mul_(gates_R[rows, None]))
        ctx.save_for_backward(gates_R, tokens_R, h_BF, w_down_eFD, w_up_eDF, b_up_eD)
        ctx.blocks, ctx.x_dtype = blocks, x_TD.dtype
        return y_TD.to(x_TD.dtype)

    @staticmethod
    def backward(ctx, grad_y_TD):
        gates_R, tokens_R, h_BF, w_down_eFD, w_up_eDF, b_up_eD = ctx.saved_tensors
        grad_in_TD = grad_y_TD.to(h_BF.dtype)
        grad_x_TD = torch.zeros(grad_y_TD.shape, dtype=torch.float32, device=grad_y_TD.device)
        grad_gates_R = torch.zeros_like(gates_R)
        for slot, rows, block in ctx.blocks:
            tokens_r, r, h_bF = tokens_R[rows], rows.stop - rows.start, h_BF[block]
            grad_y_bD = _gather(grad_in_TD, tokens_r, block)
            # The ungated gradient of the activation serves twice: times the activation it is dL/dgate, so y is not kept.
            grad_a_bF = grad_y_bD @ w_up_eDF[slot]
            grad_bias_r = grad_y_bD[:r].float() @ b_up_eD[slot].float()
            grad_gates_R[rows] = (grad_a_bF[:r].float() * F.gelu(h_bF[:r]).float()).sum(-1) + grad_bias_r
            grad_a_bF[:r] *= gates_R[rows, None].to(grad_a_bF.dtype)
            grad_h_bF = torch.ops.aten.gelu_backward(grad_a_bF, h_bF)
            grad_x_TD.index_add_(0, tokens_r, (grad_h_bF @ w_down_eFD[slot])[:r].float())
        return grad_x_TD.to(ctx.x_dtype), grad_gates_R, *[None] * 6


def _gather(source_TD: torch.Tensor, tokens_r: torch.Tensor, block: slice) -> torch.Tensor:
    """(b, D): the rows of `tokens_r`, then zeros."""
    rows_bD = source_TD.new_zeros(block.stop - block.start, source_TD.shape[1])
    torch.index_select(source_TD, 0, tokens_r, out=rows_bD[: len(tokens_r)])
    return rows_bD


def _blocks(rows_e: Sequence[int], like: torch.Tensor) -> list[tuple[int, slice, slice]]:
    """`(slot, its rows, its rows in the block layout)` for every expert that has any."""
    blocks, start = [], 0
    for slot, rows in enumerate(_segments(rows_e)):
        size = _block_size(rows.stop - rows.start, like)
        if size:
            blocks.append((slot, rows, slice(start, start + size)))
            start += size
    return blocks


def _block_size(rows: int, like: torch.Tensor) -> int:
    """Rows that are computed for `rows` that are wanted.

    bf16 on CPUs goes through oneDNN, which compiles a kernel for every new number of rows (2-7 ms, ten times the product
    itself) and forgets old ones beyond 1,024: with eight sizes an octave, at least 32 rows apart, a run has all its kernels
    after a few steps, for at most an eighth more rows (and 32).
    """
    if like.device.type != "cpu" or like.dtype != torch.bfloat16:
        return rows
    multiple = max(32, 1 << (rows.bit_length() - 4) if rows > 8 else 1)
    return -(-rows // multiple) * multiple


def _segments(rows_e: Sequence[int]) -> list[slice]:
    """Row range of each expert."""
    segments, start = [], 0
    for rows in rows_e:
        segments.append(slice(start, start + rows))
        start += rows
    return segments


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
        "num_layers": num_layers,
        "num_experts": config.num_experts,
        "d_model": config.d_model,
        "d_ffn": config.d_ffn,
        "sample_sha256": digest.hexdigest(),
    }
