"""The tables of `tools/expert_tables.py` as one HTML page that needs nothing else: no script, no network."""

import html
import re
from pathlib import Path
from typing import Any

from tools.expert_tables import TOKENS, headline, tables

STYLE = Path(__file__).with_suffix(".css")
TURN = 137.508
"""Degrees from one expert's hue to the next's: the golden angle, which keeps neighbours apart."""
EXPERT = re.compile(r"(\d+)\([\d.]+\)")
"""An expert and its gate in a cell of the table of tokens."""


def page(figures: dict[str, Any]) -> str:
    """The whole page; all texts are escaped."""
    name = html.escape(f"Experts of {figures['experiment']}")
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{name}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>",
        f"<h1>{name}</h1>\n<p>{html.escape(headline(figures))}</p>",
        *(_section(number, *table) for number, table in enumerate(tables(figures))),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _section(number: int, title: str, head: list[str], rows: list[list[str]]) -> str:
    is_of_tokens = title == TOKENS
    # The token, or what else a row is about, is the row's header; before it comes its place in the text, if it has one.
    header = 1 if head[0] == "" else 0
    lines = [
        f'<h2 id="t{number}">{html.escape(title)}</h2>',
        # Reachable by keyboard, since it scrolls.
        f'<div class="table" role="region" aria-labelledby="t{number}" tabindex="0">\n<table>\n<thead><tr>',
        "".join(f'<th scope="col">{html.escape(name or "place")}</th>' for name in head),
        "</tr></thead>\n<tbody>",
    ]
    for row in rows:
        cells = [
            f'<th scope="row">{html.escape(cell)}</th>'
            if place == header
            else f"<td>{_experts(cell) if is_of_tokens and place > 2 else html.escape(cell)}</td>"
            for place, cell in enumerate(row)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody>\n</table>\n</div>"])


def _experts(cell: str) -> str:
    """A cell of experts and gates, each in its expert's colour."""

    def coloured(match: re.Match) -> str:
        hue = float(match[1]) * TURN % 360
        return f'<span class="expert" style="--hue: {hue:.0f}">{match[0]}</span>'

    return EXPERT.sub(coloured, html.escape(cell))
