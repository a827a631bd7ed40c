"""Checked dataclasses from nested plain values, such as YAML holds; every mistake is a `ValueError` of one line."""

import dataclasses
import difflib
import math
import types
import typing
from typing import Any

from modeling.key_rules import RULE_PRESETS, KeyRules
from trainer.plain_yaml import as_written, has_half, parse_float, type_name
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
    """`value` as the annotated type; a whole number is one where a float is meant, also in quotes."""
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
            return int(value)
        if option is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            number = parse_float(value) if isinstance(value, str) else float(value)
            if number is None:
                continue
            if not math.isfinite(number):
                raise ValueError(f"{key} = {number} must be a finite number")
            return number
        if option is str and isinstance(as_written(value), str):
            return _whole(as_written(value), key)
    names = " or ".join("null" if o is type(None) else o.__name__ for o in options)
    cure = _cure(value, options)
    raise ValueError(f"{key} = {shown(value)} is {type_name(value)}; expected {names}{cure}")


def _cure(value: Any, options: tuple) -> str:
    """How to write what was probably meant; empty where that cannot be told."""
    if bool in options and isinstance(value, str):
        return ", which is written true or false"
    if str in options and int not in options and isinstance(value, int | float):
        return "; put it in quotes"
    if int in options and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    digits = value.replace("_", "") if isinstance(value, str) else ""
    if (int in options or float in options) and digits != value and parse_float(digits) is not None:
        return f"; write {digits}"
    return ""


def _whole(text: str, key: str) -> str:
    """A text that can be written and tokenised."""
    if has_half(text):
        raise ValueError(
            f"{key} = {shown(text)} holds half a surrogate pair; write the character itself, or both halves of its escape"
        )
    return text


def nearest(word: str, known: list[str]) -> str:
    """What a mistyped word may have meant, or all that is known; for a message."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}? " if close else f"known: {', '.join(known)}; "
