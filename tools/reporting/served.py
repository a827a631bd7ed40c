"""What single experts serve, from a run's `experts.json`: the pairs that choose the same tokens, and each one's tokens.

Shapes: L layers, E experts, P pairs of a layer.
"""

import json
from pathlib import Path
from typing import Any

from trainer.runfolder import EXPERTS
from trainer.text import visible

LONGEST_TOKEN = 24
"""Most characters of a token on the page."""


def served(folder: Path, num_experts: int) -> dict[str, Any] | None:
    """What the page shows of it; None where there is none, or it is damaged.

    Returns:
        `step` of the evaluation; `pairs` (L x P) [expert, expert, tokens]; `tokens` (L x E), for each expert a text such as
        `the 120 · ␣a 33`, how often it served these tokens.
    """
    try:
        found = json.loads((folder / EXPERTS).read_text(encoding="utf-8"))
        step = int(found["step"])
        pairs = [_pairs(layer["coselected"], num_experts) for layer in found["layers"]]
        tokens = [[_tokens(expert) for expert in layer["tokens"]] for layer in found["layers"]]
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    is_sound = all(len(layer) == num_experts for layer in tokens)
    return {"step": step, "pairs": pairs, "tokens": tokens} if is_sound else None


def _pairs(pairs: list[Any], num_experts: int) -> list[list[int]]:
    sound = [p for p in pairs if isinstance(p, list) and len(p) == 3 and all(type(v) is int and v >= 0 for v in p)]
    return [pair for pair in sound if max(pair[:2]) < num_experts]


def _tokens(expert: list[list[Any]]) -> str:
    return " · ".join(f"{visible(str(token)[:LONGEST_TOKEN])} {int(count):,}" for token, count in expert)
