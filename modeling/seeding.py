"""Where every random number comes from: a generator derived from the seed and the purpose of the draw.

No draw depends on the rank, on the order in which things are built or on the global generator, so any rank can
repeat any draw at any time.
"""

import hashlib

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that is a pure function of `seed` and the parts of `purpose`."""
    text = "/".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def derive_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose. Draw on the CPU and move the result, so that every device sees the same values."""
    return torch.Generator("cpu").manual_seed(derive_seed(seed, *purpose))
