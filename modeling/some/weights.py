"""The frozen weights of experts: how they are drawn, and how they are kept.

An expert's weights are a pure function of (seed, layer, expert, init, grid, shape), drawn in fp32.

Shapes: D width, F expert hidden width, e experts of a shard.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from modeling.config import SoMEConfig
from modeling.seeding import derive_generator

GRID_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What a matrix is kept in under `expert_grid`."""
LARGEST_INT8, LARGEST_FP8 = 127, 448
"""Of whole numbers (symmetric), and of E4M3."""


@dataclass(frozen=True)
class ExpertWeights:
    """The experts of a shard: `w_down_eFD`, `b_down_eF`, `w_up_eDF`, `b_up_eD`.

    Matrices are in the dtype that computes, or int8 or E4M3; then their values are the whole numbers or the short floating
    ones times `scale_down` and `scale_up`, powers of two, and so exact in bf16 too. Biases are in the dtype that computes.
    """

    w_down_eFD: torch.Tensor
    b_down_eF: torch.Tensor
    w_up_eDF: torch.Tensor
    b_up_eD: torch.Tensor
    scale_down: float = 1.0
    scale_up: float = 1.0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that computes."""
        return self.b_down_eF.dtype

    def matrices(self, slot: int | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """`(w_down, w_up)` of one expert, or of several, in the dtype that computes."""
        w_down_FD, w_up_DF = self.w_down_eFD[slot], self.w_up_eDF[slot]
        if w_down_FD.dtype not in GRID_DTYPES.values():
            return w_down_FD, w_up_DF
        return w_down_FD.to(self.dtype).mul_(self.scale_down), w_up_DF.to(self.dtype).mul_(self.scale_up)


def expert_weights(
    config: SoMEConfig, seed: int, layer: int, expert: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One expert's `(w_down_FD, w_up_DF, b_down_F, b_up_D)` in fp32 (specs section 2)."""
    D, H, gain = config.d_model, config.d_ffn, config.expert_gain
    generator = derive_generator(seed, "expert", layer, expert)
    if config.expert_grid == "int8":
        w_down_FD, w_up_DF = (
            torch.randint(-most, most + 1, shape, generator=generator) * scale
            for shape, (most, scale) in zip(((H, D), (D, H)), grids(config), strict=True)
        )
    elif config.expert_grid == "fp8":
        w_down_FD, w_up_DF = (
            (torch.empty(shape).uniform_(-bound, bound, generator=generator) / scale).to(GRID_DTYPES["fp8"]).float() * scale
            for shape, bound, scale in zip(((H, D), (D, H)), _bounds(config), scales(config), strict=True)
        )
    else:
        w_down_FD, w_up_DF = (_draw(config.expert_init, *shape, generator) for shape in ((H, D), (D, H)))
        w_up_DF = gain * w_up_DF
    b_down_F, b_up_D = torch.zeros(H), torch.zeros(D)
    if config.expert_bias == "torch":
        b_down_F.uniform_(-(D**-0.5), D**-0.5, generator=generator)
        b_up_D.uniform_(-(H**-0.5), H**-0.5, generator=generator)
    return w_down_FD, w_up_DF, b_down_F, gain * b_up_D


def scales(config: SoMEConfig) -> tuple[float, float]:
    """What the values kept of the two matrices are multiplied by: powers of two on a grid, else 1.

    E4M3 holds numbers up to 448. With the largest power of two that keeps uniform values below, rounding them to its 3 bits
    behind the leading one changes their variance by about 1 % at most.
    """
    if config.expert_grid == "fp8":
        down, up = (2.0 ** -math.floor(math.log2(LARGEST_FP8 / bound)) for bound in _bounds(config))
    elif config.expert_grid == "int8":
        down, up = (scale for _, scale in grids(config))
    else:
        down = up = 1.0
    return down, up


def grids(config: SoMEConfig) -> tuple[tuple[int, float], tuple[int, float]]:
    """`(largest whole number, scale)` of the two matrices under `expert_grid` int8.

    Uniform whole numbers up to m have variance ((2 m + 1)^2 - 1) / 12. With the largest power of two that keeps m in int8,
    the variance of the `default` init is met within 2 %.
    """
    down, up = _bounds(config)
    return _grid(down), _grid(up)


def _bounds(config: SoMEConfig) -> tuple[float, float]:
    """Largest values of the two matrices under the `default` init."""
    return config.d_model**-0.5, config.expert_gain * config.d_ffn**-0.5


def _grid(bound: float) -> tuple[int, float]:
    """The grid whose uniform values have the variance of uniform real numbers within +-bound."""
    exponent = math.floor(math.log2((LARGEST_INT8 + 0.75) / bound))
    return round((math.sqrt((2 * bound * 2.0**exponent) ** 2 + 1) - 1) / 2), 2.0**-exponent


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
