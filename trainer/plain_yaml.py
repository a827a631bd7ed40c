"""YAML as plain data by the core schema of YAML 1.2: what looks like a number to people is that number, and nothing else is.

The library itself follows YAML 1.1, where 010 is eight, 1:30 is ninety, 1_000 is a thousand, `no` is false, 2024-01-01 is a
date, and 1e-3 is text.
"""

import re
from typing import Any

import yaml

MAX_BRACKETS = 50
"""Deepest brackets, whose parsing takes time in proportion to the square of them."""

_TAG = "tag:yaml.org,2002:"
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_CORE = (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile("|".join(_BOOLS)), list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile("<<"), ["<"]),
)
"""Kind of a plain scalar, how it is written, and the characters that it may begin with."""
_YAML_1_1 = yaml.resolver.Resolver()


class Malformed(ValueError):
    """Text that is not plain YAML; says where and why.

    Attributes:
        cure: what to write instead; None where only the author knows.
    """

    cure: str | None = None


class SpelledInt(int):
    """A whole number such as `08` or `0o10`, which YAML 1.1 took as text: where text is expected it stays what was written,
    so that names in older files keep their value.

    Attributes:
        text: as it was written.
    """

    text: str


class SpelledFloat(float):
    """The same for `1e3`."""

    text: str


def parse_yaml(text: str) -> Any:
    """The plain data that a YAML text holds.

    Raises:
        Malformed: not YAML, a tag that asks for more than plain data, a key that stands twice, or half a character.
    """
    try:
        return PlainLoader(text).get_single_data()
    except _HalfACharacter as error:
        malformed = Malformed(f"line {error.problem_mark.line + 1}: {error.problem}")
        malformed.cure = "write the character itself, or both halves of its escape"
        raise malformed from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise Malformed(f"line {line}: {error.problem or error.context}") from None
    except Exception as error:  # the library lets through what its constructors raise
        raise Malformed(" ".join(str(error).split()) or type(error).__name__) from None


def dump_yaml(values: dict[str, Any], allow_unicode: bool = False) -> str:
    """Plain data as YAML, keys in their order, that readers of YAML 1.1 and 1.2 take for the same."""
    return yaml.dump(values, Dumper=_PlainDumper, sort_keys=False, allow_unicode=allow_unicode)


def parse_float(text: str) -> float | None:
    """The number that a text is to this schema, or None."""
    return _to_float(text) if _FLOAT.fullmatch(text) else None


def parse_int(text: str) -> int | None:
    """The whole number that a text is to this schema, or None."""
    return _to_int(text) if _INT.fullmatch(text) else None


def is_spelled(value: Any) -> bool:
    """Whether it is a number whose spelling was kept."""
    return isinstance(value, SpelledInt | SpelledFloat)


def as_written(value: Any) -> Any:
    """A number whose spelling was kept as that text; everything else as it is."""
    return value.text if is_spelled(value) else value


def type_name(value: Any) -> str:
    """What a value is, for messages."""
    return {SpelledInt: "int", SpelledFloat: "float"}.get(type(value), type(value).__name__)


def join_surrogates(text: str) -> str:
    """`text` with the two halves of a character that were escaped one by one put together, as JSON escapes are."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def has_half(text: str) -> bool:
    """Whether it holds half a character, which no encoding can write."""
    return any("\ud800" <= character <= "\udfff" for character in text)


class _HalfACharacter(yaml.constructor.ConstructorError):
    pass


class PlainLoader(yaml.SafeLoader):
    """The library's safe loader with the core schema, which takes no key twice and not ever deeper brackets."""

    yaml_implicit_resolvers: dict[str, list] = {}

    def fetch_flow_collection_start(self, token: type) -> None:
        """An opening bracket."""
        if self.flow_level >= MAX_BRACKETS:
            raise yaml.scanner.ScannerError(None, None, f"more than {MAX_BRACKETS} open brackets", self.get_mark())
        super().fetch_flow_collection_start(token)

    def compose_scalar_node(self, anchor: str | None) -> yaml.ScalarNode:
        """A scalar, whole characters where they were escaped in halves."""
        node = super().compose_scalar_node(anchor)
        node.value = join_surrogates(node.value)
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        """The mapping of `node`, once it is known to have no key twice, in whatever spelling."""
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        seen = set()
        for key, value in pairs:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if isinstance(value, yaml.ScalarNode) and has_half(value.value):
                raise _half(value, f"{key.value}: ")
            is_merge = key.tag == _TAG + "merge"
            name = key.value if is_merge else self.construct_object(key)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_str(self, node: yaml.ScalarNode) -> str:
        """Text of whole characters."""
        text = self.construct_scalar(node)
        if has_half(text):
            raise _half(node)
        return text

    def construct_bool(self, node: yaml.ScalarNode) -> bool:
        """`true` or `false`."""
        text = self.construct_scalar(node)
        if text not in _BOOLS:
            raise _wrong(node, text, "true or false")
        return _BOOLS[text]

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Decimal, `0o17` or `0xff`."""
        text = self.construct_scalar(node)
        number = parse_int(text)
        if number is None:
            raise _wrong(node, text, "a whole number")
        return _spelled(SpelledInt, number, text) if _was_text(node) else number

    def construct_float(self, node: yaml.ScalarNode) -> float:
        """`1e-3`, `.5`, `5.`, `-.inf`, `.nan`."""
        text = self.construct_scalar(node)
        number = parse_float(text)
        if number is None:
            raise _wrong(node, text, "a number")
        return _spelled(SpelledFloat, number, text) if _was_text(node) else number


class _PlainDumper(yaml.SafeDumper):
    """The library's safe dumper, which quotes text that either version of YAML would take for something else."""


for _kind, _pattern, _first in _CORE:
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    PlainLoader.add_implicit_resolver(_TAG + _kind, _whole, _first)
    _PlainDumper.add_implicit_resolver(_TAG + _kind, _whole, _first)
for _kind in ("str", "bool", "int", "float"):
    PlainLoader.add_constructor(_TAG + _kind, getattr(PlainLoader, f"construct_{_kind}"))
_PlainDumper.add_representer(SpelledInt, lambda dumper, value: dumper.represent_int(int(value)))
_PlainDumper.add_representer(SpelledFloat, lambda dumper, value: dumper.represent_float(float(value)))


def _to_int(text: str) -> int:
    return int(text[2:], {"0o": 8, "0x": 16}[text[:2]]) if text[:2] in ("0o", "0x") else int(text)


def _to_float(text: str) -> float:
    # Python writes infinity and NaN without the dot.
    return float(re.sub(r"\.(?=[a-zA-Z])", "", text))


def _was_text(node: yaml.ScalarNode) -> bool:
    """Whether YAML 1.1 takes this plain scalar for text."""
    return node.style is None and _YAML_1_1.resolve(yaml.ScalarNode, node.value, (True, False)) == _TAG + "str"


def _spelled(kind: type, number: float, text: str) -> Any:
    value = kind(number)
    value.text = text
    return value


def _wrong(node: yaml.Node, text: str, expected: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, f"{text!r} is not {expected}", node.start_mark)


def _half(node: yaml.Node, where: str = "") -> _HalfACharacter:
    return _HalfACharacter(None, None, f"{where}{node.value[:40]!r} holds half a surrogate pair", node.start_mark)
