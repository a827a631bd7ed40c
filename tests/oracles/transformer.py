"""The common model of some.md 1.1 for one sequence, one head and one query position at a time, in float64.

Shape suffixes: S positions, V vocabulary, D model width, C head width (D / heads).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

LAYER_TENSORS = {  # of one layer, with their shapes; in-projection rows are q, then k, then v
    "attn_in_weight": "(3D, D)",
    "attn_in_bias": "(3D)",
    "attn_out_weight": "(D, D)",
    "attn_out_bias": "(D)",
    "norm1_weight": "(D)",
    "norm1_bias": "(D)",
    "norm2_weight": "(D)",
    "norm2_bias": "(D)",
}


def transformer_per_position(
    ids_S: Tensor,
    tensors: Mapping[str, Any],
    channel_mixers: Sequence[Callable[[Tensor], Tensor]],
    num_heads: int,
    *,
    norm_position: Literal["post", "pre"] = "post",
    embedding_scale: float | None = None,
    causal: bool = True,
) -> Tensor:
    """Returns logits_SV.

    `tensors`: "embedding_VD", "head_weight_VD", "head_bias_V", and "layers", a list of dicts with the LAYER_TENSORS.
    `channel_mixers`: one callable a layer, h_SD -> y_SD in float64, without the residual.
    `embedding_scale`: factor on the embedding; None = sqrt(D), as the spec has it.
    `causal`: False in v1.1, where every position looks at all of them.
    """
    embedding_VD = tensors["embedding_VD"].to(torch.float64)
    width = embedding_VD.shape[1]
    scale = math.sqrt(width) if embedding_scale is None else embedding_scale
    x_SD = torch.stack(
        [scale * embedding_VD[token] + positional_encoding(p, width) for p, token in enumerate(ids_S.tolist())]
    )
    for layer, mix in zip(tensors["layers"], channel_mixers, strict=True):
        w = {name: layer[name].to(torch.float64) for name in LAYER_TENSORS}
        norm1 = (w["norm1_weight"], w["norm1_bias"])
        norm2 = (w["norm2_weight"], w["norm2_bias"])
        if norm_position == "post":
            h_SD = layer_norm(x_SD + attention(x_SD, w, num_heads, causal), *norm1)
            x_SD = layer_norm(h_SD + mix(h_SD), *norm2)
        else:
            h_SD = x_SD + attention(layer_norm(x_SD, *norm1), w, num_heads, causal)
            x_SD = h_SD + mix(layer_norm(h_SD, *norm2))
    if norm_position == "pre":
        x_SD = layer_norm(x_SD)
    head_weight_VD, head_bias_V = tensors["head_weight_VD"].to(torch.float64), tensors["head_bias_V"].to(torch.float64)
    return torch.stack([head_weight_VD @ x_D + head_bias_V for x_D in x_SD])


def positional_encoding(position: int, width: int) -> Tensor:
    """PE[p, 2i] = sin(p * 10000^(-2i/d)), PE[p, 2i+1] = cos of the same."""
    pe_D = torch.zeros(width, dtype=torch.float64)
    for column in range(width):
        angle = position * 10000.0 ** (-(column - column % 2) / width)
        pe_D[column] = math.sin(angle) if column % 2 == 0 else math.cos(angle)
    return pe_D


def attention(x_SD: Tensor, w: Mapping[str, Tensor], num_heads: int, causal: bool) -> Tensor:
    """Multi-head self-attention; position p looks at positions 0..p, or at all of them."""
    width = x_SD.shape[1]
    head_width = width // num_heads
    packed = [w["attn_in_weight"] @ x_D + w["attn_in_bias"] for x_D in x_SD]
    outputs = []
    for p in range(len(packed)):
        seen = range(p + 1) if causal else range(len(packed))
        heads = []
        for head in range(num_heads):
            first = head * head_width
            q_C = packed[p][first : first + head_width]
            keys = [packed[s][width + first : width + first + head_width] for s in seen]
            values = [packed[s][2 * width + first : 2 * width + first + head_width] for s in seen]
            scores = torch.stack([torch.dot(q_C, k_C) / math.sqrt(head_width) for k_C in keys])
            weights = torch.exp(scores - scores.max())
            weights = weights / weights.sum()
            heads.append(torch.stack([weights[i] * values[i] for i in range(len(seen))]).sum(0))
        outputs.append(w["attn_out_weight"] @ torch.cat(heads) + w["attn_out_bias"])
    return torch.stack(outputs)


def layer_norm(x_SD: Tensor, weight_D: Tensor | None = None, bias_D: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Each row to mean 0 and (biased) variance 1; then weight and bias, where given."""
    rows = []
    for x_D in x_SD:
        centred_D = x_D - x_D.mean()
        row_D = centred_D / torch.sqrt((centred_D**2).mean() + eps)
        row_D = row_D if weight_D is None else row_D * weight_D
        rows.append(row_D if bias_D is None else row_D + bias_D)
    return torch.stack(rows)
