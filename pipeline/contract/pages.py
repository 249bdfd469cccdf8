"""Pages that stand alone in one file: templates in a shared frame, and plots as inline SVG.

A page needs no network and no script. The same values give the same bytes: what matplotlib or its
user has set plays no part.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHARED = Path(__file__).with_name("templates")  # frame.html and parts.html
# Colours that nothing else has, and what stands for them on the page, which knows light and dark.
INK, LINE, BLUE, ORANGE, GREEN, RED = _COLOURS = [f"#01020{number}" for number in range(6)]
DASHED: Any = {"color": INK, "linewidth": 0.8, "linestyle": "--"}
ABOVE: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "borderpad": 0}  # a legend
_VARIABLES = ("ink", "line", "blue", "orange", "green", "red")
_INKED = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
_STYLE: Any = {  # of matplotlib, whose own type lists every name
    "font.size": 10,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(_INKED, INK),
    "grid.color": LINE,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "page",  # ids that do not change from page to page
}
_WIDTH = 5.4  # inches; 389 units of the SVG, so that letters keep their size in a narrow window


def render(template: Path, **values: Any) -> str:
    """A page from its template; in `.html` every value is escaped, unless it is `Markup`.

    One of HTML begins with `{% extends "frame.html" %}`, fills the blocks `style` and `content`,
    and finds macros in `parts.html`. A number is written with `{{ value|number(",.2f") }}`.

    Example:
      >>> "<h1>Users &amp; items</h1>" in render(_SHARED / "frame.html", title="Users & items")
      True
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, _SHARED]),
        autoescape=template.suffix == ".html",
        undefined=StrictUndefined,  # a misspelt name is an error
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = format
    return environment.get_template(template.name).render(values)


def svg_plot(
    title: str,  # over it, and what is read out in its place
    name: str,  # part of the ids of its elements, so that those of one page are different
    draw: Callable[[Axes], None],
    *,
    height: float = 3.0,  # inches
    left: float = 0.13,  # margin for the names on the axis: no font decides it
    top: float = 0.15,  # inches above the axes
) -> Markup:
    """A plot of matplotlib as a `<figure>` of inline SVG; `left` is a share of its width.

    What is drawn in `INK`, `BLUE` and so on has the colours of the page, light or dark.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(_WIDTH, height))
        FigureCanvasSVG(figure)
        figure.subplots_adjust(left, 0.48 / height, 0.93, 1 - top / height)
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(' id="', f' id="{name}-')
    svg = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", svg)
    for colour, variable in zip(_COLOURS, _VARIABLES, strict=True):
        svg = svg.replace(colour, f"var(--{variable})")
    for size in ("width", "height"):
        svg = re.sub(rf'(<svg [^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    return Markup(
        "<figure><figcaption>{title}</figcaption>\n"
        '<svg role="img" aria-label="{title}" {svg}</figure>'
    ).format(title=title, svg=Markup(svg.removeprefix("<svg ")))
