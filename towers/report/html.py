"""The frame of a page that stands alone: its style, and tables of values that are escaped here.

A page needs no network and no script, follows the light or dark setting of its reader, and prints.
Functions that take `content` take HTML; all others take text, and escape it.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{
  color-scheme: light;
  --ink: #1c2330; --soft: #5d6778; --line: #d9dee7; --paper: #fff; --ground: #f4f6f9;
  --model: #1f5fbf; --other: #b5541c; --third: #1a7f4b; --code: #f0f2f6;
}}
@media screen and (prefers-color-scheme: dark) {{
  :root {{
    color-scheme: dark;
    --ink: #e6eaf1; --soft: #9aa5b8; --line: #333c4b; --paper: #1b212b; --ground: #12161d;
    --model: #7fb0ff; --other: #f0a060; --third: #62c794; --code: #252d3a;
  }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1080px; padding: 12px 20px; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, Arial, sans-serif; }}
h1 {{ font-size: 22px; margin: 8px 0 2px; overflow-wrap: anywhere; }}
h2 {{ font-size: 17px; margin: 0 0 8px; }}
h3, h4 {{ font-size: 15px; margin: 14px 0 4px; }}
p {{ margin: 6px 0; overflow-wrap: anywhere; }}
.soft {{ color: var(--soft); }}
section {{ background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px; margin: 14px 0; }}
.columns {{ display: grid; gap: 10px 28px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }}
.columns > * {{ min-width: 0; max-width: 620px; }}
.tiles {{ display: grid; gap: 10px; margin: 14px 0;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }}
.tiles > div {{ background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 10px 14px; }}
.figure {{ font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; margin: 6px 0; font-size: 14px; }}
caption {{ text-align: left; font-weight: 600; padding: 4px 0; }}
th, td {{ padding: 3px 6px; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }}
th {{ font-weight: 500; color: var(--soft); }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
table.text td, table.text th {{ text-align: left; }}
table.text td + td {{ overflow-wrap: anywhere; }}
tr.marked td {{ font-weight: 600; }}
figure {{ margin: 6px 0; max-width: 560px; }}
figcaption {{ font-weight: 600; }}
svg {{ display: block; width: 100%; height: auto; }}
pre {{ background: var(--code); padding: 8px 10px; border-radius: 7px; overflow-x: auto;
  font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere; }}
code {{ background: var(--code); border-radius: 4px; padding: 0 3px; overflow-wrap: anywhere; }}
pre code {{ padding: 0; }}
@media (max-width: 680px) {{
  body {{ padding: 6px 10px; }}
  section {{ padding: 10px 11px; }}
  table {{ font-size: 13px; }}
  th, td {{ padding: 3px 4px; }}
}}
@media print {{
  body {{ max-width: none; padding: 0; background: none; }}
  section {{ border: 0; padding: 0; }}
  section, figure, tr {{ break-inside: avoid; }}
  .tall {{ break-inside: auto; }}
}}
</style>
</head>
<body>
<h1>{title}</h1>
"""


def page(title: str, content: Iterable[str]) -> str:
    """A whole page; empty parts of the content are left out."""
    head = _HEAD.format(title=html.escape(title))
    return head + "\n".join(part for part in content if part) + "\n</body>\n</html>\n"


def section(title: str, *content: str, tall: bool = False) -> str:
    """A part with a heading; a tall one may go over a page break in print."""
    kind = ' class="tall"' if tall else ""
    body = "\n".join(part for part in content if part)
    return f"<section{kind}><h2>{html.escape(title)}</h2>\n{body}\n</section>"


def columns(*content: str) -> str:
    """Parts beside each other where there is room."""
    return '<div class="columns">\n' + "\n".join(f"<div>{one}</div>" for one in content) + "</div>"


def paragraph(text: str, kind: str = "") -> str:
    """One paragraph; `kind` is "soft" for what matters less."""
    return f"<p{_class(kind)}>{html.escape(text)}</p>"


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """Large figures in a row: a name, the figure, and a note on it."""
    parts = [
        f'<div><div class="soft">{html.escape(name)}</div>'
        f'<div class="figure">{html.escape(figure)}</div>'
        f'<div class="soft">{html.escape(note)}</div></div>'
        for name, figure, note in figures
    ]
    return '<div class="tiles">' + "\n".join(parts) + "</div>"


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    kind: str = "",
    marked: Iterable[int] = (),
) -> str:
    """A table; its first column is text, the others numbers, or with kind "text" text too.

    Args:
      header: names of the columns.
      rows: a cell each.
      kind: class of the table.
      marked: numbers of the rows that stand out.
    """
    stand_out = set(marked)
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = [
        f"<tr{_class('marked' * (number in stand_out))}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for number, cells in enumerate(rows)
    ]
    lines = "\n".join(body)
    return f'<div class="scroll"><table{_class(kind)}><tr>{head}</tr>\n{lines}\n</table></div>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
