"""What is shown of texts from outside, and how settings files are read."""

import os
import sys

import pytest

from trainer.console import Console, say
from trainer.text import LONGEST_LINE, error_line, parse_yaml, shown, visible

HOSTILE = "a\x1b]0;title\x07b\r\x9b2J\u202ec\u2066d\x00\x7f"
SAFE = r"a\x1b]0;title\x07b\r\x9b2J\u202ec\u2066d\x00\x7f"


def test_nothing_that_a_terminal_obeys_is_shown(capsys):
    assert visible(HOSTILE) == SAFE
    assert visible("plain text, ümläut, 漢字 🙂") == "plain text, ümläut, 漢字 🙂"
    assert visible("two\nlines\t.", keep="\n") == "two\nlines\\t."
    assert visible(os.fsdecode(b"caf\xe9")) == "caf\\udce9", "bytes of a name that are no text"
    say(f"data: {HOSTILE}")
    Console(True).say(f"\nonce {HOSTILE}\n")
    assert capsys.readouterr().out == f"data: {SAFE}\n\nonce {SAFE}\n\n"


def test_above_the_bar_too(monkeypatch):
    written = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("trainer.console.tqdm.write", lambda self, text: written.append(text))
    console = Console(True)
    console.begin(0, 2)
    console.say(HOSTILE)
    console.end()
    assert written == [SAFE]


def test_an_error_is_one_line_with_its_cure():
    line = error_line(ValueError(f"train.x = {HOSTILE * 1000}\n  oh\tno; write another"))
    assert line.startswith("error: train.x = a\\x1b") and line.endswith(" oh no; write another")
    assert line.isprintable() and LONGEST_LINE < len(line) < LONGEST_LINE + 10


def test_values_are_shown_in_short():
    shared = ["x"]
    for _ in range(40):  # 10^40 elements, were they written out
        shared = [shared] * 10
    assert len(shown(shared)) < 10_000
    assert shown("a" * 1000).startswith("'aaa") and len(shown("a" * 1000)) < 130
    assert shown(3) == "3" and shown("short") == "'short'"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: a stands twice"),
        ("x: {a: 1, a: 2}", "line 1: a stands twice"),
        ("!!python/name:os.system", "line 1: could not determine a constructor"),
        ("!!timestamp x", "."),
        ("!!bool x", "x"),
        ("[" * 51, "more than 50 open brackets"),
        ("\x00", "unacceptable character"),
    ],
)
def test_what_is_no_plain_yaml_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse_yaml(text)


def test_merged_keys_may_be_replaced():
    assert parse_yaml("base: &b {x: 1, y: 2}\nz: {<<: *b, y: 3}")["z"] == {"x": 1, "y": 3}
