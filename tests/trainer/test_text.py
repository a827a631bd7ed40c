"""What is shown of texts from outside."""

import os
import sys

from trainer.console import Console, say
from trainer.text import LONGEST_LINE, error_line, shown, visible

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
