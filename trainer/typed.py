"""Checked dataclasses from nested plain values, such as YAML holds; every mistake is a `ValueError` of one line."""

import dataclasses
import difflib
import math
import types
import typing
from typing import Any

from modeling.key_rules import RULE_PRESETS, KeyRules
from trainer.text import shown


def build(cls: type, values: Any, prefix: str) -> Any:
    """An instance of dataclass `cls` from a dict, with every key and type checked."""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.')} = {shown(values)}: expected keys and values, see trainer/experiments")
    if cls is KeyRules and "preset" in values:
        values = dict(values)
        preset = values.pop("preset")
        if not isinstance(preset, str) or preset not in RULE_PRESETS:
            raise ValueError(f"{prefix}preset = {shown(preset)} is unknown; known: {', '.join(RULE_PRESETS)}")
        values = {**RULE_PRESETS[preset], **values}
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            name = key if isinstance(key, str) else shown(key)
            raise ValueError(f"{prefix}{name}: unknown key; {nearest(name, known)}".rstrip("; "))
    return cls(**{key: _convert(hints[key], value, f"{prefix}{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as the annotated type; YAML reads 6e-4 as text and 1 as int where a float is meant, which are accepted."""
    if dataclasses.is_dataclass(hint):
        return build(hint, value, f"{key}.")
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    # Beyond, torch and NumPy overflow, and Python does not even print it.
    if isinstance(value, int) and value.bit_length() > 63:
        raise ValueError(f"{key} is a whole number of {value.bit_length()} bits; numbers here have 63 at most")
    for option in options:
        if option is type(None) and value is None:
            return None
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                number = float(value)
            except ValueError:
                continue
            if not math.isfinite(number):
                raise ValueError(f"{key} = {number} must be a finite number")
            return number
        if option is str and isinstance(value, str):
            return value
    names = " or ".join("null" if o is type(None) else o.__name__ for o in options)
    raise ValueError(f"{key} = {shown(value)} is {type(value).__name__}; expected {names}")


def nearest(word: str, known: list[str]) -> str:
    """What a mistyped word may have meant, or all that is known; for a message."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}? " if close else f"known: {', '.join(known)}; "
