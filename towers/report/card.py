"""A model card on a page: the few forms of Markdown that cards use → HTML.

Headings, paragraphs, lists, tables, fenced code, **bold** and `code`. All else stays text, and no
HTML passes: a card may hold names from anywhere.
"""

from __future__ import annotations

import functools
import html
import itertools
import re

_CELLS = re.compile(r"(?<!\\)\|")
_RULE = re.compile(r"[\s|:-]*-[\s|:-]*")


def card_html(markdown: str) -> str:
    """A card as HTML, with headings from the third level on."""
    blocks = []
    lines = markdown.splitlines()
    while lines:
        kind = _kind(lines[0])
        if kind == "fence":
            code = list(itertools.takewhile(lambda line: _kind(line) != "fence", lines[1:]))
            lines = lines[len(code) + 2 :]
            blocks.append("<pre><code>" + html.escape("\n".join(code)) + "</code></pre>")
            continue
        same = list(itertools.takewhile(functools.partial(_belongs, kind), lines[1:]))
        block, lines = [lines[0], *same], lines[1 + len(same) :]
        blocks.append(_BLOCKS[kind](block))
    return "\n".join(block for block in blocks if block)


def _kind(line: str) -> str:
    starts = line.strip()
    if not starts:
        return "nothing"
    for start, kind in (("```", "fence"), ("#", "heading"), ("|", "table"), ("- ", "list")):
        if starts.startswith(start):
            return kind
    return "text"


def _belongs(kind: str, line: str) -> bool:
    """Whether a line goes on with a block of a kind."""
    if kind == "list":
        return _kind(line) in ("list", "text")
    return kind in ("table", "text", "nothing") and _kind(line) == kind


def _heading(lines: list[str]) -> str:
    level = min(len(lines[0]) - len(lines[0].lstrip("#")) + 2, 4)
    return f"<h{level}>{_inline(lines[0].lstrip('#').strip())}</h{level}>"


def _list(lines: list[str]) -> str:
    items: list[str] = []
    for line in lines:
        if _kind(line) == "list":
            items.append(line.strip()[2:])
        else:
            items[-1] += " " + line.strip()
    return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"


def _table(lines: list[str]) -> str:
    rows = []
    for number, line in enumerate(lines):
        if number == 1 and _RULE.fullmatch(line):
            continue
        cells = _CELLS.split(line.strip().removeprefix("|").removesuffix("|"))
        tag = "td" if number else "th"
        texts = (_inline(cell.strip().replace("\\|", "|")) for cell in cells)
        rows.append("<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>")
    return '<div class="scroll"><table class="text">' + "\n".join(rows) + "</table></div>"


def _inline(text: str) -> str:
    """Escaped first, so that what comes after meets no HTML but its own."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


_BLOCKS = {
    "heading": _heading,
    "list": _list,
    "table": _table,
    "text": lambda lines: f"<p>{_inline(' '.join(lines))}</p>",
    "nothing": lambda lines: "",
}
